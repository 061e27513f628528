# SPDX-License-Identifier: Apache-2.0
"""`RLModule`: the training step as a short pipeline of named stages over one batch of rollouts."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule
from torch import Tensor

from lit_rl import distributed as ranks
from lit_rl.hooks import callbacks_with, dispatch
from lit_rl.methods.evaluating import Evaluation
from lit_rl.methods.recalling import RecallStage
from lit_rl.methods.reporting import PROGRESS_BAR, Ledger, Reporting, rollout_statistics
from lit_rl.methods.state import RunState
from lit_rl.methods.terms import Term
from lit_rl.methods.updating import UpdateStage
from lit_rl.policies import FrozenPolicy, Policy
from lit_rl.prompts import PromptEncoder
from lit_rl.rewards import Reward, RewardInput, RewardSetupError, check_rewards, score_rewards
from lit_rl.rewards.base import FAILURES
from lit_rl.rollouts import Prompts, Rollouts, StopReason
from lit_rl.samplers.base import Interrupt, RolloutRequest, RolloutSampler, Sampling
from lit_rl.seeding import seed_everything_from, single_precision

OptimizerFactory = Callable[[Iterable[Any]], torch.optim.Optimizer]
SchedulerFactory = Callable[[torch.optim.Optimizer], torch.optim.lr_scheduler.LRScheduler]
_MAX_DRAWS = 1000  # attempts to replace prompts that the encoder drops


class RLModule(RunState, RecallStage, UpdateStage, Evaluation, Reporting, LightningModule):
    """A method: collect → recall → credit → update, each stage one method that a subclass may override.

    Args:
        policy: the language model to train, in hub format.
        sampler: generates completions; default `lit_rl.samplers.HFSampler`.
        rewards: what completions are scored by; at most one of them is marked as the verifier.
        sampling: how to draw tokens in training.
        optimizer: builds the optimizer from the trainable parameters; default AdamW, learning rate 1e-6.
        scheduler: builds a learning-rate scheduler that is stepped once a rollout step.
        prompts_per_step: prompts of one training step, over all ranks.
        group_size: completions of each prompt.
        updates_per_rollout: optimizer steps on each batch of rollouts (mini-batches).
        epochs_per_rollout: passes over each batch of rollouts.
        micro_batch_tokens: padded tokens of one forward and backward pass.
        max_grad_norm: gradients are scaled down to this norm; None leaves them alone.
        max_rollouts: the run ends after this many rollout steps.
        max_rounds: how often a step may ask for more prompts (dynamic sampling) before it goes on with what it has.
        max_prompt_tokens: budget of a prompt.
        encoder: turns records into token ids; default: the tokenizer's own chat template for messages.
        reference: frozen policy that ``logprobs.reference`` comes from.
        old_logprobs: where π_old comes from when a batch gets several updates: ``"auto"`` takes the sampler's
            log-probabilities where they are certainly the policy's own and recomputes the others, ``"recompute"``
            recomputes all, ``"sampler"`` trusts the sampler.
        on_nonfinite: what to do with a step whose gradient is not finite; the batch is on disk in both cases.
        keep_entropy: ask the sampler for entropies (``policy/entropy``).
        seed: every random decision of the run follows from it.
    """

    model: torch.nn.Module
    ledger: Ledger

    def __init__(
        self,
        policy: Policy,
        rewards: Sequence[Reward] | Reward = (),
        sampler: RolloutSampler | None = None,
        sampling: Sampling | None = None,
        optimizer: OptimizerFactory | None = None,
        scheduler: SchedulerFactory | None = None,
        prompts_per_step: int = 16,
        group_size: int = 8,
        updates_per_rollout: int = 1,
        epochs_per_rollout: int = 1,
        micro_batch_tokens: int = 16384,
        max_grad_norm: float | None = 1.0,
        max_rollouts: int = 1000,
        max_rounds: int = 4,
        max_prompt_tokens: int | None = 1024,
        encoder: Callable[..., PromptEncoder] | None = None,
        reference: FrozenPolicy | None = None,
        old_logprobs: Literal["auto", "recompute", "sampler"] = "auto",
        on_nonfinite: Literal["error", "skip"] = "error",
        keep_entropy: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__()
        positive = {"prompts_per_step": prompts_per_step, "group_size": group_size, "max_rollouts": max_rollouts}
        positive |= {"updates_per_rollout": updates_per_rollout, "epochs_per_rollout": epochs_per_rollout}
        positive |= {"micro_batch_tokens": micro_batch_tokens, "max_rounds": max_rounds}
        for name, value in positive.items():
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}.")
        for name, choice, choices in (
            ("old_logprobs", old_logprobs, ("auto", "recompute", "sampler")),
            ("on_nonfinite", on_nonfinite, ("error", "skip")),
        ):
            if choice not in choices:
                raise ValueError(f"{name} must be one of {list(choices)}, got {choice!r}.")
        if max_grad_norm is not None and not max_grad_norm > 0:
            raise ValueError(f"max_grad_norm must be positive, or None to leave gradients alone, got {max_grad_norm}.")
        if updates_per_rollout > prompts_per_step:
            raise ValueError(
                f"updates_per_rollout={updates_per_rollout} needs at least as many prompts, but prompts_per_step is "
                f"{prompts_per_step}: lower updates_per_rollout or raise prompts_per_step."
            )
        self.automatic_optimization = False
        self.policy = policy
        self.rewards = [rewards] if isinstance(rewards, Reward) else list(rewards)
        if self.rewards:
            check_rewards(self.rewards)
        if sampler is None:
            from lit_rl.samplers.hf import HFSampler

            sampler = HFSampler()
        self.sampler = sampler
        self.sampling = sampling if sampling is not None else Sampling()
        self.optimizer_factory = optimizer or (lambda params: torch.optim.AdamW(params, lr=1e-6, weight_decay=0.0))
        self.scheduler_factory = scheduler
        self.prompts_per_step, self.group_size = prompts_per_step, group_size
        self.updates_per_rollout, self.epochs_per_rollout = updates_per_rollout, epochs_per_rollout
        self.micro_batch_tokens, self.max_grad_norm = micro_batch_tokens, max_grad_norm
        self.max_rollouts, self.max_rounds = max_rollouts, max_rounds
        self.max_prompt_tokens = max_prompt_tokens
        self.encoder_factory = encoder or PromptEncoder
        self.reference = reference
        self.old_logprobs, self.on_nonfinite = old_logprobs, on_nonfinite
        self.keep_entropy, self.seed = keep_entropy, seed
        self.providers = {}
        self._proven_rewards: set[str] = set()
        self.ledger = Ledger()
        self.model = None  # type: ignore[assignment]  # loaded by configure_model
        self.init_run_state()

    # What a method defines -----------------------------------------------------------------------------------------

    def terms(self) -> list[Term]:
        """The summands of the loss. A method returns its own; coefficients are read at every step."""
        raise TypeError(f"{type(self).__name__} must define terms(): the list of its loss terms.")

    def advantages(self, rollouts: Rollouts) -> Tensor:
        """``[N, T]``: how much better each token's completion did than expected. Zero where nothing is known."""
        return torch.zeros(len(rollouts), rollouts.width, device=rollouts.device)

    def describe(self) -> list[str]:
        """The effective algorithm, one line a part, for the run header."""
        factors = [(term, term.coefficient(self)) for term in self.terms()]
        live = [(term, c) for term, c in factors if term.watched or c != 0]
        return [f"loss: {'' if c == 1 else f'{c:g} × '}{term.name} = {term.describe()}" for term, c in live]

    def frozen_policies(self) -> dict[str, FrozenPolicy]:
        """Policies that are not trained, by name. A method with a teacher adds it here.

        Loading, moving, saving, rewinding and refreshing follow, and ``logprobs.<name>`` can be required.
        """
        return {} if self.reference is None else {"reference": self.reference}

    # The step ------------------------------------------------------------------------------------------------------

    @single_precision()
    def training_step(self, batch: Any, batch_idx: int) -> None:
        """One rollout step: everything that happens between two batches of completions."""
        self.ledger = Ledger()
        with self.ledger.timed("step"):
            seed_everything_from(self.seed, self.rollout_step, ranks.rank())
            self.remember_boundary()
            with self.placement.gathered(self):
                rollouts = self.collect()
                if self.interrupted:
                    return
                rollouts = self.recall(rollouts)
                rollouts = self.credit(rollouts)
            self.update(rollouts)
        self.finish_step(rollouts)

    def collect(self) -> Rollouts:
        """Stage 1: sample and score, in rounds, until no callback on any rank asks for more prompts."""
        wanted = self.prompts_per_step // ranks.world_size()
        for callback in callbacks_with(self.trainer, "on_plan"):
            answer = callback.on_plan(self.trainer, self, wanted)
            wanted = wanted if answer is None else answer
        parts: list[Rollouts] = []
        self.sampled_plainly = True
        for _ in range(self.max_rounds):
            fresh = self.collect_round(wanted)
            if self.interrupted:
                return fresh
            parts = [Rollouts.cat([*parts, fresh])]
            asks = [c.on_collected(self.trainer, self, parts[0]) for c in callbacks_with(self.trainer, "on_collected")]
            wanted = max((n or 0 for n in asks), default=0)
            if not int(ranks.all_max(torch.tensor(wanted, device=self.device))):
                break
        return dispatch(self.trainer, self, "on_batch_ready", parts[0])

    def collect_round(self, prompts: int) -> Rollouts:
        """One round of stage 1: completions of the next prompts, scored."""
        request = dispatch(self.trainer, self, "on_rollout_request", self.plan(prompts))
        with self.ledger.timed("rollout"), self.sampler.active():
            fresh = self.sampler.sample(request).to(self.device)
        self.interrupted = self.agree_to_stop()
        if self.interrupted:
            return fresh
        plain = request.sampling.full_support and request.sampling.temperature == self.sampling.temperature
        self.sampled_plainly &= plain  # the trainer computes log-probabilities for its own sampling settings only
        fresh.edits = [*request.edits, *fresh.edits]
        fresh = dispatch(self.trainer, self, "on_rollouts", fresh)
        return dispatch(self.trainer, self, "on_rewards", self.score(fresh))

    def plan(self, prompts: int) -> RolloutRequest:
        """A request for the next prompts of this rank (a collective call)."""
        return RolloutRequest.for_groups(
            self.draw(self.sampler.prompts_to_draw(prompts)),
            self.group_size,
            dataclasses.replace(self.sampling),  # a callback may change it for this request
            self.seed,
            score=self.score,
            entropy=self.keep_entropy,
            should_stop=Interrupt(self.stop_requested),
            wanted=prompts,
        )

    def draw(self, wanted: int) -> Prompts:
        """The next prompts of this rank; those that the encoder drops are replaced.

        A collective call: the cursor moves by what all ranks draw.
        """
        parts: list[Prompts] = []
        missing = wanted
        for _ in range(_MAX_DRAWS):
            everyone = [int(n) for n in ranks.gather_ragged(torch.tensor([missing], device=self.device))]
            if not sum(everyone):
                return Prompts.cat(parts) if len(parts) != 1 else parts[0]
            start = self.cursor + sum(everyone[: ranks.rank()])
            self.cursor += sum(everyone)
            parts.append(self.encode(self.stream.at(start, missing), range(start, start + missing)))
            missing -= len(parts[-1])
            if missing:
                self.ledger.total("rollout/prompts_dropped", float(missing))
        raise ValueError(
            f"{_MAX_DRAWS} attempts did not find {wanted} prompts of at most {self.max_prompt_tokens} tokens: raise "
            "max_prompt_tokens, or filter the data."
        )

    def encode(self, records: list[dict[str, Any]], draws: Iterable[int]) -> Prompts:
        """Records of the data source as prompts.

        Raises:
            ValueError: the encoder adds ``model_inputs``, which no sampler of the package and no scoring pass reads.
        """
        prompts = self.encoder.encode(records, list(draws))
        if prompts.model_inputs:
            raise ValueError(
                f"{type(self.encoder).__name__} adds further inputs of the model ({', '.join(prompts.model_inputs)}), "
                "which training would ignore: the policy reads text only for now. Override `encode`, the sampler and "
                "`current` of the method to pass them on, or leave them out."
            )
        return prompts

    def score(self, rollouts: Rollouts) -> Rollouts:
        """Run the rewards. Scoring again replaces raw terms and verdicts; weights that callbacks set stay."""
        if not self.rewards:
            return rollouts
        with self.ledger.timed("reward"):
            terms, weights = score_rewards(self.rewards, self.reward_input(rollouts))
        failed = rollouts.row["stop_reason"].cpu() == StopReason.ERROR  # not scorable, whatever a reward makes of it
        terms = {name: values.cpu().masked_fill(failed, math.nan) for name, values in terms.items()}
        for reward in self.rewards:
            rollouts.reward_terms[reward.name] = terms[reward.name].to(self.device)
            if reward.name not in rollouts.reward_weights:
                rollouts.reward_weights[reward.name] = weights[reward.name].to(self.device)
            if reward.verifier:
                rollouts.correct = terms[reward.name].to(self.device, copy=True)
        return rollouts

    def reward_input(self, rollouts: Rollouts) -> RewardInput:
        """What rewards may read of a batch: texts end where the completion ends."""
        group = rollouts.group.tolist()
        ids = rollouts.completions()
        prompts = rollouts.prompts
        return RewardInput(
            prompts=[prompts.text[g] for g in group],
            completions=self.tokenizer.batch_decode(ids, skip_special_tokens=True),
            completion_ids=ids,
            lengths=rollouts.lengths.cpu(),
            finished=rollouts.finished.cpu(),
            group=rollouts.group.cpu(),
            columns={k: [v[g] for g in group] for k, v in prompts.columns.items()},
            source=[prompts.source[g] for g in group],
            max_length=self.sampling.max_tokens,
        )

    def credit(self, rollouts: Rollouts) -> Rollouts:
        """Stage 3: advantages."""
        rollouts.advantages = self.advantages(rollouts)
        return dispatch(self.trainer, self, "on_advantages", rollouts)

    def finish_step(self, rollouts: Rollouts) -> None:
        """Advance the two clocks, report, and hand the batch to whoever wants to look at it."""
        rollout_statistics(rollouts, self.ledger)
        for reward in self.rewards:
            for kind, count in reward.pop_failures().items():
                self.ledger.total(f"reward/{reward.name}_{kind}", float(count))
        for name, value in self.sampler.metrics(rollouts).items():
            self.ledger.mean(f"sampler/{name}", torch.tensor([value]))
        numbers = self.complete(self.ledger.reduce(self.device))
        self.warn_of_mismatch(numbers)
        self.refuse_dead_rewards(numbers)
        self.log_numbers(numbers, PROGRESS_BAR)
        measured = dict(numbers)
        for callback in callbacks_with(self.trainer, "on_metrics"):
            callback.on_metrics(self.trainer, self, numbers)
        self.log_numbers({name: value for name, value in numbers.items() if measured.get(name) is not value})
        self.last_rollouts = rollouts
        self.clock += 1
        self.rollout_step += 1
        for frozen in self.frozen_policies().values():
            frozen.refresh(self.model, self.rollout_step)

    def refuse_dead_rewards(self, numbers: dict[str, float]) -> None:
        """Stop at the first step of a reward that failed on all of its rows: it will not get better.

        Raises:
            RewardSetupError: with what it failed of, as far as this rank knows.
        """
        for reward in self.rewards:
            if f"reward/{reward.name}" in numbers:
                self._proven_rewards.add(reward.name)
            failed = [k for k in FAILURES if f"reward/{reward.name}_{k}" in numbers]
            if failed and reward.name not in self._proven_rewards:
                detail = f": {reward.last_failure}" if reward.last_failure else ""
                raise RewardSetupError(
                    f"Reward {reward.name!r} failed on every completion of its first step ({', '.join(failed)}"
                    f"{detail}). Repair it before you train."
                )

    def rescore(self, rollouts: Rollouts, rows: Tensor) -> None:
        """Score some rows again in place, after they were cut. Whole groups are scored, the given rows replaced.

        Args:
            rollouts: the batch.
            rows: int ``[n]``, rows whose terms and verdicts are replaced.
        """
        if not len(rows):
            return
        touched = torch.zeros(len(rollouts.prompts), dtype=torch.bool, device=rollouts.device)
        touched[rollouts.group[rows]] = True
        index = touched[rollouts.group].nonzero()[:, 0]
        again = self.score(rollouts.select(index))
        mine = torch.isin(index, rows)
        for name in ("correct", *(f"reward_terms.{r.name}" for r in self.rewards)):
            values = rollouts.row[name].clone()
            values[index[mine]] = again.row[name][mine]
            rollouts.row[name] = values
