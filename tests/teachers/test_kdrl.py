# SPDX-License-Identifier: Apache-2.0
"""KDRL: estimators, masks and the joint loss against the card's numbers and naive loops."""

import math
from pathlib import Path

import pytest
import torch
from lessons import Metrics, assert_close, checkpoint_teacher, exact_module, gradients_of, token_losses

from lit_rl.callbacks import ScalarSchedule
from lit_rl.methods import GRPO, KDRL
from lit_rl.methods.kdrl import reward_guided_mask
from lit_rl.objectives import AdvantageNormalizer, KLPenalty
from lit_rl.policies import Checkpoint, Live
from lit_rl.testing import assert_same_weights, final_state, loss_and_gradients, make_module, make_policy, train

NAN = math.nan


def penalty(estimator: str, ratio: float) -> tuple[float, float]:
    """Value and derivative in log π of the term at R = ``ratio``."""
    own = torch.tensor([[0.0]], dtype=torch.float64, requires_grad=True)
    other = torch.tensor([[ratio]], dtype=torch.float64)
    value = KLPenalty(surrogate=estimator, cap=None).values(own, other, None, torch.ones(1, 1)).sum()
    return value.item(), torch.autograd.grad(value, own)[0].item()


@pytest.mark.parametrize(
    ("ratio", "k2", "k3"),
    [
        (1.0, (0.5, -1.0), (0.718282, -1.718282)),
        (-1.0, (0.5, 1.0), (0.367879, 0.632121)),
        (3.0, (4.5, -3.0), (16.085537, -19.085537)),
        (-3.0, (4.5, 3.0), (2.049787, 0.950213)),
        (0.0, (0.0, 0.0), (0.0, 0.0)),
    ],
)
def test_estimators_and_their_slopes_without_a_cap(ratio, k2, k3):
    assert penalty("k2", ratio) == pytest.approx(k2, abs=1e-6)
    assert penalty("k3", ratio) == pytest.approx(k3, abs=1e-6)


def test_the_methods_term_has_no_cap_either(tmp_path: Path):
    (term,) = [t for t in make_module(tmp_path, KDRL, teacher=Live()).terms() if t.name == "kd"]
    assert term.penalty == KLPenalty(surrogate="k2", cap=None)


def test_annealing_is_a_linear_schedule_of_the_coefficient():
    schedule = ScalarSchedule("kd_coef", start=5e-3, end=1e-3, steps=80)
    found = [schedule.value(s) for s in (0, 1, 40, 80, 81, 280)]
    assert found == pytest.approx([0.005, 0.00495, 0.003, 0.001, 0.001, 0.001])


@pytest.mark.parametrize(
    ("mask", "expected"),
    [
        ("none", [1] * 12),
        ("response", [0, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0]),
        ("group", [0, 0, 0, 0, 1, 1, 1, 1, 0, 0, 0, 0]),
    ],
)
def test_masks(mask, expected):
    correct = torch.tensor([1.0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1])
    group = torch.arange(3).repeat_interleave(4)
    assert reward_guided_mask(correct, group, mask).int().tolist() == expected
    shuffled = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    assert reward_guided_mask(correct[shuffled], group[shuffled], mask).int().tolist() == [
        expected[i] for i in shuffled.tolist()
    ]


def test_unknown_verdicts_never_count_as_solved_and_are_not_wrong_either():
    correct, group = torch.tensor([NAN, 0.0, NAN, 1.0]), torch.tensor([0, 0, 1, 1])
    assert reward_guided_mask(correct, group, "response").tolist() == [False, True, False, False]
    assert reward_guided_mask(correct, group, "group").tolist() == [True, True, False, False]


@pytest.mark.parametrize(("ddof", "first", "second"), [(0, 1.722051, -0.574850), (1, 1.49, -0.4975)])
def test_advantage_form_adds_the_log_ratio_to_the_groups_advantage(ddof, first, second):
    advantages = AdvantageNormalizer(ddof=ddof, eps=0.0)(torch.tensor([1.0, 0, 0, 0]).double(), torch.zeros(4).long())
    assert float(advantages[0] + 5e-3 * -2) == pytest.approx(first, abs=1e-6)
    assert float(advantages[1] + 5e-3 * 0.5) == pytest.approx(second, abs=1e-6)


# --- on batches ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def joint(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("joint")
    return exact_module(folder, KDRL, teacher=checkpoint_teacher(folder), kd_coef=0.3)


def use(module, **settings) -> None:
    for name, value in settings.items():
        assert hasattr(module, name)
        setattr(module, name, value)
    module.loss_terms = module.terms()


def ready(module):
    """The batch at ratio 1, with verdicts and advantages of known structure."""
    batch = module.last_rollouts.clone()
    batch.logprobs["old"] = module.policy_logprobs(batch, module.model)[0]
    batch.correct = torch.tensor([1.0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1])
    module.providers["logprobs.teacher"](module, batch)
    batch.row["reward_terms.digit"] = batch.correct.clone()
    batch.advantages = module.advantages(batch)
    return batch


