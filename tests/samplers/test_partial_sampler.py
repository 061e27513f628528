# SPDX-License-Identifier: Apache-2.0
"""Partial rollouts: the published schedule, what is carried over and what becomes of old tokens."""

import math
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from contract import contract
from lightning.pytorch import Callback
from scripted_sampler import ScriptedSampler, Steps, prompts_at

from lit_rl.callbacks import DynamicSampling
from lit_rl.methods.terms import Current, PolicyTerm, Signals
from lit_rl.objectives import Clip
from lit_rl.rollouts import Rollouts, StopReason
from lit_rl.samplers import HFSampler, PartialSampler, RolloutRequest, RolloutSampler, Sampling
from lit_rl.samplers.wrapping import staleness
from lit_rl.testing import (
    StopAt,
    assert_same_weights,
    check_resume,
    final_state,
    make_module,
    make_policy,
    run_on_ranks,
    train,
)

LENGTHS = (2, 3, 9, 10, 4, 12, 5, 1)


def scripted(*lengths: int, **options) -> tuple[PartialSampler, ScriptedSampler]:
    inner = ScriptedSampler(lambda draw, sample: lengths[draw % len(lengths)])
    return PartialSampler(inner, **options), inner


test_partial_sampler_keeps_the_contract = contract(PartialSampler)


# --- the schedule ----------------------------------------------------------------------------------------------------


def test_the_published_toy_schedule():
    """N = 2, M = 4, one token a tick: stop times, trained lengths, off-policy tokens and buffer of the card."""
    sampler, inner = scripted(*LENGTHS)
    run, seen = Steps(sampler), []
    for version in range(3):
        before = inner.ticks
        rollouts = run.step(2)
        stale = staleness(rollouts, version) > 0
        lengths = rollouts.lengths.tolist()
        seen.append((inner.ticks - before, lengths, int(stale.sum()), sum(lengths), len(sampler.buffer.prompts)))
    assert seen == [(3, [2, 3], 0, 5, 2), (6, [9, 4], 3, 13, 2), (1, [10, 1], 9, 11, 2)]


def test_without_oversampling_nothing_is_interrupted():
    sampler, inner = scripted(*LENGTHS, oversampling=1)
    run, stops = Steps(sampler), []
    for version in range(3):
        before = inner.ticks
        rollouts = run.step(2)
        stops.append(inner.ticks - before)
        assert len(sampler.buffer) == 0
        assert not (staleness(rollouts, version) > 0).any()
    assert stops == [3, 10, 12]


@pytest.mark.parametrize("seed", range(4))
def test_schedule_against_a_naive_loop(seed):
    """Random lengths, group sizes and M / N: the same groups, the same stop times, and every count adds up."""
    rng = random.Random(seed)
    length = [[rng.randint(1, 15) for _ in range(3)] for _ in range(200)]
    wanted, oversampling, group_size = rng.randint(1, 4), rng.choice([1.0, 1.5, 2.0, 3.0]), rng.randint(1, 3)
    inner = ScriptedSampler(lambda draw, sample: length[draw][sample])
    sampler = PartialSampler(inner, oversampling=oversampling)
    run = Steps(sampler, group_size)
    pool_size, drawn, trained = math.ceil(oversampling * wanted), 0, 0
    waiting: list[tuple[int, int]] = []  # (draw, ticks so far)
    for step in range(8):
        pool = waiting + [(d, 0) for d in range(drawn, drawn + pool_size - len(waiting))]
        drawn += pool_size - len(waiting)
        left = [max(length[d][:group_size]) - t for d, t in pool]
        stop = max(0, sorted(left)[wanted - 1])
        done = [i for i, x in enumerate(left) if x <= stop][:wanted]
        before = inner.ticks
        rollouts = run.step(wanted)
        assert inner.ticks - before == stop
        assert rollouts.prompts.draw.tolist() == [pool[i][0] for i in done]
        assert rollouts.lengths.tolist() == [n for i in done for n in length[pool[i][0]][:group_size]]
        waiting = [(d, t + stop) for i, (d, t) in enumerate(pool) if i not in done]
        assert sampler.buffer.prompts.draw.tolist() == [d for d, _ in waiting]
        trained += int(rollouts.lengths.sum())
        assert len(waiting) == pool_size - wanted
        assert run.cursor == drawn == pool_size + step * wanted
        assert trained + int(sampler.buffer.lengths.sum()) == inner.generated, "no token is lost or generated twice"


