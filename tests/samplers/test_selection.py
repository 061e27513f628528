# SPDX-License-Identifier: Apache-2.0
"""Selection from a pool: the published numbers, ties, completions that could not be scored."""

import itertools
import math

import pytest
import torch

from lit_rl.samplers.selection import contrast, select_from_pool

POOL = torch.tensor([0.1, 0.9, 0.5, 0.3, 0.7, 0.2])
NOISE = torch.tensor([0.9, 0.8, 0.1, 0.2, 0.7, 0.6])


def test_best_and_worst_of_six():
    index = select_from_pool(POOL, 4)
    assert index.tolist() == [1, 4, 0, 5]
    kept = POOL[index].double()
    assert kept.mean() == pytest.approx(0.475)
    std = contrast(kept, torch.zeros(4, dtype=torch.long), 1)
    assert float(std) == pytest.approx(0.334477, abs=1e-6)
    advantages = (kept - kept.mean()) / (std + 1e-4)
    assert advantages.tolist() == pytest.approx([1.27026, 0.67249, -1.12082, -0.82193], abs=1e-5)


def test_an_odd_number_keeps_one_more_of_the_worst():
    assert select_from_pool(POOL, 3).tolist() == [1, 0, 5]
    assert select_from_pool(POOL, 1).tolist() == [0]


@pytest.mark.parametrize("how", ["best_worst", "mean_deviation", "extremes_random", "random"])
def test_nothing_is_kept_twice_whatever_the_ties(how):
    for pool in itertools.product([0.0, 1.0, math.nan], repeat=4):
        for keep in range(6):
            index = select_from_pool(torch.tensor(pool), keep, how, NOISE[:4]).tolist()
            assert len(index) == len(set(index)) == min(keep, 4)
            scored = sum(not math.isnan(x) for x in pool)
            assert sum(math.isnan(pool[i]) for i in index) == max(0, min(keep, 4) - scored), "NaN only if it must be"


def test_binary_rewards_are_kept_half_and_half_whatever_the_pass_rate():
    for correct in range(4, 13):
        pool = torch.zeros(16)
        pool[torch.randperm(16, generator=torch.Generator().manual_seed(correct))[:correct]] = 1.0
        assert float(pool[select_from_pool(pool, 8)].sum()) == 4


def test_other_selections():
    assert select_from_pool(POOL, 2, "mean_deviation").tolist() == [1, 0]
    assert select_from_pool(POOL, 4, "extremes_random", NOISE).tolist() == [1, 0, 2, 3]
    assert select_from_pool(POOL, 3, "random", NOISE).tolist() == [2, 3, 5]


def test_contrast_against_a_loop():
    generator = torch.Generator().manual_seed(0)
    rewards = torch.rand(20, generator=generator)
    rewards[torch.rand(20, generator=generator) < 0.2] = math.nan
    group = torch.randint(0, 4, (20,), generator=generator)
    found = contrast(rewards, group, 6)
    for g in range(6):
        values = [float(r) for r, k in zip(rewards, group) if k == g and not math.isnan(r)]
        mean = sum(values) / max(len(values), 1)
        expected = math.sqrt(sum((v - mean) ** 2 for v in values) / max(len(values), 1))
        assert float(found[g]) == pytest.approx(expected, abs=1e-9)


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match="selection must be"):
        select_from_pool(POOL, 2, "best")
    with pytest.raises(ValueError, match="needs noise"):
        select_from_pool(POOL, 2, "random")
