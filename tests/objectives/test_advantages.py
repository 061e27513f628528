# SPDX-License-Identifier: Apache-2.0
"""Advantages: closed-form numbers, naive references, and what must not change them."""

import itertools
import math
import statistics
import threading

import pytest
import torch
from torch import Tensor

from lit_rl.objectives import (
    AdvantageNormalizer,
    discounted_returns,
    gdpo_advantages,
    generalized_advantages,
    whiten,
)

NAN = math.nan
GRPO = AdvantageNormalizer()
DR_GRPO = AdvantageNormalizer(scale="none")
RLOO = AdvantageNormalizer(scale="none", leave_one_out=True)
PLUS_PLUS = AdvantageNormalizer(center="batch", scale="batch", level="token")
PLUS_PLUS_BASELINE = AdvantageNormalizer(center="group", scale="batch", level="token")
ALL = [
    AdvantageNormalizer(center=c, scale=s, level=level, leave_one_out=loo, ddof=ddof)
    for c, s, level, loo, ddof in itertools.product(
        ("group", "batch", "none"), ("group", "batch", "none"), ("sequence", "token"), (False, True), (0, 1)
    )
    if not (loo and c != "group") and not (level == "token" and "batch" not in (c, s))
]


def one_group(*rewards: float) -> tuple[Tensor, Tensor]:
    return torch.tensor(rewards, dtype=torch.float64), torch.zeros(len(rewards), dtype=torch.long)


def close(actual: Tensor, *expected: float, atol: float = 1e-4) -> None:
    torch.testing.assert_close(actual.double(), torch.tensor(expected, dtype=torch.float64), atol=atol, rtol=0)


