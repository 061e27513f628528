# SPDX-License-Identifier: Apache-2.0
"""AutoNPO: its trigger, its choice of a distance, and runs in which it decides to go back."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from callback_batches import NAN, Module, add_demonstrations, batch
from npo_runs import Diary, Numbers, guided_module, guides, hopeless_module, same_tokens

from lit_rl.callbacks import RECAP, AutoNPO, Bound, DivergenceGuard, DynamicSampling, Objective
from lit_rl.callbacks.npo_guide import GuideCache
from lit_rl.callbacks.npo_trigger import Stagnation, choose_distance
from lit_rl.rewind import StateRing, weights_of
from lit_rl.testing import check_neutral, check_resume, final_state, make_policy, train


def saturating_quality(distance: float) -> float:
    return 1 - math.exp(-distance / 30)


def test_the_best_distance_balances_saturating_quality_against_exponential_variance() -> None:
    def score(d: float) -> float:
        return saturating_quality(d) / math.exp(d / 40)

    best = 30 * math.log(1 + 40 / 30)
    assert best == pytest.approx(25.42, abs=0.01)
    assert score(best) == pytest.approx(0.3027, abs=1e-4)
    expected = {20: 0.2951, 25: 0.3026, 30: 0.2986, 40: 0.2709}
    assert {d: score(d) for d in expected} == pytest.approx(expected, abs=1e-4)
    candidates = range(1, 80)
    quality = {d: saturating_quality(d) for d in candidates}
    assert choose_distance(quality, {d: math.exp(d / 40) for d in candidates}) == 25


def test_raw_kl_without_floor_always_chooses_the_smallest_distance() -> None:
    distances = (20, 25, 30, 40)
    quality = {d: saturating_quality(d) for d in distances}
    raw = {d: 0.002 * d for d in distances}
    scores = [quality[d] / raw[d] for d in distances]
    assert scores == pytest.approx([12.16, 11.31, 10.54, 9.21], abs=0.01)
    assert choose_distance(quality, raw) == 20
    assert choose_distance(quality, {d: max(v, 0.08) for d, v in raw.items()}) == 40  # the floor lets quality decide


def test_equal_scores_choose_the_smaller_distance() -> None:
    assert choose_distance({30: 0.5, 20: 0.5}, {30: 1.0, 20: 1.0}) == 20


def steps_until_fired(rewards: Any, entropies: Any, **options: Any) -> int | None:
    trigger = Stagnation(**{"window": 5, "decay": 0.5, **options})
    for step in range(60):
        if trigger.update(rewards(step), entropies(step)):
            return step
    return None


def test_only_a_flat_reward_with_falling_entropy_triggers() -> None:
    def flat(step: int) -> float:
        return 0.5

    def rising(step: int) -> float:
        return 0.01 * step

    def falling(step: int) -> float:
        return 2 * 0.95**step

    assert steps_until_fired(flat, falling) == 5  # as soon as two values are a window apart
    assert steps_until_fired(flat, flat) is None
    assert steps_until_fired(rising, falling) is None
    assert steps_until_fired(rising, flat) is None
    assert steps_until_fired(falling, falling) == 5  # a falling reward stagnates too
    assert steps_until_fired(flat, rising) is None
    assert (
        steps_until_fired(flat, lambda step: 2 * 0.999**step) is None
    )  # it falls, but by less than 5 % over the window


def test_the_averages_are_those_of_a_loop() -> None:
    trigger = Stagnation(decay=0.9, window=3, reward_gain=0.0, entropy_drop=0.0)
    rewards = [0.2, 0.5, 0.1, 0.4, 0.3, 0.6]
    entropies = [1.0, 0.8, 0.9, 0.7, 0.95, 0.5]
    fired = [trigger.update(*pair) for pair in zip(rewards, entropies)]
    smooth = {"r": [rewards[0]], "h": [entropies[0]]}
    for reward, entropy in zip(rewards[1:], entropies[1:]):
        smooth["r"].append(0.9 * smooth["r"][-1] + 0.1 * reward)
        smooth["h"].append(0.9 * smooth["h"][-1] + 0.1 * entropy)
    expected = [False] * 3
    for t in range(3, 6):
        expected.append(smooth["r"][t] - smooth["r"][t - 3] < 0 and smooth["h"][t] < smooth["h"][t - 3])
    assert fired == expected
    assert list(trigger.rewards) == pytest.approx(smooth["r"][-4:])


EAGER: dict[str, Any] = {
    "distances": (2, 4),
    "window": 1,
    "decay": 0.0,
    "reward_gain": 100.0,  # any reward stagnates
    "entropy_drop": -100.0,  # any entropy falls
    "probe_pass_rate": 0.01,
    "mistake_accuracy": 0.5,
    "samples": 8,
    "max_interventions": 1,
}


def eager(**options: Any) -> AutoNPO:
    return AutoNPO(**{**EAGER, **options})


def test_a_run_goes_back_by_a_saved_distance_and_replays_the_same_prompts_with_guides(tmp_path: Path) -> None:
    diary, numbers, npo = Diary(), Numbers(), eager()
    module = guided_module(make_policy(tmp_path / "policy"), max_rollouts=6)
    train(tmp_path / "run", module, [npo, diary, numbers])
    assert npo.interventions == 1
    (distance,) = numbers.series("npo/delta_star")
    clock = next(c for c, logged in numbers.logged.items() if "npo/delta_star" in logged)
    now = diary.steps[clock] + 1  # rollout step at which it decided
    assert now % 2 == 0
    back = diary.steps[clock + 1]
    assert back == now - distance
    assert diary.clocks == list(range(6 + int(distance)))
    assert diary.steps == [*range(now), *range(back, 6)]
    for replayed, original in zip(range(clock + 1, clock + 1 + int(distance)), range(back, now)):
        assert torch.equal(diary.batches[replayed].prompts.draw, diary.batches[original].prompts.draw)
        assert diary.cursors[replayed] == diary.cursors[original]
    assert sum(guides(diary.batches[clock + 1 : clock + 1 + int(distance)])) > 0
    assert sum(guides(diary.batches[clock + 1 + int(distance) :])) == 0
    replaying = [float(k in range(clock + 1, clock + 1 + int(distance))) for k in diary.clocks]
    assert numbers.series("npo/replaying") == replaying


def test_every_number_is_logged_when_it_is_known(tmp_path: Path) -> None:
    numbers, npo = Numbers(), eager()
    train(tmp_path / "run", guided_module(make_policy(tmp_path / "policy"), max_rollouts=6), [npo, numbers])
    assert len(numbers.series("npo/pool_size")) == len(numbers.series("npo/trigger")) == len(numbers.logged)
    decided = next(logged for logged in numbers.logged.values() if "npo/delta_star" in logged)
    assert decided["npo/trigger"] == 1
    assert 0 < decided["npo/probe_pass_rate"] <= 1
    best = int(decided["npo/delta_star"])
    for name in ("q_hat", "v_hat", "s_hat"):
        assert decided[f"npo/{name}"] == decided[f"npo/{name}_{best}"]
    assert 0 < decided["npo/q_hat"] <= 1
    assert decided["npo/v_hat"] > 1  # exp of a positive KL
    assert decided["npo/s_hat"] == pytest.approx(decided["npo/q_hat"] / decided["npo/v_hat"])
    for name in ("npo/candidates", "npo/injected_groups", "npo/guide_ratio_mean"):
        assert numbers.series(name)
    assert len(numbers.series("npo/delta_star")) == 1  # and only then


def test_a_probe_that_solves_nothing_cancels(tmp_path: Path) -> None:
    numbers, npo = Numbers(), eager()
    module = hopeless_module(make_policy(tmp_path / "policy"), updates_per_rollout=1, max_rollouts=5)
    train(tmp_path / "run", module, [npo, numbers])
    assert numbers.series("npo/pool_size")[-1] > 0
    assert set(numbers.series("npo/probe_pass_rate")) == {0.0}
    assert npo.interventions == 0
    assert module.clock == module.rollout_step == 5


def test_with_nothing_to_inject_a_replay_is_the_original_bit_by_bit(tmp_path: Path) -> None:
    diary = Diary()
    check_neutral(tmp_path, lambda: [eager(gate=-1.0), diary], guided_module)
    assert len(diary.clocks) > 5, "the run did not go back"
    repeated = [step for step in set(diary.steps) if diary.steps.count(step) == 2]
    for step in repeated:
        first, second = (i for i, s in enumerate(diary.steps) if s == step)
        assert same_tokens(diary.batches[first], diary.batches[second])


def test_without_interventions_the_run_is_untouched_and_nothing_is_saved(tmp_path: Path) -> None:
    check_neutral(tmp_path, lambda: [eager(max_interventions=0)], guided_module)
    assert not list((tmp_path / "changed" / "autonpo").glob("step*"))


def test_a_run_killed_inside_the_rewound_segment_resumes_exactly(tmp_path: Path) -> None:
    built: list[AutoNPO] = []

    def callbacks() -> list[Any]:
        built.append(eager())
        recap = RECAP([Objective("a", "reward/answer", "reward", "loss:policy")], window=1)
        return [built[-1], recap]

    check_resume(tmp_path, callbacks, guided_module, at=3)
    assert built[0].interventions == 1
    assert built[2].cache is not None, "the run was not stopped inside the replay"


def test_the_pool_holds_failing_prompts_as_they_were_before_slots_were_replaced() -> None:
    npo, module = eager(mistake_accuracy=0.25, pool_size=3), Module()
    module.rollout_step = 5
    rollouts = batch(
        [[4] * 4] * 5,
        [[0.0] * 4, [1.0, 0, 0, 0], [1.0, 1, 0, 0], [NAN] * 4, [0.0, 0, 0, NAN]],
        draws=range(20, 25),
    )
    npo.on_rewards(None, module, add_demonstrations(rollouts, [3, 3], 0.0))
    assert list(npo.pool) == [(5, 20), (5, 21), (5, 24)]
    module.rollout_step = 6
    npo.on_rewards(None, module, batch([[4] * 4], [[0.0] * 4], draws=[30]))
    assert list(npo.pool) == [(5, 21), (5, 24), (6, 30)]  # first in, first out
    npo.ring.forget_after = lambda step: None  # type: ignore[method-assign]
    npo.on_rewind(None, module, 6)
    assert list(npo.pool) == [(5, 21), (5, 24)]


class Decision(AutoNPO):
    """Decides at rollout step 40 without a policy: what it samples and how far it goes back is recorded."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, verdicts: list[float], **options: Any) -> None:
        super().__init__(**{"distances": (10, 20, 30), **options})
        self.ring.files = {10: "a", 20: "b", 30: "c"}
        self.pool.extend([(9, 1), (10, 2), (19, 3), (20, 4), (29, 5), (30, 6), (39, 7)])
        self.asked: list[int] = []
        self.went: list[tuple[int, list[int]]] = []
        probe = batch([[3] * len(verdicts)], [verdicts])
        rate = {2: 0.0, 3: 0.5, 4: 0.5, 5: 1.0, 6: 1.0, 7: 0.0}  # Q of 10: 0.5, of 20: 0.625, of 30: 0.5

        def guide(module: Any, draws: list[int], samples: int) -> Any:
            self.asked = list(draws)
            solved = [draw for draw in draws if rate[draw]]
            rollouts = batch([[2]] * len(solved), [[1.0]] * len(solved), draws=solved)
            return GuideCache.of(rollouts, range(len(solved)), 1), {draw: rate[draw] for draw in draws}

        monkeypatch.setattr("lit_rl.callbacks.autonpo.sample_in_parts", lambda *args: iter([probe]))
        monkeypatch.setattr("lit_rl.callbacks.autonpo.sample_guide", guide)

    def variance(self, module: Any, probe: Any, step: int) -> float:
        return {30: 1.0, 20: 1.1, 10: 2.0}[step]

    def replay(self, module: Any, cache: GuideCache, step: int) -> None:
        self.went.append((step, sorted(cache.index)))


