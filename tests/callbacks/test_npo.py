# SPDX-License-Identifier: Apache-2.0
"""NPO: slot replacement against its numbers, and runs that go back and are replayed with and without a guide."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from callback_batches import NAN, Module, add_demonstrations, batch, grpo_advantages
from npo_runs import Diary, Numbers, guided_module, guides, hopeless_module, same_tokens

from lit_rl.callbacks import RECAP, DynamicSampling, NPOSchedule, Objective, PredictiveDynamicSampling, RewardAlarm
from lit_rl.callbacks.npo_guide import GuideCache, eligible_groups, replace_slots, sample_guide, sample_in_parts
from lit_rl.rollouts import Origin, Rollouts, StopReason
from lit_rl.testing import assert_same_weights, check_neutral, check_resume, final_state, make_policy, train


def cache(completions: dict[int, int], version: int = 9) -> GuideCache:
    """A guide's completions: draw -> number of tokens."""
    rollouts = batch([[n] for n in completions.values()], [[1.0]] * len(completions), draws=list(completions))
    rollouts.token["completion_ids"] += 100
    rollouts.token["logprobs.sampler"] *= 0.5
    return GuideCache.of(rollouts, range(len(completions)), version)


def inject(rollouts: Rollouts, guide: GuideCache, gate: float = 0.6, **options: Any) -> Rollouts:
    """Slot replacement with the verdict that the guide's completion deserves."""
    strict, is_mode = options.get("strict", False), options.get("is_mode", "on_policy")
    rollouts, rows = replace_slots(rollouts, eligible_groups(rollouts, guide, gate, strict), guide, is_mode)
    rollouts.correct[rows] = 1.0
    rollouts.reward_terms["exact"][rows] = 1.0
    return rollouts


@pytest.mark.parametrize(("ddof", "guide", "others"), [(1, 2.4749, -0.3536), (0, 2.6458, -0.3780)])
def test_a_guide_in_a_group_that_fails_gets_all_the_advantage(ddof: int, guide: float, others: float) -> None:
    rollouts = batch([[5] * 8], [[0.0] * 8])
    assert grpo_advantages(rollouts.rewards, rollouts.group).count_nonzero() == 0
    rollouts = inject(rollouts, cache({0: 4}))
    advantages = grpo_advantages(rollouts.rewards, rollouts.group, ddof)
    assert advantages.tolist() == pytest.approx([others] * 7 + [guide], abs=1e-4)
    if ddof:
        assert guide == pytest.approx(7 / math.sqrt(8), abs=1e-4)
        assert others == pytest.approx(-1 / math.sqrt(8), abs=1e-4)


def test_a_guide_in_a_group_that_is_half_right_moves_its_advantages() -> None:
    rollouts = batch([[5] * 8], [[1.0] * 4 + [0.0] * 4])
    assert grpo_advantages(rollouts.rewards, rollouts.group)[0] == pytest.approx(0.9354, abs=1e-4)
    rollouts = inject(rollouts, cache({0: 4}))
    assert rollouts.correct.sum() == 5
    advantages = grpo_advantages(rollouts.rewards, rollouts.group)
    assert advantages.tolist() == pytest.approx([0.7246] * 4 + [-1.2076] * 3 + [0.7246], abs=1e-4)


def test_the_gate_is_inclusive_unless_it_is_strict() -> None:
    above, at = [1.0] * 5 + [0.0] * 3, [1.0] * 3 + [0.0] * 2
    rollouts = batch([[5] * 8, [5] * 5, [5] * 2, [5] * 2], [above, at, [1.0, 1.0], [NAN, NAN]])
    guide = cache({0: 4, 1: 4, 2: 4, 3: 4})
    assert eligible_groups(rollouts, guide, 0.6).tolist() == [False, True, False, False]
    assert eligible_groups(rollouts, guide, 0.6, strict=True).tolist() == [False] * 4
    assert eligible_groups(rollouts, guide, 0.999).tolist() == [True, True, False, False]  # never an all-correct group


def test_without_a_cached_completion_or_below_any_gate_nothing_changes() -> None:
    rollouts = batch([[5, 3], [4, 4]], [[0.0, 0.0], [0.0, 1.0]])
    for guide, gate in ((cache({7: 4}), 0.6), (cache({0: 4, 1: 9}), -1.0)):
        assert inject(rollouts, guide, gate) is rollouts
        assert not rollouts.origin.any()


