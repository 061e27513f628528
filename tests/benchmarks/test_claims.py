# SPDX-License-Identifier: Apache-2.0
"""Learning claims: how numbers are read from runs, compared, and said."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest

from benchmarks.claims import report
from benchmarks.claims.carryless import as_record
from benchmarks.claims.claim import Arm, Claim, Metric, after, at_end, collapsed, reached, within

# A run that goes back after its third step, from rollout step 3 to 1, and pays 50 for its guide.
WENT_BACK = {
    "val": [0.1, 0.2, 0.3, 0.25, 0.5],
    "rollout_step": [0.0, 1.0, 2.0, 1.0, 2.0],
    "tokens": [10.0] * 5,
}


def write_run(folder: Path, logged: dict[str, list[float]], **single: tuple[int, float]) -> Path:
    """A run directory in which names were logged at every step, and single values at one."""
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(folder)) as writer:
        for name, values in logged.items():
            for step, value in enumerate(values):
                writer.add_scalar(name, value, step)
        for name, (step, value) in single.items():
            writer.add_scalar(name, value, step)
    return folder


def test_what_a_run_has_after_some_steps_counts_the_abandoned_ones_only_on_the_clock(tmp_path: Path) -> None:
    run = write_run(tmp_path, WENT_BACK)
    assert after("val", 3)(run) == pytest.approx(0.3)
    assert after("val", 3, "rollout_step")(run) == pytest.approx(0.5)
    assert after("val", 2, "rollout_step")(run) == pytest.approx(0.25)


def test_costs_of_the_guide_are_added_from_their_step_on(tmp_path: Path) -> None:
    run = write_run(tmp_path, WENT_BACK, guide=(2, 50.0))
    assert reached("val", 0.45, cost="tokens")(run) == 50
    assert reached("val", 0.45, cost="tokens", also="guide")(run) == 100
    assert reached("val", 0.25, cost="tokens", also="guide")(run) == 80
    assert reached("val", 0.15, cost="tokens", also="guide")(run) == 20
    assert reached("val", 0.9, cost="tokens")(run) == math.inf
    assert within("val", 79, "tokens", "guide")(run) == pytest.approx(0.2)
    assert within("val", 80, "tokens", "guide")(run) == pytest.approx(0.3)
    assert within("val", 80, "tokens", "never logged")(run) == pytest.approx(0.5)


def test_a_run_has_collapsed_if_it_ends_below_half_of_its_best(tmp_path: Path) -> None:
    assert collapsed("val")(write_run(tmp_path / "a", {"val": [0.2, 0.8, 0.41]})) == 0
    assert collapsed("val")(write_run(tmp_path / "b", {"val": [0.2, 0.8, 0.39]})) == 1


def small_claim(**changes: Any) -> Claim:
    callbacks = [{"class_path": "lit_rl.callbacks.GRPOLambda", "init_args": {"fraction": 0.2}}]
    metrics = [Metric("score", at_end("val"), "higher"), Metric("collapsed", collapsed("val"), "lower", counts=True)]
    return Claim(
        name="small",
        title="Small",
        sentence="It helps.",
        source="nowhere",
        arms=[Arm("grpo"), Arm("lambda", ["b.yaml"], {"trainer.callbacks+": callbacks})],
        metrics=metrics,
        curves=["val"],
        setup="A task.",
        configs=["a.yaml"],
        overrides={"model.init_args.max_rollouts": 3},
        **changes,
    )


def test_runs_are_compared_by_seed_and_collapses_are_counted(tmp_path: Path) -> None:
    curves = {"grpo": [[0.8, 0.2], [0.8, 0.8]], "lambda": [[0.5, 0.6], [0.5, 1.0]]}
    runs = {
        arm: [write_run(tmp_path / arm / str(i), {"val": curve}) for i, curve in enumerate(found)]
        for arm, found in curves.items()
    }
    lines = report.table(report.Results(small_claim(), [1, 2], runs, tmp_path)).splitlines()
    assert lines[2] == (
        "| score (higher is better) | 0.500 ± 3.812 | 0.800 ± 2.541 | +0.3 ± 1.3, no clear difference |"
    )
    assert lines[3] == "| collapsed (lower is better) | 1 of 2 | 0 of 2 | -1 |"


def test_many_arms_are_rows(tmp_path: Path) -> None:
    arms = [Arm(name) for name in "abcdef"]
    runs = {arm.name: [write_run(tmp_path / arm.name, {"val": [0.5]})] for arm in arms}
    claim = dataclasses.replace(small_claim(), arms=arms)
    lines = report.table(report.Results(claim, [1], runs, tmp_path)).splitlines()
    assert lines[0] == "| metric | score (higher is better) | collapsed (lower is better) |"
    assert [line.split(" | ")[0] for line in lines[2:6]] == ["| a", "| b", "| b − a", "| c"]
    assert len(lines) == 2 + 11


def test_the_report_says_what_each_arm_adds() -> None:
    said = report.arms(small_claim()).splitlines()
    assert said[2:] == [
        "- warm start: `configs/quickstart-warmup.yaml`",
        "- all arms: `a.yaml`, `max_rollouts: 3`",
        "- `grpo`: adds nothing, the baseline",
        "- `lambda`: adds `b.yaml`, `GRPOLambda(fraction=0.2)`",
    ]


def test_a_report_has_no_empty_paragraph(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "DOCS", tmp_path / "claims")
    runs = {arm: [write_run(tmp_path / arm, {"val": [0.1, 0.2]})] for arm in ("grpo", "lambda")}
    for folder in runs.values():
        (folder[0] / "done.json").write_text('{"seconds": 1.0}')
    for claim in (small_claim(), small_claim(tried=["something else: nothing"], extra=lambda results: "More.")):
        report.write(report.Results(claim, [1], runs, tmp_path), "It does.")
        text = (tmp_path / "claims" / "small.md").read_text()
        assert "\n\n\n" not in text
        assert ("- something else: nothing" in text) == ("More." in text) == bool(claim.tried)


def test_the_kept_task_is_the_addition_without_carries() -> None:
    record = as_record([957, 468])
    assert record["prompt"] == "957:468="
    assert record["answer"] == "1315"  # the true sum is 1425
    assert record["completion"] == ">7+8=15,5+6=11,9+4=13#1315"
