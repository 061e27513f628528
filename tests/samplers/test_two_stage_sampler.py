# SPDX-License-Identifier: Apache-2.0
"""Exploring with one policy and training on another: exactness, coupling, selection, and what is measured."""

import math
from dataclasses import replace

import pytest
import torch
from contract import contract
from lightning.pytorch import Callback
from sampler_models import full_logits, largest_gap, prompts, tiny_model
from torch import Tensor

from lit_rl.environments import CalculatorEnvironment
from lit_rl.rollouts import Rollouts, StopReason
from lit_rl.samplers import (
    EnvironmentSampler,
    HFSampler,
    LowPrecisionSampler,
    PartialSampler,
    RolloutRequest,
    Sampling,
    TwoStageSampler,
)
from lit_rl.samplers.noise import gumbels, row_keys
from lit_rl.samplers.stopping import Stopping
from lit_rl.samplers.two_stage import _Numbers, sign_agreement
from lit_rl.samplers.verifying import accept_prefixes
from lit_rl.testing import check_resume, make_module, make_policy, train

THREE = ([5, 9, 11, 4, 30], [7, 8], [12, 20, 21])


def scored_by(function):
    """A request's ``score``: the reward of each row is ``function(rollouts, row)``."""

    def score(rollouts: Rollouts) -> Rollouts:
        values = [float(function(rollouts, i)) for i in range(len(rollouts))]
        rollouts.reward_terms["test"] = torch.tensor(values)
        rollouts.reward_weights["test"] = torch.ones(len(values))
        return rollouts

    return score


def by_length(rollouts: Rollouts, row: int) -> float:
    return int(rollouts.lengths[row])


def by_sample(rollouts: Rollouts, row: int) -> float:
    """Does not depend on the text, so that every explorer selects the same."""
    return (37 * int(rollouts.row["sample"][row])) % 11


def connected(model, tokenizer, explore, **options) -> TwoStageSampler:
    sampler = TwoStageSampler(explore, **options)
    sampler.setup(model, tokenizer)
    sampler.sync(model, 5)
    return sampler


def ask(group_size=4, wanted=3, score=by_length, texts=THREE, seed=3, **sampling) -> RolloutRequest:
    settings = Sampling(**{"max_tokens": 12, "stop_token_ids": list(range(3, 9))} | sampling)
    return RolloutRequest.for_groups(prompts(*texts), group_size, settings, seed, wanted=wanted, score=scored_by(score))


def rough(kind="nf4-rounded") -> LowPrecisionSampler:
    return LowPrecisionSampler(HFSampler(), kind)


@pytest.fixture(scope="module")
def model(tokenizer):
    return tiny_model("Qwen2", vocab_size=len(tokenizer))


# --- coupled ---------------------------------------------------------------------------------------------------------


def test_without_quantisation_the_second_stage_repeats_the_first(model, tokenizer):
    """Then it is best-worst selection from a plain pool, and with nothing to select from the plain sampler."""
    sampler = connected(model, tokenizer, HFSampler(), pool_size=10)
    request = ask()
    out = sampler.sample(request)
    pool = RolloutRequest.for_groups(request.prompts, 10, request.sampling, request.seed, noise="gumbel")
    plain = sampler.exploit.sample(pool)
    for g in range(3):
        lengths = plain.lengths[plain.group == g].tolist()
        order = sorted(range(10), key=lambda i, x=lengths: (-x[i], i))
        worst = [i for i in sorted(range(10), key=lambda i, x=lengths: (x[i], i)) if i not in order[:2]]
        expected = [*order[:2], *worst[:2]]
        rows = (out.group == g).nonzero()[:, 0]
        assert out.row["sample"][rows].tolist() == expected
        completions = [plain.completions()[10 * g + i] for i in expected]
        assert [out.completions()[r] for r in rows.tolist()] == completions
    assert torch.equal(out.row["explore_reward"], out.lengths.float())
    everything = connected(model, tokenizer, HFSampler(), pool_size=4).sample(request)
    plain = sampler.exploit.sample(replace(request, noise="gumbel", wanted=None, score=None))
    assert sorted(map(tuple, everything.completions())) == sorted(map(tuple, plain.completions()))