def on_two_ranks(function, parts):
    """Run ``function(part, all_reduce)`` for two parts at once; ``all_reduce`` really adds across them."""
    barrier, box, results = threading.Barrier(2, timeout=20), [None, None], [None, None]

    def work(rank: int) -> None:
        def all_reduce(value: Tensor) -> Tensor:
            box[rank] = value
            barrier.wait()
            total = box[0] + box[1]
            barrier.wait()
            return total

        results[rank] = function(parts[rank], all_reduce)

    threads = [threading.Thread(target=work, args=(rank,)) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


# --- closed-form numbers ---------------------------------------------------------------------------------------------


def test_group_normalisation_of_one_success_in_four():
    close(AdvantageNormalizer(eps=1e-4)(*one_group(1, 0, 0, 0)), 1.4997, -0.4999, -0.4999, -0.4999)
    close(GRPO(*one_group(1, 0, 0, 0)), 1.499997, -0.499999, -0.499999, -0.499999, atol=1e-6)
    close(DR_GRPO(*one_group(1, 0, 0, 0)), 0.75, -0.25, -0.25, -0.25, atol=1e-12)
    close(AdvantageNormalizer(ddof=0)(*one_group(1, 0, 0, 0)), 1.732, -0.577, -0.577, -0.577, atol=1e-3)
    close(GRPO(*one_group(1, 1, 0, 0)), 0.866024, 0.866024, -0.866024, -0.866024, atol=1e-6)


@pytest.mark.parametrize(
    ("correct", "positive"),
    [(1, 2.4749), (2, 1.6202), (3, 1.2076), (4, 0.9354), (5, 0.7246), (6, 0.5401), (7, 0.3536)],
)
def test_group_of_eight(correct, positive):
    size = 8
    advantages = AdvantageNormalizer(eps=0.0)(*one_group(*[1.0] * correct, *[0.0] * (size - correct)))
    mirrored = AdvantageNormalizer(eps=0.0)(*one_group(*[1.0] * (size - correct), *[0.0] * correct))
    p = correct / size
    assert advantages[0].item() == pytest.approx(positive, abs=5e-5)
    assert advantages[0].item() == pytest.approx(math.sqrt((1 - p) / p * (size - 1) / size))
    assert advantages[-1].item() == pytest.approx(-mirrored[0].item())


def test_leave_one_out():
    close(RLOO(*one_group(1, 0, 0, 0)), 1, -1 / 3, -1 / 3, -1 / 3, atol=1e-12)
    rewards, group = one_group(0.3, -1.2, 2.0, 0.7, 0.1)
    others = [(rewards.sum() - r) / 4 for r in rewards]
    close(RLOO(rewards, group), *[(r - b).item() for r, b in zip(rewards, others)], atol=1e-12)
    torch.testing.assert_close(RLOO(rewards, group), DR_GRPO(rewards, group) * 5 / 4)
    assert abs(RLOO(rewards, group).sum().item()) < 1e-12


def test_leave_one_out_gives_the_exact_policy_gradient():
    """Enumerate every pair of samples: the expectation of A grad log pi is the gradient of the expected reward."""
    logits = torch.tensor([0.3, -0.5, 1.1], dtype=torch.float64, requires_grad=True)
    reward = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    log_pi = logits.log_softmax(0)
    (exact,) = torch.autograd.grad((log_pi.exp() * reward).sum(), logits, retain_graph=True)
    estimate = torch.zeros(3, dtype=torch.float64)
    for a, b in itertools.product(range(3), repeat=2):
        advantages = RLOO(*one_group(reward[a].item(), reward[b].item()))
        (gradient,) = torch.autograd.grad(
            (advantages * torch.stack([log_pi[a], log_pi[b]])).mean(), logits, retain_graph=True
        )
        estimate += (log_pi[a] + log_pi[b]).exp().detach() * gradient
    torch.testing.assert_close(estimate, exact, atol=1e-12, rtol=0)


def test_reinforce_plus_plus_weighs_rows_by_their_tokens():
    rewards, group = one_group(1, 0)
    trained = torch.tensor([[1.0, 1.0], [1.0, 0.0]])
    for normalizer in (PLUS_PLUS, PLUS_PLUS_BASELINE):
        close(normalizer(rewards, group, trained), 0.57735, -1.154701, atol=5e-6)
        close(normalizer(rewards, group, torch.ones(2, 2)), math.sqrt(3) / 2, -math.sqrt(3) / 2, atol=5e-6)


def test_gdpo_keeps_different_combinations_apart():
    terms = {"accuracy": torch.tensor([1.0, 0, 0, 0]), "format": torch.tensor([1.0, 1, 1, 0])}
    weights = {"accuracy": 1.0, "format": 1.0}
    group = torch.zeros(4, dtype=torch.long)
    close(gdpo_advantages(terms, weights, group), 1.2247, 0, 0, -1.2247)
    over_tokens = gdpo_advantages(terms, weights, group, trained=torch.ones(4, 3))
    close(over_tokens, *[x * math.sqrt(11 / 9) for x in (1.2247, 0, 0, -1.2247)])  # 12 tokens instead of 4 rows


def test_gdpo_leaves_unscorable_terms_out():
    terms = {"accuracy": torch.tensor([1.0, 0, NAN, 0, NAN]), "format": torch.tensor([1.0, 1, 0, 0, NAN])}
    weights = {"accuracy": 1.0, "format": 0.5}
    group = torch.zeros(5, dtype=torch.long)
    advantages = gdpo_advantages(terms, weights, group)
    total = GRPO(terms["accuracy"], group) + 0.5 * GRPO(terms["format"], group)
    expected = (total[:4] - total[:4].mean()) / (total[:4].std() + 1e-6)
    torch.testing.assert_close(advantages, torch.cat([expected, torch.zeros(1)]), atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="same names"):
        gdpo_advantages(terms, {"accuracy": 1.0}, group)


# --- naive reference -------------------------------------------------------------------------------------------------


def naive(n: AdvantageNormalizer, rewards: list[float], group: list[int], lengths: list[int]) -> list[float]:
    rows = [i for i, r in enumerate(rewards) if not math.isnan(r)]
    members = {i: [rewards[j] for j in rows if group[j] == group[i]] for i in range(len(rewards))}

    def deviation(values):
        mean = sum(values) / len(values)
        return math.sqrt(sum((v - mean) ** 2 for v in values) / max(len(values) - n.ddof, 1))

    def over_batch(values):
        return [values[i] for i in rows for _ in range(lengths[i] if n.level == "token" else 1)]

    centred = {}
    for i in rows:
        centred[i] = rewards[i] - statistics.fmean(members[i]) if n.center == "group" else rewards[i]
        if n.leave_one_out:
            centred[i] *= len(members[i]) / max(len(members[i]) - 1, 1)
    raw = dict(enumerate(rewards))
    base = over_batch(centred if n.level == "token" or n.leave_one_out else raw)
    out = []
    for i in range(len(rewards)):
        flat = len(members[i]) < 2 or len(set(members[i])) == 1
        if i not in rows or (flat and "group" in (n.center, n.scale)):
            out.append(0.0)
            continue
        a = centred[i]
        if n.center == "batch" or (n.center == "group" and n.scale == "batch" and n.level == "token"):
            a -= statistics.fmean(base)
        scale = {"group": deviation(members[i]), "batch": deviation(base), "none": None}[n.scale]
        out.append(a if scale is None else a / (scale + n.eps))
    return out


@pytest.mark.parametrize("normalizer", ALL, ids=lambda n: n.describe())
def test_against_a_naive_loop(normalizer):
    generator = torch.Generator().manual_seed(3)
    group = [7, 2, 7, -4, 2, 7, 9, 2, 9, 11, 12, 12]
    rewards = torch.randn(12, generator=generator, dtype=torch.float64).round(decimals=1).tolist()
    rewards[4], rewards[9] = NAN, 0.4  # an unscorable row; a group of one
    rewards[6] = rewards[8] = 0.1  # a group without spread
    rewards[10] = NAN  # a group with one scorable row
    lengths = [3, 1, 4, 1, 5, 2, 6, 5, 3, 5, 2, 4]
    trained = (torch.arange(6) < torch.tensor(lengths)[:, None]).float()
    actual = normalizer(torch.tensor(rewards, dtype=torch.float64), torch.tensor(group), trained)
    close(actual, *naive(normalizer, rewards, group, lengths), atol=1e-9)


# --- limits and invariances ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("normalizer", ALL, ids=lambda n: n.describe())
def test_rows_ranks_and_padding_do_not_matter(normalizer):
    generator = torch.Generator().manual_seed(0)
    rewards = torch.randn(10, generator=generator, dtype=torch.float64) + 1000.0
    rewards[3] = NAN
    group = torch.tensor([0, 0, 0, 1, 1, 1, 5, 5, 5, 5])
    trained = (torch.rand(10, 7, generator=generator) > 0.4).float()
    whole = normalizer(rewards, group, trained)
    order = torch.randperm(10, generator=generator)
    shuffled = normalizer(rewards[order], group[order], torch.cat([trained, torch.zeros(10, 3)], 1)[order])
    torch.testing.assert_close(shuffled, whole[order], atol=1e-10, rtol=0)

    parts = [slice(0, 3), slice(3, 10)]
    halves = on_two_ranks(lambda s, reduce: normalizer(rewards[s], group[s], trained[s], reduce), parts)
    torch.testing.assert_close(torch.cat(halves), whole, atol=1e-10, rtol=0)


def test_an_empty_rank_takes_part_in_the_reduction():
    rewards, group = one_group(1.0, 0.0, 0.5)
    parts = [(rewards, group), (rewards[:0], group[:0])]
    normalizer = AdvantageNormalizer(center="batch", scale="batch")
    full, empty = on_two_ranks(lambda part, reduce: normalizer(*part, None, reduce), parts)
    torch.testing.assert_close(full, normalizer(rewards, group))
    assert empty.shape == (0,)


@pytest.mark.parametrize("normalizer", ALL, ids=lambda n: n.describe())
def test_no_spread_means_exactly_zero(normalizer):
    if (normalizer.center, normalizer.scale) == ("none", "none"):
        return
    rewards, group = one_group(*[0.1] * 7)  # 0.1 is not its own mean in floating point
    assert normalizer(rewards, group, torch.ones(7, 2)).eq(0).all()
    assert normalizer(rewards.float(), group, torch.ones(7, 2)).eq(0).all()


@pytest.mark.parametrize("normalizer", [GRPO, DR_GRPO, RLOO, PLUS_PLUS_BASELINE], ids=lambda n: n.describe())
def test_group_of_one_has_no_baseline_and_no_advantage(normalizer):
    advantages = normalizer(torch.tensor([5.0, 1.0, 0.0]), torch.tensor([0, 1, 1]), torch.ones(3, 2))
    assert advantages[0] == 0
    assert advantages[1] > 0


@pytest.mark.parametrize("normalizer", ALL, ids=lambda n: n.describe())
def test_an_unscorable_row_changes_nothing_for_the_others(normalizer):
    rewards, group = torch.tensor([1.0, 0.2, 0.0, 3.0]), torch.tensor([0, 0, 0, 0])
    with_nan = torch.cat([rewards, torch.tensor([NAN])])
    advantages = normalizer(with_nan, torch.zeros(5, dtype=torch.long), torch.ones(5, 2))
    torch.testing.assert_close(advantages[:4], normalizer(rewards, group, torch.ones(4, 2)))
    assert advantages[4] == 0


def test_all_unscorable_is_all_zero():
    rewards = torch.full((3,), NAN)
    for normalizer in ALL:
        assert normalizer(rewards, torch.tensor([0, 0, 1]), torch.ones(3, 2)).eq(0).all()


def test_normalised_leave_one_out_has_unit_deviation():
    normalizer = AdvantageNormalizer(scale="batch", leave_one_out=True, eps=0.0)
    rewards = torch.tensor([1.0, 0.0, 3.0, 2.5, 0.0, 0.5], dtype=torch.float64)
    assert normalizer(rewards, torch.tensor([0, 0, 0, 1, 1, 1])).std().item() == pytest.approx(1)


def test_integer_rewards_and_half_precision():
    group = torch.tensor([0, 0])
    assert GRPO(torch.tensor([1.0, 0.0], dtype=torch.bfloat16), group).dtype == torch.bfloat16
    torch.testing.assert_close(GRPO(torch.tensor([1, 0]), group), GRPO(torch.tensor([1.0, 0.0]), group))


@pytest.mark.parametrize(
    ("normalizer", "text"),
    [
        (GRPO, "A = (r - mean_group) / (std_group + 1e-06)"),
        (DR_GRPO, "A = r - mean_group"),
        (RLOO, "A = n/(n-1) (r - mean_group)"),
        (AdvantageNormalizer(ddof=0), "A = (r - mean_group) / (std_group + 1e-06); population std"),
        (PLUS_PLUS, "A = (r - mean_batch) / (std_batch + 1e-06); batch statistics over trained tokens"),
        (
            PLUS_PLUS_BASELINE,
            "A = (c - mean_batch(c)) / (std_batch(c) + 1e-06), c = r - mean_group; "
            "batch statistics over trained tokens",
        ),
    ],
)
def test_describe(normalizer, text):
    assert normalizer.describe() == text


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"center": "prompt"}, "center"),
        ({"scale": "std"}, "scale"),
        ({"level": "word"}, "level"),
        ({"center": "batch", "leave_one_out": True}, "center='group'"),
        ({"ddof": 2}, "ddof"),
        ({"eps": -1.0}, "eps"),
        ({"level": "token"}, "batch"),
    ],
)
def test_impossible_settings_are_refused(arguments, match):
    with pytest.raises(ValueError, match=match):
        AdvantageNormalizer(**arguments)


