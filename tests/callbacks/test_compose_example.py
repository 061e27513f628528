# SPDX-License-Identifier: Apache-2.0
"""The example that composes a run in code, on a tiny policy."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lit_rl.testing import make_policy

EXAMPLE = Path(__file__).parents[2] / "examples" / "compose.py"


def test_the_example_runs_with_its_three_interventions(tmp_path: Path) -> None:
    main = runpy.run_path(str(EXAMPLE))["main"]
    trainer = main(str(make_policy(tmp_path / "policy")), str(tmp_path / "run"), steps=2)
    assert trainer.lightning_module.rollout_step == 2
    events = EventAccumulator(str(tmp_path / "run")).Reload()
    names = events.Tags()["scalars"]
    for name in ("dot/truncated", "grpo_lambda/selected_fraction", "schedule/sampling.temperature"):
        assert name in names
    assert [e.value for e in events.Scalars("schedule/sampling.temperature")] == pytest.approx([1.0, 0.9])


def test_the_example_has_fewer_than_forty_lines() -> None:
    assert len(EXAMPLE.read_text().splitlines()) < 40