def agreement(p: Tensor, q: Tensor) -> float:
    """P(same token) under shared Gumbel noise: sum_v 1 / sum_u max(p_u / p_v, q_u / q_v)."""
    return float(sum(1 / torch.maximum(p / p[v], q / q[v]).sum() for v in range(len(p))))


def test_how_often_shared_gumbel_noise_draws_the_same_token():
    keys = row_keys(0, torch.arange(20000), torch.zeros(20000, dtype=torch.long))
    for p, q, expected in (
        ((0.6, 0.4), (0.5, 0.5), 0.9),
        ((0.7, 0.2, 0.1), (0.6, 0.25, 0.15), 0.896078),
        ((0.3, 0.7), (0.3, 0.7), 1.0),
    ):
        p, q = (torch.tensor(x, dtype=torch.float64) for x in (p, q))
        assert agreement(p, q) == pytest.approx(expected, abs=1e-6)
        noise = gumbels(keys, torch.zeros_like(keys), len(p))
        same = (p.log() + noise).argmax(1) == (q.log() + noise).argmax(1)
        assert float(same.double().mean()) == pytest.approx(expected, abs=0.01)


def test_coupled_completions_are_the_policys_own_and_share_a_beginning(model, tokenizer):
    sampler = connected(model, tokenizer, rough(), pool_size=12)
    out = sampler.sample(ask())
    assert largest_gap(model, out) < 1e-4
    numbers = sampler.metrics(out)
    assert 0.1 < numbers["kept_prefix_ratio"] < 1
    unrelated = connected(model, tokenizer, rough(), pool_size=12)
    unrelated.explore.inner.sample, same_noise = None, unrelated.explore.inner.sample
    unrelated.explore.inner.sample = lambda r: same_noise(replace(r, seed=99))
    other = unrelated.sample(ask())
    assert unrelated.metrics(other)["kept_prefix_ratio"] < numbers["kept_prefix_ratio"] / 2, "the noise is shared"


@pytest.mark.parametrize(("mode", "oversampling"), [("coupled", 1.0), ("fresh", 1.5)])
def test_another_explorer_that_selects_the_same_changes_nothing(model, tokenizer, mode, oversampling):
    outs = []
    for kind in ("nf4-rounded", "fp4-rounded", "bfloat16"):
        sampler = connected(model, tokenizer, rough(kind), pool_size=12, mode=mode, oversampling=oversampling)
        outs.append(sampler.sample(ask(wanted=2, score=by_sample)))
    for other in outs[1:]:
        other.row.pop("explore_reward", None), outs[0].row.pop("explore_reward", None)
        assert outs[0].diff(other) == {}


# --- verified --------------------------------------------------------------------------------------------------------


def verified_pool(model, tokenizer, rows: int, **settings):
    """Drafts of a rounded copy for one prompt, and what `accept_prefixes` and a continuation make of them."""
    draft, exact = rough(), HFSampler()
    for sampler in (draft, exact):
        sampler.setup(model, tokenizer)
        sampler.sync(model, 0)
    sampling = Sampling(**{"max_tokens": 2, "stop_token_ids": [4]} | settings)
    request = RolloutRequest.for_groups(prompts([5, 9]), rows, sampling, seed=1)
    drafts = draft.sample(request)
    stopping = Stopping(model, tokenizer, sampling, vocab_size=len(tokenizer), device="cpu")
    accepted = accept_prefixes(drafts, model, exact, draft, sampling, stopping, seed=8, entropy=True)
    return draft, exact, drafts, accepted, request


def p_value(counts: Tensor, expected: Tensor) -> float:
    often = expected >= 5
    counts = torch.cat([counts[often], counts[~often].sum()[None]])
    expected = torch.cat([expected[often], expected[~often].sum()[None]])
    statistic = ((counts - expected).square() / expected.clamp(min=1e-9)).sum()
    return float(torch.special.gammaincc(torch.tensor((len(counts) - 1) / 2.0), statistic.float() / 2))