def test_token_level_needs_weights():
    with pytest.raises(ValueError, match="weights"):
        PLUS_PLUS(*one_group(1, 0))


# --- returns, generalized advantages, whitening ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lam", "advantages", "returns"),
    [
        (0.95, (0.46575, 0.385, 0.3), (0.96575, 0.985, 1)),
        (1.0, (0.5, 0.4, 0.3), (1, 1, 1)),
        (0.0, (0.1, 0.1, 0.3), (0.6, 0.7, 1)),
    ],
)
def test_generalized_advantages(lam, advantages, returns):
    rewards = torch.tensor([[0.0, 0.0, 1.0]], dtype=torch.float64)
    values = torch.tensor([[0.5, 0.6, 0.7]], dtype=torch.float64)
    actual = generalized_advantages(rewards, values, torch.ones(1, 3), 1.0, lam)
    close(actual[0][0], *advantages, atol=1e-12)
    close(actual[1][0], *returns, atol=1e-12)
    if lam == 0.95:
        close(whiten(actual[0], torch.ones(1, 3))[0], 0.991344, 0.017092, -1.008436, atol=1e-6)


def test_an_observation_token_has_no_influence():
    rewards = torch.tensor([[0.0, NAN, 1.0]], dtype=torch.float64)
    mask = torch.tensor([[1, 0, 1]])
    for strange in (9.0, NAN, math.inf):
        values = torch.tensor([[0.5, strange, 0.6]], dtype=torch.float64)
        advantages, returns = generalized_advantages(rewards, values, mask, 1.0, 0.95)
        close(advantages[0], 0.48, 0, 0.4, atol=1e-12)
        close(returns[0], 0.98, 0, 1, atol=1e-12)


