# SPDX-License-Identifier: Apache-2.0
"""Self-distilled RLVR: the card's numbers, bounds and limits, a naive loop, resuming with a snapshot."""

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lessons import ANSWER_FIRST, Metrics, assert_close, exact_module, gradients_of, token_losses

from lit_rl.methods import GRPO, RLSD
from lit_rl.methods.rlsd import between, evidence_weights, mixing_at
from lit_rl.objectives import Clip
from lit_rl.policies import Live, PrivilegedPrompt, Snapshot, Teacher
from lit_rl.testing import (
    assert_same_weights,
    check_resume,
    final_state,
    loss_and_gradients,
    make_module,
    make_policy,
    train,
)


def credited(advantage: float, gain: float, mixing: float = 0.5, clip: float = 0.2) -> float:
    a = torch.tensor(advantage, dtype=torch.float64)
    return float(a * evidence_weights(a, torch.tensor(gain, dtype=torch.float64), mixing, clip))


@pytest.mark.parametrize(
    ("advantage", "gain", "expected"),
    [(1, 0.1, 1.05259), (1, 0.5, 1.1), (-1, 0.5, -0.9), (-2, -0.1, -2.10517), (1, -1, 0.9)],
)
def test_credited_advantages(advantage, gain, expected):
    assert credited(advantage, gain) == pytest.approx(expected, abs=1e-5)


@given(st.floats(-5, 5), st.floats(-3, 3), st.floats(0, 1), st.floats(0, 0.9))
def test_the_sign_never_changes_and_the_size_stays_in_bounds(advantage, gain, mixing, clip):
    found = credited(advantage, gain, mixing, clip)
    assert math.copysign(1, found) == math.copysign(1, advantage) or found == 0
    slack = 1e-9
    assert abs(advantage) * (1 - mixing * clip) - slack <= abs(found) <= abs(advantage) * (1 + mixing * clip) + slack


@given(st.floats(-3, 3), st.floats(0, 3))
def test_credit_rises_and_blame_falls_with_the_evidence(gain, more):
    assert credited(1.0, gain + more) >= credited(1.0, gain)
    assert abs(credited(-1.0, gain + more)) <= abs(credited(-1.0, gain))


@pytest.mark.parametrize("settings", [{"mixing": 0.0}, {"clip": 0.0}])
def test_without_mixing_or_clip_range_nothing_is_reweighed(settings):
    assert credited(1.3, 0.7, **settings) == pytest.approx(1.3, abs=1e-15)
    assert credited(0.0, 5.0) == 0.0


def test_tokens_without_a_score_keep_their_advantage_and_no_gradient_flows():
    gain = torch.tensor([0.1, math.nan], requires_grad=True)
    found = evidence_weights(torch.ones(2), gain, 0.5, 0.2)
    assert found[1] == 1.0
    assert not found.requires_grad


@pytest.mark.parametrize(
    ("step", "warmup", "decay", "expected"),
    [(0, 0, 60, 0.5), (30, 0, 60, 0.25), (60, 0, 60, 0.0), (90, 0, 60, 0.0), (5, 10, 60, 0.25), (40, 10, 60, 0.25),
     (1000, 0, 0, 0.5)],
)  # fmt: skip
def test_schedule(step, warmup, decay, expected):
    assert mixing_at(step, 0.5, warmup, decay) == pytest.approx(expected)


def test_pieces_between_marks():
    texts = ["x", "<", "t>", "a", "b</t", ">", "c", "<t>", "d"]
    assert between(texts, "<t>", "</t>") == [False, False, False, True, True, False, False, False, True]
    assert between([], "<t>", "</t>") == []


# --- on batches ------------------------------------------------------------------------------------------------------


def told(policy: Path, method: type = RLSD, **options) -> RLSD:
    defaults = {"prompt": PrivilegedPrompt(ANSWER_FIRST), "teacher": Snapshot(every=2), "mixing_decay": 4}
    return make_module(policy, method, **(defaults | options))


