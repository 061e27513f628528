# SPDX-License-Identifier: Apache-2.0
"""Stage 4 of the step: mini-batches, frozen global denominators, micro-batches, one optimizer step each."""

from __future__ import annotations

import math
import warnings
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lit_rl import distributed as ranks
from lit_rl.hooks import callbacks_with, dispatch
from lit_rl.methods.batching import mini_batch, split
from lit_rl.methods.terms import Current, LossTerm, Term
from lit_rl.policies import completion_states, token_logprobs
from lit_rl.rollouts import Origin, Rollouts
from lit_rl.storage import save_rollouts

if TYPE_CHECKING:
    from lit_rl.methods.module import RLModule


IDLE_UPDATES = 10  # optimizer steps without anything to train on, after which a term is warned about
LARGE_MISMATCH = 0.05  # nats a token; rounding in half precision makes about 0.001


class NonFiniteGradientError(RuntimeError):
    """The gradient of an optimizer step is NaN or infinite; the batch is on disk."""


class UpdateStage:
    """The update of an `RLModule` (manual optimisation)."""

    @property
    def updates_per_step(self: RLModule) -> int:
        """Optimizer steps on each batch of rollouts."""
        return self.updates_per_rollout * self.epochs_per_rollout

    def update(self: RLModule, rollouts: Rollouts) -> None:
        """Train on a batch: ``epochs_per_rollout`` × ``updates_per_rollout`` optimizer steps on every rank."""
        steps = self.updates_per_step
        with self.ledger.timed("update"):
            plain: Any = self.optimizers(use_pl_optimizer=False)
            self.ledger.largest("policy/lr", torch.tensor(plain.param_groups[0]["lr"]))
            for step in range(steps):
                self.update_index = self.rollout_step * steps + step
                # A mini-batch is a copy, so that every pass begins with the weights that the batch came with.
                part = step % self.updates_per_rollout
                mini = rollouts if steps == 1 else mini_batch(rollouts, self.updates_per_rollout, part)
                known = len(rollouts.edits)
                mini = self.optimize(mini, first=step == 0, last=step == steps - 1)
                if mini is not rollouts:
                    rollouts.edits += mini.edits[known:]
            scheduler = self.lr_schedulers()
            if scheduler is not None:
                with warnings.catch_warnings():  # a first step without anything to train on moves only the schedule
                    warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step")
                    scheduler.step()  # type: ignore[union-attr, call-arg]
        with self.ledger.timed("sync"), self.placement.gathered(self):
            self.policy_version += 1
            self.sampler.sync(self.model, self.policy_version)

    def optimize(self: RLModule, mini: Rollouts, first: bool, last: bool) -> Rollouts:
        """One optimizer step on a mini-batch, skipped on all ranks if none of them has anything to train on.

        Returns:
            The mini-batch after the callbacks.
        """
        with self.placement.gathered(self):
            for term in self.loss_terms:
                term.prepare(self, mini)
            mini = dispatch(self.trainer, self, "on_loss_weights", mini)
        active = torch.zeros(len(mini), dtype=torch.bool, device=self.device)
        for term in self.loss_terms:
            if term.coefficient(self) != 0:
                active |= term.active(mini)
        counts = torch.stack([*(term.averaging(mini)[1].to(self.device) for term in self.loss_terms), active.sum()])
        counts = ranks.all_sum(counts.double())
        *trained, rows = counts.tolist()
        self.warn_of_idle_terms(trained)
        if not rows:
            return mini
        denominators = counts[:-1].unbind()
        optimizer: Any = self.optimizers()
        optimizer.zero_grad(set_to_none=True)
        self.accumulate_gradients(mini, active.nonzero()[:, 0], denominators, first)
        if not self.gradient_is_usable(mini):
            optimizer.zero_grad(set_to_none=True)
        elif last:
            optimizer.step()
        else:  # not counted in trainer.global_step, which counts rollout steps
            self.trainer.strategy.optimizer_step(optimizer.optimizer, _nothing, model=self)
        return mini

    def accumulate_gradients(
        self: RLModule, mini: Rollouts, rows: Tensor, denominators: tuple[Tensor, ...], first: bool
    ) -> None:
        """Backward over all micro-batches; the ranks may hold different numbers of them."""
        world = ranks.world_size()
        active = mini if len(rows) == len(mini) else mini.select(rows)
        parts = self.placement.passes(split(active, self.micro_batch_rows(active)))
        for i, part in enumerate(parts):
            last = i == len(parts) - 1
            with self.placement.reduction(self, last):
                if part is None:
                    self.manual_backward(self.placement.empty_loss(self))
                    continue
                loss = self.micro_loss(part, denominators, first)
                loss = self.placement.joined(self, loss, last)
                self.manual_backward(loss * world)  # ranks are averaged over; the denominators are global already

    def micro_loss(self: RLModule, micro: Rollouts, denominators: tuple[Tensor, ...], first: bool) -> Tensor:
        """Scalar loss of one micro-batch."""
        wanted = torch.zeros_like(micro.completion_mask)
        live = self.live_terms()
        for term in live:
            wanted |= term.trained(micro) != 0
        entropy = any(term.needs_entropy for term in live)
        current = self.current(micro, wanted, entropy, states=any(term.needs_states for term in live))
        if first:
            self.record_mismatch(micro, current, wanted)
        for callback in callbacks_with(self.trainer, "on_micro_batch"):
            callback.on_micro_batch(self.trainer, self, micro, current)
        terms = self.losses(micro, current, denominators)
        silent = [term.coefficient == 0 for term in terms]
        for callback in callbacks_with(self.trainer, "on_loss_terms"):
            callback.on_loss_terms(self.trainer, self, terms)
        for loss_term, was_silent in zip(terms, silent):
            self.ledger.total(f"loss/{loss_term.name}", loss_term.raw().detach() / self.updates_per_step)
            if was_silent and float(loss_term.coefficient) != 0:
                raise RuntimeError(
                    f"on_loss_terms gave the term {loss_term.name!r} a coefficient, but it was computed without "
                    "gradient because the method's own is 0: set that one, and scale it in on_loss_terms."
                )
        start = micro.loss_weights.new_zeros(()) + self.placement.anchor(current)
        return sum((t.loss() for t in terms if float(t.coefficient) != 0), start=start)

    def live_terms(self: RLModule) -> list[Term]:
        """The terms that are computed: those with a coefficient, and those that are watched without one."""
        return [term for term in self.loss_terms if term.watched or term.coefficient(self) != 0]

    def current(self: RLModule, micro: Rollouts, wanted: Tensor, entropy: bool, states: bool = False) -> Current:
        """The policy's log-probabilities of a micro-batch, with gradient, and the hidden states if asked for."""
        behind = completion_states(
            self.model,
            micro.prompts.ids,
            micro.completion_ids,
            micro.completion_mask,
            micro.lengths,
            prompt_index=micro.group,
            wanted=wanted,
        )
        temperature = self.sampling.temperature or 1.0
        logprobs, entropies = token_logprobs(behind, micro.completion_ids, temperature=temperature, entropy=entropy)
        return Current(logprobs, entropies, behind if states else None)

    def losses(self: RLModule, micro: Rollouts, current: Current, denominators: tuple[Tensor, ...]) -> list[LossTerm]:
        """The named terms of one micro-batch."""
        out = []
        for term, denominator in zip(self.loss_terms, denominators):
            coefficient = term.coefficient(self)
            if coefficient == 0 and not term.watched:
                continue
            with torch.set_grad_enabled(coefficient != 0):
                values = term.values(micro, current, self.ledger.signals)
            out.append(LossTerm(term.name, values, term.averaging(micro)[0], denominator.to(values), coefficient))
        return out

    @torch.no_grad()
    def record_mismatch(self: RLModule, micro: Rollouts, current: Current, wanted: Tensor) -> None:
        """How far the sampler's log-probabilities are from the trainer's own (k3 and largest gap)."""
        if "sampler" not in micro.logprobs:
            return
        where = wanted & (micro.origin == Origin.POLICY)[:, None]
        gap = torch.where(where, current.logprobs.detach() - micro.logprobs["sampler"], 0.0)
        self.ledger.mean("policy/kl_sampler", torch.expm1(gap) - gap, where)
        self.ledger.largest("policy/sampler_gap_max", gap.abs(), where)

    def warn_of_idle_terms(self: RLModule, trained: list[float]) -> None:
        """Say so if a term with a coefficient has had nothing to train on since the run began."""
        for term, count in zip(self.loss_terms, trained):
            if count:
                self._idle[term.name] = -math.inf  # it is fed: never warn of it
                continue
            if not term.coefficient(self):
                continue
            self._idle[term.name] = self._idle.get(term.name, 0) + 1
            if self._idle[term.name] == IDLE_UPDATES:
                origins = sorted(Origin(o).name.lower() for o in term.origins or Origin)
                rank_zero_warn(
                    f"The loss term {term.name!r} has trained nothing in {IDLE_UPDATES} optimizer steps: there was no "
                    f"token of origin {' or '.join(origins)}. Use a sampler or a callback that delivers some "
                    "(configs/data/mixture.yaml), or set its coefficient to 0."
                )

    def warn_of_mismatch(self: RLModule, numbers: dict[str, float]) -> None:
        """Say so if the first batch shows that sampler and trainer do not speak of the same distribution."""
        gap = numbers.get("policy/kl_sampler")
        if gap is None or self._mismatch_known or not self.sampled_plainly:  # a narrowed support explains a gap
            return
        self._mismatch_known = True
        if not gap < LARGE_MISMATCH:
            rank_zero_warn(
                f"The sampler's log-probabilities differ from the policy's own by a KL of {gap:.3g} nats a token "
                f"(policy/kl_sampler). {type(self.sampler).__name__} must return them after temperature and over the "
                "support that was sampled from, for the policy's current weights. If it samples in another precision, "
                "or from older weights, set `correction`."
            )

    def gradient_is_usable(self: RLModule, mini: Rollouts) -> bool:
        """Clip the gradient; False (or an error) if it is not finite. Under fp16 the scaler decides instead."""
        if self.trainer.precision == "16-mixed":
            return True
        norm = self.clip_gradient()
        if math.isfinite(norm):
            return True
        path = save_rollouts(mini, self.run_dir / "nonfinite", f"clock{self.clock:08d}-rank{ranks.rank()}")
        if self.on_nonfinite == "error":
            raise NonFiniteGradientError(
                f"The gradient norm of training step {self.clock} is {norm}. Its batch was saved to {path}. Look there "
                "for extreme log-probabilities or rewards, lower the learning rate, or set on_nonfinite=skip."
            )
        self.skipped_updates += 1
        return False

    def clip_gradient(self: RLModule) -> float:
        """Scale gradients down to ``max_grad_norm`` and record the norm they had."""
        parameters = [p for p in self.model.parameters() if p.grad is not None]
        norm: Any = torch.nn.utils.clip_grad_norm_(parameters, self.max_grad_norm or math.inf)
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        self.ledger.mean("policy/grad_norm", norm.detach().float().reshape(1))
        return float(norm)

    def on_before_optimizer_step(self: RLModule, optimizer: torch.optim.Optimizer) -> None:
        """Under fp16, gradients are only meaningful here, after the scaler has unscaled them."""
        if self.trainer.precision == "16-mixed":
            self.clip_gradient()


def _nothing() -> None:
    """The closure of an inner update: gradients are there already."""