def test_monte_carlo_limit_is_reward_to_go():
    generator = torch.Generator().manual_seed(1)
    rewards = torch.randn(3, 6, generator=generator, dtype=torch.float64)
    mask = torch.rand(3, 6, generator=generator) > 0.3
    for gamma in (1.0, 0.9):
        expected = torch.zeros(3, 6, dtype=torch.float64)
        for i in range(3):
            kept = [t for t in range(6) if mask[i, t]]
            for a, t in enumerate(kept):
                expected[i, t] = sum(gamma**k * rewards[i, s] for k, s in enumerate(kept[a:]))
        torch.testing.assert_close(discounted_returns(rewards, mask, gamma), expected)
        values = torch.randn(3, 6, generator=generator, dtype=torch.float64)
        advantages, returns = generalized_advantages(rewards, values, mask, gamma, lam=1.0)
        torch.testing.assert_close(advantages, (expected - values) * mask)
        torch.testing.assert_close(returns, expected)


def test_only_a_final_reward_is_shared_by_all_tokens():
    rewards = torch.tensor([[0.0, 0.0, 0.7, 0.0]])
    mask = torch.tensor([[1, 1, 1, 0]])
    close(discounted_returns(rewards, mask)[0], 0.7, 0.7, 0.7, 0, atol=1e-7)


