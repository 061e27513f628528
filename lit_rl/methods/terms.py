# SPDX-License-Identifier: Apache-2.0
"""A loss is a sum of named terms.

A `Term` is the recipe: which rows and tokens it trains, how it is averaged, what it computes. Its counts are taken
once for each optimizer step over all micro-batches and ranks; a `LossTerm` is its value on one micro-batch, divided by
that frozen global count. So no split of a batch, over micro-batches or over ranks, changes the loss or its gradient.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from lit_rl import distributed as ranks
from lit_rl.objectives import Aggregation, aggregation_weights, mismatch_metrics, row_weights
from lit_rl.rollouts import Origin, Rollouts

if TYPE_CHECKING:
    from lit_rl.methods.module import RLModule
    from lit_rl.policies import TokenStates


@dataclass
class LossTerm:
    """One named summand of the loss on one micro-batch.

    Attributes:
        name: logged as ``loss/<name>``.
        values: ``[N, T]`` or ``[N]``, differentiable.
        weights: same shape, averaging weights without gradient; 0 where the term trains nothing.
        denominator: scalar, the global count over the optimizer step.
        coefficient: factor of the whole term; what callbacks may change.
    """

    name: str
    values: Tensor
    weights: Tensor
    denominator: Tensor
    coefficient: float | Tensor = 1.0

    def raw(self) -> Tensor:
        """Scalar: this micro-batch's share of the global mean, coefficient left out."""
        trained = self.weights != 0
        total = (torch.where(trained, self.values, 0.0) * self.weights).sum()
        return total / torch.where(self.denominator > 0, self.denominator, 1.0)  # without a count there is no value

    def loss(self) -> Tensor:
        """Scalar: what is differentiated."""
        return self.coefficient * self.raw()


class Current(NamedTuple):
    """The policy being trained, on one micro-batch.

    Attributes:
        logprobs: ``[N, T]`` with gradient, 0 where no term asked for it.
        entropy: ``[N, T]`` with gradient if a term trains it, else detached or None.
        states: the hidden states behind the wanted tokens, with gradient, if a term needs them: for losses over the
            whole vocabulary.
    """

    logprobs: Tensor
    entropy: Tensor | None
    states: TokenStates | None = None


@dataclass
class Signals:
    """Numbers that a term reports, summed over a step: name -> (sum, count), and name -> maximum."""

    sums: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    maxima: dict[str, Tensor] = field(default_factory=dict)

    def mean(self, name: str, values: Tensor, where: Tensor) -> None:
        """Add the values at ``where`` (bool, same shape) to the mean that is logged as ``name``."""
        total, count = torch.where(where, _wide(values), 0.0).sum(), where.sum()
        if name in self.sums:
            old = self.sums[name]
            total, count = total + old[0], count + old[1]
        self.sums[name] = (total, count)

    def ratio(self, name: str, total: Tensor, count: Tensor) -> None:
        """Add to the quotient of two sums that is logged as ``name``."""
        old = self.sums.get(name, (torch.zeros(()), torch.zeros(())))
        self.sums[name] = (old[0].to(total) + total.detach(), old[1].to(count) + count)

    def largest(self, name: str, values: Tensor, where: Tensor) -> None:
        """Let the values at ``where`` compete for the maximum that is logged as ``name``."""
        if values.numel():
            value = torch.where(where, _wide(values), -torch.inf).max()
            self.maxima[name] = torch.maximum(self.maxima[name], value) if name in self.maxima else value


def _wide(values: Tensor) -> Tensor:
    """Without gradient, and precise enough to be added up."""
    return values.detach() if values.dtype == torch.float64 else values.detach().float()


