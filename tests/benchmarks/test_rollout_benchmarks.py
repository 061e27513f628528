# SPDX-License-Identifier: Apache-2.0
"""What the rollout benchmarks count and force: tokens, scores, lengths, memory, and what they say about it."""

import os
import subprocess
import sys
import time
from typing import Any

import pytest
import torch

from benchmarks import rollouts, two_stage
from benchmarks.common import Goal, Report, Table
from benchmarks.driving import Score, Sizes, Steps, Stream, tree_peak_bytes
from benchmarks.peer.ours import EndlessSampler
from benchmarks.rollout_runs import ForcedLengths, Variant, pareto, sampler_of
from benchmarks.workloads import digit_problems
from lit_rl import HFSampler, Policy, Sampling
from lit_rl.rollouts import Rollouts
from lit_rl.samplers import AsyncSampler, PartialSampler, RolloutRequest
from lit_rl.testing import make_policy


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    return Policy(str(make_policy(tmp_path_factory.mktemp("policy")))).load()


def test_every_sampler_draws_the_same_prompts_in_order(policy):
    """The partial one starts further prompts, and returns as many groups as the others."""
    sizes, seen = Sizes(2, 3, 8), {}
    for sampler in (HFSampler(), PartialSampler(HFSampler())):
        steps = Steps(sampler, *policy, digit_problems(16, 4), sizes)
        steps.sync()
        batches = [steps.next() for _ in range(4)]
        assert [len(batch) for batch in batches] == [6] * 4
        seen[type(sampler).__name__] = [int(d) for batch in batches for d in batch.prompts.draw]
    assert seen["HFSampler"] == list(range(8))
    assert set(seen["PartialSampler"]) <= set(range(8 + 2))


def test_tokens_of_a_turn_include_what_was_sampled_ahead(policy):
    sampler = AsyncSampler(HFSampler(), worker="thread")
    steps = Steps(sampler, *policy, digit_problems(16, 4), Sizes(2, 3, 8))
    steps.sync()
    tokens, seconds = steps.turn(2)
    sampler.close()
    plain = Steps(HFSampler(), *policy, digit_problems(16, 4), Sizes(2, 3, 8))
    plain.sync()
    assert tokens == sum(int(plain.next().lengths.sum()) for _ in range(3))  # two steps, and the one ahead
    assert seconds > 0
    assert not sampler.batches


def test_the_score_is_that_of_exact_answers_and_counts(policy):
    _, tokenizer = policy
    prompts = Stream(tokenizer, [{"prompt": "1+1=", "answer": "2"}, {"prompt": "1+2=", "answer": "3"}]).at(0, 2)
    texts = ["#2", "#3", "1#3", "3"]
    ids = [torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts]
    batch = Rollouts.build(prompts, torch.tensor([0, 0, 1, 1]), ids)
    score = Score(tokenizer)
    assert score(batch).rewards.tolist() == [1, 0, 1, 0]
    assert score.take() == (4, sum(len(x) for x in ids))
    assert score.take() == (0, 0)


def test_forced_lengths_are_those_of_the_law_whatever_the_order(policy):
    law = {"name": "Pareto", "smallest": 2, "exponent": 1.1, "limit": 30}
    expected = pareto(2, 1.1, 30, group_size=4)
    steps = Stream(policy[1], digit_problems(8, 4))
    request = RolloutRequest.for_groups(steps.at(3, 2), 4, Sampling(max_tokens=30), 0)
    request.group, request.sample = request.group.flip(0), request.sample.flip(0)
    ForcedLengths(law, 4).on_rollout_request(None, None, request)
    assert request.budgets.tolist() == [*reversed(expected(4)), *reversed(expected(3))]
    sampler = EndlessSampler()
    sampler.setup(*policy)
    assert sampler.sample(request).lengths.tolist() == request.budgets.tolist()


def test_the_pareto_law_has_its_tail():
    lengths = torch.tensor([x for group in range(4000) for x in pareto(16, 1.1, 1024, 8)(group)]).float()
    for t in (32, 128, 512):
        assert float((lengths > t + 0.5).float().mean()) == pytest.approx((16 / (t + 0.5)) ** 1.1, rel=0.1)
    assert float(lengths.min()) == 16
    assert float(lengths.max()) == 1024


