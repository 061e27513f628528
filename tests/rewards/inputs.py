# SPDX-License-Identifier: Apache-2.0
"""Reward inputs for the tests of this folder."""

from typing import Any

import torch

from lit_rl.rewards import RewardInput


def reward_input(
    completions: list[str],
    *,
    lengths: list[int] | None = None,
    finished: list[bool] | None = None,
    source: list[str] | None = None,
    max_length: int | None = None,
    prompts: list[str] | None = None,
    **columns: list[Any],
) -> RewardInput:
    """A batch of completions, by default finished and with one token a character."""
    n = len(completions)
    return RewardInput(
        prompts=prompts or ["?"] * n,
        completions=completions,
        completion_ids=[list(text.encode()) for text in completions],
        lengths=torch.tensor([len(text) for text in completions] if lengths is None else lengths, dtype=torch.long),
        finished=torch.tensor([True] * n if finished is None else finished),
        group=torch.arange(n),
        columns=columns,
        source=source or ["arithmetic"] * n,
        max_length=max_length,
    )
