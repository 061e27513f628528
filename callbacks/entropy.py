# SPDX-License-Identifier: Apache-2.0
"""Watch what drives entropy down, and how far the present entropy can still carry the policy."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lit_rl import distributed as ranks
from lit_rl.hooks import RolloutCallback
from lit_rl.objectives.covariance import token_covariance
from lit_rl.rollouts import Rollouts


def fit_entropy_law(entropies: Sequence[float], scores: Sequence[float]) -> tuple[float, float]:
    """Least squares of :math:`R = -a e^H + b` (arXiv 2505.22617, eq. 1): a and b. The score at H = 0 is b − a.

    >>> a, b = fit_entropy_law([0.0, math.log(2)], [0.4, 0.2])
    >>> round(a, 9), round(b, 9)
    (0.2, 0.6)

    Raises:
        ValueError: fewer than two different entropies.
    """
    xs = [math.exp(h) for h in entropies]
    mean_x, mean_y = sum(xs) / max(len(xs), 1), sum(scores) / max(len(xs), 1)
    spread = sum((x - mean_x) ** 2 for x in xs)
    if spread == 0:
        raise ValueError(f"The entropy law needs at least two different entropies to fit, got {list(entropies)}.")
    slope = sum((x - mean_x) * (y - mean_y) for x, y in zip(xs, scores)) / spread
    return -slope, mean_y - slope * mean_x


class EntropyMonitor(RolloutCallback):
    """The covariance that drives entropy, and the law that ties entropy to the score (arXiv 2505.22617).

    To first order an update lowers the entropy by the covariance of a token's log-probability and its advantage, most
    of which a tiny share of the tokens carries: `KLCov` and `ClipCov` restrain just these. Over the validations of a
    run the score follows the entropy along :math:`R = -a e^H + b`, so :math:`b - a` is what is left to gain.

    Logged: ``covariance/mean`` and, for each of ``shares``, ``covariance/top_<share>`` (mean over the tokens of largest
    covariance), over the trained tokens of all ranks; after ``points`` validations ``entropy_law/a``, ``entropy_law/b``
    and ``entropy_law/predicted_ceiling``.

    Args:
        shares: shares of the tokens whose mean covariance is logged; the paper's table has these.
        score: logged validation value that takes the place of R.
        points: validations before the law is fitted.
    """

    def __init__(
        self, shares: Sequence[float] = (0.0002, 0.002, 0.02), score: str = "val/pass@1", points: int = 4
    ) -> None:
        if not all(0 < share <= 1 for share in shares):
            raise ValueError(f"shares are parts of all tokens, in (0, 1], got {list(shares)}.")
        if points < 2:
            raise ValueError(f"points must be at least 2, got {points}.")
        self.shares, self.score, self.points = list(shares), score, points
        self.seen: list[tuple[float, float]] = []  # (entropy, score) at each validation
        self.entropy = math.nan
        self._tokens: list[Tensor] = []

    def on_batch_ready(self, trainer: Any, module: Any, rollouts: Rollouts) -> None:
        """A new batch: forget the tokens of the one before."""
        self._tokens = []

    def on_micro_batch(self, trainer: Any, module: Any, micro: Rollouts, current: Any) -> None:
        """Keep log-probabilities and advantages of the trained tokens."""
        trained = micro.kept_mask() & (micro.loss_weights != 0) & micro.sampled[:, None]
        self._tokens.append(torch.stack([current.logprobs.detach()[trained], micro.advantages[trained]], 1).float())

    def on_metrics(self, trainer: Any, module: Any, metrics: Mapping[str, float]) -> None:
        """Covariances of the step, and the law as it stands."""
        self.entropy = metrics.get("policy/entropy", math.nan)
        mine = torch.cat([torch.zeros(0, 2, device=module.device), *self._tokens])
        tokens, _ = ranks.all_gather_concat(mine)  # [tokens, 2]
        if len(tokens):
            covariance = token_covariance(tokens[:, 0], tokens[:, 1], torch.ones(len(tokens), device=tokens.device))
            module.log("covariance/mean", float(covariance.mean()))
            for share in self.shares:
                largest = covariance.topk(max(1, math.floor(share * len(tokens)))).values
                module.log(f"covariance/top_{share:g}", float(largest.mean()))
        if len(self.seen) >= self.points and len({entropy for entropy, _ in self.seen}) > 1:
            a, b = fit_entropy_law(*zip(*self.seen))
            module.log_dict({"entropy_law/a": a, "entropy_law/b": b, "entropy_law/predicted_ceiling": b - a})

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """A point of the law: the last step's entropy and the score."""
        score = float(trainer.callback_metrics.get(self.score, math.nan))
        if not trainer.sanity_checking and math.isfinite(self.entropy) and math.isfinite(score):
            self.seen.append((self.entropy, score))

    def state_dict(self) -> dict[str, Any]:
        return {"seen": [list(point) for point in self.seen], "entropy": self.entropy}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.seen = [(entropy, score) for entropy, score in state_dict["seen"]]
        self.entropy = state_dict["entropy"]
