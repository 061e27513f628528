# SPDX-License-Identifier: Apache-2.0
"""Several rewards together: their raw terms, the weight of each term in each row, and the weighted sum.

A NaN term means one of two things: the reward does not apply to the row (its weight there is 0, and the sum leaves it
out), or the row could not be scored (its weight is not 0, and the sum is NaN).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lit_rl.rewards.base import Reward, RewardInput


def check_rewards(rewards: Sequence[Reward]) -> None:
    """Refuse a list of rewards that cannot be combined.

    Raises:
        ValueError: the list is empty, a name occurs twice, or two rewards claim to be the verifier.
    """
    if not rewards:
        raise ValueError("rewards must hold at least one reward.")
    twice = [name for name, count in Counter(reward.name for reward in rewards).items() if count > 1]
    if twice:
        raise ValueError(f"rewards must have different names, but {twice} occur(s) more than once; set `name`.")
    verifiers = [reward.name for reward in rewards if reward.verifier]
    if len(verifiers) > 1:
        raise ValueError(
            f"only one reward gives the verdict `correct`, but {verifiers} all have verifier=True; "
            "set verifier=False on the others."
        )


def score_rewards(rewards: Sequence[Reward], batch: RewardInput) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Score a batch with every reward.

    Returns:
        Raw terms by reward name, each ``[N]``, NaN where there is no value; and weights by reward name, each ``[N]``:
        the reward's weight where it applies to the row, 0 elsewhere.
    """
    terms = {reward.name: reward(batch) for reward in rewards}
    weights = {
        reward.name: torch.where(reward.applies(batch), float(reward.weight), 0.0).to(batch.lengths.device)
        for reward in rewards
    }
    return terms, weights


def verdict(rewards: Sequence[Reward], terms: Mapping[str, Tensor]) -> Tensor:
    """``[N]``: the term of the reward marked as the verifier; all NaN if none is."""
    for reward in rewards:
        if reward.verifier:
            return terms[reward.name].clone()
    return torch.full_like(next(iter(terms.values())), math.nan)


def weighted_sum(terms: Mapping[str, Tensor], weights: Mapping[str, Tensor | float]) -> Tensor:
    """The reward of each row from its terms.

    Args:
        terms: raw values by name, each ``[N]``.
        weights: by name, ``[N]`` or one number; a term of weight 0 is left out of the row even if it is NaN.

    Returns:
        ``[N]``; NaN where a term that counts is NaN or where no term counts.
    """
    first = next(iter(terms.values()))
    total = torch.zeros_like(first)
    counted = torch.zeros_like(first, dtype=torch.bool)
    for name, values in terms.items():
        weight = torch.as_tensor(weights[name], dtype=values.dtype, device=values.device).expand_as(values)
        total = total + torch.where(weight != 0, weight * values, 0.0)
        counted = counted | (weight != 0)
    return torch.where(counted, total, math.nan)
