# SPDX-License-Identifier: Apache-2.0
"""Our samplers keep the contract, and the contract notices samplers that do not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from contract import contract

from lit_rl.rollouts import Rollouts, StopReason
from lit_rl.samplers import HFSampler, RolloutRequest
from lit_rl.testing import SAMPLER_PROMISES, SamplerBench, check_sampler

test_hf_sampler_keeps_the_contract = contract(HFSampler)
test_hf_sampler_in_waves_of_five_keeps_the_contract = contract(lambda: HFSampler(max_rows=5, prefill_tokens=9))


def test_one_call_checks_everything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = []
    for name in list(SAMPLER_PROMISES):
        monkeypatch.setitem(SAMPLER_PROMISES, name, lambda bench, name=name: kept.append(name))
    check_sampler(HFSampler, tmp_path, without=["the_seed_decides"])
    assert kept == [name for name in SAMPLER_PROMISES if name != "the_seed_decides"]
    with pytest.raises(ValueError, match="no promise 'typo'"):
        check_sampler(HFSampler, tmp_path, without=["typo"])


Fault = Callable[[RolloutRequest, Rollouts], Any]


def shifted(request: RolloutRequest, out: Rollouts) -> None:
    out.logprobs["sampler"] = out.logprobs["sampler"] - 0.01 * out.completion_mask


def reversed_rows(request: RolloutRequest, out: Rollouts) -> Rollouts:
    return out.select(torch.arange(len(out)).flip(0))


def wide(request: RolloutRequest, out: Rollouts) -> Rollouts:
    return out.pad(out.width + 2)


def without_versions(request: RolloutRequest, out: Rollouts) -> None:
    out.token["policy_version"].zero_()


def cut_without_saying(request: RolloutRequest, out: Rollouts) -> None:
    reason = out.row["stop_reason"]
    reason[reason == StopReason.ABORTED] = int(StopReason.LENGTH)


def uniform_tokens(request: RolloutRequest, out: Rollouts) -> None:
    if out.width == 1:
        out.token["completion_ids"] = torch.arange(len(out))[:, None] % 64


def grows(request: RolloutRequest, out: Rollouts) -> None:
    torch.rand(1)


def drops_a_group(request: RolloutRequest, out: Rollouts) -> Rollouts | None:
    return out.select(out.group > 0) if request.wanted else None


def one_token_more(request: RolloutRequest, out: Rollouts) -> None:
    """Also returns a token after the stop token, as an engine may that trims nothing."""
    if request.sampling.stop_token_ids and out.width:
        row = (
            int((out.row["stop_reason"] == StopReason.STOP).nonzero()[0]) if (out.row["stop_reason"] == 1).any() else -1
        )
        if row >= 0 and int(out.lengths[row]) < out.width:
            out.row["lengths"][row] += 1


@pytest.mark.parametrize(
    ("fault", "broken"),
    [
        (shifted, "log_probabilities_are_those_of_the_policy"),
        (shifted, "log_probabilities_are_over_the_support"),
        (shifted, "greedy_takes_the_most_likely_token"),
        (reversed_rows, "rows_are_those_of_the_request"),
        (wide, "every_signal_is_there"),
        (without_versions, "sync_brings_the_new_weights"),
        (without_versions, "a_prefix_keeps_its_version_and_mask"),
        (cut_without_saying, "should_stop_interrupts"),
        (uniform_tokens, "tokens_follow_the_distribution"),
        (uniform_tokens, "gumbel_noise_follows_it_too"),
        (grows, "the_trainer_is_left_alone"),
        (drops_a_group, "a_step_gets_its_groups"),
        (one_token_more, "a_stop_token_ends_a_completion"),
        (one_token_more, "every_signal_is_there"),
    ],
)
def test_a_faulty_sampler_is_noticed(fault: Fault, broken: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    class Faulty(HFSampler):
        def sample(self, request: RolloutRequest) -> Rollouts:
            out = super().sample(request)
            return out if (changed := fault(request, out)) is None else changed

    with (
        SamplerBench(Faulty, tmp_path_factory.getbasetemp() / "contract") as bench,
        pytest.raises(AssertionError),
    ):
        SAMPLER_PROMISES[broken](bench)


class ForgetsSeed(HFSampler):
    def submit(self, request: RolloutRequest) -> None:
        super().submit(request.clone())
        self._pending[-1].seed = 0


class UsesCompany(HFSampler):
    """Noise that hangs on the row's place in the batch."""

    def submit(self, request: RolloutRequest) -> None:
        super().submit(request.clone())
        self._pending[-1].sample = torch.arange(len(request))

    def collect(self) -> Rollouts:
        sample = self._pending[-1].sample
        out = super().collect()
        out.row["sample"] = sample
        return out


class IgnoresBudgets(HFSampler):
    def submit(self, request: RolloutRequest) -> None:
        super().submit(request.clone())
        self._pending[-1].budgets = None


class StartsAgain(HFSampler):
    """Continues a prefix with noise from position 0 on."""

    def submit(self, request: RolloutRequest) -> None:
        super().submit(request.clone())
        if request.prefix is not None:
            self._pending[-1].seed += 1


class Stale(HFSampler):
    """Keeps the weights of its set-up."""

    def setup(self, model: torch.nn.Module, tokenizer: Any) -> None:
        import copy

        super().setup(copy.deepcopy(model), tokenizer)


class StopsTraining(HFSampler):
    def collect(self) -> Rollouts:
        out = super().collect()
        self.model.eval()
        return out


class Counts(HFSampler):
    """Its noise depends on how many requests there were, which it does not store."""

    seen = 0

    def submit(self, request: RolloutRequest) -> None:
        super().submit(request.clone())
        self._pending[-1].seed += self.seen
        self.seen += request.wanted is not None


@pytest.mark.parametrize(
    ("sampler", "broken"),
    [
        (ForgetsSeed, "the_seed_decides"),
        (UsesCompany, "company_does_not_matter"),
        (IgnoresBudgets, "budgets_bound_each_row"),
        (StartsAgain, "a_prefix_is_continued"),
        (StartsAgain, "an_interrupted_request_is_continued"),
        (Stale, "sync_brings_the_new_weights"),
        (StopsTraining, "the_trainer_is_left_alone"),
        (Counts, "its_state_resumes"),
        (Counts, "a_step_can_be_undone"),
    ],
)
def test_a_sampler_with_a_fault_inside_is_noticed(
    sampler: type[HFSampler], broken: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    with (
        SamplerBench(sampler, tmp_path_factory.getbasetemp() / "contract") as bench,
        pytest.raises(AssertionError),
    ):
        SAMPLER_PROMISES[broken](bench)