class Term(ABC):
    """The recipe of one loss term.

    Args:
        coefficient: a number, or the name of an attribute of the module (so that schedules can reach it).
        origins: rows of these origins are trained; None trains every row.

    Attributes:
        name: logged as ``loss/<name>``.
        requires: signals that the term reads.
        watched: whether the term is computed and logged while its coefficient is 0, without gradient.
        needs_entropy: whether it reads ``current.entropy``.
        needs_states: whether it reads ``current.states``.
    """

    name: str
    requires: frozenset[str] = frozenset()
    watched: bool = False
    needs_entropy: bool = False
    needs_states: bool = False

    def __init__(self, coefficient: float | str = 1.0, origins: Iterable[Origin] | None = None) -> None:
        self._coefficient = coefficient
        self.origins = frozenset(int(o) for o in origins) if origins is not None else None

    def coefficient(self, module: RLModule) -> float:
        """The current factor of this term."""
        return float(getattr(module, self._coefficient)) if isinstance(self._coefficient, str) else self._coefficient

    def trained(self, batch: Rollouts) -> Tensor:
        """``[N, T]``: loss weights, 0 on rows of other origins and beyond the end that counts."""
        weights = torch.where(batch.kept_mask(), batch.loss_weights, 0.0)
        if self.origins is None:
            return weights
        mine = torch.zeros(len(batch), dtype=torch.bool, device=batch.device)
        for origin in self.origins:
            mine |= batch.origin == origin
        return weights * mine[:, None]

    @abstractmethod
    def averaging(self, batch: Rollouts) -> tuple[Tensor, Tensor]:
        """Averaging weights (``[N, T]`` or ``[N]``) and this batch's count (scalar)."""

    def prepare(self, module: RLModule, mini: Rollouts) -> None:  # noqa: B027  (most terms need no preparation)
        """Once for each optimizer step, with this rank's whole mini-batch: look at it, store signals in it."""

    def active(self, batch: Rollouts) -> Tensor:
        """``[N]`` bool: rows on which this term has a gradient. Others need no forward pass."""
        return (self.trained(batch) != 0).any(1)

    @abstractmethod
    def values(self, batch: Rollouts, current: Current, signals: Signals) -> Tensor:
        """The differentiable values, ``[N, T]`` or ``[N]``, matching `averaging`."""

    def describe(self) -> str:
        """The formula, for the run header."""
        return self.name


class TokenTerm(Term):
    """A term with one value a token, averaged by an `Aggregation`.

    Attributes:
        formula: the value of a token, for the run header; by default the term's name.
    """

    formula = ""

    def __init__(
        self,
        coefficient: float | str = 1.0,
        origins: Iterable[Origin] | None = None,
        aggregation: Aggregation = Aggregation.TOKEN_MEAN,
        max_length: int | None = None,
    ) -> None:
        super().__init__(coefficient, origins)
        self.aggregation, self.max_length = Aggregation(aggregation), max_length

    def averaging(self, batch: Rollouts) -> tuple[Tensor, Tensor]:
        return aggregation_weights(self.trained(batch), self.aggregation, self.max_length)

    def describe(self) -> str:
        return f"{self.formula or self.name}; {self.aggregation.value.replace('_', ' ')}"


