# SPDX-License-Identifier: Apache-2.0
"""AutoNPO, DOT, GRPO-λ and RECAP in one configuration: killed again and again, it ends as if nothing had happened."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from lit_rl.checkpoint import last_good_checkpoint
from lit_rl.cli import main
from lit_rl.testing import make_policy, start_process
from lit_rl.testing.checks import assert_same_state
from tests.core.runs import scalars, wait_until

CONFIG = """
model:
  class_path: lit_rl.GRPO
  init_args:
    rewards:
      - class_path: lit_rl.rewards.FunctionReward
        init_args: {function: npo_runs.starts_alike, name: answer, verifier: true, columns: [answer]}
      - class_path: lit_rl.rewards.FormatReward
        init_args: {pattern: '[0-9A-Z].*', weight: 0.3}
    sampling: {max_tokens: 6}
    optimizer:
      class_path: torch.optim.AdamW
      init_args: {lr: 1.0e-2, weight_decay: 0.0}
    scheduler:
      class_path: lit_rl.schedules.WarmupLinear
      init_args: {warmup: 3, total: 60}
    prompts_per_step: 8
    group_size: 4
    updates_per_rollout: 2
    max_rollouts: 14
    seed: 3
data:
  class_path: lit_rl.testing.toys.ToyData
trainer:
  accelerator: cpu
  limit_val_batches: 0
  enable_progress_bar: false
  callbacks:
    - class_path: lit_rl.callbacks.AutoNPO
      init_args:
        distances: [2, 4]
        window: 2
        decay: 0.0
        reward_gain: 100.0
        entropy_drop: -100.0
        probe_pass_rate: 0.01
        mistake_accuracy: 0.5
        max_interventions: 2
    - class_path: lit_rl.callbacks.DynamicOutlierTruncation
      init_args: {alpha: 0.5, min_margin: 1, min_success: 0.75}
    - class_path: lit_rl.callbacks.GRPOLambda
      init_args: {fraction: 0.5}
    - class_path: lit_rl.callbacks.RECAP
      init_args:
        window: 2
        objectives:
          - {name: accuracy, monitor: reward/answer, kind: reward}
          - {name: format, monitor: reward/format, kind: reward}
    - class_path: npo_runs.Slow
      init_args: {seconds: 0.03}
checkpoint: {every_n_rollouts: 1}
"""


def fit(folder: Path, policy: Path) -> None:
    """Start or continue the run as the command line does."""
    config = folder.parent / "all_four.yaml"
    where = [f"--model.init_args.policy.path={policy}", f"--trainer.default_root_dir={folder}"]
    main(["fit", "--config", str(config), "--ckpt_path", "last", *where])


def latest(folder: Path) -> int:
    """Clock of the newest checkpoint, -1 if there is none."""
    return max((int(path.name[5:13]) for path in folder.glob("checkpoints/clock*.ckpt")), default=-1)


def start(folder: Path, policy: Path) -> Any:
    # TensorBoard reads event files in the order of their names, which hold the second in which they were begun.
    wait_until(lambda: not list(folder.glob(f"events.out.tfevents.{int(time.time())}.*")))
    return start_process(fit, folder, policy)


@pytest.mark.slow
def test_a_run_of_all_four_killed_three_times_at_random_ends_as_if_it_had_not_been(tmp_path: Path) -> None:
    policy = make_policy(tmp_path / "policy")
    (tmp_path / "all_four.yaml").write_text(yaml.safe_dump(yaml.safe_load(CONFIG)))
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    undisturbed = start(whole, policy)
    rng, clocks = random.Random(os.getpid()), []
    for _ in range(3):
        before = latest(killed)
        process = start(killed, policy)
        wait_until(lambda before=before: latest(killed) > before + 1)  # type: ignore[misc]
        time.sleep(rng.uniform(0, 0.2))
        os.kill(process.pid, signal.SIGKILL)
        process.join(60)
        assert process.exitcode == -signal.SIGKILL
        clocks.append(latest(killed))
    last = start(killed, policy)
    for process in (undisturbed, last):
        process.join(300)
        assert process.exitcode == 0
    ends = [last_good_checkpoint(folder) for folder in (whole, killed)]
    assert ends[0].name == ends[1].name
    first, second = (torch.load(path, weights_only=True) for path in ends)
    for part in ("state_dict", "optimizer_states", "lr_schedulers", "callbacks", "lit_rl"):
        assert_same_state(first[part], second[part], f"{part}, killed at {clocks},")
    logged, again = scalars(whole), scalars(killed)
    assert logged == again
    # The run did what it was to be tested for.
    steps = [value for _, value in logged["rollout_step"]]
    assert sorted(set(steps)) == list(range(14))
    assert len(steps) > 14, "AutoNPO did not go back"
    assert [clock for clock, _ in logged["rollout_step"]] == list(range(len(steps)))
    for name in ("dot/truncated", "grpo_lambda/penalty_mean", "npo/injected_groups"):
        assert any(value != 0 for _, value in logged[name]), name
    assert any(value != 1 for _, value in logged["recap/lambda/accuracy"])


def test_the_same_configuration_runs_in_this_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["lit-rl"])
    config = yaml.safe_load(CONFIG)
    config["model"]["init_args"]["max_rollouts"] = 3
    (tmp_path / "all_four.yaml").write_text(yaml.safe_dump(config))
    fit(tmp_path / "run", make_policy(tmp_path / "policy"))
    assert latest(tmp_path / "run") == 3