def test_more_oversampling_never_stops_later():
    stops = []
    for oversampling in (1, 1.5, 2, 3, 4):
        sampler, inner = scripted(*LENGTHS, oversampling=oversampling)
        Steps(sampler).step(2)
        stops.append(inner.ticks)
    assert stops == sorted(stops, reverse=True)


def test_groups_that_finish_in_the_same_tick_are_kept_and_come_first():
    sampler, inner = scripted(3, 3, 3, 9)
    run = Steps(sampler)
    assert run.step(2).prompts.draw.tolist() == [0, 1]
    assert inner.ticks == 3
    assert sampler.buffer.row["stop_reason"].tolist() == [StopReason.END, StopReason.ABORTED]
    ticks, generated = inner.ticks, inner.generated
    assert run.step(1).prompts.draw.tolist() == [2]
    assert (inner.ticks, inner.generated) == (ticks, generated), "a complete group needs no generation"


def test_only_the_open_members_of_a_group_generate_again():
    inner = ScriptedSampler(lambda draw, sample: 20 if (draw, sample) == (0, 7) else 2)
    sampler = PartialSampler(inner)
    run = Steps(sampler, group_size=8)
    assert run.step(1).prompts.draw.tolist() == [1]
    run.step(1)  # draw 2 is fast: group 0 goes on waiting
    rows = [len(r) for r in inner.requests]
    assert rows == [16, 1 + 8]
    assert inner.requests[1].sample.tolist()[0] == 7
    assert sampler.buffer.lengths.tolist() == [2] * 7 + [4]


def test_the_budget_is_shared_by_all_segments():
    sampler, inner = scripted(1000, 100, 28, 28)
    run = Steps(sampler, max_tokens=128)
    run.step(1)
    rollouts = run.step(1)  # 100 tokens are there: 28 remain
    assert inner.requests[1].prefix.lengths.tolist() == [100, 0]
    assert rollouts.lengths.tolist() == [128]
    assert rollouts.row["stop_reason"].tolist() == [StopReason.LENGTH]
    assert not rollouts.finished.any()


def test_a_completion_keeps_the_budget_that_it_was_drawn_with():
    sampler, _ = scripted(1000, 2, 1000, 2)
    run = Steps(sampler)
    request = run.request(1)
    request.budgets = torch.tensor([5, 9])
    sampler.sample(request)
    assert sampler.sample(run.request(1)).prompts.draw.tolist() == [0]
    request = run.request(1)  # draw 2 waits with 100 tokens, less the 3 that it had when draw 0 reached its 5
    request.budgets = torch.tensor([50])
    assert sampler.sample(request).lengths.tolist() == [2]
    assert sampler.buffer.row["budget"].tolist() == [100]


def test_rows_come_back_with_their_own_prompts_and_columns():
    sampler, _ = scripted(*LENGTHS)
    run = Steps(sampler, group_size=2)
    for _ in range(3):
        rollouts = run.step(2)
        assert rollouts.prompts.columns["answer"] == [str(d) for d in rollouts.prompts.draw.tolist()]
        assert rollouts.prompts.uid.tolist() == [100 + d for d in rollouts.prompts.draw.tolist()]
        assert rollouts.row["sample"].tolist() == [0, 1, 0, 1]
        assert rollouts.group.tolist() == [0, 0, 1, 1]
        assert sorted(set(rollouts.unit.tolist())) == sorted(rollouts.unit.tolist())
        assert "budget" not in rollouts.row


def test_a_refill_round_takes_from_the_buffer_before_it_draws():
    sampler, _ = scripted(1, 2, 3, 4, 5, 6, 7, 8)
    run = Steps(sampler)
    run.step(3)
    assert sampler.prompts_to_draw(1) == 0
    cursor = run.cursor
    assert run.step(1).prompts.draw.tolist() == [3]
    assert run.cursor == cursor
    assert len(sampler.buffer.prompts) == 2


