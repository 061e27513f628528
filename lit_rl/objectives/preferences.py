# SPDX-License-Identifier: Apache-2.0
"""Preference losses on pairs (DPO and its relatives).

A pair has a log-ratio ``log pi/pi_ref`` of its chosen and of its rejected completion; ``delta`` is their difference and
``beta delta`` the margin of the implicit rewards. Each loss is one number a pair ``[P]``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch.nn.functional as F
from torch import Tensor


def sequence_log_ratios(logprobs: Tensor, reference: Tensor, mask: Tensor, length_normalized: bool = False) -> Tensor:
    """Log-ratio of each completion under policy and reference.

    Args:
        logprobs: ``[N, T]`` under the policy, with gradient.
        reference: ``[N, T]`` under the reference policy; zeros for reference-free losses such as SimPO.
        mask: ``[N, T]``, true on completion tokens; entries outside may hold anything.
        length_normalized: divide by the number of tokens.

    Returns:
        ``[N]``; 0 for an empty completion.
    """
    valid = mask.bool()
    log_ratio = (logprobs.masked_fill(~valid, 0.0) - reference.detach().masked_fill(~valid, 0.0)).sum(1)
    return log_ratio / valid.sum(1).clamp(min=1) if length_normalized else log_ratio


def dpo_sigmoid(chosen: Tensor, rejected: Tensor, beta: float = 0.1, label_smoothing: float = 0.0) -> Tensor:
    """``-log sigmoid(beta delta)`` (DPO, arXiv 2305.18290, eq. 7); with smoothing s conservative DPO.

    Conservative DPO is ``-(1 - s) log sigmoid(beta delta) - s log sigmoid(-beta delta)``: labels are wrong with
    probability s.

    Args:
        chosen: ``[P]`` log-ratios of the chosen completions.
        rejected: ``[P]`` log-ratios of the rejected completions.
        beta: inverse temperature of the implicit reward.
        label_smoothing: assumed share of flipped labels.
    """
    margin = beta * (chosen - rejected)
    return -(1 - label_smoothing) * F.logsigmoid(margin) - label_smoothing * F.logsigmoid(-margin)


def dpo_robust(chosen: Tensor, rejected: Tensor, beta: float = 0.1, label_smoothing: float = 0.1) -> Tensor:
    """Unbiased DPO under flipped labels: ``(-(1-s) log sigmoid(m) + s log sigmoid(-m)) / (1 - 2s)`` (arXiv 2403.00409).

    Args:
        chosen: ``[P]`` log-ratios.
        rejected: ``[P]`` log-ratios.
        beta: inverse temperature of the implicit reward.
        label_smoothing: share of flipped labels, below 0.5.
    """
    margin = beta * (chosen - rejected)
    keep, flip = F.logsigmoid(margin), F.logsigmoid(-margin)
    return (-(1 - label_smoothing) * keep + label_smoothing * flip) / (1 - 2 * label_smoothing)


def dpo_ipo(chosen: Tensor, rejected: Tensor, beta: float = 0.1) -> Tensor:
    """``(delta - 1/(2 beta))²`` (IPO, arXiv 2310.12036, eq. 17): the margin is regressed on a constant.

    Args:
        chosen: ``[P]`` log-ratios (TRL averages them over tokens).
        rejected: ``[P]`` log-ratios.
        beta: regularisation; the target margin is 1/(2 beta).
    """
    return (chosen - rejected - 1 / (2 * beta)).square()


def dpo_hinge(chosen: Tensor, rejected: Tensor, beta: float = 0.1) -> Tensor:
    """``max(0, 1 - beta delta)`` (SLiC, arXiv 2305.10425, on log-ratios).

    Args:
        chosen: ``[P]`` log-ratios.
        rejected: ``[P]`` log-ratios.
        beta: inverse temperature of the implicit reward.
    """
    return F.relu(1 - beta * (chosen - rejected))


@dataclass
class PreferenceLoss:
    """A loss of the DPO family, chosen by name.

    Args:
        kind: "sigmoid" (DPO), "ipo", "hinge" or "robust".
        beta: inverse temperature of the implicit reward; for IPO the target margin is 1/(2 beta).
        label_smoothing: assumed share of flipped labels; "sigmoid" (conservative DPO) and "robust" only.
        length_normalized: use log-ratios a token instead of a completion.
    """

    kind: Literal["sigmoid", "ipo", "hinge", "robust"] = "sigmoid"
    beta: float = 0.1
    label_smoothing: float = 0.0
    length_normalized: bool = False

    def __post_init__(self) -> None:
        if self.kind not in ("sigmoid", "ipo", "hinge", "robust"):
            raise ValueError(f"kind must be 'sigmoid', 'ipo', 'hinge' or 'robust', got {self.kind!r}.")
        if not self.beta > 0:
            raise ValueError(f"beta must exceed 0, got {self.beta}.")
        if not 0 <= self.label_smoothing < 0.5:
            raise ValueError(f"label_smoothing is a share of flipped labels in [0, 0.5), got {self.label_smoothing}.")
        if self.label_smoothing and self.kind in ("ipo", "hinge"):
            raise ValueError(f"label_smoothing has no effect with kind={self.kind!r}: set it to 0.")

    def log_ratios(self, logprobs: Tensor, reference: Tensor, mask: Tensor) -> Tensor:
        """`sequence_log_ratios` with this loss's normalisation, ``[N]``."""
        return sequence_log_ratios(logprobs, reference, mask, self.length_normalized)

    def __call__(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        """Loss of each pair ``[P]`` from the log-ratios of its two completions."""
        if self.kind == "ipo":
            return dpo_ipo(chosen, rejected, self.beta)
        if self.kind == "hinge":
            return dpo_hinge(chosen, rejected, self.beta)
        loss = dpo_sigmoid if self.kind == "sigmoid" else dpo_robust
        return loss(chosen, rejected, self.beta, self.label_smoothing)

    def describe(self) -> str:
        """The formula in one line, for the header of a run."""
        smoothing = f", label smoothing {self.label_smoothing:g}" if self.label_smoothing else ""
        unit = "token" if self.length_normalized else "completion"
        formula = {
            "sigmoid": f"-log sigmoid({self.beta:g} delta)",
            "robust": f"robust -log sigmoid({self.beta:g} delta)",
            "ipo": f"(delta - {1 / (2 * self.beta):g})^2",
            "hinge": f"max(0, 1 - {self.beta:g} delta)",
        }[self.kind]
        return f"{formula}{smoothing}, delta = difference of log-ratios a {unit}"
