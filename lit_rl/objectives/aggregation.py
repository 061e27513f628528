# SPDX-License-Identifier: Apache-2.0
"""How token losses become one number: element weights and a count.

A loss is ``(values * weights).sum() / count`` with ``count`` summed over all micro-batches and ranks of one optimizer
step, so that no split of the batch changes it. Counts count what trains (tokens with a non-zero weight, or rows with
such a token), not how much: halving every weight halves the loss.
"""

from __future__ import annotations

from enum import StrEnum

import torch
from torch import Tensor


class Aggregation(StrEnum):
    """What the loss is a mean of. A row is left out when none of its tokens trains."""

    # The lower-case names come first because configuration files name members, and these are the names people know.
    token_mean = "token_mean"
    sequence_mean = "sequence_mean"
    sequence_sum = "sequence_sum"
    constant = "constant"
    TOKEN_MEAN = token_mean
    """Mean over all trained tokens of the optimizer step (DAPO, arXiv 2503.14476)."""
    SEQUENCE_MEAN = sequence_mean
    """Mean over rows of the mean over each row's tokens (GRPO, arXiv 2402.03300): long rows weigh less a token."""
    SEQUENCE_SUM = sequence_sum
    """Mean over rows of the sum over each row's tokens."""
    CONSTANT = constant
    """Sum over tokens divided by rows times a constant length (Dr.GRPO, arXiv 2503.20783)."""

    def describe(self) -> str:
        """The formula in one line, for the header of a run."""
        return {
            "token_mean": "sum of token losses / trained tokens of the optimizer step",
            "sequence_mean": "mean over rows of the mean over each row's trained tokens",
            "sequence_sum": "mean over rows of the sum over each row's trained tokens",
            "constant": "sum of token losses / (rows * max_length)",
        }[self.value]


def aggregation_weights(
    loss_weights: Tensor, aggregation: Aggregation, max_length: int | None = None
) -> tuple[Tensor, Tensor]:
    """Element weights and local count of a token-level loss.

    Args:
        loss_weights: ``[N, T]``, how much each token trains; 0 where it does not.
        aggregation: what the loss is a mean of.
        max_length: the constant length in tokens; needed by ``Aggregation.CONSTANT`` only.

    Returns:
        Weights ``[N, T]`` and a float64 scalar: the loss is ``(values * weights).sum() / count``, with the counts of
        all micro-batches and ranks added first. The count is 0 when nothing trains; clamp the sum to 1 before dividing.

    Raises:
        ValueError: ``Aggregation.CONSTANT`` without a positive ``max_length``.
    """
    aggregation = Aggregation(aggregation)
    trains = loss_weights != 0
    lengths = trains.sum(1, keepdim=True)  # [N, 1]
    rows = (lengths > 0).sum().double()
    if aggregation is Aggregation.TOKEN_MEAN:
        return loss_weights, lengths.sum().double()
    if aggregation is Aggregation.SEQUENCE_MEAN:
        return loss_weights / lengths.clamp(min=1), rows
    if aggregation is Aggregation.SEQUENCE_SUM:
        return loss_weights, rows
    if max_length is None or max_length < 1:
        raise ValueError(
            f"aggregation='constant' divides by a fixed length: set max_length to the longest completion in tokens, "
            f"at least 1 (got {max_length})."
        )
    return loss_weights / max_length, rows


def row_weights(
    loss_weights: Tensor, aggregation: Aggregation = Aggregation.SEQUENCE_MEAN, max_length: int | None = None
) -> tuple[Tensor, Tensor]:
    """Weights and local count of a row-level loss: those of the same value written on every token of the row.

    The default gives each row that trains its mean token weight (1 for plain masks), a mean over rows. ``SEQUENCE_SUM``
    weighs a row by its length (LUSPO).

    Args:
        loss_weights: ``[N, T]``.
        aggregation: as in `aggregation_weights`.
        max_length: as in `aggregation_weights`.

    Returns:
        Weights ``[N]`` and a float64 scalar count.
    """
    weights, count = aggregation_weights(loss_weights, aggregation, max_length)
    return torch.sum(weights, dim=1), count
