# SPDX-License-Identifier: Apache-2.0
"""Policies: loading and export, log-probabilities, frozen policies, and the memory that all of it needs."""

from lit_rl.policies.exporting import export, merge_adapter
from lit_rl.policies.frozen import EMA, AdapterOff, Checkpoint, FrozenCopy, FrozenPolicy, Live, Snapshot
from lit_rl.policies.head import selected_logprobs
from lit_rl.policies.loading import LoRA, Policy, build_small_model, padded_vocab
from lit_rl.policies.plan import MemoryPlan, memory_plan
from lit_rl.policies.scoring import (
    Head,
    TokenStates,
    completion_logprobs,
    completion_states,
    find_head,
    token_logprobs,
)
from lit_rl.policies.served import Served
from lit_rl.policies.teacher import PrivilegedPrompt, Teacher

__all__ = [
    "AdapterOff",
    "Checkpoint",
    "EMA",
    "FrozenCopy",
    "FrozenPolicy",
    "Head",
    "Live",
    "LoRA",
    "MemoryPlan",
    "Policy",
    "PrivilegedPrompt",
    "Served",
    "Snapshot",
    "Teacher",
    "TokenStates",
    "build_small_model",
    "completion_logprobs",
    "completion_states",
    "export",
    "find_head",
    "memory_plan",
    "merge_adapter",
    "padded_vocab",
    "selected_logprobs",
    "token_logprobs",
]
