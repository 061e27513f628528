# SPDX-License-Identifier: Apache-2.0
"""RECAP against the numbers of its formulas, a loop, its limits, and on runs that mix sampling with replay."""

from __future__ import annotations

import math
import random
import statistics
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from callback_batches import Module, add_demonstrations, batch

from lit_rl.callbacks import RECAP, Objective
from lit_rl.callbacks.recap_objective import improvement_and_instability, objective_weights
from lit_rl.data import EvalSet, GeneratedStream, MixedStream, PromptDataModule
from lit_rl.methods.terms import LossTerm
from lit_rl.objectives import AdvantageNormalizer
from lit_rl.rewards import FunctionReward
from lit_rl.samplers import DatasetSampler
from lit_rl.testing import (
    StopAt,
    assert_same_weights,
    check_neutral,
    final_state,
    make_module,
    make_policy,
    toy_reward,
    train,
)
from lit_rl.testing.toys import toy_record


def scores(histories: list[list[float]], **options: Any) -> list[float]:
    return [sum(improvement_and_instability(history, **options)) for history in histories]


def test_a_falling_loss_scores_by_improvement_and_instability() -> None:
    falling, constant = [0.8, 0.8, 0.4, 0.4], [0.5] * 4
    assert improvement_and_instability(falling) == pytest.approx((2, 0.19245), abs=1e-5)
    assert improvement_and_instability(constant) == (1, 0)
    weights = scores([falling, constant])
    assert objective_weights(weights, 5) == pytest.approx([1.11868, 0.88132], abs=1e-5)
    assert objective_weights(weights, 1) == pytest.approx([1.53436, 0.46564], abs=1e-5)


def test_the_deviation_may_be_taken_around_the_current_mean() -> None:
    falling, constant = [0.8, 0.8, 0.4, 0.4], [0.5] * 4
    assert improvement_and_instability(falling, center="current")[1] == pytest.approx(0.27217, abs=1e-5)
    weights = objective_weights(scores([falling, constant], center="current"), 5)
    assert weights == pytest.approx([1.12653, 0.87347], abs=1e-5)


def test_a_volatile_loss_gains_weight_over_a_constant_one() -> None:
    weights = scores([[0.1] * 4, [0.8, 0.6, 0.7, 0.5]])
    assert weights == pytest.approx([1, 1.26597], abs=1e-5)
    assert objective_weights(weights, 5) == pytest.approx([0.97341, 1.02659], abs=1e-5)
    assert objective_weights(weights, 0.1) == pytest.approx([0.1308, 1.8692], abs=1e-4)


def test_weights_have_mean_one_and_reach_their_limits() -> None:
    rng = random.Random(3)
    for count in (1, 2, 5):
        values = [rng.uniform(0.5, 5) for _ in range(count)]
        assert statistics.mean(objective_weights(values, 5)) == pytest.approx(1)
        assert objective_weights(values, 1e9) == pytest.approx([1.0] * count)
        assert max(objective_weights(values, 1e-6)) == pytest.approx(count)
    assert objective_weights([3.7], 5) == [1]
    low, high = objective_weights([1.0, 2.0], 5)
    assert high / low == pytest.approx(math.exp(0.2), abs=1e-9)
    assert high / low == pytest.approx(1.2214, abs=1e-4)


def test_softmax_maximises_score_plus_entropy_over_the_simplex() -> None:
    values, temperature = [1.0, 1.4, 0.7], 0.5
    best = [w / 3 for w in objective_weights(values, temperature)]

    def target(p: list[float]) -> float:
        return sum(s * x - temperature * x * math.log(x) for s, x in zip(values, p))

    rng = random.Random(0)
    for _ in range(200):
        raw = [rng.expovariate(1) + 1e-9 for _ in values]
        assert target([x / sum(raw) for x in raw]) <= target(best) + 1e-12


def test_scores_do_not_depend_on_the_scale_of_an_objective() -> None:
    history = [0.9, 0.7, 0.8, 0.5, 0.6, 0.4]
    for center in ("all", "current"):
        expected = improvement_and_instability(history, center=center)
        assert improvement_and_instability([40 * x for x in history], center=center) == pytest.approx(expected)