class PolicyTerm(TokenTerm):
    """The policy-gradient surrogate: values from one of `lit_rl.objectives.surrogates`."""

    name = "policy"

    def __init__(self, surrogate: Any, correction: Any = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.surrogate, self.correction = surrogate, correction
        self.requires = frozenset({"logprobs.sampler"}) if correction is not None else frozenset()

    def averaging(self, batch: Rollouts) -> tuple[Tensor, Tensor]:
        if self.surrogate.level == "sequence":
            return row_weights(self.trained(batch), self.aggregation, self.max_length)
        return super().averaging(batch)

    def prepare(self, module: RLModule, mini: Rollouts) -> None:
        """Let a surrogate that selects tokens over the whole mini-batch do so, on all ranks together."""
        if not self.surrogate.selects_over_batch:
            return
        now, _ = module.policy_logprobs(mini, module.model)
        old = self.anchor(mini, Current(now, None))
        trained = self.trained(mini) != 0
        width = int(ranks.all_max(torch.tensor(mini.width, device=mini.device)))
        gathered = [
            ranks.all_gather_concat(torch.nn.functional.pad(x.float(), (0, width - mini.width)))
            for x in (now, old, mini.advantages, trained)
        ]
        (logprobs, mine), old, advantages, mask = gathered[0], *(g[0] for g in gathered[1:])
        selected = self.surrogate.select(logprobs, old, advantages, mask.bool(), counter=module.update_index)
        mini.token["selected"] = selected[mine, : mini.width]

    def active(self, batch: Rollouts) -> Tensor:
        # A row whose advantages are all zero has no gradient: it counts in the mean but needs no forward pass.
        teaches = batch.advantages != 0
        if "selected" in batch.token:
            teaches = teaches | batch.token["selected"]
        return ((self.trained(batch) != 0) & teaches).any(1)

    def values(self, batch: Rollouts, current: Current, signals: Signals) -> Tensor:
        trained = self.trained(batch) != 0
        old = self.old_logprobs(batch, current)
        extra = {"selected": batch.token["selected"]} if "selected" in batch.token else {}
        advantages = self.credited(batch, current, signals)
        loss = self.surrogate(current.logprobs, self.anchor(batch, current), advantages, trained, **extra)
        signals.mean("policy/clip_ratio", loss.clipped, trained)
        signals.largest("policy/ratio_max", loss.ratio, trained)
        if self.correction is None:
            return loss.values
        weight = self.correction(batch.logprobs["sampler"], old.detach(), trained)
        applied = mismatch_metrics(batch.logprobs["sampler"], old, trained, weight)
        signals.mean("policy/correction_mean", weight, trained)
        signals.ratio("policy/correction_clipped", applied.clipped, applied.tokens)
        signals.ratio("_correction_square", applied.weight_squared, applied.tokens)  # becomes policy/correction_ess
        if loss.values.dim() == 1:  # a sequence objective takes the mean weight of its tokens
            weight = torch.where(trained, weight, 0.0).sum(1) / trained.sum(1).clamp(min=1)
        return loss.values * weight

    def anchor(self, batch: Rollouts, current: Current) -> Tensor:
        """``[N, T]``: the log-probabilities that the ratio is taken against. π_old; a subclass may choose another."""
        return self.old_logprobs(batch, current)

    def credited(self, batch: Rollouts, current: Current, signals: Signals) -> Tensor:
        """``[N, T]``: what the surrogate takes as advantages. Those of the batch; a subclass may reweigh tokens."""
        return batch.advantages

    @staticmethod
    def old_logprobs(batch: Rollouts, current: Current) -> Tensor:
        """``[N, T]``: π_old. Where nobody stored it (NaN or absent) it is the current policy: one update a batch."""
        now = current.logprobs.detach()
        if "old" not in batch.logprobs:
            return now
        old = batch.logprobs["old"]
        return torch.where(torch.isnan(old), now, old)

    def describe(self) -> str:
        average = "sequence mean" if self.surrogate.level == "sequence" else self.aggregation.value.replace("_", " ")
        corrected = f", corrected by {self.correction.describe()}" if self.correction is not None else ""
        return f"{self.surrogate.describe()}; {average}{corrected}"


class KLTerm(TokenTerm):
    """A penalty for leaving the reference policy, estimated on the sampled tokens."""

    name = "kl"
    watched = True
    requires = frozenset({"logprobs.reference"})

    def __init__(self, penalty: Any, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.penalty = penalty

    def values(self, batch: Rollouts, current: Current, signals: Signals) -> Tensor:
        trained = self.trained(batch) != 0
        reference = batch.logprobs["reference"]
        old = PolicyTerm.old_logprobs(batch, current)
        signals.mean("policy/kl_reference", self.penalty.report(current.logprobs.detach(), reference, trained), trained)
        return self.penalty.values(current.logprobs, reference, old, trained)

    def describe(self) -> str:
        return f"{self.penalty.describe()}; {self.aggregation.value.replace('_', ' ')}"


class EntropyTerm(TokenTerm):
    """The entropy bonus: minus the entropy, so that a positive coefficient keeps the policy exploring."""

    name = "entropy"
    formula = "-entropy"
    needs_entropy = True

    def values(self, batch: Rollouts, current: Current, signals: Signals) -> Tensor:
        assert current.entropy is not None
        return -current.entropy


class LikelihoodTerm(TokenTerm):
    """Negative log-likelihood of demonstrations or replayed text (supervised fine-tuning)."""

    name = "sft"
    formula = "-log pi of demonstrations and replayed text"

    def __init__(self, coefficient: float | str = 1.0, origins: Iterable[Origin] | None = None, **kwargs: Any) -> None:
        super().__init__(coefficient, origins or (Origin.DEMONSTRATION, Origin.REPLAY), **kwargs)

    def values(self, batch: Rollouts, current: Current, signals: Signals) -> Tensor:
        return -current.logprobs