def test_a_request_outside_of_training_goes_to_the_inner_sampler():
    sampler, _ = scripted(*LENGTHS)
    run = Steps(sampler)
    run.step(2)
    buffer = sampler.buffer
    rollouts = sampler.sample(RolloutRequest.for_groups(prompts_at(50, 3), 2, Sampling(max_tokens=100), 0))
    assert rollouts.prompts.draw.tolist() == [50, 51, 52]
    assert (rollouts.row["stop_reason"] == StopReason.END).all()
    assert sampler.buffer is buffer


# --- old tokens ------------------------------------------------------------------------------------------------------


def two_segments(correction: str, **options) -> Rollouts:
    """Two prompts with two completions; of the second, 3 + 2 tokens and a member that ended before, after 2 tokens."""
    lengths = {(0, 0): 3, (0, 1): 3, (1, 0): 5, (1, 1): 2}
    sampler = PartialSampler(
        ScriptedSampler(lambda d, s: lengths.get((d, s), 50)), correction=correction, oversampling=2, **options
    )
    run = Steps(sampler, group_size=2)
    run.step(1)
    rollouts = run.step(1)
    assert rollouts.prompts.draw.tolist() == [1]
    return rollouts


def test_versions_and_logprobs_are_kept_segment_by_segment():
    rollouts = two_segments("recompute")
    assert rollouts.token["policy_version"].tolist() == [[0, 0, 0, 1, 1], [0] * 5]
    expected = [[1 / 2] * 3 + [1 / 3] * 2, [1 / 2, 1 / 2, 1, 1, 1]]
    torch.testing.assert_close(rollouts.logprobs["sampler"].exp(), torch.tensor(expected))
    assert "old" not in rollouts.logprobs
    assert rollouts.loss_weights.sum() == 7


def test_mask_prefix_trains_new_tokens_only():
    rollouts = two_segments("mask_prefix")
    assert rollouts.loss_weights.tolist() == [[0, 0, 0, 1, 1], [0, 0, 0, 0, 0]]
    rollouts.advantages = torch.ones(2, 5)
    weights, _ = PolicyTerm(Clip(), aggregation="sequence_mean").averaging(rollouts)
    assert weights[0].tolist() == [0, 0, 0, 0.5, 0.5]
    assert weights[1].tolist() == [0] * 5


@pytest.mark.parametrize("correction", ["recompute", "behaviour", "truncated"])
def test_ratio_and_weight_of_old_tokens(correction):
    """π(token) = 0.25 now; the old tokens were sampled with 0.5, the new ones with 1 / 3."""
    rollouts = two_segments(correction)
    rollouts.advantages = torch.ones(2, 5)
    sampler = PartialSampler(correction=correction)
    term = PolicyTerm(Clip(0.99, 10.0), sampler.loss_correction)
    now = torch.full((2, 5), math.log(0.25), requires_grad=True)
    loss = term.values(rollouts, Current(now, None), Signals())
    old, new = {"recompute": (1, 1), "behaviour": (0.5, 0.75), "truncated": (0.5, 0.75)}[correction]
    assert (-loss[0]).tolist() == pytest.approx([old] * 3 + [new] * 2)
    loss[0].sum().backward()
    assert now.grad[0].tolist() == pytest.approx([-old] * 3 + [-new] * 2)


def test_truncated_bounds_the_weight():
    rollouts = two_segments("truncated")
    rollouts.advantages = torch.ones(2, 5)
    term = PolicyTerm(Clip(), PartialSampler(correction="truncated", max_weight=1.5).loss_correction)
    now = torch.full((2, 5), math.log(0.9))  # 1.8 times the probability of the old tokens, 2.7 times of the new
    loss = term.values(rollouts, Current(now, None), Signals())
    assert (-loss[0]).tolist() == pytest.approx([1.5] * 5)


def test_a_staleness_bound_starts_old_completions_again():
    lengths = (2, 30, 2, 2, 2, 2, 2, 2)
    for bound, expected in ((None, [2, 4, 6, 8]), (2, [2, 4, 6, 2])):
        sampler, _ = scripted(*lengths, max_staleness=bound)
        run, seen, restarted = Steps(sampler), [], []
        for _ in range(4):
            run.step(1)
            seen += sampler.buffer.lengths.tolist()
            restarted.append(sampler.metrics(sampler.buffer)["restarted_completions"])
        assert seen == expected
        assert restarted == ([0, 0, 0, 0] if bound is None else [0, 0, 0, 1])
        assert bound is None or sampler.buffer.token["policy_version"][0, :2].tolist() == [3, 3]


