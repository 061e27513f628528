# SPDX-License-Identifier: Apache-2.0
"""bitsandbytes' optimizers learn, resume and rewind like any other, and are chosen by a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from extras import needs

from lit_rl.cli import main
from lit_rl.testing import check_resume, make_module, make_policy, train
from tests.toy_config import BASE

bnb = needs("bitsandbytes")
CONFIGS = Path(__file__).parents[2] / "configs" / "optimizers"


def eight_bits(parameters: Any) -> torch.optim.Optimizer:
    """Moments of tensors as small as the toy's in 8 bits, at AdamW's learning rate."""
    return bnb.optim.AdamW8bit(parameters, lr=1e-2, weight_decay=0.0, min_8bit_size=256)


def test_moments_are_in_eight_bits_and_the_toy_task_is_learned(tmp_path: Path) -> None:
    module = make_module(make_policy(tmp_path / "policy"), optimizer=eight_bits, max_rollouts=30)
    rewards: list[float] = []
    finish = module.finish_step
    module.finish_step = lambda rollouts: (rewards.append(float(rollouts.rewards.mean())), finish(rollouts))
    train(tmp_path / "run", module)
    states = module._plain_optimizers()[0].state
    matrices = [states[p] for p in module.model.parameters() if p.numel() >= 256]
    assert matrices
    assert all(state["state1"].dtype == state["state2"].dtype == torch.uint8 for state in matrices)
    assert sum(rewards[-5:]) / 5 > sum(rewards[:5]) / 5 + 0.3


def test_a_run_resumes_bit_for_bit(tmp_path: Path) -> None:
    check_resume(tmp_path, module=lambda folder: make_module(folder, optimizer=eight_bits, max_rollouts=4), at=2)


@pytest.mark.parametrize("name", ["adamw8bit", "paged_adamw8bit"])
def test_an_optimizer_is_exchanged_by_its_file_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr("sys.argv", ["lit-rl"])
    (tmp_path / "base.yaml").write_text(BASE)
    settings = {"model.init_args.policy.path": make_policy(tmp_path / "policy"), "trainer.default_root_dir": tmp_path}
    files = ["--config", str(tmp_path / "base.yaml"), "--config", str(CONFIGS / f"{name}.yaml")]
    main(["fit", *files, *(f"--{k}={v}" for k, v in settings.items())])
    written = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())["model"]["init_args"]["optimizer"]
    saved = yaml.safe_load((tmp_path / "config.yaml").read_text())["model"]["init_args"]["optimizer"]
    assert saved["class_path"].rsplit(".", 1)[1] == written["class_path"].rsplit(".", 1)[1]
    assert written["init_args"].items() <= saved["init_args"].items()
    assert (tmp_path / "checkpoints" / "clock00000002.ckpt").exists()
