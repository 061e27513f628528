# SPDX-License-Identifier: Apache-2.0
"""Sampling noise against SplitMix64 in Python's own integers, and its statistics."""

import math

import pytest
import torch
from torch import Tensor

from lit_rl.samplers import noise
from lit_rl.samplers.noise import gumbels, row_keys, uniforms

GOLDEN, WORD = 0x9E3779B97F4A7C15, (1 << 64) - 1
# The first outputs of SplitMix64 from state 0, as published with the generator.
PUBLISHED = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F, 0xF88BB8A8724C81EC, 0x1B39896A51A8749B]


def mix(x: int) -> int:
    """The output function in unsigned 64-bit arithmetic."""
    x &= WORD
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & WORD
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & WORD
    return x ^ (x >> 31)


def key(seed: int, draw: int, sample: int) -> int:
    return mix(mix(mix(seed) + (draw + 1) * GOLDEN) + (sample + 1) * GOLDEN)


def unit(x: int) -> float:
    return ((x >> 12) + 0.5) / 2**52


def p_value(counts: Tensor, expected: Tensor) -> float:
    """Of a chi-square test."""
    statistic = ((counts - expected).square() / expected).sum()
    return float(torch.special.gammaincc(torch.tensor((counts.numel() - 1) / 2), statistic.float() / 2))


def test_the_hash_is_splitmix64() -> None:
    assert [mix(i * GOLDEN) for i in range(1, 6)] == PUBLISHED
    found = uniforms(torch.zeros((), dtype=torch.long), torch.arange(5))
    assert found.tolist() == [unit(x) for x in PUBLISHED]


@pytest.mark.parametrize("seed", [0, 1, -1, 2**63 - 1, 2**64 + 12345])
def test_keys_and_uniforms_equal_integer_arithmetic(seed: int) -> None:
    draws, samples = [0, 1, 7, 10**12], [0, 3, 1, 255]
    keys = row_keys(seed, torch.tensor(draws), torch.tensor(samples))
    expected = [key(seed, d, s) for d, s in zip(draws, samples, strict=True)]
    assert [k & WORD for k in keys.tolist()] == expected
    positions = torch.tensor([0, 1, 5000])
    for k, row in zip(expected, uniforms(keys[:, None], positions).tolist(), strict=True):
        assert row == [unit(mix(k + (p + 1) * GOLDEN)) for p in positions.tolist()]


def test_noise_is_a_function_of_its_coordinates_alone() -> None:
    keys = row_keys(3, torch.arange(20), torch.arange(20) % 4)
    whole = uniforms(keys[:, None], torch.arange(9))
    order = torch.tensor([13, 2, 2, 19])
    assert torch.equal(uniforms(keys[order, None], torch.tensor([4, 1])), whole[order][:, [4, 1]])
    wide = gumbels(keys, torch.arange(20), 30)
    assert torch.equal(gumbels(keys[order], order, 12), wide[order, :12])  # of the vocabulary's size, too


def test_uniforms_lie_strictly_between_0_and_1() -> None:
    extreme = noise._unit(torch.tensor([0, -1]))  # all bits 0, all bits 1
    assert 0 < float(extreme[0]) < 1e-15
    assert 1 - 1e-15 < float(extreme[1]) < 1


def test_uniforms_are_uniform_and_uncorrelated_along_every_coordinate() -> None:
    """40 draws, 40 samples and 40 positions: each cell of the cube, and each pair of neighbours."""
    draw, sample = torch.meshgrid(torch.arange(40), torch.arange(40), indexing="ij")
    keys = row_keys(1, draw.flatten(), sample.flatten()).view(40, 40, 1)
    cube = uniforms(keys, torch.arange(40))
    assert p_value(torch.histc(cube, 200, 0, 1), torch.full((200,), 40**3 / 200)) > 1e-4
    for dim in range(3):
        first, second = cube.narrow(dim, 0, 39).flatten(), cube.narrow(dim, 1, 39).flatten()
        pairs = (first * 10).long() * 10 + (second * 10).long()
        assert p_value(pairs.bincount(minlength=100), torch.full((100,), len(pairs) / 100)) > 1e-4


def test_other_seeds_give_unrelated_noise() -> None:
    draws, samples = torch.arange(3000), torch.zeros(3000, dtype=torch.long)
    first, second = (uniforms(row_keys(seed, draws, samples), torch.zeros((), dtype=torch.long)) for seed in (1, 2))
    assert abs(float(torch.corrcoef(torch.stack([first, second]))[0, 1])) < 4 / math.sqrt(3000)


def test_gumbels_have_the_moments_of_the_distribution() -> None:
    values = gumbels(row_keys(0, torch.arange(200), torch.arange(200)), torch.arange(200), 1000)
    assert abs(float(values.mean()) - 0.5772157) < 4 * math.pi / math.sqrt(6 * values.numel())
    assert abs(float(values.var()) - math.pi**2 / 6) < 0.03
    between = torch.corrcoef(values.T[:50])
    assert float((between - torch.eye(50)).abs().max()) < 0.4  # 200 values each: 5.6 standard deviations


def test_adding_gumbels_draws_from_the_distribution() -> None:
    probs = torch.tensor([0.5, 0.3, 0.15, 0.05], dtype=torch.float64)
    keys = row_keys(7, torch.arange(20000), torch.zeros(20000, dtype=torch.long))
    drawn = (probs.log() + gumbels(keys, torch.zeros((), dtype=torch.long).expand(20000), 4)).argmax(-1)
    assert p_value(drawn.bincount(minlength=4), probs * 20000) > 1e-4


def test_policies_that_share_gumbels_draw_the_same_token_most_often() -> None:
    """At total variation d they agree with probability at least (1 - d) / (1 + d), far more than independent draws."""
    p = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64)
    q = torch.tensor([0.3, 0.4, 0.2, 0.1], dtype=torch.float64)
    keys = row_keys(7, torch.arange(5000), torch.zeros(5000, dtype=torch.long))
    shared = gumbels(keys, torch.zeros((), dtype=torch.long).expand(5000), 4)
    same = ((p.log() + shared).argmax(-1) == (q.log() + shared).argmax(-1)).double().mean()
    assert float(same) > (1 - 0.1) / (1 + 0.1) - 4 * 0.5 / math.sqrt(5000)
