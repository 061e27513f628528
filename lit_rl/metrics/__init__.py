# SPDX-License-Identifier: Apache-2.0
"""Metrics of generation: pass@k, maj@k, lengths, calibration."""

from lit_rl.metrics.calibration import CalibrationMetrics
from lit_rl.metrics.generation import GenerationMetrics
from lit_rl.metrics.passk import majority_correct, pass_at_k

__all__ = ["CalibrationMetrics", "GenerationMetrics", "majority_correct", "pass_at_k"]
