# SPDX-License-Identifier: Apache-2.0
"""The work that a benchmark's utilisation counts, and the pieces that both sides of a comparison share."""

import json

import pytest
import torch

from benchmarks.peer.spec import exact, spread_reward
from benchmarks.workloads import matrix_flops, padded_tokenizer
from lit_rl.rewards import ExactMatchReward
from lit_rl.testing import make_policy


def test_flops_are_those_of_the_matrices_of_a_real_model(tmp_path):
    from transformers import AutoModelForCausalLM

    folder = make_policy(tmp_path / "policy")
    model = AutoModelForCausalLM.from_pretrained(folder)
    linear = [m for m in model.modules() if isinstance(m, torch.nn.Linear)]  # the tied head is one of them
    token, pair = matrix_flops(folder)
    assert token == 2 * sum(m.weight.numel() for m in linear)
    config = json.loads((folder / "config.json").read_text())
    # scores and weighted sum: a multiply and an add for each entry of each head
    assert pair == config["num_hidden_layers"] * 2 * 2 * config["hidden_size"]


def test_forced_length_uses_the_whole_budget_of_every_completion(tmp_path):
    from benchmarks.peer.ours import EndlessSampler
    from lit_rl import HFSampler, Policy, Sampling
    from lit_rl.prompts import PromptEncoder
    from lit_rl.samplers import RolloutRequest

    model, tokenizer = Policy(str(make_policy(tmp_path / "policy"))).load()
    prompts = PromptEncoder(tokenizer).encode([{"prompt": "1+2=", "source": "toy", "uid": 0}], [0])
    lengths = []
    for sampler in (HFSampler(), EndlessSampler()):
        sampler.setup(model, tokenizer)
        sampler.sync(model, 0)
        rollouts = sampler.sample(RolloutRequest.for_groups(prompts, 32, Sampling(max_tokens=40), seed=0))
        lengths.append(rollouts.lengths.tolist())
    assert min(lengths[0]) < 40  # the policy does end completions by itself
    assert lengths[1] == [40] * 32


@pytest.mark.parametrize(("text", "answer"), [("1#12", "12"), ("1#2#12", "12"), ("12", "12"), ("#13", "12"), ("", "")])
def test_both_sides_verify_alike(text, answer):
    ours = ExactMatchReward(marker="#", require_finished=False)
    assert exact(text, answer) == ours.score_row(text, answer=answer)


def test_the_spread_reward_tells_completions_apart():
    assert spread_reward([3, 4], 64) != spread_reward([3, 5], 64)
    assert 0 <= spread_reward([63] * 9, 64) <= 1


def test_a_padded_tokenizer_reads_text_as_before_and_decodes_every_id():
    tokenizer = padded_tokenizer(200)
    assert len(tokenizer) == 200
    ids = tokenizer("12+7=")["input_ids"]
    assert tokenizer.decode(ids) == "12+7="
    assert all(isinstance(tokenizer.decode([i]), str) for i in range(200))
