# SPDX-License-Identifier: Apache-2.0
"""pass@k, maj@k, lengths: against exhaustive counting, unscorable rows, and two ranks."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint

from lit_rl.checkpoint import RolloutCheckpoint
from lit_rl.data import EvalSet, ListStream, PromptDataModule
from lit_rl.metrics import GenerationMetrics, majority_correct, pass_at_k
from lit_rl.rollouts import Prompts, Rollouts, StopReason
from lit_rl.testing import make_module, make_policy, make_trainer, run_on_ranks


@pytest.mark.parametrize(("samples", "correct"), [(1, 0), (1, 1), (4, 1), (5, 3), (6, 6), (6, 0)])
def test_pass_at_k_is_the_share_of_subsets_that_hold_a_right_one(samples: int, correct: int):
    verdicts = [i < correct for i in range(samples)]
    for k in range(1, samples + 1):
        subsets = list(itertools.combinations(verdicts, k))
        assert pass_at_k(samples, correct, k) == pytest.approx(sum(map(any, subsets)) / len(subsets), abs=1e-12)


def test_pass_at_more_than_there_are_is_refused():
    with pytest.raises(ValueError, match="pass@3 needs at least 3 scorable completions of each prompt, got 2"):
        pass_at_k(2, 1, 3)


@pytest.mark.parametrize(
    ("answers", "correct", "expected"),
    [
        (["7", "7", "3"], [1, 1, 0], 1.0),
        (["3", "3", "7"], [0, 0, 1], 0.0),
        (["7", "3"], [1, 0], 0.5),
        (["7", "3", "4"], [1, 0, 0], 1 / 3),
        (["7.0", "7", "3", "3", "3"], [1, 1, 0, 0, 0], 0.0),
        (["7.0", "7", "3"], [1, 1, 0], 1.0),  # right answers are one answer, however they are written
        ([None, None, "7"], [0, 0, 1], 1.0),
        ([None, None], [0, 0], 0.0),
        ([], [], 0.0),
    ],
)
def test_majority(answers: list[str | None], correct: list[float], expected: float):
    assert majority_correct(answers, correct) == pytest.approx(expected)


def batch(verdicts: list[list[float]], seed: int = 0, sources: list[str] | None = None) -> Rollouts:
    """One group for each list of verdicts (NaN: not scorable); lengths are random, every third row is cut off."""
    generator = torch.Generator().manual_seed(seed)
    group = torch.tensor([g for g, row in enumerate(verdicts) for _ in row])
    lengths = torch.randint(1, 6, (len(group),), generator=generator).tolist()
    n = len(verdicts)
    prompts = Prompts(
        ids=[torch.tensor([1])] * n,
        text=["p"] * n,
        uid=torch.arange(n),
        draw=torch.arange(n),
        source=sources or ["a"] * n,
    )
    reason = torch.where(torch.arange(len(group)) % 3 == 0, int(StopReason.LENGTH), int(StopReason.END))
    rollouts = Rollouts.build(prompts, group, [torch.ones(length) for length in lengths], stop_reason=reason)
    rollouts.correct = torch.tensor([v for row in verdicts for v in row])
    rollouts.reward_terms["verdict"] = rollouts.correct.clone()
    rollouts.reward_weights["verdict"] = torch.full((len(group),), 2.0)
    return rollouts


NAN = math.nan
VERDICTS = [[1, 0, 0, 0], [1, 1, 0, NAN], [0, 0, 0, 0], [NAN, NAN, NAN, NAN], [1, 1, 1, 1], [NAN, 1, NAN, NAN]]
ANSWERS = [["7", "3", "3", "4"], ["7", "7", "3", "5"], [None] * 4, ["1"] * 4, ["7"] * 4, ["2", "7", "2", "2"]]


def naive(verdicts: list[list[float]], rollouts: Rollouts, samples: int) -> dict[str, float]:
    """The same numbers by counting subsets and votes."""
    scored = [[v for v in row if not math.isnan(v)] for row in verdicts]
    out: dict[str, float] = {}
    for k in (1, 2, 4):
        if k <= samples:
            groups = [row for row in scored if len(row) >= k]
            shares = [[any(s) for s in itertools.combinations(row, k)] for row in groups]
            out[f"pass@{k}"] = sum(sum(s) / len(s) for s in shares) / len(groups)
    votes = []
    for row, answers in zip(verdicts, ANSWERS):
        pairs = [(a, v) for a, v in zip(answers, row) if not math.isnan(v)]
        if not pairs:
            continue
        counts = Counter(a for a, _ in pairs if a is not None)
        best = [a for a, c in counts.items() if c == max(counts.values())]
        votes.append(sum(dict(pairs)[a] for a in best) / len(best) if best else 0.0)
    out[f"maj@{samples}"] = sum(votes) / len(votes)
    flat = [v for row in verdicts for v in row]
    known = [v for v in flat if not math.isnan(v)]
    out["reward_mean"] = 2 * sum(known) / len(known)
    out["length_mean"] = float(rollouts.lengths.float().mean())
    out["truncated_ratio"] = sum(i % 3 == 0 for i in range(len(flat))) / len(flat)
    out["unscorable_ratio"] = (len(flat) - len(known)) / len(flat)
    return out


def test_metrics_are_what_counting_gives_and_unscorable_rows_count_as_such_only():
    metrics = GenerationMetrics(samples=4)
    rollouts = batch(VERDICTS)
    metrics.update(rollouts, [a for row in ANSWERS for a in row])
    found = {k: float(v) for k, v in metrics.compute().items()}
    expected = naive(VERDICTS, rollouts, 4)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, abs=1e-6), name


def test_metrics_do_not_depend_on_batches_or_on_the_order_of_rows():
    answers = [a for row in ANSWERS for a in row]
    whole, parts = GenerationMetrics(4), GenerationMetrics(4)
    rollouts = batch(VERDICTS)
    whole.update(rollouts, answers)
    order = torch.randperm(len(rollouts), generator=torch.Generator().manual_seed(1))
    shuffled, shuffled_answers = rollouts.select(order), [answers[i] for i in order]
    for groups in ([0, 3, 5], [1, 2, 4]):
        rows = [i for i, g in enumerate(shuffled.group.tolist()) if g in groups]
        parts.update(shuffled.select(torch.tensor(rows)), [shuffled_answers[i] for i in rows])
    for name, value in whole.compute().items():
        torch.testing.assert_close(parts.compute()[name], value)


def test_without_answers_there_is_no_majority_and_without_scorable_rows_no_number():
    metrics = GenerationMetrics(2)
    metrics.update(batch([[NAN, NAN]]))
    found = {k: float(v) for k, v in metrics.compute().items()}
    assert "maj@2" not in found
    assert math.isnan(found["pass@1"])
    assert math.isnan(found["reward_mean"])
    assert found["unscorable_ratio"] == 1


def check_rank(rank: int) -> None:
    """Ranks with different numbers of prompts (the second first has none) reduce to what one rank counts."""
    mine, theirs = ([0, 1, 2, 3, 4], [5]) if rank == 0 else ([5], [0, 1, 2, 3, 4])
    everything, reduced = GenerationMetrics(4), GenerationMetrics(4)
    everything.sync_on_compute = False
    for groups, targets in ((mine, (reduced, everything)), (theirs, (everything,))):
        for target in targets:
            target.update(batch([VERDICTS[g] for g in groups], seed=7), [a for g in groups for a in ANSWERS[g]])
    for name, value in everything.compute().items():
        if name not in ("length_mean", "truncated_ratio"):  # made up for each batch
            torch.testing.assert_close(reduced.compute()[name], value, msg=name)


def test_two_ranks_reduce_to_what_one_counts():
    run_on_ranks(check_rank, 2)


# Validation ------------------------------------------------------------------------------------------------------


class TwoSets(PromptDataModule):
    """A set of two sources, and another one with its own number of completions and its own temperature."""

    def build(self, stage: str) -> None:
        sums = [{"prompt": f"{i}+1=", "answer": "1", "source": "even" if i % 2 == 0 else "odd"} for i in range(5)]
        self.train_stream = ListStream(sums)
        mixed = EvalSet("mixed", ListStream(sums, shuffle=False), samples=1, temperature=0.0)
        many = EvalSet("many", ListStream(sums[::2], shuffle=False), samples=4, max_tokens=3)
        self.eval_sets = [mixed, many]


def validate(folder: Path, policy: Path, **options: Any) -> dict[str, float]:
    module = make_module(policy)
    trainer = make_trainer(folder, limit_val_batches=1.0, **options)
    trainer.validate(module, datamodule=TwoSets(), verbose=False)
    return {k: float(v) for k, v in module.evaluation.items()}


def test_validation_reports_each_set_each_source_of_a_mixed_one_and_the_mean_over_sets(tmp_path: Path):
    found = validate(tmp_path, make_policy(tmp_path / "policy"))
    assert {"val/pass@1", "val/mixed/pass@1", "val/mixed/even/pass@1", "val/mixed/odd/pass@1"} <= found.keys()
    assert "val/many/pass@4" in found
    assert "val/mixed/pass@2" not in found  # one completion of each prompt
    assert "val/many/even/pass@1" not in found  # a set of one source needs no second name
    both = found["val/mixed/pass@1"] + found["val/many/pass@1"]
    assert found["val/pass@1"] == pytest.approx(both / 2)
    by_source = 3 * found["val/mixed/even/length_mean"] + 2 * found["val/mixed/odd/length_mean"]
    assert found["val/mixed/length_mean"] == pytest.approx(by_source / 5)
    assert found["val/many/length_mean"] <= 3  # its own budget


def check_validation(rank: int, folder: str, policy: str, expected: dict[str, float]) -> None:
    """A rank without odd prompts of the small set, say, takes part in every reduction."""
    found = validate(Path(folder), Path(policy), strategy="ddp", devices=2)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert math.isclose(found[name], value, abs_tol=1e-6), (name, found[name], value)


def test_two_ranks_validate_as_one(tmp_path: Path):
    policy = make_policy(tmp_path / "policy")
    expected = validate(tmp_path / "one", policy)
    run_on_ranks(check_validation, 2, str(tmp_path / "two"), str(policy), expected)


class SignalInValidation(Callback):
    """What SIGTERM does, in the middle of the first validation."""

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        next(c for c in trainer.callbacks if isinstance(c, RolloutCheckpoint)).received = 15


def test_a_signal_in_the_first_validation_stops_a_run_that_monitors_it(tmp_path: Path):
    module = make_module(make_policy(tmp_path / "policy"))
    best = ModelCheckpoint(tmp_path / "best", "best", monitor="val/pass@1", mode="max")
    options = {"limit_val_batches": 1.0, "val_check_interval": 2, "check_val_every_n_epoch": None}
    trainer = make_trainer(tmp_path / "run", [SignalInValidation(), best], **options)
    trainer.fit(module, datamodule=TwoSets())
    assert module.clock == 2
    assert math.isnan(float(trainer.callback_metrics["val/pass@1"]))
    assert (tmp_path / "run" / "checkpoints" / "clock00000002.ckpt").exists()
