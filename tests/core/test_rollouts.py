# SPDX-License-Identifier: Apache-2.0
"""The data contract: selecting, joining, cutting and saving keep every signal with its row."""

import math

import pytest
import torch

from lit_rl.rollouts import Origin, Prompts, Rollouts, StopReason, occurrence
from lit_rl.storage import load_rollouts, readable_rows, save_rollouts


def make_prompts(n: int) -> Prompts:
    return Prompts(
        ids=[torch.arange(1, 2 + i) for i in range(n)],
        text=[f"p{i}" for i in range(n)],
        uid=torch.arange(n) + 100,
        draw=torch.arange(n) + 200,
        source=["a" if i % 2 else "b" for i in range(n)],
        columns={"answer": [str(i) for i in range(n)]},
    )


def make_rollouts(lengths: list[int], group: list[int]) -> Rollouts:
    ids = [torch.arange(1, n + 1) + 10 * i for i, n in enumerate(lengths)]
    logprobs = [-torch.arange(1.0, n + 1) for n in lengths]
    rollouts = Rollouts.build(make_prompts(max(group) + 1), torch.tensor(group), ids, sampler_logprobs=logprobs)
    rollouts.reward_terms["math"] = torch.arange(len(lengths), dtype=torch.float32)
    rollouts.reward_weights["math"] = torch.ones(len(lengths))
    return rollouts


def test_build_pads_on_the_right_and_masks_what_was_generated():
    rollouts = make_rollouts([3, 0, 2], [1, 0, 1])
    assert rollouts.completions() == [[1, 2, 3], [], [21, 22]]
    assert rollouts.completion_mask.tolist() == [[True] * 3, [False] * 3, [True, True, False]]
    assert rollouts.logprobs["sampler"][2].tolist() == [-1.0, -2.0, 0.0]
    assert rollouts.row["sample"].tolist() == [0, 0, 1]


def test_select_keeps_rows_together_with_their_prompts():
    rollouts = make_rollouts([1, 2, 3, 4], [2, 0, 1, 2])
    picked = rollouts.select(torch.tensor([3, 0]))
    assert picked.completions() == [[31, 32, 33, 34], [1]]
    assert [picked.prompts.text[g] for g in picked.group] == ["p2", "p2"]
    assert picked.prompts.columns["answer"] == ["2"]
    by_mask = rollouts.select(rollouts.lengths > 2)
    assert by_mask.completions() == [[21, 22, 23], [31, 32, 33, 34]]


def test_select_of_nothing_and_cat_with_nothing():
    rollouts = make_rollouts([1, 2], [0, 1])
    nothing = rollouts.select(torch.zeros(0, dtype=torch.long))
    assert len(nothing) == len(nothing.prompts) == 0
    assert Rollouts.cat([nothing, rollouts]).completions() == rollouts.completions()


def test_cat_keeps_groups_and_units_apart_and_pads():
    first, second = make_rollouts([1, 2], [0, 0]), make_rollouts([4], [0])
    second.row["extra"] = torch.tensor([5.0])
    both = Rollouts.cat([first, second])
    assert both.group.tolist() == [0, 0, 1]
    assert both.unit.tolist() == [0, 1, 2]
    assert both.width == 4
    assert both.completions() == [[1], [11, 12], [1, 2, 3, 4]]
    assert math.isnan(both.row["extra"][0])
    assert both.row["extra"][2] == 5


def test_cat_does_not_invent_log_probabilities_and_what_it_does_not_know_does_not_train():
    first, second = make_rollouts([2], [0]), make_rollouts([1], [0])
    first.logprobs["old"] = torch.tensor([[-1.0, -2.0]])
    first.advantages = torch.ones(1, 2)
    del second.token["loss_weights"]
    both = Rollouts.cat([first, second])
    assert both.logprobs["old"][0].tolist() == [-1.0, -2.0]
    assert both.logprobs["old"][1].isnan().all()  # 0 would be a probability of 1
    assert both.advantages.tolist() == [[1.0, 1.0], [0.0, 0.0]]
    assert both.loss_weights[1].tolist() == [0.0, 0.0]