def test_metrics_of_the_toy_schedule():
    sampler, _ = scripted(*LENGTHS)
    run = Steps(sampler)
    run.step(2)
    sampler.metrics(sampler.buffer)
    rollouts = run.step(2)
    numbers = sampler.metrics(rollouts)
    assert numbers["off_policy_ratio"] == pytest.approx(3 / 13)
    assert numbers["staleness_mean"] == pytest.approx(3 / 13)
    assert numbers["staleness_max"] == 1
    assert numbers["waiting_groups"] == 2
    assert numbers["partial_completions"] == 2
    assert numbers["prefilled_tokens"] == 6
    assert sampler.metrics(rollouts)["prefilled_tokens"] == 0, "numbers are those of one step"


# --- state -----------------------------------------------------------------------------------------------------------


def test_a_rewind_drops_what_waits():
    sampler, _ = scripted(*LENGTHS)
    run = Steps(sampler)
    run.step(2)
    sampler.on_rewind(None)
    assert sampler.buffer is None
    assert sampler.prompts_to_draw(2) == 4


def test_state_survives_a_checkpoint_that_is_loaded_safely(tmp_path):
    sampler, _ = scripted(*LENGTHS)
    run = Steps(sampler)
    run.step(2)
    torch.save(sampler.state_dict(), tmp_path / "state.pt")
    other, _ = scripted(*LENGTHS)
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    again = Steps(other)
    again.cursor, again.version = run.cursor, run.version
    other.sync(None, run.version)
    for _ in range(3):
        first, second = run.step(2), again.step(2)
        assert first.diff(second) == {}
        assert first.prompts.text == second.prompts.text


def test_an_interrupted_step_can_be_undone():
    sampler, _ = scripted(*LENGTHS)
    run = Steps(sampler)
    run.step(2)
    boundary, cursor = sampler.boundary(), run.cursor
    stopped = run.request(2)
    stopped.should_stop = lambda progress: progress.step == 1
    sampler.sample(stopped)
    assert sampler.buffer is not boundary[0]
    sampler.return_to(boundary)
    assert sampler.buffer is boundary[0]
    run.cursor = cursor
    assert run.step(2).lengths.tolist() == [9, 4]


def test_impossible_settings_are_refused():
    for options, match in (
        ({"oversampling": 0.5}, "oversampling"),
        ({"correction": "none"}, "correction"),
        ({"max_staleness": 0}, "max_staleness"),
    ):
        with pytest.raises(ValueError, match=match):
            PartialSampler(**options)
    with pytest.raises(ValueError, match="outermost"):
        PartialSampler(PartialSampler())

    class Once(ScriptedSampler):
        continues_prefix = False

    with pytest.raises(ValueError, match="continues them, which Once cannot"):
        PartialSampler(Once(lambda d, s: 1))


# --- with a model ----------------------------------------------------------------------------------------------------


def hf_partial(model, tokenizer, **options) -> PartialSampler:
    sampler = PartialSampler(HFSampler(), **options)
    sampler.setup(model, tokenizer)
    sampler.sync(model, 0)
    return sampler


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_an_interrupted_completion_equals_the_uninterrupted_one(temperature, tokenizer):
    """With frozen weights, whatever the interruptions: the same tokens, log-probabilities and ends."""
    from sampler_models import tiny_model

    model = tiny_model("Qwen2", vocab_size=len(tokenizer))
    sampler = hf_partial(model, tokenizer, oversampling=3)
    run = Steps(sampler, group_size=2, max_tokens=24)
    run.sampling = replace(run.sampling, temperature=temperature)
    parts = [run.step(2, model) for _ in range(5)]
    assert sampler.metrics(parts[-1])["off_policy_ratio"] > 0, "the test needs an interruption"
    got = Rollouts.cat(parts)
    want = sampler.sample(RolloutRequest.for_groups(got.prompts, 2, run.sampling, 7))
    assert got.completions() == want.completions()
    assert got.row["stop_reason"].tolist() == want.row["stop_reason"].tolist()
    for name in ("logprobs.sampler", "entropy"):
        torch.testing.assert_close(got.token[name][:, : want.width], want.token[name], atol=2e-5, rtol=1e-4)