@pytest.mark.parametrize(
    ("gamma", "expected"), [(0.5, (0.475, -0.05, 0.3)), (1.0, (0.6, 0.1, 0.3)), (0.0, (0.5, -0.2, 0.3))]
)
def test_discount_of_token_advantages(gamma, expected):
    rewards = torch.tensor([[0.5, -0.2, 0.3]], dtype=torch.float64)
    close(discounted_returns(rewards, torch.ones(1, 3), gamma)[0], *expected, atol=1e-12)


def test_reward_to_go_is_the_gradient_of_the_sequence_divergence():
    """Two binary tokens, exact: discount 1 is the gradient of KL(student || teacher) over sequences, 0 is not."""

    def log_p(first, second, a, b):
        log_bernoulli = torch.nn.functional.logsigmoid
        one = log_bernoulli(first if a else -first)
        return one, log_bernoulli(second[a] if b else -second[a])

    first = torch.tensor(0.0, dtype=torch.float64, requires_grad=True)
    student = torch.tensor([0.5, -1.0], dtype=torch.float64)
    teacher = torch.tensor(1.0, dtype=torch.float64), torch.tensor([0.0, 1.0], dtype=torch.float64)
    divergence, estimates = torch.zeros((), dtype=torch.float64), dict.fromkeys((0.0, 0.5, 1.0), 0.0)
    for a, b in itertools.product((0, 1), repeat=2):
        p, q = torch.stack(log_p(first, student, a, b)), torch.stack(log_p(*teacher, a, b))
        divergence = divergence + p.sum().exp() * (p - q).sum()
        (slope,) = torch.autograd.grad(p[0], first, retain_graph=True)
        for gamma in estimates:
            to_go = discounted_returns((p - q).detach()[None], torch.ones(1, 2), gamma)
            estimates[gamma] += (p.sum().exp() * to_go[0, 0] * slope).item()
    (exact,) = torch.autograd.grad(divergence, first)
    assert divergence.item() == pytest.approx(0.366323, abs=1e-6)
    assert exact.item() == pytest.approx(-0.142046, abs=1e-6)
    assert estimates[1.0] == pytest.approx(exact.item(), abs=1e-12)
    assert estimates[0.0] == pytest.approx(-0.25, abs=1e-6)
    assert estimates[0.5] == pytest.approx(-0.196023, abs=1e-6)


def test_whitening():
    generator = torch.Generator().manual_seed(2)
    values = 100 + torch.randn(5, 8, generator=generator, dtype=torch.float64)
    mask = torch.rand(5, 8, generator=generator) > 0.5
    dirty = values.masked_fill(~mask, NAN)
    white = whiten(dirty, mask)
    assert white[mask].mean().item() == pytest.approx(0, abs=1e-12)
    assert white[mask].var().item() == pytest.approx(1, abs=1e-6)
    assert white[~mask].eq(0).all()
    halves = on_two_ranks(lambda s, reduce: whiten(dirty[s], mask[s], reduce), [slice(0, 2), slice(2, 5)])
    torch.testing.assert_close(torch.cat(halves), white, atol=1e-12, rtol=0)


def test_whitening_without_spread_is_zero():
    assert whiten(torch.full((2, 3), 0.1), torch.ones(2, 3)).eq(0).all()
    assert whiten(torch.tensor([[3.0, 4.0]]), torch.tensor([[True, False]])).eq(0).all()
    assert whiten(torch.ones(2, 3), torch.zeros(2, 3)).eq(0).all()


def test_an_empty_completion_has_no_returns():
    nothing = torch.zeros(2, 0)
    assert discounted_returns(nothing, nothing).shape == (2, 0)
    assert discounted_returns(torch.ones(1, 2), torch.zeros(1, 2)).eq(0).all()


@pytest.mark.parametrize(("gamma", "lam", "match"), [(1.1, 0.9, "gamma"), (1.0, -0.1, "lam")])
def test_discounts_outside_the_unit_interval_are_refused(gamma, lam, match):
    with pytest.raises(ValueError, match=match):
        generalized_advantages(torch.ones(1, 2), torch.ones(1, 2), torch.ones(1, 2), gamma, lam)