def test_cat_of_selections_is_the_batch_again():
    rollouts = make_rollouts([3, 1, 2, 5], [0, 1, 0, 1])
    parts = [rollouts.select_groups(torch.tensor([True, False])), rollouts.select_groups(torch.tensor([False, True]))]
    joined = Rollouts.cat(parts)
    assert sorted(map(tuple, joined.completions())) == sorted(map(tuple, rollouts.completions()))
    assert joined.rewards.sum() == rollouts.rewards.sum()


def test_truncate_is_a_cut_for_rewards_and_losses_but_keeps_tokens():
    rollouts = make_rollouts([4, 2, 3], [0, 0, 0])
    rollouts.truncate(torch.tensor([0, 1]), torch.tensor([2, 5]))
    assert rollouts.lengths.tolist() == [2, 2, 3]
    assert rollouts.finished.tolist() == [False, True, True]
    assert rollouts.row["stop_reason"].tolist() == [StopReason.CUT, StopReason.END, StopReason.END]
    assert rollouts.completions() == [[1, 2], [11, 12], [21, 22, 23]]
    assert rollouts.completions(kept=False)[0] == [1, 2, 3, 4]
    assert rollouts.loss_weights[0].tolist() == [1, 1, 0, 0]
    assert rollouts.generated.tolist() == [4, 2, 3]
    assert rollouts.kept_mask().sum(1).tolist() == [2, 2, 3]


def test_rewards_are_derived_and_not_scorable_stays_not_scorable():
    rollouts = make_rollouts([1, 1, 1, 1], [0, 0, 0, 0])
    rollouts.reward_terms["math"] = torch.tensor([1.0, math.nan, math.nan, 1.0])
    rollouts.reward_weights["math"] = torch.tensor([2.0, 1.0, 0.0, 0.0])
    rollouts.reward_terms["format"] = torch.tensor([1.0, 1.0, 1.0, 1.0])
    rollouts.reward_weights["format"] = torch.tensor([0.5, 0.5, 0.5, 0.0])
    values = rollouts.rewards.tolist()
    assert values[0] == 2.5
    assert math.isnan(values[1])  # a failed reward that applies
    assert values[2] == 0.5  # a reward that does not apply is left out
    assert math.isnan(values[3])  # nothing applies: there is no reward
    rollouts.reward_terms["bonus"] = torch.tensor([0.25, 0.25, 0.25, 0.25])  # without weights it counts once
    assert rollouts.rewards.tolist()[::2] == [2.75, 0.75]


def test_group_mean_leaves_nan_out():
    rollouts = make_rollouts([1, 1, 1], [0, 0, 1])
    means = rollouts.group_mean(torch.tensor([1.0, math.nan, math.nan])).tolist()
    assert means[0] == 1.0
    assert math.isnan(means[1])


def test_diff_counts_changed_entries_and_treats_nan_as_equal():
    rollouts = make_rollouts([2, 2], [0, 0])
    before = rollouts.clone()
    assert rollouts.diff(before) == {}
    rollouts.loss_weights[0, 1] = 0.5  # an edit in place
    rollouts.row["new"] = torch.zeros(2)
    assert rollouts.diff(before) == {"new": 2, "loss_weights": 1}


def test_padding_cannot_cut():
    with pytest.raises(ValueError, match="trim"):
        make_rollouts([3], [0]).pad(2)


@pytest.mark.parametrize("seed", range(3))
def test_occurrence_equals_a_loop(seed: int):
    group = torch.randint(0, 4, (17,), generator=torch.Generator().manual_seed(seed))
    seen: dict[int, int] = {}
    expected = []
    for g in group.tolist():
        expected.append(seen.get(g, 0))
        seen[g] = expected[-1] + 1
    assert occurrence(group).tolist() == expected


def test_stored_rollouts_come_back_equal(tmp_path):
    rollouts = make_rollouts([3, 0, 2], [1, 0, 1])
    rollouts.row["origin"][0] = int(Origin.GUIDE)
    path = save_rollouts(rollouts, tmp_path, "batch", texts=["a", "b", "c"])
    back = load_rollouts(tmp_path, "batch")
    assert back.diff(rollouts) == {}
    assert back.prompts.text == rollouts.prompts.text
    assert path.read_text().count("\n") == 3
    assert readable_rows(rollouts)[1]["correct"] is None  # NaN is not JSON