def test_verified_text_is_distributed_as_the_policys_own(model, tokenizer):
    """First tokens, and second tokens after the commonest first one, against the policy's exact distributions."""
    rows = 4000
    draft, exact, drafts, accepted, request = verified_pool(model, tokenizer, rows)
    whole = exact.sample(replace(request, prefix=accepted, seed=9))
    p = exact.next_token_logprobs([torch.tensor([5, 9])], request.sampling)[0].double().exp()
    q = draft.next_token_logprobs([torch.tensor([5, 9])], request.sampling)[0].double().exp()
    first = whole.completion_ids[:, 0]
    assert p_value(torch.bincount(first, minlength=len(p)).double(), p * rows) > 1e-4
    assert p_value(torch.bincount(drafts.completion_ids[:, 0], minlength=len(p)).double(), p * rows) < 1e-6
    share = float((accepted.row["accepted"] > 0).double().mean())
    assert share == pytest.approx(float(torch.minimum(p, q).sum()), abs=0.03)
    common = int(torch.bincount(first[whole.lengths == 2]).argmax())
    after = whole.completion_ids[(first == common) & (whole.lengths == 2), 1]
    p2 = exact.next_token_logprobs([torch.tensor([5, 9, common])], request.sampling)[0].double().exp()
    assert len(after) > 100
    assert p_value(torch.bincount(after, minlength=len(p)).double(), p2 * len(after)) > 1e-4


def test_numbers_of_verified_tokens_are_the_policys(model, tokenizer):
    _, exact, drafts, accepted, request = verified_pool(model, tokenizer, 40, max_tokens=12)
    assert (accepted.row["accepted"] < drafts.lengths).any()
    assert (accepted.row["accepted"] == drafts.lengths).any()
    assert largest_gap(model, accepted) < 1e-4
    for row, logits in enumerate(full_logits(model, accepted)):
        expected = torch.distributions.Categorical(logits=logits).entropy()
        n = len(logits)
        torch.testing.assert_close(accepted.token["entropy"][row, :n], expected, atol=1e-4, rtol=0)
        assert not accepted.token["entropy"][row, n:].any()
        k = int(accepted.row["accepted"][row])
        assert accepted.completions()[row][:k] == drafts.completions()[row][:k]
        rejected = k < int(drafts.lengths[row])
        assert n == k + rejected
        if rejected:
            assert accepted.completions()[row][k] != drafts.completions()[row][k], "max(p - q, 0) is 0 there"
        else:
            assert accepted.row["stop_reason"][row] == drafts.row["stop_reason"][row]
    whole = exact.sample(replace(request, prefix=accepted, seed=9))
    assert not (whole.row["stop_reason"] == StopReason.ABORTED).any()


def test_the_same_policy_accepts_everything(model, tokenizer):
    sampler = connected(model, tokenizer, HFSampler(), pool_size=4, mode="verified")
    out = sampler.sample(ask())
    plain = sampler.exploit.sample(replace(ask(), wanted=None, score=None))
    assert sorted(map(tuple, out.completions())) == sorted(map(tuple, plain.completions()))
    assert sampler.metrics(out)["accepted_ratio"] == 1


def test_a_new_token_may_end_the_completion(tokenizer):
    """A draft that never stops against a policy that always does: by the end token, a stop token, a stop string."""
    model = tiny_model("Qwen2", vocab_size=len(tokenizer))

    class Certain(HFSampler):
        def __init__(self, token: int) -> None:
            super().__init__()
            self.token = token

        def next_token_logprobs(self, contexts, sampling):
            out = torch.full((len(contexts), len(tokenizer)), -30.0)
            out[:, self.token] = 0.0
            return out

    x, stop = tokenizer.convert_tokens_to_ids(["x", "="])
    sampling = Sampling(max_tokens=9, stop_token_ids=[4], stop=["x="])
    stopping = Stopping(model, tokenizer, sampling, vocab_size=len(tokenizer), device="cpu")
    for token, reason in ((1, StopReason.END), (4, StopReason.STOP), (stop, StopReason.STOP), (9, StopReason.ABORTED)):
        drafts = Rollouts.build(
            prompts([5, 6]), torch.zeros(1, dtype=torch.long), [torch.tensor([x, x, x])],
            sampler_logprobs=[torch.tensor([-30.0, 10.0, 0.0])],  # accepted, rejected, never looked at
        )  # fmt: skip
        out = accept_prefixes(drafts, model, Certain(token), Certain(x), sampling, stopping, seed=0)
        assert out.completions() == [[x, token]]
        assert out.row["accepted"].tolist() == [1]
        assert out.row["stop_reason"].tolist() == [reason]
        assert out.finished.tolist() == [reason != StopReason.ABORTED]