def test_exactly_the_last_slot_is_overwritten_with_all_that_is_known_of_the_guide() -> None:
    rollouts = batch([[5, 3, 2], [4, 4, 4], [2, 2, 2]], [[0.0] * 3] * 3, draws=[20, 21, 22])
    rollouts = rollouts.select(torch.tensor([2, 0, 1, 5, 4, 3, 6, 7, 8]))  # the last sample is not the last row
    rollouts.token["entropy"] = torch.ones(9, rollouts.width)
    before = rollouts.clone()
    guide = cache({20: 7, 22: 3}, version=6)
    guide.signals["stop_reason"][1] = int(StopReason.LENGTH)
    guide.signals["finished"][1] = False
    after, rows = replace_slots(rollouts, torch.tensor([True, False, True]), guide, "on_policy")
    assert rows.tolist() == [0, 8]
    assert rollouts.diff(before) == {}
    assert after.width == 7
    assert after.row["sample"].tolist() == before.row["sample"].tolist()
    assert after.completion_ids[0].tolist() == [101, 102, 103, 104, 105, 106, 107]
    assert after.completion_ids[8].tolist() == [101, 102, 103, 0, 0, 0, 0]
    assert after.loss_weights[8].tolist() == [1, 1, 1, 0, 0, 0, 0]
    assert after.token["policy_version"][8].tolist() == [6, 6, 6, 0, 0, 0, 0]
    assert after.logprobs["sampler"][0].tolist() == [-0.5] * 7
    assert after.token["entropy"][0].isnan().all()  # that of the policy on the guide's tokens is not known
    assert after.lengths[[0, 8]].tolist() == [7, 3]
    assert after.origin.tolist() == [1, 0, 0, 0, 0, 0, 0, 0, 1]
    assert after.row["stop_reason"][[0, 8]].tolist() == [StopReason.END, StopReason.LENGTH]
    assert after.finished[[0, 8]].tolist() == [True, False]
    others = torch.tensor([1, 2, 3, 4, 5, 6, 7])
    assert after.select(others).trim().diff(before.select(others)) == {}


def test_old_logprobs_of_the_slot_follow_the_mode() -> None:
    rollouts = batch([[2, 2]], [[0.0, 0.0]])
    on_policy, _ = replace_slots(rollouts, torch.tensor([True]), cache({0: 3}), "on_policy")
    assert "old" not in on_policy.logprobs  # the current policy's
    exact, _ = replace_slots(rollouts, torch.tensor([True]), cache({0: 3}), "exact")
    assert exact.logprobs["old"][1].tolist() == [-0.5] * 3
    assert exact.logprobs["old"][0].isnan().all()
    rollouts.logprobs["old"] = torch.full((2, 2), -2.0)
    on_policy, _ = replace_slots(rollouts, torch.tensor([True]), cache({0: 3}), "on_policy")
    assert on_policy.logprobs["old"][1].isnan().all()
    assert on_policy.logprobs["old"][0, :2].tolist() == [-2.0, -2.0]


def test_a_group_gets_one_guide_and_demonstrations_none() -> None:
    rollouts = add_demonstrations(batch([[5, 5, 5]], [[0.0, 0.0, 0.0]]), [4, 6], verdict=0.0)
    guide = cache({0: 4, 1: 4, 2: 4})
    assert eligible_groups(rollouts, guide, 0.9).tolist() == [True, False, False]
    assert not eligible_groups(inject(rollouts, guide), guide, 0.9).any()


def test_the_guide_gives_its_first_correct_completion_of_each_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = [
        batch([[2, 3, 4], [5, 6, 7]], [[0.0, 1.0, 1.0], [0.0, 0.0, NAN]], draws=[7, 8]),
        batch([[9, 1, 2], [3, 3, 3]], [[1.0, 0.0, 0.0], [NAN] * 3], draws=[9, 4]),
    ]
    monkeypatch.setattr("lit_rl.callbacks.npo_guide.sample_in_parts", lambda *args: iter(parts))
    guide, accuracy = sample_guide(Module(policy_version=5), [7, 8, 9, 4], 3)
    assert {draw: guide.length(draw) for draw in guide.index} == {7: 3, 9: 9}
    assert guide.version == 5
    assert accuracy[7] == pytest.approx(2 / 3)
    assert (accuracy[8], accuracy[9]) == pytest.approx((0, 1 / 3))
    assert math.isnan(accuracy[4])


