# SPDX-License-Identifier: Apache-2.0
"""A batch in which everything differs between rows, and a float64 method to train on it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from lit_rl.methods import GRPO
from lit_rl.objectives import CISPO, DPPO, GMPO, GSPO, SAPO, VESPO, Clip, ClipCov, KLCov, Reinforce
from lit_rl.policies import FrozenCopy
from lit_rl.rollouts import Origin, Rollouts
from lit_rl.testing import make_module, make_policy, train

SURROGATES: dict[str, Any] = {
    "clip": Clip(0.1, 0.15),
    "dual clip": Clip(0.1, 0.15, dual_clip=1.2),
    "GSPO": GSPO(0.01, 0.02),
    "CISPO": CISPO(clip_high=1.1),
    "REINFORCE": Reinforce(),
    "GMPO": GMPO(0.05, 0.05),
    "SAPO": SAPO(),
    "VESPO": VESPO(),
    "DPPO": DPPO(clip_low=0.02, clip_high=0.02),
    "Clip-Cov": ClipCov(fraction=0.2, cov_low=-10, cov_high=10),
    "KL-Cov": KLCov(fraction=0.2),
}


def exact_policy(folder: Path) -> Path:
    """GPT-2 without dropout; the norms of Qwen2 compute in float32, which makes 1e-8 of the last bit of a float64."""
    return make_policy(folder, "gpt2", resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)


def exact_module(folder: Path, policy: Path, **trainer: Any) -> GRPO:
    """A method in float64 that has taken one step, with every term of the family in its loss."""
    module = make_module(
        policy,
        max_rollouts=1,
        reference=FrozenCopy(),
        kl_coef=0.3,
        entropy_coef=0.2,
        sft_coef=0.7,
        prompts_per_step=4,
        group_size=3,
    )
    train(folder, module, precision="64-true", **trainer)
    assert isinstance(module, GRPO)
    module.model.double()
    return module


def varied(batch: Rollouts) -> Rollouts:
    """The batch with an older π_old, weights between 0 and 1, cut rows, demonstrations, pairs and empty rows."""
    draw = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    n, width = len(batch), batch.width
    batch.logprobs["sampler"] = batch.logprobs["sampler"].double() + 0.1 * noise(n, width)
    batch.logprobs["old"] = batch.logprobs["sampler"] + 0.2 * noise(n, width)
    batch.logprobs["reference"] = batch.logprobs["sampler"] + 0.3 * noise(n, width)
    batch.advantages = noise(n, 1).expand(n, width) + 0.1 * noise(n, width)
    batch.advantages[:3] = 0.0  # a group without signal
    batch.loss_weights = batch.loss_weights * torch.rand(n, width, generator=draw)
    batch.truncate(torch.tensor([4, 5]), torch.tensor([2, 0]))
    batch.row["origin"][6] = int(Origin.DEMONSTRATION)
    batch.row["unit"] = torch.arange(n) // 2
    return batch


def use(module: GRPO, **settings: Any) -> None:
    """Change the objective of a method after its set-up."""
    for name, value in settings.items():
        assert hasattr(module, name)
        setattr(module, name, value)
    module.loss_terms = module.terms()
