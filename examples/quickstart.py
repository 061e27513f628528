# SPDX-License-Identifier: Apache-2.0
"""The quickstart: make a small policy, warm-start it on careless solutions, train it with GRPO, show what it learned.

Every step is a command that you can run yourself; this script prints each before it runs it. A finished step is not
repeated: delete its folder in ``runs/quickstart`` to start it over.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

RUN = Path("runs/quickstart")


def command(*words: str) -> None:
    """Print a ``lit-rl`` command and run it."""
    print("\n$ lit-rl " + " ".join(words), flush=True)
    subprocess.run([sys.executable, "-m", "lit_rl.cli", *words], check=True)


def last_value(run: Path, name: str, first: bool = False) -> float:
    """The last (or first) value of a scalar in a run's TensorBoard files."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run)).Reload().Scalars(name)
    return events[0 if first else -1].value


def main() -> None:
    """Run what has not been run yet."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=1)
    seed = parser.parse_args().seed
    run = RUN if seed == 1 else RUN.with_name(f"quickstart-seed{seed}")
    policy, untrained = run / "policy", run / "untrained"
    seeds = [f"--model.init_args.seed={seed}", f"--data.init_args.seed={seed}"]
    start = time.perf_counter()
    if not policy.exists():
        if not untrained.exists():
            print("1. A small Qwen2 with a character tokenizer, randomly initialised.")
            command("new-policy", str(untrained), "--seed", str(seed))
        print("\n2. Warm start: supervised training on careless solutions.")
        command(
            "fit", "--config", "configs/quickstart-warmup.yaml", "--ckpt_path", "last", *seeds,
            f"--model.init_args.policy.path={untrained}", f"--trainer.default_root_dir={run / 'warmup'}",
        )  # fmt: skip
        command("export", str(run / "warmup"), str(policy))
    warm = time.perf_counter() - start
    print("\n3. GRPO: an exact answer is worth 1, everything else 0.")
    where = [f"--model.init_args.policy.path={policy}", f"--trainer.default_root_dir={run / 'grpo'}", *seeds]
    if not (run / "grpo" / "checkpoints").exists():
        command("validate", "--config", "configs/quickstart.yaml", *where)
    start = time.perf_counter()
    command("fit", "--config", "configs/quickstart.yaml", "--ckpt_path", "last", *where)
    trained = time.perf_counter() - start
    before, after = last_value(run / "grpo", "val/pass@1", first=True), last_value(run / "grpo", "val/pass@1")
    print(f"\nheld-out pass@1: {before:.3f} after the warm start, {after:.3f} after GRPO")
    print(f"warm start {warm:.0f} s, GRPO {trained:.0f} s (both with start-up and validation)")
    print(f"\nSee the run:  tensorboard --logdir {run}")


if __name__ == "__main__":
    main()
