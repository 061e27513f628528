# SPDX-License-Identifier: Apache-2.0
"""CaOPD: rewriting of confidences, what the teacher is shown, skipped tokens, and the metrics of calibration."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lessons import Method, Metrics, padded_policy, scored
from torchmetrics.functional.classification import binary_auroc, binary_calibration_error

from lit_rl.callbacks import CalibratedOPD
from lit_rl.callbacks.caopd import CONFIDENCE_TEMPLATE, spoken_confidence, with_confidence, without_confidence
from lit_rl.data import EvalSet
from lit_rl.methods import GRPO, OPD
from lit_rl.metrics.calibration import (
    CalibrationMetrics,
    brier_score,
    expected_calibration_error,
    ranking_rate,
)
from lit_rl.objectives import Divergence
from lit_rl.policies import EMA, Live, PrivilegedPrompt, Teacher
from lit_rl.rollouts import Origin, Rollouts, StopReason
from lit_rl.samplers import Sampling
from lit_rl.testing import ToyData, check_resume, make_module, make_policy, train
from lit_rl.tokenizers import build_character_tokenizer

NAN = math.nan
C, R = torch.tensor([0.9, 0.6, 0.7, 0.7], dtype=torch.float64), torch.tensor([1.0, 1, 0, 0], dtype=torch.float64)


# --- text ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("right", "printed"), [(3, "0.38"), (1, "0.12"), (5, "0.62"), (7, "0.88"), (0, "0.00"), (8, "1.00")]
)
def test_rates_are_printed_with_two_decimals(right, printed):
    assert with_confidence("", right / 8) == f"Confidence: {printed}"


def test_everything_from_the_first_confidence_on_is_replaced():
    text = "work\nconfidence: 0.99 and more\nConfidence: 1.00"
    once = with_confidence(text, 0.375)
    assert once == "work\nConfidence: 0.38"
    assert with_confidence(once, 0.375) == once
    assert with_confidence("no line ", 0.5) == "no line\nConfidence: 0.50"
    assert with_confidence("", 1.0) == "Confidence: 1.00"
    assert without_confidence("CONFIDENCE: 1") == ""


@pytest.mark.parametrize(
    ("text", "expected"),
    [("a\nConfidence: 0.8", 0.8), ("confidence: 90%", 0.9), ("Confidence: 0.1\nConfidence: .7", 0.7),
     ("Confidence: 1", 1.0), ("I am sure", NAN), ("Confidence: high", NAN),
     ("Confidence: 2558", NAN), ("Confidence: 101 %", NAN)],
)  # fmt: skip
def test_spoken_confidence(text, expected):
    assert spoken_confidence(text) == pytest.approx(expected, nan_ok=True)


# --- metrics ---------------------------------------------------------------------------------------------------------


def test_metrics_of_four_completions():
    assert float(brier_score(C, R)) == pytest.approx(0.2875)
    assert float((C - R).mean()) == pytest.approx(0.225)
    assert float(ranking_rate(C, R)) == pytest.approx(0.5)
    assert float(expected_calibration_error(C, R)) == pytest.approx(0.475)
    always = torch.ones(4, dtype=torch.float64)
    assert float(brier_score(always, R)) == 0.5
    assert float(expected_calibration_error(always, R)) == 0.5
    assert float(ranking_rate(always, R)) == 0.0


def test_the_measured_rate_minimises_the_brier_score():
    outcomes = torch.tensor([1.0] * 3 + [0.0] * 5, dtype=torch.float64)
    scores = {c: float(brier_score(torch.full((8,), c, dtype=torch.float64), outcomes)) for c in (0.375, 1.0, 0.5)}
    assert scores[0.375] == pytest.approx(0.234375)
    assert scores[1.0] == pytest.approx(0.625)
    assert scores[1.0] - scores[0.375] == pytest.approx((1 - 0.375) ** 2)
    assert min(scores, key=scores.get) == 0.375


@given(st.lists(st.tuples(st.integers(0, 99), st.booleans()), min_size=2, max_size=30))
def test_metrics_agree_with_torchmetrics_where_they_mean_the_same(pairs):
    """Below 1, where torchmetrics has the same bins; ranking equals the area under the curve without ties."""
    confidence = torch.tensor([(i + 0.5) / 100 for i, _ in pairs], dtype=torch.float64)
    correct = torch.tensor([r for _, r in pairs], dtype=torch.long)
    theirs = binary_calibration_error(confidence, correct, n_bins=10, norm="l1")
    assert float(expected_calibration_error(confidence, correct)) == pytest.approx(float(theirs), abs=1e-6)
    area = float(binary_auroc(confidence, correct)) if 0 < correct.sum() < len(correct) else 0.0
    found = float(ranking_rate(confidence, correct))
    assert found <= area + 1e-6
    if len(set(confidence.tolist())) == len(confidence):
        assert found == pytest.approx(area, abs=1e-6)
    assert found == pytest.approx(float(ranking_rate(confidence.pow(3) / 7, correct)))


def test_bins_are_closed_on_the_left_and_the_last_on_both_sides():
    for confidence, accuracy, expected in ((0.3, 0.3, 0.0), (1.0, 1.0, 0.0), (0.9, 0.9, 0.0), (1.7, 1.0, 0.7)):
        c, r = torch.full((10,), confidence).double(), (torch.arange(10) < 10 * accuracy - 1e-9).double()
        assert float(expected_calibration_error(c, r)) == pytest.approx(expected, abs=1e-6)
    single = expected_calibration_error(torch.tensor([0.7, 0.79]), torch.tensor([1.0, 0.49]))
    assert float(single) == pytest.approx(0.0, abs=1e-6), "0.7 in single precision belongs to the bin of 0.79"
    mixed = expected_calibration_error(torch.tensor([0.95, 1.0]), torch.tensor([1.0, 0.95]))
    assert float(mixed) == pytest.approx(0.0, abs=1e-6), "0.95 and 1.0 share a bin"


def test_the_metric_leaves_out_what_is_unknown_and_says_how_much_was_spoken():
    metric = CalibrationMetrics()
    metric.update(torch.tensor([0.9, NAN, 0.6]), torch.tensor([1.0, 1.0, NAN]))
    metric.update(torch.tensor([0.6, 0.7, 0.7]), torch.tensor([1.0, 0.0, 0.0]))
    found = metric.compute()
    assert float(found["confidence_spoken"]) == pytest.approx(4 / 5)
    assert float(found["brier"]) == pytest.approx(0.2875)
    metric.reset()
    metric.update(torch.zeros(0), torch.zeros(0))
    assert math.isnan(float(metric.compute()["ece"]))


# --- rewriting of a batch --------------------------------------------------------------------------------------------


def tokenizer() -> Any:
    return build_character_tokenizer(99)


def spoken_batch(texts: list[str], correct: list[float], groups: int = 1) -> tuple[Rollouts, Method]:
    encoder = tokenizer()
    size = len(texts) // groups
    batch = scored([correct[g * size : (g + 1) * size] for g in range(groups)])
    ids = [torch.tensor([*encoder(t)["input_ids"], encoder.eos_token_id], dtype=torch.long) for t in texts]
    fresh = Rollouts.build(batch.prompts, batch.group, ids)
    fresh.correct = batch.correct
    fresh.logprobs["sampler"] = torch.zeros_like(fresh.loss_weights)
    fresh.prompts.columns["solution"] = ["shown\nConfidence: 1.00"] * groups
    return fresh, Method(tokenizer=encoder)


def texts_of(batch: Rollouts) -> list[str]:
    return tokenizer().batch_decode(batch.completions(), skip_special_tokens=True)


def test_right_and_wrong_completions_get_the_same_line_and_keep_their_body():
    texts = ["it is 4\nConfidence: 0.9", "it is 5", "no\nconfidence: 1 sure", "Confidence: 0.2"]
    batch, module = spoken_batch(texts, [1.0, 0, 0, 0])
    found = CalibratedOPD(["solution"], skip_tokens=0).on_rewards(None, module, batch)
    line = "\nConfidence: 0.25"
    assert texts_of(found) == [f"it is 4{line}", f"it is 5{line}", f"no{line}", line[1:]]
    eos = module.tokenizer.eos_token_id
    assert all(ids.index(eos) == len(ids) - 1 for ids in found.completions())
    assert found.finished.all()
    assert found.row["stop_reason"].eq(int(StopReason.END)).all()
    assert found.origin.eq(int(Origin.TEACHER)).all()
    assert torch.equal(found.correct, batch.correct)
    assert found.prompts.columns["confidence"] == ["0.25"]
    assert found.prompts.columns["solution"] == ["shown\nConfidence: 0.25"]
    assert "logprobs.sampler" not in found.token
    assert batch.prompts.columns["solution"] == ["shown\nConfidence: 1.00"], "the data must not change"
    again = CalibratedOPD(skip_tokens=0).on_rewards(None, module, found)
    assert texts_of(again) == texts_of(found)
    assert again.completions() == found.completions()
    logged = module.logged()
    assert logged["caopd/success_rate"] == pytest.approx(0.25)


def test_sampled_tokens_stay_token_for_token_with_their_weights_and_masks():
    batch, module = spoken_batch(["abcdef\nConfidence: 0.9", "xyz"], [1.0, 0.0])
    batch.loss_weights[0, 2] = 0.0
    batch.token["completion_mask"][0, 3] = False
    found = CalibratedOPD(skip_tokens=0).on_rewards(None, module, batch)
    assert found.completion_ids[0, :6].tolist() == batch.completion_ids[0, :6].tolist()
    assert found.loss_weights[0].tolist() == [1, 1, 0, 1, 1, 1] + [1] * (found.width - 6)
    assert not found.completion_mask[0, 3]
    assert found.completion_mask[0, 4:].all()


def test_a_token_that_spans_the_border_is_cut_and_its_beginning_kept():
    """A tokenizer with one token for "d\\n" must not lose the d."""

    class Pairs:
        eos_token_id = 0
        words = {1: "en", 2: "d\nCon", 3: "fidence: 9", 4: "d", 5: "\n"}

        def decode(self, ids, skip_special_tokens=True):
            return "".join(self.words.get(i, chr(i) if i > 9 else "") for i in ids)

        def __call__(self, text, add_special_tokens=False):
            return {"input_ids": [ord(c) for c in text]}

    stays, end = CalibratedOPD().parts(Method(tokenizer=Pairs()), [1, 2, 3, 0], 0.5)
    assert stays == [1]
    assert Pairs().decode(end) == "d\nConfidence: 0.50"


def test_a_group_without_verdicts_is_left_alone():
    batch, module = spoken_batch(["a\nConfidence: 1", "b", "c", "d"], [NAN, NAN, 1.0, 0.0], groups=2)
    found = CalibratedOPD(["solution"], skip_tokens=0).on_rewards(None, module, batch)
    assert texts_of(found) == ["a\nConfidence: 1", "b", "c\nConfidence: 0.50", "d\nConfidence: 0.50"]
    assert found.prompts.columns["confidence"] == [None, "0.50"]
    assert found.prompts.columns["solution"] == ["shown\nConfidence: 1.00", "shown\nConfidence: 0.50"]
    assert found.origin.tolist() == [int(Origin.POLICY)] * 2 + [int(Origin.TEACHER)] * 2


def test_a_body_without_room_is_shortened_so_that_the_line_fits():
    batch, module = spoken_batch(["x" * 39, "y"], [1.0, 1.0])
    module.sampling = Sampling(max_tokens=30)
    found = CalibratedOPD(skip_tokens=0).on_rewards(None, module, batch)
    assert found.lengths.max() == 30
    assert texts_of(found)[0] == "x" * 12 + "\nConfidence: 1.00"
    assert module.logged()["caopd/shortened"] == 1


def test_the_first_tokens_do_not_train_and_a_short_completion_contributes_nothing():
    batch, module = spoken_batch(["abcdef", "ab"], [1.0, 0.0])
    found = CalibratedOPD(rewrite=False, skip_tokens=3).on_rewards(None, module, batch)
    assert found.loss_weights[0].tolist() == [0, 0, 0, 1, 1, 1, 1]
    assert found.loss_weights[1].eq(0).all()
    assert texts_of(found) == ["abcdef", "ab"], "without rewriting it only measures"


# --- runs ------------------------------------------------------------------------------------------------------------

SHOWN = PrivilegedPrompt("{answer} {confidence};{prompt}")


def calibrated(policy: Path, **options: Any) -> OPD:
    defaults = {
        "teacher": Teacher(EMA(decay=0.5), SHOWN),
        "divergence": Divergence(1.0),
        "group_size": 4,
        "sampling": Sampling(max_tokens=24),
        "aggregation": "sequence_mean",
    }
    return make_module(policy, OPD, **(defaults | options))


class SpeakingData(ToyData):
    """The toy task with evaluation."""

    def build(self, stage: str) -> None:
        super().build(stage)
        self.eval_sets = [EvalSet("toy", self.eval_sets[0].stream, limit=4, samples=2)]


def test_a_run_trains_the_measured_confidence_and_reports_calibration(tmp_path: Path):
    metrics = Metrics()
    seen: dict[str, float] = {}

    class Keep(Metrics):
        def on_evaluation_metrics(self, trainer: Any, module: Any, metrics: dict[str, float], prefix: str) -> None:
            seen.update(metrics)

    module = calibrated(padded_policy(tmp_path / "policy", 99, vocabulary=99), max_rollouts=2)
    train(
        tmp_path / "run",
        module,
        [CalibratedOPD(), metrics, Keep()],
        data=SpeakingData(),
        limit_val_batches=1.0,
        val_check_interval=1,
        check_val_every_n_epoch=None,
    )
    for step in metrics.steps:
        assert math.isfinite(step["loss/distill"])
        assert 0 <= step["caopd/success_rate"] <= 1
    batch = module.last_rollouts
    texts = module.tokenizer.batch_decode(batch.completions(), skip_special_tokens=True)
    rates = batch.group_mean(batch.correct)
    for text, group in zip(texts, batch.group.tolist()):
        assert text.endswith(f"Confidence: {float(rates[group]):.2f}")
    assert {"val/ece", "val/brier", "val/overconfidence", "val/ranking_rate", "val/confidence_spoken"} <= seen.keys()


def test_a_run_resumes_exactly(tmp_path: Path):
    check_resume(tmp_path, callbacks=lambda: [CalibratedOPD()], module=calibrated)


def test_without_rewriting_and_skipping_a_run_is_plain_self_distillation(tmp_path: Path):
    from lit_rl.testing import assert_same_weights, final_state

    policy = make_policy(tmp_path / "policy")
    states = []
    for name, callbacks in (("plain", []), ("measured", [CalibratedOPD(skip_tokens=0, rewrite=False)])):
        module = calibrated(policy, teacher=Teacher(Live(), PrivilegedPrompt("{answer};{prompt}")), max_rollouts=2)
        train(tmp_path / name, module, callbacks)
        states.append(final_state(module))
    assert_same_weights(*states)


def test_losses_that_compare_with_the_sampler_are_refused(tmp_path: Path):
    policy = make_policy(tmp_path / "policy")
    with pytest.raises(Exception, match="rewrites completions"):
        train(tmp_path / "grpo", make_module(policy, GRPO, max_rollouts=1), [CalibratedOPD()])
    with pytest.raises(Exception, match="raise group_size"):
        train(tmp_path / "one", calibrated(policy, group_size=1), [CalibratedOPD()])
    with pytest.raises(ValueError, match="skip_tokens"):
        CalibratedOPD(skip_tokens=-1)


def test_the_template_shows_what_the_paper_shows():
    assert PrivilegedPrompt(CONFIDENCE_TEMPLATE).columns == ("solution", "confidence")