def test_the_guide_tries_the_failures_of_the_longest_segment_and_helps_with_those_of_the_chosen_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    npo, module = Decision(monkeypatch, [1.0, 0.0]), Module(rollout_step=40)
    npo.consider(module)
    assert npo.asked == [2, 3, 4, 5, 6, 7]  # since step 10, that one included
    assert npo.went == [(20, [4, 5, 6])]
    assert npo.interventions == 1
    assert module.logged["npo/delta_star"] == 20
    assert {d: module.logged[f"npo/q_hat_{d}"] for d in (10, 20, 30)} == {10: 0.5, 20: 0.625, 30: 0.5}
    assert module.logged["npo/s_hat"] == pytest.approx(0.625 / 1.1)


@pytest.mark.parametrize(("verdicts", "goes"), [([1, 0, 0], True), ([1, 0, 0, 0], False), ([1, NAN, NAN, 0], True)])
def test_the_probe_confirms_from_its_pass_rate_on(monkeypatch: pytest.MonkeyPatch, verdicts: Any, goes: bool) -> None:
    npo, module = Decision(monkeypatch, [float(v) for v in verdicts], probe_pass_rate=0.3), Module(rollout_step=40)
    npo.consider(module)
    assert bool(npo.went) == goes


@pytest.mark.parametrize("verdicts", [[0.0, 0.0], [NAN, NAN]])
def test_a_probe_without_a_right_answer_never_confirms(monkeypatch: pytest.MonkeyPatch, verdicts: list[float]) -> None:
    npo, module = Decision(monkeypatch, verdicts, probe_pass_rate=0.0), Module(rollout_step=40)
    npo.consider(module)
    assert module.logged == {"npo/probe_pass_rate": 0}
    assert not npo.went