@pytest.mark.parametrize("kind", ["loss", "reward"])
@pytest.mark.parametrize("center", ["all", "current"])
def test_the_signals_are_those_of_a_loop(kind: Any, center: Any) -> None:
    rng = random.Random(5)
    for half in (1, 2, 10):
        history = [rng.uniform(0.2, 1) for _ in range(2 * half)]
        previous, current = statistics.mean(history[:half]), statistics.mean(history[half:])
        around = current if center == "current" else statistics.mean(history)
        squares = 0.0
        for x in history:
            squares += (x - around) ** 2
        c = previous / current if kind == "loss" else current / previous
        i = math.sqrt(squares / (2 * half - 1)) / (previous + current)
        assert improvement_and_instability(history, kind, center) == pytest.approx((c, i))


def test_a_rising_reward_improves_and_a_reward_of_zero_does_not_explode() -> None:
    assert improvement_and_instability([0.3, 0.3, 0.9, 0.9], "reward")[0] == pytest.approx(3)
    assert improvement_and_instability([0.0] * 4, "reward") == (1, 0)
    assert improvement_and_instability([0.0, 0.0, 0.5, 0.5], "reward", cap=5.0)[0] == 5
    assert improvement_and_instability([1.0] * 4, "reward") == (1, 0)


OBJECTIVES = [Objective("math", "reward/exact", "reward", "source:toy"), Objective("replay", "loss/sft")]


def test_weights_are_one_until_two_windows_are_full() -> None:
    recap, module = RECAP(OBJECTIVES, window=2), Module()
    for step, (reward, loss) in enumerate([(0.3, 0.8), (0.3, 0.8), (0.9, 0.4), (0.9, 0.4)]):
        assert recap.weights == {"math": 1, "replay": 1}, step
        recap.on_metrics(None, module, {"reward/exact": reward, "loss/sft": loss})
    expected = objective_weights(scores([[0.3, 0.3, 0.9, 0.9]], kind="reward") + scores([[0.8, 0.8, 0.4, 0.4]]), 5)
    assert list(recap.weights.values()) == pytest.approx(expected)
    assert module.logged == {
        "recap/c/math": pytest.approx(3),
        "recap/c/replay": pytest.approx(2),
        "recap/i/math": pytest.approx(0.34641 / 1.2, abs=1e-5),
        "recap/i/replay": pytest.approx(0.19245, abs=1e-5),
        "recap/lambda/math": pytest.approx(expected[0]),
        "recap/lambda/replay": pytest.approx(expected[1]),
    }


def test_a_step_without_a_value_does_not_move_the_window() -> None:
    recap = RECAP(OBJECTIVES, window=1)
    for metrics in ({"reward/exact": 0.5}, {"loss/sft": 2.0}, {"reward/exact": math.nan, "loss/sft": 1.0}):
        recap.on_metrics(None, Module(), metrics)
    assert {k: list(v) for k, v in recap.history.items()} == {"math": [0.5], "replay": [2.0, 1.0]}
    assert recap.weights == {"math": 1, "replay": 1}


def test_an_objective_of_several_sources_is_the_mean_of_their_values() -> None:
    recap = RECAP([Objective("math", ["reward/a", "reward/b"], "reward", "loss:policy")], window=1)
    recap.on_metrics(None, Module(), {"reward/a": 0.2, "reward/b": 0.6})
    recap.on_metrics(None, Module(), {"reward/b": 0.5})
    assert list(recap.history["math"]) == pytest.approx([0.4, 0.5])


