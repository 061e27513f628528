# SPDX-License-Identifier: Apache-2.0
"""The public test kit: tiny runs and the contracts that components must keep.

from lit_rl.testing import check_neutral, check_resume, check_sampler

def test_my_callback_resumes(tmp_path):
    check_resume(tmp_path, lambda: [MyCallback()])

def test_my_sampler_keeps_its_promises(tmp_path):
    check_sampler(MySampler, tmp_path)
"""

from lit_rl.testing.checks import (
    InterruptAt,
    StopAt,
    assert_same_state,
    assert_same_weights,
    check_neutral,
    check_resume,
    check_split_invariance,
    check_two_ranks,
    loss_and_gradients,
)
from lit_rl.testing.ranks import run_on_ranks, start_process
from lit_rl.testing.sampler_bench import SamplerBench
from lit_rl.testing.sampler_promises import SAMPLER_PROMISES, check_sampler
from lit_rl.testing.toys import ToyData, final_state, make_module, make_policy, make_trainer, toy_reward, train

__all__ = [
    "SAMPLER_PROMISES",
    "InterruptAt",
    "SamplerBench",
    "StopAt",
    "ToyData",
    "assert_same_state",
    "assert_same_weights",
    "check_neutral",
    "check_resume",
    "check_sampler",
    "check_split_invariance",
    "check_two_ranks",
    "final_state",
    "loss_and_gradients",
    "make_module",
    "make_policy",
    "make_trainer",
    "run_on_ranks",
    "start_process",
    "toy_reward",
    "train",
]
