# SPDX-License-Identifier: Apache-2.0
"""The quickstart: make a small policy, warm-start it on careless solutions, train it with GRPO, show what it learned.

Every step is a command that you can run yourself; this script prints each before it runs it. A finished step is not
repeated and an interrupted one goes on from its last checkpoint: delete its folder in ``runs/quickstart`` to start it
over.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

RUN = Path("runs/quickstart")


def command(*words: str) -> None:
    """Print a ``lit-rl`` command and run it; a failure ends the script with the command's exit status."""
    print("\n$ lit-rl " + " ".join(words), flush=True)
    # The CPU build of torch finds no accelerator; saying so twice a command helps nobody.
    environment = {**os.environ, "PYTHONWARNINGS": os.environ.get("PYTHONWARNINGS", "ignore")}
    status = subprocess.run([sys.executable, "-m", "lit_rl.cli", *words], env=environment).returncode
    if status:
        print(f"\nStopped (exit status {status}). Run the same command again to go on from the last checkpoint.")
        sys.exit(status)


def scalars(run: Path, name: str) -> list[tuple[int, float]]:
    """Steps and values of a scalar in a run's TensorBoard files."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run), size_guidance={"scalars": 0}).Reload()
    return [(e.step, e.value) for e in events.Scalars(name)] if name in events.Tags()["scalars"] else []


def warm_start(run: Path, seed: int) -> None:
    """A new policy, trained on demonstrations and written in hub format."""
    untrained, policy = run / "untrained", run / "policy"
    if policy.exists():
        print(f"1. and 2. The warm-started policy is there already: {policy}")
        return
    print("1. A small Qwen2 with a character tokenizer, randomly initialised.")
    if not untrained.exists():
        command("new-policy", str(untrained), "--seed", str(seed))
    print("\n2. Warm start: supervised training on careless solutions.")
    command(
        "fit", "--config", "configs/quickstart-warmup.yaml", "--ckpt_path", "last", *seeds(seed),
        f"--model.init_args.policy.path={untrained}", f"--trainer.default_root_dir={run / 'warmup'}",
    )  # fmt: skip
    command("export", str(run / "warmup"), str(policy))


def reinforce(run: Path, seed: int) -> None:
    """GRPO from the warm-started policy; the first point of its curve is the policy before training."""
    print("\n3. GRPO: an exact answer is worth 1, everything else 0.")
    where = [f"--model.init_args.policy.path={run / 'policy'}", f"--trainer.default_root_dir={run / 'grpo'}"]
    if not scalars_exist(run / "grpo"):
        command("validate", "--config", "configs/quickstart.yaml", *where, *seeds(seed))
    command("fit", "--config", "configs/quickstart.yaml", "--ckpt_path", "last", *where, *seeds(seed))


def scalars_exist(run: Path) -> bool:
    """Whether a run has begun to log."""
    return any(run.glob("events.out.tfevents*"))


def seeds(seed: int) -> list[str]:
    """The arguments that make another run of the same experiment."""
    return [f"--model.init_args.seed={seed}", f"--data.init_args.seed={seed}"]


def summarize(run: Path) -> dict[str, Any]:
    """What the log files say: seconds are those of the training steps, over all resumptions."""
    curve = scalars(run / "grpo", "val/pass@1")
    steps = scalars(run / "grpo", "time/step")
    reached = next((step for step, value in curve if value >= 0.9), None)
    return {
        "pass@1 before": curve[0][1],
        "pass@1 after": curve[-1][1],
        "warm start seconds": sum(value for _, value in scalars(run / "warmup", "time/step")),
        "grpo seconds": sum(value for _, value in steps),
        "grpo seconds to 0.90": None if reached is None else sum(value for step, value in steps if step <= reached),
        "longest mean length": max(value for _, value in scalars(run / "grpo", "rollout/length_mean")),
        "last mean length": scalars(run / "grpo", "val/length_mean")[-1][1],
    }


def main() -> None:
    """Run what has not been run yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=1, help="seed of the weights, the problems and the sampling")
    parser.add_argument("--run", type=Path, help=f"folder of the run (default {RUN}, or {RUN}-seedN for other seeds)")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    arguments = parser.parse_args()
    seed = arguments.seed
    run = arguments.run or (RUN if seed == 1 else RUN.with_name(f"{RUN.name}-seed{seed}"))
    warm_start(run, seed)
    reinforce(run, seed)
    figures = summarize(run)
    before, after = figures["pass@1 before"], figures["pass@1 after"]
    print(f"\nheld-out pass@1: {before:.3f} after the warm start, {after:.3f} after GRPO")
    print(f"seconds of training: {figures['warm start seconds']:.0f} warm start, {figures['grpo seconds']:.0f} GRPO")
    print(f"\nSee the run:  tensorboard --logdir {run}")
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