def test_without_a_state_at_a_candidate_distance_nothing_is_sampled(monkeypatch: pytest.MonkeyPatch) -> None:
    npo, module = Decision(monkeypatch, [1.0]), Module(rollout_step=41)
    npo.consider(module)
    assert not module.logged
    npo.pool.clear()
    module.rollout_step = 40
    npo.consider(module)
    assert not module.logged


def test_at_the_end_of_a_replay_the_trigger_starts_from_nothing() -> None:
    npo, module = eager(max_interventions=2), Module(rollout_step=4, interrupted=False)
    npo.ring.files = {4: "here"}
    npo.cache, npo.replay_until = GuideCache(torch.zeros(0), torch.zeros(0), {}, 0), 5
    npo.trigger.update(0.1, 0.2)
    npo.on_train_batch_end(None, module, None, None, 0)
    assert npo.cache is not None
    assert npo.trigger.rewards
    module.rollout_step = 5
    npo.on_train_batch_end(None, module, None, None, 0)
    assert npo.cache is None
    assert not npo.trigger.rewards


def test_the_pass_rate_on_the_pool_leaves_out_what_could_not_be_scored() -> None:
    npo = eager()
    accuracy = {1: 0.5, 2: 1.0, 3: NAN, 4: 0.0}
    assert npo.quality(accuracy, {1, 2}) == 0.75
    assert npo.quality(accuracy, {1, 3, 4, 9}) == 0.25
    assert npo.quality(accuracy, {3}) == 0