def test_caches_are_joined_selected_and_restored() -> None:
    parts = [cache({3: 4, 8: 2}), cache({}), cache({5: 6})]
    joined = GuideCache.cat(parts)
    assert [joined.length(draw) for draw in (3, 8, 5)] == [4, 2, 6]
    assert 4 not in joined
    chosen = GuideCache(**joined.only({5, 8}).state_dict())
    assert len(chosen) == 2
    rollouts, _ = replace_slots(batch([[1]], [[0.0]], draws=[5]), torch.tensor([True]), chosen, "on_policy")
    assert rollouts.completion_ids[0].tolist() == [101, 102, 103, 104, 105, 106]
    assert len(joined.only(set())) == 0


def test_a_list_that_drops_failing_groups_first_is_refused() -> None:
    npo = NPOSchedule(0, 4)
    with pytest.raises(ValueError, match="list NPOSchedule before DynamicSampling"):
        npo.check_setup(Module([DynamicSampling(), npo]))
    npo.check_setup(Module([npo, DynamicSampling()]))


def test_arguments_without_meaning_are_refused() -> None:
    for start, end in ((-1, 4), (4, 4)):
        with pytest.raises(ValueError, match="start < end"):
            NPOSchedule(start, end)
    with pytest.raises(ValueError, match="samples"):
        NPOSchedule(0, 4, samples=0)
    with pytest.raises(ValueError, match="is_mode"):
        NPOSchedule(0, 4, is_mode="offline")  # type: ignore[arg-type]
    npo = NPOSchedule(0, 101)
    with pytest.raises(ValueError, match="never goes back: the run has 100 rollouts"):
        npo.check_setup(Module([npo]))


def test_a_replay_with_nothing_to_inject_is_the_original_bit_by_bit(tmp_path: Path) -> None:
    """Up to the last rollout: the run must not end at the step at which it goes back."""
    policy = make_policy(tmp_path / "policy")
    plain, replayed = hopeless_module(policy), hopeless_module(policy)
    diary = Diary()

    def others() -> list[Any]:
        objectives = [Objective("a", "loss/kl"), Objective("b", "reward/digit", "reward", "loss:policy")]
        return [PredictiveDynamicSampling(history=2), RECAP(objectives, window=1)]

    train(tmp_path / "plain", plain, others())
    train(tmp_path / "replayed", replayed, [NPOSchedule(1, 4), diary, *others()])
    assert diary.clocks == [0, 1, 2, 3, 4, 5, 6]
    assert diary.steps == [0, 1, 2, 3, 1, 2, 3]
    for first, second in ((1, 4), (2, 5), (3, 6)):
        assert_same_weights(diary.weights[first], diary.weights[second])
        assert same_tokens(diary.batches[first], diary.batches[second])
        assert torch.equal(diary.batches[first].advantages, diary.batches[second].advantages)
        assert diary.cursors[first] == diary.cursors[second]
        assert diary.rates[first] == diary.rates[second]
        assert diary.references[first] == diary.references[second]
    assert len({str(reference) for reference in diary.references}) == 2  # it was refreshed, and given back
    assert_same_weights(final_state(plain), final_state(replayed))
    assert (replayed.rollout_step, replayed.clock, replayed.cursor) == (4, 7, plain.cursor)
    assert replayed.policy_version > plain.policy_version