def test_each_kind_of_target_is_multiplied_and_nothing_else() -> None:
    recap = RECAP(
        [
            Objective("format", "reward/format", "reward"),
            Objective("toy", "reward/exact", "reward", "source:toy"),
            Objective("replay", "loss/sft"),
        ]
    )
    recap.weights = {"format": 0.5, "toy": 1.5, "replay": 1.25}
    rollouts = batch([[3, 4], [5, 2]], [[1.0, 0.0], [0.0, 1.0]], source=["toy", "other"])
    rollouts.reward_terms["format"] = torch.ones(4)
    rollouts.reward_weights["format"] = torch.tensor([1.0, 1.0, 0.0, 0.2])
    rollouts.advantages = torch.ones(4, rollouts.width)
    recap.on_rewards(None, None, rollouts)
    recap.on_advantages(None, None, rollouts)
    assert rollouts.reward_weights["format"].tolist() == pytest.approx([0.5, 0.5, 0.0, 0.1])
    assert rollouts.reward_weights["exact"].tolist() == [1.0] * 4
    assert rollouts.advantages[:, 0].tolist() == [1.5, 1.5, 1.0, 1.0]
    values = torch.ones(2, requires_grad=True)
    terms = [LossTerm(n, values, torch.ones(2), torch.tensor(2.0), 0.4) for n in ("policy", "sft")]
    recap.on_loss_terms(None, None, terms)
    assert [t.coefficient for t in terms] == pytest.approx([0.4, 0.5])


def test_demonstrations_of_other_sources_keep_their_advantages() -> None:
    recap = RECAP(OBJECTIVES)
    recap.weights["math"] = 2.0
    rollouts = add_demonstrations(batch([[3, 4]], [[1.0, 0.0]]), [5])
    rollouts.advantages = torch.ones(3, rollouts.width)
    recap.on_advantages(None, None, rollouts)
    assert rollouts.advantages[:, 0].tolist() == [2.0, 2.0, 1.0]


def module_with(*rewards: FunctionReward, scale: str = "group") -> Module:
    terms = [SimpleNamespace(name=name) for name in ("policy", "sft")]
    return Module(rewards=list(rewards), loss_terms=terms, advantage=AdvantageNormalizer(scale=scale))


def reward(name: str, **options: Any) -> FunctionReward:
    return FunctionReward(lambda rows: [0.0] * len(rows), name=name, **options)


def test_a_target_or_monitor_that_does_not_exist_is_refused() -> None:
    module = module_with(reward("exact"))
    for objective in (Objective("x", "loss/sfd"), Objective("x", "loss/sft", target="loss:sfd")):
        with pytest.raises(ValueError, match=r"there is.*'sft'|there is \['loss/policy', 'loss/sft'\]"):
            RECAP([objective]).check_setup(module)
    with pytest.raises(ValueError, match="reward/exact"):
        RECAP([Objective("x", "reward/exakt", "reward", "loss:policy")]).check_setup(module)


def test_a_reward_whose_weight_would_be_divided_out_again_is_refused() -> None:
    recap = RECAP([Objective("x", "reward/exact", "reward")])
    with pytest.raises(ValueError, match="takes the weight out again"):
        recap.check_setup(module_with(reward("exact")))
    with pytest.raises(ValueError, match="takes the weight out again"):
        recap.check_setup(module_with(reward("exact", sources=["a"]), reward("format", sources=["b"])))
    recap.check_setup(module_with(reward("exact"), scale="none"))
    recap.check_setup(module_with(reward("exact", sources=["a", "b"]), reward("format", sources=["b"])))


def test_objectives_without_meaning_are_refused() -> None:
    with pytest.raises(ValueError, match="surrogate"):
        Objective("x", "loss/policy")
    with pytest.raises(ValueError, match="needs a target"):
        Objective("x", "val/pass@1", "reward")
    with pytest.raises(ValueError, match="needs a target"):
        Objective("x", ["reward/a", "reward/b"], "reward")
    with pytest.raises(ValueError, match="kind"):
        Objective("x", "loss/sft", "lost")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="differ in their target"):
        RECAP([Objective("a", "loss/sft"), Objective("b", "loss/sft")])
    for options in ({"window": 0}, {"temperature": 0}, {"center": "mean"}):
        with pytest.raises(ValueError, match=next(iter(options))):
            RECAP(OBJECTIVES, **options)  # type: ignore[arg-type]