def test_variance_grows_with_the_divergence_between_the_two_policies(tmp_path: Path) -> None:
    seen: dict[str, Any] = {}

    class Measure(AutoNPO):
        def consider(self, module: Any) -> None:
            if module.rollout_step != 4:
                return
            mine = module.last_rollouts
            seen["steps"] = self.ring.steps()
            present, _ = module.policy_logprobs(mine, module.model)
            before = final_state(module)
            for step in (0, 2):
                with weights_of(module, self.ring, step):
                    earlier, _ = module.policy_logprobs(mine, module.model)
                total, tokens = 0.0, 0
                for row in range(len(mine)):
                    for t in range(int(mine.lengths[row])):
                        gap = float(earlier[row, t]) - float(present[row, t])
                        total, tokens = total + math.exp(gap) - gap - 1, tokens + 1
                k, length = total / tokens, tokens / len(mine)
                assert self.variance(module, [mine], step) == pytest.approx(math.exp(k * length), rel=1e-4)
                self.v_mode = "kl"
                assert self.variance(module, [mine], step) == pytest.approx(max(k, self.v_floor), rel=1e-4)
                self.v_mode = "exp"
                seen[f"kl{step}"] = k
            for name, value in final_state(module).items():
                assert torch.equal(value, before[name])

    module = guided_module(make_policy(tmp_path / "policy"))
    train(tmp_path / "run", module, [Measure(**EAGER)])
    assert seen["steps"] == [0, 2]
    assert seen["kl0"] > seen["kl2"] > 0


def test_states_are_saved_where_distances_reach_and_bounded(tmp_path: Path) -> None:
    npo = eager(probe_pass_rate=2.0)  # never confirms
    module = guided_module(make_policy(tmp_path / "policy"), max_rollouts=9)
    train(tmp_path / "run", module, [npo])
    assert npo.ring.steps() == [4, 6, 8]
    assert isinstance(npo.ring, StateRing)
    files = sorted(path.name[:12] for path in (tmp_path / "run" / "autonpo").glob("step*"))
    assert files == ["step00000004", "step00000006", "step00000008"]


def test_setup_asks_for_entropies_and_for_all_groups() -> None:
    npo = AutoNPO()
    with pytest.raises(ValueError, match="keep_entropy"):
        npo.check_setup(Module([npo], keep_entropy=False))
    npo = AutoNPO(entropy_monitor="policy/kl_reference")
    npo.check_setup(Module([npo], keep_entropy=False))
    with pytest.raises(ValueError, match="list AutoNPO before DynamicSampling"):
        npo.check_setup(Module([DynamicSampling(), npo]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"distances": ()}, "distances"),
        ({"distances": (0, 3)}, "distances"),
        ({"v_mode": "k3"}, "v_mode"),
        ({"is_mode": "off"}, "is_mode"),
        ({"pool_size": 0}, "pool_size"),
        ({"window": 0}, "window"),
        ({"decay": 1.0}, "decay"),
        ({"samples": 0}, "samples"),
    ],
)
def test_arguments_without_meaning_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AutoNPO(**options)


def test_a_guard_and_autonpo_rewind_the_same_run(tmp_path: Path) -> None:
    """Whoever goes back, the other forgets the abandoned future."""
    npo, diary = eager(max_interventions=9, probe_pass_rate=2.0), Diary()
    guard = DivergenceGuard([Bound("rollout_step", high=3.5)], every=2, max_rewinds=1)
    module = guided_module(make_policy(tmp_path / "policy"), max_rollouts=9)
    train(tmp_path / "run", module, [npo, guard, diary])
    assert diary.steps == [0, 1, 2, 3, 4, 4]  # back once, then stopped
    assert npo.ring.steps() == [0, 2, 4]
    assert all(step <= 4 for step, _ in npo.pool)
    assert len(npo.pool) == len(set(npo.pool))
