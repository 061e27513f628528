# SPDX-License-Identifier: Apache-2.0
"""On-policy distillation: both losses against naive loops, limits, sources, resuming."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lessons import (
    Metrics,
    SolvedData,
    assert_close,
    checkpoint_teacher,
    exact_module,
    exact_policy,
    exact_teacher,
    gradients_of,
    token_losses,
    told_the_answer,
)

from lit_rl.methods import OPD
from lit_rl.methods.opd import teacher_advantages
from lit_rl.methods.teaching import teacher_comparison
from lit_rl.objectives import AdvantageNormalizer, Aggregation, Clip, Divergence
from lit_rl.policies import EMA, Checkpoint, FrozenCopy, Live, Teacher
from lit_rl.policies import divergence_tiles as tiles
from lit_rl.rollouts import Origin
from lit_rl.testing import (
    check_resume,
    check_split_invariance,
    check_two_ranks,
    final_state,
    loss_and_gradients,
    make_module,
    make_policy,
    train,
)

STUDENT = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
TEACHER = torch.tensor([0.7, 0.2, 0.1], dtype=torch.float64)


# --- the advantage form, in closed form ------------------------------------------------------------------------------


def test_advantages_of_every_token_of_the_vocabulary():
    found = teacher_advantages(STUDENT.log()[None], TEACHER.log()[None], torch.ones(1, 3))
    assert found[0].tolist() == pytest.approx([1.252763, -0.916291, -1.098612], abs=1e-6)
    assert float((STUDENT * found[0]).sum()) == pytest.approx(-0.537176, abs=1e-6)


@pytest.mark.parametrize(
    ("discount", "expected"), [(0.5, (0.475, -0.05, 0.3)), (1.0, (0.6, 0.1, 0.3)), (0.0, (0.5, -0.2, 0.3))]
)
def test_discounted_sum_to_go(discount, expected):
    gain = torch.tensor([[0.5, -0.2, 0.3]])
    found = teacher_advantages(torch.zeros(1, 3), gain, torch.ones(1, 3), discount=discount)
    assert found[0].tolist() == pytest.approx(expected)


@pytest.mark.parametrize(("discount", "expected"), [(1.0, -0.142046), (0.5, -0.196023), (0.0, -0.25)])
def test_two_step_toy_gives_the_gradient_of_the_sequence_kl_at_discount_one(discount, expected):
    """Binary tokens; the exact expectation of the policy gradient over the four sequences."""
    first = torch.tensor(0.0, dtype=torch.float64, requires_grad=True)
    second = {0: 0.5, 1: -1.0}
    teacher_first, teacher_second = 1.0, {0: 0.0, 1: 1.0}

    def log_p(token: int, logit: Any) -> torch.Tensor:
        return torch.nn.functional.logsigmoid(torch.as_tensor(logit if token else -logit, dtype=torch.float64))

    objective = torch.zeros((), dtype=torch.float64)
    for a in (0, 1):
        for b in (0, 1):
            own = torch.stack([log_p(a, first), log_p(b, second[a])])
            theirs = torch.stack([log_p(a, teacher_first), log_p(b, teacher_second[a])])
            advantages = teacher_advantages(own.detach()[None], theirs[None], torch.ones(1, 2), discount=discount)[0]
            objective = objective - own.detach().sum().exp() * (advantages * own).sum()
    (slope,) = torch.autograd.grad(objective, first)
    assert float(slope) == pytest.approx(expected, abs=1e-6)


def test_a_token_that_the_teacher_likes_better_is_pushed_up_and_what_it_did_not_score_is_left_alone():
    old, teacher = torch.tensor([[-1.0, -1.0, -1.0]]), torch.tensor([[-0.5, -2.0, math.nan]])
    found = teacher_advantages(old, teacher, torch.ones(1, 3))[0].tolist()
    assert found == [0.5, -1.0, 0.0]
    assert teacher_advantages(old, teacher, torch.ones(1, 3), coef=2.0)[0].tolist() == [1.0, -2.0, 0.0]
    assert teacher_advantages(old, teacher, torch.zeros(1, 3)).eq(0).all()


# --- the losses on a batch -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def gkd(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("gkd")
    return exact_module(
        folder, OPD, teacher=checkpoint_teacher(folder), temperature=1.3, prompts_per_step=2, group_size=3
    )


@pytest.fixture(scope="module")
def gradient(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("gradient")
    return exact_module(
        folder, OPD, teacher=checkpoint_teacher(folder), loss="policy_gradient", prompts_per_step=2, group_size=3
    )


def use(module: Any, **settings: Any) -> None:
    for name, value in settings.items():
        assert hasattr(module, name)
        setattr(module, name, value)
    module.loss_terms = module.terms()


@pytest.mark.parametrize(
    ("divergence", "aggregation"),
    [
        (Divergence(0.0), "token_mean"),
        (Divergence(1.0), "sequence_mean"),
        (Divergence(0.3), "token_mean"),
        (Divergence(0.0, top_k=5), "sequence_mean"),
        (Divergence(0.5, entry_clip=0.001), "token_mean"),
    ],
    ids=str,
)
def test_gkd_equals_a_naive_loop_with_its_gradient(gkd, divergence, aggregation):
    use(gkd, divergence=divergence, aggregation=Aggregation(aggregation))
    batch = gkd.last_rollouts
    assert batch.lengths.unique().numel() > 1
    rows = token_losses(gkd, batch, lambda z, y: divergence.of_logits(z / 1.3, y / 1.3))
    by_token = torch.cat(rows).mean()
    by_row = torch.stack([values.mean() for values in rows]).mean()
    expected = by_token if aggregation == "token_mean" else by_row
    loss, found = loss_and_gradients(gkd, batch, 40)
    assert loss == pytest.approx(float(expected.detach()), abs=1e-10)
    assert_close(found, gradients_of(gkd, expected))


def test_the_term_announces_the_weights_that_the_loss_has(gkd, monkeypatch):
    """So that no logit is computed twice."""
    use(gkd, divergence=Divergence(0.5), aggregation=Aggregation.SEQUENCE_MEAN, distill_coef=0.7)
    monkeypatch.setattr(tiles, "_DivergenceGradients", None)
    loss, found = loss_and_gradients(gkd, gkd.last_rollouts, 40)
    assert loss > 0
    assert max(float(g.abs().max()) for g in found.values()) > 0
    use(gkd, distill_coef=1.0)


def test_gkd_trains_only_what_has_a_weight(gkd):
    use(gkd, divergence=Divergence(1.0), aggregation=Aggregation.TOKEN_MEAN)
    batch = gkd.last_rollouts.clone()
    weights = torch.rand(batch.loss_weights.shape, generator=torch.Generator().manual_seed(0)).round(decimals=1)
    batch.loss_weights = batch.loss_weights * torch.where(weights < 0.4, 0.0, weights)
    batch.truncate(torch.tensor([1]), torch.tensor([2]))
    rows = token_losses(gkd, batch, lambda z, y: Divergence(1.0).of_logits(z / 1.3, y / 1.3))
    kept = [batch.loss_weights[i, : len(v)] for i, v in enumerate(rows)]
    count = sum(int((w != 0).sum()) for w in kept)
    expected = sum((w * v).sum() for w, v in zip(kept, rows)) / count
    loss, found = loss_and_gradients(gkd, batch, 10**9)
    assert loss == pytest.approx(float(expected.detach()), abs=1e-10)
    assert_close(found, gradients_of(gkd, expected))
    batch.loss_weights = torch.zeros_like(batch.loss_weights)
    assert loss_and_gradients(gkd, batch, 10**9)[0] == 0.0


def test_no_split_of_a_batch_changes_the_distillation_loss(gkd):
    use(gkd, divergence=Divergence(0.5, token_clip=0.06), aggregation=Aggregation.SEQUENCE_MEAN)
    check_split_invariance(gkd, gkd.last_rollouts)


def test_policy_gradient_equals_a_naive_loop_and_doubles_with_its_coefficient(gradient):
    batch = gradient.last_rollouts
    found = {}
    for coef in (1.0, 2.0):
        use(gradient, kl_coef=coef)
        fresh = batch.clone()
        fresh.logprobs["old"] = fresh.logprobs["old"].double() + 0.05  # another policy than the current one
        fresh.advantages = gradient.advantages(fresh)
        found[coef] = loss_and_gradients(gradient, fresh, 40)
        total, count = torch.zeros((), dtype=torch.float64), 0
        for i, pair in enumerate(token_losses(gradient, batch, lambda z, y: torch.stack([z, y]).log_softmax(-1))):
            for t, (own, theirs) in enumerate(pair):
                token = int(batch.completion_ids[i, t])
                old = fresh.logprobs["old"][i, t]
                total = total - coef * (theirs[token] - old) * (own[token] - old).exp()
                count += 1
        assert found[coef][0] == pytest.approx(
            float(total.detach() / count), abs=1e-6
        )  # the sampler's numbers are float32
        assert_close(found[coef][1], gradients_of(gradient, total / count), 1e-6)
    assert found[2.0][0] == pytest.approx(2 * found[1.0][0])


def test_rewards_and_teacher_add_up(gradient):
    """With a verifier the same code is RL and distillation at once."""
    batch = gradient.last_rollouts
    taught = gradient.advantages(batch)
    use(gradient, advantage=AdvantageNormalizer(), kl_coef=2.0)
    both = gradient.advantages(batch)
    rewards = AdvantageNormalizer()(batch.rewards, batch.group)
    torch.testing.assert_close(both, torch.where(batch.kept_mask(), taught + rewards[:, None], 0.0))
    use(gradient, advantage=None)


def test_a_student_that_is_its_own_teacher_has_nothing_to_learn(tmp_path: Path):
    for loss in ("gkd", "policy_gradient"):
        module = exact_module(tmp_path / loss, OPD, teacher=Live(), loss=loss, old_logprobs="recompute")
        value, found = loss_and_gradients(module, module.last_rollouts, 10**9)
        tolerance = 1e-12 if loss == "gkd" else 1e-6  # stored log-probabilities are float32
        assert value == pytest.approx(0, abs=tolerance)
        assert max(float(g.abs().max()) for g in found.values()) < tolerance


def test_the_teacher_is_shown_its_own_prompt(tmp_path: Path):
    """The same weights teach something once they see more than the student."""
    module = exact_module(tmp_path, OPD, teacher=told_the_answer(Live()), divergence=Divergence(0.0))
    batch = module.last_rollouts
    answers = batch.prompts.columns["answer"]
    shown = [torch.cat([module.tokenizer(f"{a};", return_tensors="pt")["input_ids"][0], p])
             for a, p in zip(answers, batch.prompts.ids)]  # fmt: skip
    expected = torch.cat(token_losses(module, batch, Divergence(0.0).of_logits, shown)).mean()
    loss, found = loss_and_gradients(module, batch, 40)
    assert loss == pytest.approx(float(expected.detach()), abs=1e-12)
    assert loss > 1e-4
    assert_close(found, gradients_of(module, expected))


# --- whose completions, whose teacher --------------------------------------------------------------------------------


def origins(folder: Path, data: SolvedData | None = None, **options: Any) -> torch.Tensor:
    module = make_module(
        make_policy(folder / "policy"),
        OPD,
        teacher=Checkpoint(str(make_policy(folder / "teacher", seed=1))),
        prompts_per_step=40,
        max_rollouts=1,
        group_size=1,
        **options,
    )
    train(folder / "run", module, data=data or SolvedData())
    return module.last_rollouts.origin


def test_without_on_policy_prompts_it_is_supervised_distillation(tmp_path: Path):
    assert origins(tmp_path, on_policy_fraction=0.0).eq(int(Origin.DEMONSTRATION)).all()


def test_a_fraction_of_the_prompts_is_on_policy_and_the_same_in_every_run(tmp_path: Path):
    first = origins(tmp_path / "a", on_policy_fraction=0.5)
    assert 10 <= int((first == Origin.POLICY).sum()) <= 30
    assert set(first.tolist()) == {int(Origin.POLICY), int(Origin.DEMONSTRATION)}
    assert torch.equal(first, origins(tmp_path / "b", on_policy_fraction=0.5))


def test_a_prompt_without_a_demonstration_is_answered_by_the_student(tmp_path: Path):
    found = origins(tmp_path, SolvedData(sparse=True), on_policy_fraction=0.0)
    assert set(found.tolist()) == {int(Origin.POLICY), int(Origin.DEMONSTRATION)}


def test_the_teacher_can_write_the_other_completions(tmp_path: Path):
    found = origins(tmp_path, on_policy_fraction=0.3, sequence_kd=True)
    assert set(found.tolist()) == {int(Origin.POLICY), int(Origin.TEACHER)}


def test_each_source_has_its_own_teacher_and_a_source_without_one_is_not_trained(tmp_path: Path):
    """The loss over two sources is the mean over the tokens of the one that is taught."""
    student = exact_policy(tmp_path / "policy")
    wide, same = exact_teacher(tmp_path / "teacher"), exact_policy(tmp_path / "other", seed=7)
    teachers = [Teacher(Checkpoint(str(wide)), sources=["a"]), Teacher(Checkpoint(str(same)), sources=["b"])]
    values = {}
    for name, used in (("both", teachers), ("first", teachers[:1])):
        module = make_module(student, OPD, teacher=used, max_rollouts=1, prompts_per_step=8, group_size=1)
        metrics = Metrics()
        train(tmp_path / name, module, [metrics], data=SolvedData(sources=("a", "b", "c")))
        batch = module.last_rollouts
        values[name] = (metrics.steps[0]["loss/distill"], batch)
    batch = values["first"][1]
    source = [batch.prompts.source[g] for g in batch.group.tolist()]
    assert set(source) == {"a", "b", "c"}
    alone = make_module(student, OPD, teacher=Checkpoint(str(wide)), max_rollouts=1, prompts_per_step=8, group_size=1)
    train(tmp_path / "alone", alone, data=SolvedData(sources=("a", "b", "c")))
    alone.model.load_state_dict(make_module(student, OPD, teacher=Live()).policy.load()[0].state_dict())
    part = batch.select(torch.tensor([s == "a" for s in source]))
    assert values["first"][0] == pytest.approx(loss_and_gradients(alone, part, 10**9)[0], abs=1e-6)
    assert values["both"][0] != pytest.approx(values["first"][0], abs=1e-6)


# --- runs ------------------------------------------------------------------------------------------------------------


def following(policy: Path, **options: Any) -> OPD:
    teacher = told_the_answer(EMA(decay=0.5))
    return make_module(policy, OPD, **({"teacher": teacher, "divergence": Divergence(0.0)} | options))


def test_a_run_with_a_moving_privileged_teacher_resumes_exactly(tmp_path: Path):
    check_resume(tmp_path, module=following)


def mixture(policy: Path) -> OPD:
    return make_module(policy, OPD, teacher=FrozenCopy(), on_policy_fraction=0.4, loss="gkd")


@pytest.mark.slow
def test_two_ranks_train_like_one(tmp_path: Path):
    check_two_ranks(tmp_path, module=following)


@pytest.mark.parametrize("loss", ["gkd", "policy_gradient"])
def test_it_moves_the_student_towards_the_teacher(tmp_path: Path, loss: str):
    """Not a claim about quality: the divergence at the last batch's tokens, after training against before."""
    policy, teacher = make_policy(tmp_path / "policy"), Checkpoint(str(make_policy(tmp_path / "teacher", seed=3)))
    module = make_module(policy, OPD, teacher=teacher, loss=loss, max_rollouts=10, group_size=8)
    train(tmp_path / "run", module)
    batch, values = module.last_rollouts, []
    for model in (module.model, module.policy.load()[0]):
        module.model = model
        batch.token = {k: v for k, v in batch.token.items() if not k.startswith("divergence.")}
        teacher_comparison(module, batch)
        values.append(float(batch.token["divergence.reverse"][batch.kept_mask()].mean()))
    assert values[0] < 0.7 * values[1]