def test_verified_steps_return_whole_completions_with_the_policys_numbers(model, tokenizer):
    sampler = connected(model, tokenizer, rough(), pool_size=12, mode="verified")
    out = sampler.sample(ask())
    assert len(out) == 12
    assert not (out.row["stop_reason"] == StopReason.ABORTED).any()
    assert largest_gap(model, out) < 1e-4
    assert (out.token["policy_version"][out.completion_mask] == 5).all()
    assert not [name for name in out.row if name.startswith("reward") or name in ("budget", "accepted")]
    assert 0.1 < sampler.metrics(out)["accepted_ratio"] < 1
    with pytest.raises(ValueError, match="every token to have a probability"):
        sampler.sample(ask(top_p=0.9))


# --- prompts and numbers ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["coupled", "verified", "fresh"])
def test_prompts_with_contrast_are_kept(model, tokenizer, mode):
    def only_the_last_two(rollouts: Rollouts, row: int) -> float:
        return int(rollouts.row["sample"][row]) % 2 if int(rollouts.group[row]) else 1.0

    sampler = connected(model, tokenizer, rough(), pool_size=8, mode=mode, oversampling=1.5)
    assert sampler.prompts_to_draw(2) == 3
    out = sampler.sample(ask(wanted=2, score=only_the_last_two))
    assert out.prompts.draw.tolist() == [1, 2]
    assert out.group_sizes().tolist() == [4, 4]
    numbers = sampler.metrics(out)
    assert numbers["pool_contrast"] == pytest.approx((0 + 0.5 + 0.5) / 3)
    assert numbers["kept_contrast"] == pytest.approx(0.5)
    assert numbers["pool_reward_mean"] == pytest.approx((1 + 0.5 + 0.5) / 3)
    assert ("explore_reward" in out.row) == (mode != "fresh")


def test_each_completion_keeps_the_budget_of_its_prompt(model, tokenizer):
    sampler = connected(model, tokenizer, rough(), pool_size=6)
    request = ask(stop_token_ids=[])
    request.budgets = torch.tensor([3] * 4 + [7] * 4 + [5] * 4)
    out = sampler.sample(request)
    limits = torch.tensor([3, 7, 5])[out.group]
    assert (out.lengths <= limits).all()
    assert (out.lengths[out.row["stop_reason"] == StopReason.LENGTH] >= 3).all()


def test_fresh_completions_do_not_repeat_what_was_explored(model, tokenizer):
    sampler = connected(model, tokenizer, HFSampler(), pool_size=8, mode="fresh", oversampling=1.5)
    out = sampler.sample(ask(wanted=2))
    pool = RolloutRequest.for_groups(prompts(*THREE), 8, ask().sampling, ask().seed)
    explored = set(map(tuple, sampler.exploit.sample(pool).completions()))
    assert sum(tuple(x) in explored for x in out.completions()) < len(out) / 2


def test_a_kept_prefix_ends_at_the_first_difference():
    texts = ([3, 4, 5, 6], [3, 4], [3, 4, 5]), ([3, 9, 5, 6], [3, 4, 5], [3, 4])
    kept, out = (
        Rollouts.build(prompts([5]), torch.zeros(3, dtype=torch.long), [torch.tensor(x) for x in side])
        for side in texts
    )
    numbers = _Numbers()
    numbers.kept_tokens(kept, out)
    assert numbers.summary(out)["kept_prefix_ratio"] == pytest.approx((1 / 4 + 1 + 2 / 3) / 3)