def naive(module, batch, estimator: str, mask: str, mean: str = "all") -> torch.Tensor:
    """The card's algorithm, token by token, at ratio 1."""
    advantages = AdvantageNormalizer()(batch.correct.double(), batch.group)
    policy, distilled, tokens, masked = torch.zeros(()).double(), torch.zeros(()).double(), 0, 0
    groups = [[float(c) for c, g in zip(batch.correct, batch.group) if g == k] for k in range(3)]
    pairs = token_losses(module, batch, lambda z, y: torch.stack([z, y]).log_softmax(-1))
    for i, pair in enumerate(pairs):
        wrong, unsolved = float(batch.correct[i]) == 0, max(groups[int(batch.group[i])]) == 0
        counts = {"none": True, "response": wrong, "group": unsolved}[mask]
        for t, (own, theirs) in enumerate(pair):
            token = int(batch.completion_ids[i, t])
            ratio = theirs[token] - own[token]
            estimate = {"k2": ratio.square() / 2, "k3": ratio.exp() - ratio - 1}[estimator]
            policy = policy - advantages[i] * (own[token] - own[token].detach()).exp()
            distilled = distilled + counts * estimate
            tokens, masked = tokens + 1, masked + counts
    return policy / tokens + module.kd_coef * distilled / (tokens if mean == "all" else masked)


@pytest.mark.parametrize(
    ("estimator", "mask", "mean"),
    [("k2", "none", "all"), ("k3", "response", "all"), ("k2", "group", "all"), ("k2", "response", "masked")],
)
def test_the_joint_loss_equals_a_naive_loop(joint, estimator, mask, mean):
    use(joint, kd_estimator=estimator, kd_mask=mask, kd_mean=mean, kd_coef=0.3)
    batch = ready(joint)
    expected = naive(joint, batch, estimator, mask, mean)
    loss, found = loss_and_gradients(joint, batch, 40)
    assert loss == pytest.approx(float(expected.detach()), abs=1e-6)
    assert_close(found, gradients_of(joint, expected), 1e-6)


def test_direct_and_advantage_form_agree_at_ratio_one_and_differ_elsewhere(joint):
    use(joint, kd_mask="none", kd_mean="all")
    for shift, equal in ((0.0, True), (0.3, False)):
        gradients = {}
        for estimator in ("k2", "k1_adv"):
            use(joint, kd_estimator=estimator)
            batch = ready(joint)
            if shift:
                batch.logprobs["old"] = batch.logprobs["old"] + shift * torch.linspace(-1, 1, batch.width)
            gradients[estimator] = loss_and_gradients(joint, batch, 10**9)[1]
        gap = max(float((gradients["k2"][n] - g).abs().max()) for n, g in gradients["k1_adv"].items())
        assert (gap < 1e-6) is equal, gap


def test_a_group_without_signal_still_learns_from_the_teacher(joint):
    use(joint, kd_estimator="k2", kd_mask="none", kd_mean="all")
    batch = ready(joint)
    flat = batch.select(batch.group == 1)  # all wrong
    assert flat.advantages.eq(0).all()
    assert max(float(g.abs().max()) for g in loss_and_gradients(joint, flat, 10**9)[1].values()) > 1e-4
    use(joint, kd_mask="group")
    solved = batch.select(batch.group == 2)  # all right, so not distilled either
    assert loss_and_gradients(joint, solved, 10**9)[0] == 0.0


def test_without_coefficient_it_is_grpo(tmp_path: Path):
    policy, teacher = make_policy(tmp_path / "policy"), str(make_policy(tmp_path / "teacher", seed=3))
    plain = make_module(policy, GRPO, max_rollouts=2)
    train(tmp_path / "plain", plain)
    for estimator in ("k2", "k1_adv"):
        mine = make_module(
            policy, KDRL, teacher=Checkpoint(teacher), kd_coef=0.0, kd_estimator=estimator, max_rollouts=2
        )
        train(tmp_path / estimator, mine)
        if estimator == "k2":
            assert_same_weights(final_state(plain), final_state(mine))
        else:  # reads π_old, so that its ratio is the current policy's over the sampler's: 1 up to rounding
            for name, weight in final_state(plain).items():
                torch.testing.assert_close(final_state(mine)[name], weight, rtol=0, atol=1e-5)


def test_a_student_that_is_its_own_teacher_pays_nothing(tmp_path: Path):
    module = make_module(make_policy(tmp_path / "policy"), KDRL, teacher=Live(), kd_coef=1.0, max_rollouts=1)
    metrics = Metrics()
    train(tmp_path / "run", module, [metrics])
    assert metrics.steps[0]["loss/kd"] == pytest.approx(0, abs=1e-9)
    assert metrics.steps[0]["kdrl/distilled_ratio"] == 1.0


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"kd_estimator": "k1"}, "kd_estimator"),
        ({"kd_mask": "token"}, "kd_mask"),
        ({"kd_mean": "some"}, "kd_mean"),
        ({"kd_estimator": "k1_adv", "kd_mean": "masked"}, "denominator"),
    ],
)
def test_impossible_settings_are_refused(tmp_path: Path, options: dict, match: str):
    with pytest.raises(ValueError, match=match):
        make_module(tmp_path / "policy", KDRL, teacher=Live(), **options)


def test_a_mask_needs_a_verifier(tmp_path: Path):
    from lit_rl.testing.toys import FunctionReward, starts_with_digit

    module = make_module(
        make_policy(tmp_path / "policy"), KDRL, teacher=Live(), kd_mask="group",
        rewards=[FunctionReward(starts_with_digit, name="digit")],
    )  # fmt: skip
    with pytest.raises(Exception, match="correct"):
        train(tmp_path / "run", module)