@pytest.mark.parametrize("is_mode", ["on_policy", "exact"])
def test_a_guide_takes_the_last_slot_of_groups_that_fail(tmp_path: Path, is_mode: Any) -> None:
    policy, diary, numbers = make_policy(tmp_path / "policy"), Diary(), Numbers()
    module = guided_module(policy)
    npo = NPOSchedule(1, 4, samples=16, is_mode=is_mode)
    train(tmp_path / "run", module, [npo, diary, numbers])
    assert diary.steps == [0, 1, 2, 3, 1, 2, 3, 4]
    counts = guides(diary.batches)
    assert counts[:4] == [0] * 4
    assert sum(counts[4:7]) > 0
    assert counts[7] == 0  # the cache is dropped at the end of the replay
    assert numbers.series("npo/injected_groups") == counts[4:7]
    assert all(c >= n for c, n in zip(numbers.series("npo/candidates"), counts[4:7]))
    assert numbers.series("npo/replaying") == [0, 0, 0, 0, 1, 1, 1, 0]
    assert numbers.series("rollout_step") == [0, 1, 2, 3, 1, 2, 3, 4]
    assert len(numbers.series("npo/guide_ratio_mean")) == sum(n > 0 for n in counts)
    ratios = [numbers.logged[clock]["policy/ratio_max"] for clock, n in enumerate(counts) if n]
    if is_mode == "on_policy":
        assert ratios == [1.0] * len(ratios)  # exactly, on the first update
    else:
        assert all(ratio != 1 for ratio in ratios)
        mean = [numbers.logged[clock]["npo/guide_ratio_mean"] for clock, n in enumerate(counts) if n]
        assert all(0 < m <= r for m, r in zip(mean, ratios))
    for rollouts in diary.batches[4:7]:
        for row in (rollouts.origin == Origin.GUIDE).nonzero()[:, 0].tolist():
            group = rollouts.group == rollouts.group[row]
            assert rollouts.row["sample"][row] == rollouts.row["sample"][group].max()
            assert rollouts.correct[row] == rollouts.rewards[row] == 1
            others = group & (rollouts.origin == Origin.POLICY)
            assert rollouts.correct[others].sum() <= 0.6 * group.sum()


def test_the_first_replayed_step_differs_from_the_original_in_the_guides_only(tmp_path: Path) -> None:
    diary = Diary()
    train(tmp_path / "run", guided_module(make_policy(tmp_path / "policy")), [NPOSchedule(0, 3, samples=16), diary])
    first, again = diary.batches[0], diary.batches[3]
    own = again.origin == Origin.POLICY
    assert 0 < int(own.sum()) < len(own)
    assert torch.equal(first.completion_ids[own], again.completion_ids[own][:, : first.width])
    assert torch.equal(first.prompts.draw, again.prompts.draw)


def test_a_run_killed_inside_the_rewound_segment_resumes_exactly(tmp_path: Path) -> None:
    built: list[NPOSchedule] = []

    def callbacks() -> list[Any]:
        built.append(NPOSchedule(1, 3, samples=16))
        return [built[-1], PredictiveDynamicSampling(history=2)]

    check_resume(tmp_path, callbacks, guided_module, at=4)  # steps 0 1 2, back, 1 | 2, 3 4
    assert built[0].done
    assert built[2].cache is not None, "the run was not stopped inside the replay"
    assert len(built[2].cache) > 0


def test_a_run_killed_before_it_goes_back_resumes_exactly(tmp_path: Path) -> None:
    check_resume(tmp_path, lambda: [NPOSchedule(1, 4, samples=16)], guided_module, at=3)


def test_a_gate_below_zero_leaves_the_run_untouched(tmp_path: Path) -> None:
    check_neutral(tmp_path, lambda: [NPOSchedule(1, 3, gate=-1)], guided_module)


def test_a_run_that_is_resumed_behind_the_start_of_the_segment_is_refused(tmp_path: Path) -> None:
    policy = make_policy(tmp_path / "policy")
    train(tmp_path / "run", guided_module(policy, max_rollouts=2))
    checkpoint = tmp_path / "run" / "checkpoints" / "clock00000002.ckpt"
    with pytest.raises(ValueError, match="no state of that step was saved"):
        train(tmp_path / "run", guided_module(policy), [NPOSchedule(1, 4)], checkpoint=checkpoint)


def test_another_rewind_makes_the_segment_forget_its_abandoned_part() -> None:
    npo = NPOSchedule(2, 9)
    npo.ring.forget_after = lambda step: None  # type: ignore[method-assign]
    npo.segment = [(2, 10), (3, 11), (4, 12)]
    npo.on_rewind(None, None, 3)
    assert npo.segment == [(2, 10)]


def test_prompts_are_sampled_in_parts_of_a_training_batch(tmp_path: Path) -> None:
    policy, sizes = make_policy(tmp_path / "policy"), []

    class Sample(RewardAlarm):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
            parts = list(sample_in_parts(pl_module, range(7), 5, "test"))
            sizes.extend(len(part) for part in parts)
            assert [d for part in parts for d in part.prompts.draw.tolist()] == list(range(7))
            assert pl_module.numbers["npo/guide_tokens"] == sum(int(part.lengths.sum()) for part in parts)

    train(tmp_path / "run", guided_module(policy, max_rollouts=1), [Sample()])
    assert sizes == [15, 15, 5]  # of at most 4 x 4 completions