@pytest.mark.parametrize("variant", [{}, {"negative_only": True}])
def test_a_batch_equals_a_naive_loop(tmp_path: Path, variant: dict):
    module = exact_module(
        tmp_path, RLSD, teacher=Live(), prompt=PrivilegedPrompt(ANSWER_FIRST), mixing=0.8, mixing_decay=0, **variant
    )
    batch = module.last_rollouts.clone()
    with torch.no_grad():
        for parameter in module.model.parameters():
            parameter.mul_(1.5)  # a policy that listens to the prompt, and ratios that differ from 1
    module.providers["logprobs.teacher"](module, batch)
    batch.advantages = torch.randn(len(batch), 1, generator=torch.Generator().manual_seed(0)).double() * torch.where(
        batch.kept_mask(), 1.0, 0.0
    )
    encode = module.tokenizer
    shown = [
        torch.cat([encode(f"{answer};", return_tensors="pt")["input_ids"][0], ids])
        for answer, ids in zip(batch.prompts.columns["answer"], batch.prompts.ids)
    ]
    old = batch.logprobs.get("old", batch.logprobs["sampler"]).double()
    batch.logprobs["old"] = old
    total, count, clipped = torch.zeros((), dtype=torch.float64), 0, 0
    pairs = token_losses(module, batch, lambda z, y: torch.stack([z, y]).log_softmax(-1), shown)
    for i, pair in enumerate(pairs):
        for t, (own, theirs) in enumerate(pair):
            token, advantage = int(batch.completion_ids[i, t]), float(batch.advantages[i, t])
            evidence = math.exp(math.copysign(1, advantage) * float((theirs[token] - own[token]).detach()))
            clipped += not 0.8 < evidence < 1.2
            weight = 0.2 + 0.8 * min(max(evidence, 0.8), 1.2)
            if variant and advantage >= 0:
                weight = 1.0
            ratio = (own[token] - old[i, t]).exp()
            credit = advantage * weight
            total = total + torch.maximum(-credit * ratio, -credit * ratio.clamp(0.8, 1.28))
            count += 1
    assert 0 < clipped < count
    loss, found = loss_and_gradients(module, batch, 40)
    assert loss == pytest.approx(float(total.detach() / count), abs=1e-7)
    assert_close(found, gradients_of(module, total / count), 1e-6)


@pytest.mark.parametrize("neutral", [{"mixing": 0.0}, {"evidence_clip": 0.0}, {"only_between": ("@", "@")}])
def test_it_is_grpo_where_nothing_is_reweighed(tmp_path: Path, neutral: dict):
    policy = make_policy(tmp_path / "policy")
    plain, mine = make_module(policy, GRPO, surrogate=Clip(0.2, 0.28)), told(policy, **neutral)
    for name, module in (("plain", plain), ("mine", mine)):
        module.max_rollouts = 2
        train(tmp_path / name, module)
    assert_same_weights(final_state(plain), final_state(mine))


def test_the_snapshot_is_taken_on_time_and_reported(tmp_path: Path):
    metrics = Metrics()
    train(tmp_path / "run", told(make_policy(tmp_path / "policy")), [metrics])
    assert [s["rlsd/teacher_age"] for s in metrics.steps] == [0, 1, 0, 1, 0, 1]
    assert [s["rlsd/lambda"] for s in metrics.steps] == pytest.approx([0.5, 0.375, 0.25, 0.125, 0, 0])
    assert all(0.8 <= s["rlsd/weight_mean"] <= 1.2 for s in metrics.steps)


def test_a_run_resumes_exactly_with_its_snapshot_and_schedule(tmp_path: Path):
    check_resume(tmp_path, module=told)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"mixing": 1.5}, "mixing"),
        ({"evidence_clip": 1.0}, "sign"),
        ({"mixing_decay": -1}, "steps"),
        ({"teacher": Teacher(Live())}, "makes the Teacher itself"),
    ],
)
def test_impossible_settings_are_refused(tmp_path: Path, options: dict, match: str):
    with pytest.raises(ValueError, match=match):
        told(tmp_path / "policy", **options)


def test_a_missing_answer_column_is_named_before_anything_is_loaded(tmp_path: Path):
    module = told(make_policy(tmp_path / "policy"), prompt=PrivilegedPrompt("{gold}{prompt}"))
    with pytest.raises(Exception, match="column 'gold'"):
        train(tmp_path / "run", module)
