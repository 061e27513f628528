# SPDX-License-Identifier: Apache-2.0
"""Metrics of generation: pass@k, maj@k, lengths."""

from lit_rl.metrics.generation import GenerationMetrics
from lit_rl.metrics.passk import majority_correct, pass_at_k

__all__ = ["GenerationMetrics", "majority_correct", "pass_at_k"]
