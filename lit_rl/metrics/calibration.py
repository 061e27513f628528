# SPDX-License-Identifier: Apache-2.0
"""Is a confidence worth its name? Brier score, calibration error, overconfidence, ranking."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat


def brier_score(confidence: Tensor, correct: Tensor) -> Tensor:
    """Mean squared distance between confidence and outcome."""
    return (confidence - correct).square().mean()


def expected_calibration_error(confidence: Tensor, correct: Tensor, bins: int = 10) -> Tensor:
    """Mean over completions of |mean confidence - accuracy| of their bin.

    Bins have equal width and are closed on the left, the last one on both sides; confidences outside [0, 1] fall into
    the first and last. (torchmetrics' ``binary_calibration_error`` gives 1.0 a bin of its own.)

    Args:
        confidence: ``[n]``.
        correct: ``[n]`` 0 or 1.
        bins: number of bins.
    """
    # 0.7 in single precision lies below 0.7, but means it.
    index = (confidence.double() * bins + 1e-6).floor().long().clamp(0, bins - 1)
    zeros = torch.zeros(bins, dtype=torch.float64, device=confidence.device)
    gap = zeros.index_add(0, index, confidence.double()) - zeros.index_add(0, index, correct.double())
    return gap.abs().sum() / len(confidence)


def ranking_rate(confidence: Tensor, correct: Tensor) -> Tensor:
    """Share of pairs (right, wrong) in which the right one is more confident; ties count 0, one class only gives 0.

    It equals the area under the ROC curve where there are no ties; a policy that always says 1 has 0 here.
    """
    right, wrong = confidence[correct == 1], confidence[correct == 0].sort().values
    if not len(right) or not len(wrong):
        return confidence.new_zeros(())
    below = torch.searchsorted(wrong.contiguous(), right.contiguous())
    return below.double().mean() / len(wrong)


class CalibrationMetrics(Metric):
    """Brier score, expected calibration error, overconfidence gap and ranking rate of spoken confidences (CaOPD).

    Args:
        bins: of the calibration error.
    """

    full_state_update = False

    confidence: list[Tensor]
    correct: list[Tensor]

    def __init__(self, bins: int = 10) -> None:
        super().__init__()
        self.bins = bins
        self.add_state("confidence", [], dist_reduce_fx="cat")
        self.add_state("correct", [], dist_reduce_fx="cat")

    def update(self, confidence: Tensor, correct: Tensor) -> None:
        """Add n completions: confidence (NaN: none was spoken) and verdict (NaN: not scorable), both ``[n]``."""
        self.confidence.append(confidence.double().cpu())
        self.correct.append(correct.double().cpu())

    def compute(self) -> dict[str, Tensor]:
        """Names without prefix -> scalars; NaN where nothing is known."""
        confidence = dim_zero_cat(self.confidence) if len(self.confidence) else torch.zeros(0, dtype=torch.float64)
        correct = dim_zero_cat(self.correct) if len(self.correct) else torch.zeros(0, dtype=torch.float64)
        scorable = ~torch.isnan(correct)
        spoken = scorable & ~torch.isnan(confidence)
        numbers = {"confidence_spoken": spoken.sum().double() / scorable.sum()}
        confidence, correct = confidence[spoken], correct[spoken]
        nothing = torch.tensor(torch.nan, dtype=torch.float64)
        if not len(confidence):
            return numbers | dict.fromkeys(("brier", "ece", "overconfidence", "ranking_rate", "confidence"), nothing)
        return numbers | {
            "brier": brier_score(confidence, correct),
            "ece": expected_calibration_error(confidence, correct, self.bins),
            "overconfidence": confidence.mean() - correct.mean(),
            "ranking_rate": ranking_rate(confidence, correct),
            "confidence": confidence.mean(),
        }
