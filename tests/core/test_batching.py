# SPDX-License-Identifier: Apache-2.0
"""Mini- and micro-batches hold every row once, within the budget, units whole."""

import pytest
import torch

from lit_rl.methods.batching import micro_batches, mini_batch, sequence_lengths, split
from tests.core.test_rollouts import make_rollouts


@pytest.mark.parametrize("budget", [1, 7, 20, 1000])
@pytest.mark.parametrize("seed", range(3))
def test_every_row_once_and_within_the_budget(budget: int, seed: int):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(0, 9, (13,), generator=generator).tolist()
    rollouts = make_rollouts(lengths, torch.randint(0, 4, (13,), generator=generator).tolist())
    parts = micro_batches(rollouts, budget)
    assert sorted(torch.cat(parts).tolist()) == list(range(13))
    total = sequence_lengths(rollouts)
    for rows in parts:
        assert len(rows) == 1 or len(rows) * int(total[rows].max()) <= budget
    longest = [int(total[rows].max()) for rows in parts]
    assert longest == sorted(longest, reverse=True)


def test_units_are_never_split():
    rollouts = make_rollouts([5, 1, 4, 2], [0, 0, 1, 1])
    rollouts.row["unit"] = torch.tensor([0, 1, 0, 1])
    for rows in micro_batches(rollouts, 10):
        units = rollouts.unit[rows].tolist()
        assert all(units.count(u) == 2 for u in units)


def test_no_rows_no_micro_batches():
    rollouts = make_rollouts([1], [0])
    assert micro_batches(rollouts.select(torch.zeros(0, dtype=torch.long)), 10) == []


def test_mini_batches_deal_groups_out_in_turn():
    rollouts = make_rollouts([1] * 8, [0, 0, 1, 1, 2, 2, 3, 3])
    first, second = (mini_batch(rollouts, 2, index) for index in range(2))
    assert [first.prompts.text, second.prompts.text] == [["p0", "p2"], ["p1", "p3"]]
    assert len(first) == len(second) == 4


def naive_cost(total: list[int], budget: int, price: int) -> int:
    """Least cost over every way to cut the sorted rows."""
    total = sorted(total, reverse=True)
    costs = []
    for cuts in range(2 ** (len(total) - 1)):
        ends = [i + 1 for i in range(len(total) - 1) if cuts >> i & 1] + [len(total)]
        parts = [total[a:b] for a, b in zip([0, *ends], ends)]
        if all(len(p) == 1 or len(p) * p[0] <= budget for p in parts):
            costs.append(sum(len(p) * p[0] + price for p in parts))
    return min(costs)


@pytest.mark.parametrize("budget", [12, 40, 1000])
@pytest.mark.parametrize("price", [0, 5, 30, 1000])
def test_no_other_split_costs_less(budget: int, price: int):
    for seed in range(5):
        different = 30 if seed % 2 else 3
        lengths = torch.randint(0, different, (8,), generator=torch.Generator().manual_seed(seed)).tolist()
        rollouts = make_rollouts(lengths, [0] * 8)
        total = sequence_lengths(rollouts)
        parts = micro_batches(rollouts, budget, price)
        cost = sum(len(rows) * int(total[rows].max()) + price for rows in parts)
        assert cost == naive_cost(total.tolist(), budget, price)


def test_a_few_long_rows_are_kept_apart_from_many_short_ones():
    rollouts = make_rollouts([900, 20, 21, 19, 800] + [20] * 40, [0] * 45)
    parts = [rows.tolist() for rows in micro_batches(rollouts, 10**6)]
    assert parts[0] == [0, 4]
    assert len(parts) == 2


def test_a_split_holds_the_selected_rows_as_narrow_as_they_are_and_is_a_copy():
    rollouts = make_rollouts([5, 0, 4, 2, 2], [0, 0, 1, 1, 2])
    before = {k: v.clone() for k, v in rollouts.token.items()}
    parts = [torch.tensor([2, 0]), torch.tensor([3, 1, 4])]
    made = split(rollouts, parts)
    for rows, part in zip(parts, made):
        expected = rollouts.select(rows).trim()
        assert part.width == max(rollouts.lengths[rows])
        assert [x.tolist() for x in part.prompts.ids] == [x.tolist() for x in expected.prompts.ids]
        for mine, other in ((part.row, expected.row), (part.token, expected.token)):
            assert mine.keys() == other.keys()
            for name in mine:
                torch.testing.assert_close(mine[name], other[name], equal_nan=True)
        part.loss_weights.mul_(7.0)
    assert all(torch.equal(rollouts.token[k].nan_to_num(), before[k].nan_to_num()) for k in before)
    assert split(rollouts, []) == []
