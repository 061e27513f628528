# SPDX-License-Identifier: Apache-2.0
"""Rollout samplers: they turn prompts into completions with log-probabilities."""

from lit_rl.samplers.asynchronous import AsyncSampler
from lit_rl.samplers.base import Interrupt, Progress, RolloutRequest, RolloutSampler, Sampling
from lit_rl.samplers.dataset import DatasetSampler
from lit_rl.samplers.environment import EnvironmentSampler
from lit_rl.samplers.hf import HFSampler
from lit_rl.samplers.low_precision import LowPrecisionSampler
from lit_rl.samplers.partial import PartialSampler
from lit_rl.samplers.ray_sampler import RaySampler
from lit_rl.samplers.two_stage import TwoStageSampler
from lit_rl.samplers.vllm import VLLMSampler
from lit_rl.samplers.vllm_server import VLLMServerSampler

__all__ = [
    "AsyncSampler",
    "DatasetSampler",
    "EnvironmentSampler",
    "HFSampler",
    "Interrupt",
    "LowPrecisionSampler",
    "PartialSampler",
    "Progress",
    "RaySampler",
    "RolloutRequest",
    "RolloutSampler",
    "Sampling",
    "TwoStageSampler",
    "VLLMSampler",
    "VLLMServerSampler",
]