def partial_module(folder, **options):
    sampling = Sampling(max_tokens=24)
    return make_module(folder, **{"sampler": PartialSampler(), "sampling": sampling, **options})


@pytest.mark.parametrize("correction", ["truncated", "mask_prefix"])
def test_a_run_resumes_bit_for_bit(tmp_path, correction):
    def module(folder):
        return partial_module(folder, sampler=PartialSampler(correction=correction), max_rollouts=4)

    check_resume(tmp_path, module=module, at=2)


def test_without_oversampling_a_run_is_the_plain_run(tmp_path):
    policy = make_policy(tmp_path / "policy")
    plain, partial = make_module(policy), make_module(policy, sampler=PartialSampler(oversampling=1))
    train(tmp_path / "plain", plain)
    train(tmp_path / "partial", partial)
    assert_same_weights(final_state(plain), final_state(partial))


def resume_on_a_rank(rank: int, folder: Path, policy: Path) -> None:
    """A whole run and one that is stopped and resumed, on two ranks; each has a buffer of its own."""
    parallel = {"strategy": "ddp", "devices": 2}
    whole, part, rest = (partial_module(policy, max_rollouts=4) for _ in range(3))
    train(folder / "whole", whole, **parallel)
    train(folder / "part", part, [StopAt(2)], **parallel)
    waiting = part.sampler.buffer.prompts.draw.tolist()
    checkpoint = folder / "part" / "checkpoints" / "clock00000002.ckpt"
    train(folder / "part", rest, checkpoint=checkpoint, **parallel)
    same = all(torch.equal(x, final_state(rest)[n]) for n, x in final_state(whole).items())
    torch.save({"waiting": waiting, "same": same, "cursor": rest.cursor}, folder / f"rank{rank}.pt")


def test_every_rank_carries_its_own_groups_over_and_finds_them_again(tmp_path):
    run_on_ranks(resume_on_a_rank, 2, tmp_path, make_policy(tmp_path / "policy"))
    first, second = (torch.load(tmp_path / f"rank{r}.pt", weights_only=True) for r in range(2))
    assert first["same"]
    assert second["same"]
    assert len(first["waiting"]) == len(second["waiting"]) == 2
    assert not set(first["waiting"]) & set(second["waiting"])
    assert first["cursor"] == second["cursor"] == 2 * (4 + 3 * 2)


def test_a_policy_learns_from_partial_rollouts(tmp_path):
    options = {"sampling": Sampling(max_tokens=8), "prompts_per_step": 16, "max_rollouts": 14}
    module = partial_module(make_policy(tmp_path / "policy"), **options)
    rewards, stale = [], []

    class Watch(Callback):
        def on_train_batch_end(self, trainer, pl_module, *args) -> None:
            rewards.append(float(pl_module.last_rollouts.rewards.mean()))
            stale.append(float(trainer.callback_metrics["sampler/off_policy_ratio"]))

    train(tmp_path, module, [Watch()])
    assert max(stale) > 0.1, "the test needs interruptions"
    assert sum(rewards[:3]) / 3 < 0.25
    assert sum(rewards[-3:]) / 3 > 0.45


def test_groups_that_dynamic_sampling_drops_are_replaced_from_the_buffer(tmp_path):
    draws: list[int] = []

    class Watch(Callback):
        def on_train_batch_end(self, trainer, pl_module, *args) -> None:
            rollouts = pl_module.last_rollouts
            assert not (rollouts.row["stop_reason"] == StopReason.ABORTED).any()
            assert (rollouts.group_mean(rollouts.rewards) % 1 > 0).all(), "groups without contrast are dropped"
            draws.extend(rollouts.prompts.draw.tolist())

    module = partial_module(make_policy(tmp_path / "policy"), max_rollouts=3, group_size=8)
    train(tmp_path, module, [DynamicSampling(), Watch()])
    assert len(draws) == len(set(draws)) == 3 * 4, "no group trains twice and none is missing"


def test_trusting_the_sampler_for_old_logprobs_contradicts_recomputing(tmp_path):
    module = partial_module(make_policy(tmp_path / "policy"), old_logprobs="sampler")
    with pytest.raises(ValueError, match="needs π_old from the trainer"):
        train(tmp_path, module)


def test_a_sampler_without_a_choice_draws_what_is_wanted():
    assert RolloutSampler.prompts_to_draw(HFSampler(), 5) == 5
