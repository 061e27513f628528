# SPDX-License-Identifier: Apache-2.0
"""Policies: loading, log-probabilities, frozen copies and the memory they need."""

from lit_rl.policies.head import selected_logprobs
from lit_rl.policies.scoring import Head, completion_logprobs, find_head

__all__ = ["Head", "completion_logprobs", "find_head", "selected_logprobs"]
