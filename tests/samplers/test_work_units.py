# SPDX-License-Identifier: Apache-2.0
"""A request divided among workers: every row once, the longest first, and the same completions as undivided."""

import random
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sampler_models import connected, request, tiny_model

from lit_rl.rollouts import Rollouts, StopReason
from lit_rl.samplers import Interrupt
from lit_rl.samplers.base import RolloutRequest
from lit_rl.samplers.work_units import Clock, LengthEstimate, as_of, assemble, deal, divide, part_of


@pytest.fixture(scope="module")
def sampler(tokenizer):
    return connected(tiny_model("Qwen2", vocab_size=len(tokenizer)), tokenizer)


def rows_of(parts: list[torch.Tensor]) -> list[int]:
    return sorted(row for part in parts for row in part.tolist())


GROUPS = st.lists(st.tuples(st.integers(1, 9), st.integers(1, 50)), max_size=12)  # size, expected tokens


@given(GROUPS, st.integers(1, 20), st.integers(1, 6), st.randoms())
def test_every_row_is_in_one_unit_and_in_one_share(groups, pieces, hands, shuffler):
    group = [g for g, (size, _) in enumerate(groups) for _ in range(size)]
    shuffler.shuffle(group)
    expected = torch.tensor([float(groups[g][1]) for g in group])
    parts = divide(torch.tensor(group, dtype=torch.long), expected, pieces)
    assert rows_of(parts) == list(range(len(group)))
    assert rows_of(deal(parts, expected, hands)) == list(range(len(group)))
    assert len(deal(parts, expected, hands)) <= hands
    size = -(-len(group) // pieces)
    assert all(len(part) <= max(size, 1) for part in parts)
    for g, (members, _) in enumerate(groups):
        if members <= size:
            assert sum(g in {group[i] for i in part.tolist()} for part in parts) == 1, "a small group was torn apart"
    longest = [float(expected[part].max()) for part in parts if len(part)]
    assert longest == sorted(longest, reverse=True)


def test_units_hold_the_groups_that_are_expected_to_be_longest_first():
    group = torch.tensor([0, 1, 2, 3, 0, 1, 2, 3])
    expected = torch.tensor([5.0, 30.0, 10.0, 20.0])[group]
    assert [p.tolist() for p in divide(group, expected, 2)] == [[1, 3, 5, 7], [0, 2, 4, 6]]
    assert [p.tolist() for p in divide(group, expected, 8)][:2] == [[1], [5]], "more parts than groups: rows part"


def test_shares_are_dealt_to_the_lightest_hand():
    """Tokens (8, 7, 6, 5, 4) over two hands: 8 | 7, then 6 to 7, 5 to 8, and 4 to the hands of 13 and 13."""
    parts = [torch.tensor([i]) for i in range(5)]
    shares = deal(parts, torch.tensor([8.0, 7.0, 6.0, 5.0, 4.0]), 2)
    assert [s.tolist() for s in shares] == [[0, 3, 4], [1, 2]]


@pytest.mark.parametrize("pieces", [1, 2, 3, 5, 9, 100])
def test_any_division_gives_the_completions_of_the_whole(sampler, pieces):
    whole_request = request(max_tokens=20, group_size=4)
    shuffled = torch.tensor([7, 2, 11, 0, 5, 8, 1, 10, 3, 4, 6, 9])
    asked = replace(whole_request, group=whole_request.group[shuffled], sample=whole_request.sample[shuffled])
    whole = sampler.sample(asked)
    parts = divide(asked.group, torch.tensor([3.0, 1.0, 2.0])[asked.group], pieces)
    random.Random(0).shuffle(parts)
    out = assemble(asked, parts, [sampler.sample(part_of(asked, rows)) for rows in parts])
    assert out.diff(whole, skip=["logprobs.sampler", "entropy"]) == {}
    for name in ("logprobs.sampler", "entropy"):
        torch.testing.assert_close(out.token[name], whole.token[name], atol=1e-5, rtol=1e-5)
    assert out.prompts is asked.prompts


def test_a_part_keeps_budgets_and_prefixes_and_leaves_behind_what_cannot_travel(sampler):
    asked = request(max_tokens=20, budgets=torch.arange(1, 10), wanted=3)
    prefix = sampler.sample(replace(asked, wanted=None, should_stop=lambda p: p.step >= 2))
    asked = replace(asked, prefix=prefix, should_stop=Interrupt(bool), score=lambda r: r)
    part = part_of(asked, torch.tensor([4, 7, 8]))
    assert part.budgets.tolist() == [5, 8, 9]
    assert part.group.tolist() == [0, 1, 1]
    assert part.sample.tolist() == [1, 1, 2]
    assert part.prefix.completions() == [prefix.completions()[i] for i in (4, 7, 8)]
    assert part.prompts.draw.tolist() == [1, 2]
    assert (part.should_stop, part.score, part.wanted) == (None, None, 2)


def test_a_row_that_is_missing_or_there_twice_is_an_error(sampler):
    asked = request(max_tokens=4)
    parts = divide(asked.group, torch.ones(9), 3)
    done = [sampler.sample(part_of(asked, rows)) for rows in parts]
    for chosen in ([0, 1], [0, 1, 1], [0, 1, 2, 2]):
        with pytest.raises(ValueError, match="each row of the request once"):
            assemble(asked, [parts[i] for i in chosen], [done[i] for i in chosen])


# --- the clock -------------------------------------------------------------------------------------------------------


def stopping_at(step: int, seen: list):
    def stop(progress) -> bool:
        seen.append((progress.step, progress.finished.tolist(), progress.lengths.tolist()))
        return progress.step >= step

    return stop


@pytest.mark.parametrize("at", [1, 4, 9, 99])
@pytest.mark.parametrize("hands", [1, 2, 3])
def test_shares_on_one_clock_are_one_batch(sampler, at, hands):
    """What a stop sees and what it leaves are those of a single batch, whichever share runs ahead."""
    asked = request(max_tokens=20, budgets=torch.tensor([3, 20, 20, 1, 20, 7, 20, 12, 20]), stop_token_ids=[7, 9, 11])
    expected: list = []
    whole = sampler.sample(replace(asked, should_stop=stopping_at(at, expected)))
    shares = deal(divide(asked.group, torch.ones(9), 4 * hands), torch.ones(9), hands)
    logs: list[list] = [[] for _ in shares]
    done: list[Rollouts] = []
    for rows, log in zip(shares, logs):

        def watch(progress, log=log) -> bool:
            log.append((progress.finished.clone(), progress.lengths.clone()))
            return False

        done.append(sampler.sample(replace(part_of(asked, rows), should_stop=watch)))
    clock, seen, stopped = Clock(shares, torch.zeros(9, dtype=torch.long)), [], False
    order = random.Random(at)
    while not stopped and not all(clock.received[i] >= len(log) for i, log in enumerate(logs)):
        share = order.randrange(len(shares))
        first = max(0, clock.received[share] - order.randrange(3))  # a worker that was replaced begins again
        clock.add(share, first, logs[share][first : clock.received[share] + order.randrange(3)])
        if clock.received[share] >= len(logs[share]):
            clock.end(share, done[share].lengths)
        stopped = clock.advance(stopping_at(at, seen))
    assert seen == expected
    assert stopped == (at <= len(expected) and expected[-1][0] >= at)
    if stopped:
        done = [as_of(part, *state) for part, state in zip(done, clock.states)]
    out = assemble(asked, shares, done)
    assert out.completions() == whole.completions()
    for name in ("finished", "stop_reason", "lengths"):
        assert torch.equal(out.row[name], whole.row[name])
    assert (out.row["stop_reason"] == StopReason.ABORTED).any() == (at < 20)


# --- expected lengths ------------------------------------------------------------------------------------------------


def finished(asked: RolloutRequest, lengths: list[int], reason: StopReason = StopReason.END) -> Rollouts:
    parts = [torch.zeros(n) for n in lengths]
    reasons = torch.full((len(lengths),), int(reason))
    return Rollouts.build(asked.prompts, asked.group, parts, sampler_logprobs=parts, stop_reason=reasons)


def test_a_prompt_is_expected_to_be_as_long_as_before_then_as_its_source_then_as_its_budget():
    estimate = LengthEstimate(weight=0.5)
    asked = request(2, max_tokens=40)
    assert estimate.remaining(asked).tolist() == [40.0] * 6
    known = replace(asked, prompts=asked.prompts.select([0, 1]), group=asked.group[:4], sample=asked.sample[:4])
    estimate.update(finished(known, [4, 6, 20, 40]))
    assert estimate.remaining(asked).tolist() == [5, 5, 30, 30, 17.5, 17.5]
    estimate.update(finished(known, [9, 9, 20, 20]))
    assert estimate.remaining(asked).tolist() == [7, 7, 25, 25, 16, 16]
    estimate.update(finished(known, [1, 1, 1, 1], StopReason.ABORTED))
    assert estimate.remaining(asked).tolist() == [7, 7, 25, 25, 16, 16]
    assert estimate.remaining(replace(asked, budgets=torch.tensor([3, 9] * 3))).tolist() == [3, 7, 3, 9, 3, 9]


def test_a_prefix_counts_and_one_that_is_longer_than_expected_is_given_its_budget():
    estimate = LengthEstimate()
    asked = request(1, max_tokens=40)
    estimate.update(finished(asked, [10, 10, 10]))
    prefix = finished(asked, [4, 12, 6])
    prefix.row["finished"] = torch.tensor([False, False, True])
    assert estimate.remaining(replace(asked, prefix=prefix)).tolist() == [6, 28, 0]


def test_what_is_known_is_stored_and_a_copy_learns_on_its_own(tmp_path):
    estimate = LengthEstimate()
    asked = request(1, max_tokens=40)
    asked.prompts.source[1] = "other"
    estimate.update(finished(asked, [10, 30, 7]))
    torch.save(estimate.state_dict(), tmp_path / "state.pt")
    resumed, twin = LengthEstimate(), estimate.copy()
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    twin.update(finished(asked, [20, 20, 20]))
    for other, expected in ((estimate, [10, 30, 7]), (resumed, [10, 30, 7]), (twin, [15, 25, 13.5])):
        assert other.remaining(asked).tolist() == expected
    fresh = replace(asked, prompts=replace(asked.prompts, uid=asked.prompts.uid + 50))
    assert resumed.remaining(fresh).tolist() == [8.5, 30, 8.5]


def test_the_prompts_not_seen_for_longest_are_forgotten():
    estimate = LengthEstimate(prompts=2)
    asked = request(1, max_tokens=40)
    for lengths in ([30, 3, 6], [33, 3, 6]):
        estimate.update(finished(asked, lengths))
    assert estimate.remaining(asked).tolist() == [13.5, 3, 6], "the first prompt counts as its source"