@pytest.mark.parametrize(
    ("kind", "options", "expected"),
    [("plain", {}, EndlessSampler), ("partial", {"oversampling": 3.0}, PartialSampler), ("async", {}, AsyncSampler)],
)
def test_a_variant_names_its_sampler(kind, options, expected):
    sampler = sampler_of(Variant("x", kind, 1, options, {"name": "Pareto"}))
    assert isinstance(sampler, expected)
    if kind == "partial":
        assert sampler.oversampling == 3.0
        assert isinstance(sampler.inner, EndlessSampler)
    assert type(sampler_of(Variant("x", "plain", 1))) is HFSampler


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="reads /proc")
def test_memory_is_that_of_the_process_and_its_children():
    before = tree_peak_bytes()
    code = "x = bytearray(200 * 2**20); x[::4096] = b'1' * len(x[::4096]); input()"
    child = subprocess.Popen([sys.executable, "-c", f"{code}"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        for _ in range(400):
            grown = tree_peak_bytes() - before
            if grown > 200 * 2**20:
                break
            time.sleep(0.05)
        assert 200 * 2**20 < grown < 400 * 2**20
    finally:
        child.kill()
        child.wait()


def test_the_verdict_names_the_faster_of_two_ways():
    seconds = {"a": {"seconds": 2.0}, "b": {"seconds": 1.0}}
    assert "AsyncSampler is 2.00 times as fast" in rollouts.verdict(seconds, "a", "b")
    assert "synchronous run with all cores is faster than AsyncSampler, 2.00 times" in rollouts.verdict(
        seconds, "b", "a"
    )
    assert rollouts.verdict(seconds, "not run", "b") == ""


def test_a_part_can_be_measured_again_beside_the_others(tmp_path):
    def report(tables: list[str], goals: list[str], text: str) -> Report:
        made = [Table(title, [{"a": len(text)}]) for title in tables]
        return Report("rollouts", "T", text, "m", {}, made, [Goal(g, 1.0, "at least", 1) for g in goals])

    old = report(
        ["Generation", "Partial rollouts: a", "Asynchronous rollouts"], ["HFSampler, x", "AsyncSampler, y"],
        "What it is. On this machine AsyncSampler is 1.10 times as fast as the synchronous run with all cores.",
    )  # fmt: skip
    old.save(tmp_path / "r.json")
    new = report(["Partial rollouts: b"], ["PartialSampler, z"], "What it is.")
    rollouts.keep_other_parts(new, ["partial"], tmp_path / "r.json")
    assert [t.title for t in new.tables] == ["Generation", "Partial rollouts: b", "Asynchronous rollouts"]
    assert [g.what for g in new.goals] == ["HFSampler, x", "PartialSampler, z", "AsyncSampler, y"]
    assert new.text == old.text


def test_the_verdict_on_four_bits_is_in_numbers():
    rows = [{"weights": k, "times the policy's speed": v} for k, v in (("bfloat16", 2.0), ("nf4", 0.5))]
    said = two_stage.verdict([Table("Sampling from copies: 9M parameters, 4 rows", rows)])
    assert "0.50 times the speed of the policy itself and 0.25 times that of one in bfloat16 (9M parameters)" in said
    assert "not installed" in two_stage.verdict([Table("x: y", rows[:1])])


def test_a_mode_is_compared_at_equal_tokens_of_full_precision():
    plain = {"contrast": 0.2, "decoded": 1000, "scored": 0, "explored": 0, "informative": 0.5, "seconds": 1.0}
    mode = plain | {"contrast": 0.4, "decoded": 200, "scored": 300, "seconds": 3.0}
    row = two_stage.row_of("verified", mode, plain)
    assert row["worth"] == pytest.approx(4.0)  # twice the contrast with half of the tokens
    assert row["× plain"] == pytest.approx(3.0)


def test_the_counting_sampler_counts_what_it_draws(policy):
    sampler = two_stage.counting_sampler()
    sampler.setup(*policy)
    prompts = Stream(policy[1], digit_problems(4, 4)).at(0, 2)
    request = RolloutRequest.for_groups(prompts, 2, Sampling(max_tokens=8), 0)
    rollouts = sampler.sample(request)
    assert sampler.decoded == int(rollouts.lengths.sum())
    sampler.next_token_logprobs([torch.tensor([3, 4])] * 3, request.sampling)
    assert sampler.residual == 3