def test_agreement_of_explored_and_final_rewards():
    rows = Rollouts.build(prompts([5], [6]), torch.tensor([0, 0, 0, 0, 1, 1]), [torch.tensor([3])] * 6)
    rows.row["explore_reward"] = torch.tensor([1.0, 1.0, 0.0, 0.0, 1.0, 1.0])
    rows.reward_terms["test"] = torch.tensor([1.0, 0.0, 0.0, 1.0, 1.0, 0.0])
    rows.reward_weights["test"] = torch.ones(6)
    assert sign_agreement(rows) == 0.5
    rows.reward_terms["test"] = torch.tensor([1.0, 0.0, 0.0, 0.0, 1.0, 0.0])
    assert sign_agreement(rows) == pytest.approx(3 / 4)
    rows.reward_terms["test"] = torch.ones(6)
    assert math.isnan(sign_agreement(rows))


def test_a_request_outside_of_training_goes_to_the_exact_sampler(model, tokenizer):
    sampler = connected(model, tokenizer, rough(), pool_size=8)
    plain = sampler.exploit.sample(replace(ask(), wanted=None))
    assert sampler.sample(replace(ask(), wanted=None)).diff(plain) == {}


def test_a_run_that_is_to_stop_does_not_wait_for_the_second_stage(model, tokenizer):
    sampler = connected(model, tokenizer, rough(), pool_size=8)
    request = ask(stop_token_ids=[])
    request.should_stop = lambda progress: progress.step == 2
    request.score = None.__class__  # would raise
    assert (sampler.sample(request).row["stop_reason"] == StopReason.ABORTED).any()


test_two_stage_sampler_keeps_the_contract = contract(
    lambda: TwoStageSampler(rough(), pool_size=6),
    without=("a_step_gets_its_groups", "a_step_can_be_undone", "its_state_resumes"),  # their requests have no rewards
)


# --- training --------------------------------------------------------------------------------------------------------

MODES = [("coupled", 1.0), ("verified", 1.0), ("fresh", 1.5)]


def two_stage_module(folder, mode="coupled", oversampling=1.0, **options):
    sampler = TwoStageSampler(rough(), pool_size=16, mode=mode, oversampling=oversampling)
    return make_module(folder, **{"sampler": sampler, **options})


@pytest.mark.parametrize(("mode", "oversampling"), MODES)
def test_a_policy_learns_in_two_stages(tmp_path, mode, oversampling):
    pool, agreements = [], []

    class Watch(Callback):
        def on_train_batch_end(self, trainer, pl_module, *args) -> None:
            pool.append(float(trainer.callback_metrics["sampler/pool_reward_mean"]))
            agreements.append(float(trainer.callback_metrics.get("sampler/sign_agreement", math.nan)))

    module = two_stage_module(make_policy(tmp_path / "policy"), mode, oversampling, prompts_per_step=8, max_rollouts=10)
    train(tmp_path, module, [Watch()])
    assert sum(pool[-2:]) / 2 > sum(pool[:2]) / 2 + 0.15, pool
    if mode != "fresh":
        assert sum(agreements[:5]) / 5 > 0.7, "exploring tells what trains"


def test_a_run_resumes_bit_for_bit(tmp_path):
    check_resume(tmp_path, module=lambda folder: two_stage_module(folder, "verified", max_rollouts=3), at=2)


def test_impossible_settings_are_refused(tmp_path):
    for options, match in (
        ({"pool_size": 0}, "pool_size"),
        ({"mode": "copied"}, "mode"),
        ({"selection": "best"}, "selection"),
        ({"oversampling": 0.5}, "oversampling"),
        ({"mode": "fresh"}, "nothing but the choice of prompts"),
        ({"mode": "verified", "exploit": EnvironmentSampler(CalculatorEnvironment())}, "one of the two"),
        ({"mode": "verified", "exploit": rough()}, "one of the two"),
    ):
        with pytest.raises(ValueError, match=match):
            TwoStageSampler(HFSampler(), **options)
    with pytest.raises(ValueError, match="cannot explore"):
        TwoStageSampler(PartialSampler())
    with pytest.raises(ValueError, match="outermost"):
        PartialSampler(TwoStageSampler(HFSampler()))
    policy = make_policy(tmp_path / "policy")
    with pytest.raises(ValueError, match="raise pool_size"):
        train(tmp_path, make_module(policy, sampler=TwoStageSampler(HFSampler(), pool_size=3)))
    with pytest.raises(ValueError, match="must bring `score`"):
        TwoStageSampler(HFSampler()).generate(replace(ask(), score=None))
