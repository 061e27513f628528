# SPDX-License-Identifier: Apache-2.0
"""A run says how far its sampler is from its policy, and what the correction made of it."""

import pytest
import torch

from lit_rl.samplers import AsyncSampler, HFSampler
from lit_rl.testing import make_module, make_policy, train

C = 1.05


def logged(tmp_path, sampler, **options):
    module = make_module(
        make_policy(tmp_path / "policy"),
        sampler=sampler,
        updates_per_rollout=2,
        prompts_per_step=16,
        max_rollouts=4,
        **options,
    )
    trainer = train(tmp_path / "run", module)
    return {k: float(v) for k, v in trainer.callback_metrics.items()}, module


def test_weights_effective_sample_size_and_distance_are_logged(tmp_path):
    numbers, module = logged(tmp_path, AsyncSampler(worker="thread", deterministic=True, max_weight=C))
    rollouts = module.last_rollouts
    trained = rollouts.completion_mask & (rollouts.advantages != 0)
    ratio = (rollouts.logprobs["old"] - rollouts.logprobs["sampler"])[trained].double().exp()
    weight = ratio.clamp(max=C)
    assert numbers["policy/correction_mean"] == pytest.approx(float(weight.mean()), rel=1e-4)
    assert numbers["policy/correction_clipped"] == pytest.approx(float((ratio > C).double().mean()), abs=1e-6)
    ess = weight.sum() ** 2 / (len(weight) * weight.square().sum())
    assert numbers["policy/correction_ess"] == pytest.approx(float(ess), rel=1e-4)
    assert 0 < numbers["policy/correction_clipped"] < 1
    assert numbers["policy/correction_ess"] < 0.9999
    assert numbers["policy/kl_sampler"] > 1e-4
    assert numbers["policy/sampler_gap_max"] > 0.05


def test_an_on_policy_run_has_nothing_to_correct(tmp_path):
    numbers, module = logged(tmp_path, HFSampler())
    assert module.correction is None
    assert not [name for name in numbers if "correction" in name]
    assert numbers["policy/kl_sampler"] < 1e-6
    torch.testing.assert_close(module.last_rollouts.logprobs["old"], module.last_rollouts.logprobs["sampler"])
