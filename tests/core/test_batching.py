# SPDX-License-Identifier: Apache-2.0
"""Mini- and micro-batches hold every row once, within the budget, units whole."""

import pytest
import torch

from lit_rl.methods.batching import micro_batches, mini_batches, sequence_lengths
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
    first, second = mini_batches(rollouts, 2)
    assert [first.prompts.text, second.prompts.text] == [["p0", "p2"], ["p1", "p3"]]
    assert len(first) == len(second) == 4
