# SPDX-License-Identifier: Apache-2.0
"""TIP: distil the tokens that teach, the uncertain ones and the confidently wrong ones."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor

from lit_rl import distributed as ranks
from lit_rl.hooks import RolloutCallback
from lit_rl.policies import find_head
from lit_rl.rollouts import Rollouts
from lit_rl.samplers.noise import row_keys, uniforms

Strategy = Literal["soft_or", "entropy_topk", "entropy_sample", "q3", "power_sample"]
QUADRANTS = {"q1": (True, True), "q2": (True, False), "q3": (False, True), "q4": (False, False)}
"""Name -> (uncertain, divergent)."""


def soft_or(entropy: Tensor, divergence: Tensor) -> Tensor:
    """``1 - (1 - h)(1 - d)`` of axes in [0, 1]: high where either is."""
    return 1 - (1 - entropy) * (1 - divergence)


def min_max(values: Tensor, over: Tensor, clip_quantile: float | None = None) -> Tensor:
    """Values scaled to [0, 1] by the extremes of ``over``; 0 everywhere where those are equal.

    Args:
        values: any shape.
        over: one-dimensional, the values of the whole batch.
        clip_quantile: bound both from above at this quantile of ``over`` first.
    """
    if not len(over):
        return torch.zeros_like(values)
    if clip_quantile is not None:
        top = torch.quantile(over.double(), clip_quantile).to(values.dtype)
        values, over = values.clamp(max=top), over.clamp(max=top)
    low, high = over.min(), over.max()
    return torch.where(high > low, (values - low) / (high - low), 0.0)


def largest_share(scores: Tensor, candidates: Tensor, share: float) -> Tensor:
    """``[N, T]`` bool: in each row the floor(share x n) candidates of largest score, at least one of n > 0.

    Ties are won by the earlier token.
    """
    count = candidates.sum(1)
    kept = (share * count.double()).add(1e-9).floor().long().clamp(min=1)
    order = torch.where(candidates, scores, -torch.inf).argsort(dim=1, descending=True, stable=True)
    position = torch.arange(scores.shape[1], device=scores.device).expand_as(order)
    rank = torch.empty_like(order).scatter_(1, order, position)
    return candidates & (rank < kept[:, None])


class TokenImportance(RolloutCallback):
    r"""TIP (arXiv 2604.14084): train on a share of the tokens, chosen by entropy h and divergence from the teacher δ.

    | strategy | tokens kept |
    | --- | --- |
    | ``soft_or`` | largest :math:`\hat h + \hat\delta - \hat h\hat\delta` |
    | ``entropy_topk`` | largest h |
    | ``entropy_sample`` | drawn without replacement, in proportion to h |
    | ``q3`` | largest forward KL × (1 - ĥ): confident and wrong |
    | ``power_sample`` | over the whole batch, in proportion to :math:`h^a (JSD/\ln 2)^g` (the released sampler) |

    δ is the reverse KL. A hat means scaled to [0, 1] by the extremes of the batch, h clipped at its 98th percentile
    first. In each completion floor(keep × tokens) are kept, at least one. Scores come from both models before the
    update, without gradient: one more forward pass of each. What is not kept needs no distributions in the loss, which
    is where memory is saved. Works with every method that has a teacher.

    The shares of four quadrants are logged (q1: uncertain and divergent, q2: uncertain, q3: divergent, q4: neither).
    Reconstructed: their thresholds, which are quantiles of the batch here.

    Args:
        keep: share of the tokens that is trained; 1 leaves the run untouched.
        strategy: see above.
        entropy_clip: quantile at which h is clipped.
        entropy_power: a.
        divergence_power: g.
        entropy_threshold: quantile of h from which a token counts as uncertain.
        divergence_threshold: quantile of δ from which it counts as divergent.
    """

    requires = frozenset(f"divergence.{name}" for name in ("student_entropy", "reverse", "forward", "jsd"))

    def __init__(
        self,
        keep: float = 0.5,
        strategy: Strategy = "soft_or",
        entropy_clip: float = 0.98,
        entropy_power: float = 1.0,
        divergence_power: float = 0.0,
        entropy_threshold: float = 0.5,
        divergence_threshold: float = 0.5,
    ) -> None:
        if not 0 < keep <= 1:
            raise ValueError(f"keep is the share of tokens that is trained, in (0, 1]; got {keep}.")
        if strategy not in ("soft_or", "entropy_topk", "entropy_sample", "q3", "power_sample"):
            raise ValueError(f"TokenImportance knows no strategy {strategy!r}.")
        for name, value in (
            ("entropy_clip", entropy_clip),
            ("entropy_threshold", entropy_threshold),
            ("divergence_threshold", divergence_threshold),
        ):
            if not 0 <= value <= 1:
                raise ValueError(f"{name} is a quantile, in [0, 1]; got {value}.")
        self.keep, self.strategy, self.entropy_clip = keep, strategy, entropy_clip
        self.entropy_power, self.divergence_power = entropy_power, divergence_power
        self.entropy_threshold, self.divergence_threshold = entropy_threshold, divergence_threshold

    def on_loss_weights(self, trainer: Any, module: Any, rollouts: Rollouts) -> None:
        """Silence the tokens that are not kept."""
        entropy = rollouts.token["divergence.student_entropy"] / math.log(find_head(module.model).vocab_size)
        divergence = rollouts.token["divergence.reverse"]
        candidates = (rollouts.loss_weights != 0) & rollouts.kept_mask() & ~torch.isnan(divergence)
        chosen = candidates if self.keep == 1 else self.choose(module, rollouts, entropy, candidates)
        # Tokens that no teacher scored are none of this callback's business.
        dropped = candidates & ~chosen
        self.report(module.ledger, entropy, divergence, candidates, chosen)
        if dropped.any():
            rollouts.loss_weights = torch.where(dropped, 0.0, rollouts.loss_weights)

    def choose(self, module: Any, rollouts: Rollouts, entropy: Tensor, candidates: Tensor) -> Tensor:
        """``[N, T]`` bool: the tokens that are kept."""
        if self.strategy == "power_sample":
            weights = self.power(entropy, rollouts.token["divergence.jsd"])
            drawn = self.perturbed(module, rollouts, weights).masked_fill(~candidates, -math.inf)
            count = max(1, math.floor(self.keep * int(candidates.sum()) + 1e-9)) if candidates.any() else 0
            chosen = torch.zeros_like(candidates).flatten()
            chosen[drawn.flatten().argsort(dim=0, descending=True, stable=True)[:count]] = True
            return candidates & chosen.view_as(candidates)
        if self.strategy == "entropy_sample":
            return largest_share(self.perturbed(module, rollouts, entropy), candidates, self.keep)
        return largest_share(self.scores(rollouts, entropy, candidates), candidates, self.keep)

    def scores(self, rollouts: Rollouts, entropy: Tensor, candidates: Tensor) -> Tensor:
        """``[N, T]``: importance, by the deterministic strategies."""
        if self.strategy == "entropy_topk":
            return entropy
        scaled = min_max(entropy, _everywhere(entropy[candidates]), self.entropy_clip)
        if self.strategy == "q3":
            return rollouts.token["divergence.forward"] * (1 - scaled)
        divergence = rollouts.token["divergence.reverse"]
        return soft_or(scaled, min_max(divergence, _everywhere(divergence[candidates])))

    def power(self, entropy: Tensor, jsd: Tensor) -> Tensor:
        """Weights of the released sampler."""
        agreement = (jsd / math.log(2)).clamp(min=1e-8)
        return entropy.clamp(min=1e-8).pow(self.entropy_power) * agreement.pow(self.divergence_power)

    @staticmethod
    def perturbed(module: Any, rollouts: Rollouts, weights: Tensor) -> Tensor:
        """Log weights plus Gumbel noise, a hash of (seed, draw, sample, position).

        Their k largest are a sample without replacement in proportion to the weights.
        """
        draws = rollouts.prompts.draw.to(rollouts.device)[rollouts.group]
        keys = row_keys(module.seed + 1, draws, rollouts.row["sample"])
        noise = uniforms(keys[:, None], torch.arange(rollouts.width, device=rollouts.device))
        return weights.clamp(min=1e-30).log() - (-noise.log()).log()

    def report(self, ledger: Any, entropy: Tensor, divergence: Tensor, candidates: Tensor, chosen: Tensor) -> None:
        """What was kept, what was dropped, and where the tokens lie."""
        ledger.mean("tip/kept_ratio", chosen.float(), candidates)
        for name, values in (("entropy", entropy), ("divergence", divergence)):
            ledger.mean(f"tip/{name}_kept", values, chosen)
            ledger.mean(f"tip/{name}_dropped", values, candidates & ~chosen)
        h, d = _everywhere(entropy[candidates]), _everywhere(divergence[candidates])
        if not len(h):
            return
        uncertain = entropy >= torch.quantile(h.double(), self.entropy_threshold)
        divergent = divergence >= torch.quantile(d.double(), self.divergence_threshold)
        for name, (high_h, high_d) in QUADRANTS.items():
            ledger.mean(f"tip/{name}", ((uncertain == high_h) & (divergent == high_d)).float(), candidates)
        ledger.mean("tip/rank_correlation", rank_correlation(h, d).reshape(1))


def rank_correlation(first: Tensor, second: Tensor) -> Tensor:
    """Spearman's correlation of two one-dimensional tensors; NaN if one of them is constant. Ties keep their order."""
    ranks_of = [x.argsort(stable=True).argsort().double() for x in (first, second)]
    return torch.corrcoef(torch.stack(ranks_of))[0, 1]


def _everywhere(values: Tensor) -> Tensor:
    """The values of all ranks."""
    return ranks.all_gather_concat(values)[0]