def test_a_value_that_is_never_logged_is_said_once() -> None:
    recap = RECAP([Objective("x", "policy/kll", "loss", "loss:policy")], window=2)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(12):
            recap.on_metrics(None, Module(), {"policy/kl": 0.1})
    assert [str(w.message) for w in caught if "policy/kll" in str(w.message)] == [
        "RECAP's 'x' watches 'policy/kll', which no step has logged so far. Logged are: policy/kl."
    ]


class Mixture(PromptDataModule):
    """Prompts to sample for, and text to replay, in equal parts."""

    def build(self, stage: str) -> None:
        def replayed(rng: random.Random) -> dict[str, Any]:
            digit = rng.randint(0, 9)
            return {"prompt": f"{digit}=", "completion": f"{digit}{digit}"}

        toy = GeneratedStream(toy_record, seed=1, source="toy")
        self.train_stream = MixedStream({"toy": toy, "replay": GeneratedStream(replayed, seed=2)}, seed=3)
        self.eval_sets = [EvalSet("toy", toy, limit=2)]


def mixed_module(policy: Path, **options: Any) -> Any:
    defaults: dict[str, Any] = {
        "rewards": [toy_reward(sources=["toy"])],
        "sampler": DatasetSampler(origin="replay"),
        "sft_coef": 0.5,
        "prompts_per_step": 8,
        "max_rollouts": 7,
    }
    return make_module(policy, **(defaults | options))


def mixed_recap(**options: Any) -> RECAP:
    objectives = [Objective("toy", "reward/digit", "reward", "source:toy"), Objective("replay", "loss/sft")]
    return RECAP(objectives, **{"window": 2, "temperature": 0.5, **options})


def test_a_run_that_mixes_sampling_and_replay_weighs_both_and_resumes_inside_the_window(tmp_path: Path) -> None:
    policy = make_policy(tmp_path / "policy")
    whole, first = mixed_module(policy), mixed_recap()
    train(tmp_path / "whole", whole, [first], data=Mixture())
    assert first.weights["toy"] != 1
    assert sum(first.weights.values()) == pytest.approx(2)
    for at in (3, 5):  # one value before both windows are full; with weights that the next step applies
        part, rest, second = mixed_module(policy), mixed_module(policy), mixed_recap()
        run = tmp_path / f"stopped at {at}"
        train(run, part, [mixed_recap(), StopAt(at)], data=Mixture())
        train(run, rest, [second], checkpoint=run / "checkpoints" / f"clock{at:08d}.ckpt", data=Mixture())
        assert_same_weights(final_state(whole), final_state(rest))
        assert first.state_dict() == second.state_dict()
    plain = mixed_module(policy)
    train(tmp_path / "plain", plain, data=Mixture())
    with pytest.raises(AssertionError, match="differs"):  # the weights do matter
        assert_same_weights(final_state(whole), final_state(plain))


def test_no_gradient_flows_through_the_weights() -> None:
    recap = mixed_recap()
    assert all(isinstance(w, float) for w in recap.weights.values())
    value = torch.tensor([2.0], requires_grad=True)
    term = LossTerm("sft", value, torch.ones(1), torch.tensor(1.0), 1.0)
    recap.weights["replay"] = 0.25
    recap.on_loss_terms(None, None, [term])
    term.loss().backward()
    assert value.grad is not None
    assert value.grad.item() == 0.25


def neutral() -> Iterator[RECAP]:
    objective = Objective("only", "reward/digit", "reward", "loss:policy")
    yield RECAP([objective], window=1)  # K = 1: its weight is 1
    yield RECAP([objective, Objective("other", "reward/digit", "reward", "source:toy")], window=1, temperature=math.inf)
    yield RECAP([objective], enabled=False)


def test_one_objective_or_infinite_temperature_leaves_the_run_untouched(tmp_path: Path) -> None:
    for k, callback in enumerate(neutral()):
        check_neutral(tmp_path / str(k), lambda callback=callback: [callback])