def test_offloaded_teachers_score_alike(tmp_path: Path):
    policy, other = make_policy(tmp_path / "policy"), str(make_policy(tmp_path / "teacher", seed=3))
    states = []
    for offload in (False, True):
        module = make_module(policy, OPD, teacher=Teacher(Checkpoint(other), offload=offload), max_rollouts=2)
        train(tmp_path / f"run{offload}", module)
        states.append(final_state(module))
    assert all(torch.equal(states[0][n], states[1][n]) for n in states[0])


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"loss": "kl"}, "loss must be"),
        ({"discount": 1.5}, "discount"),
        ({"temperature": 0.0}, "temperature"),
        ({"loss": "policy_gradient", "on_policy_fraction": 0.5}, "on_policy_fraction=1"),
        ({"on_policy_fraction": 1.5, "loss": "gkd"}, None),
        ({"on_policy_fraction": -0.5}, "fraction"),
        ({"teacher": []}, "needs a teacher"),
        ({"advantage": AdvantageNormalizer(), "rewards": []}, "rewards"),
        ({"advantage": AdvantageNormalizer(), "group_size": 1}, "group_size"),
    ],
)
def test_impossible_settings_are_refused(tmp_path: Path, options: dict, match: str | None):
    arguments = {"teacher": FrozenCopy()} | options
    with pytest.raises(ValueError, match=match or "on_policy_fraction"):
        make_module(tmp_path / "policy", OPD, **arguments)


def test_the_header_says_what_is_minimised(tmp_path: Path):
    gkd = make_module(tmp_path / "policy", OPD, teacher=told_the_answer(Live()), divergence=Divergence(0.0))
    assert "teacher: Live, shown answer" in gkd.describe()
    assert "loss: distill = KL(teacher || policy); token mean" in gkd.describe()
    pg = make_module(tmp_path / "policy", OPD, teacher=Live(), loss="policy_gradient", discount=0.5, surrogate=Clip())
    assert "advantage: 1 (log teacher - log policy), 0.5-discounted to go" in pg.describe()
