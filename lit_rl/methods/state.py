# SPDX-License-Identifier: Apache-2.0
"""The life of an `RLModule` around its steps: loading, set-up checks, clocks, checkpoints, rewinding, logging.

Two clocks: ``clock`` counts training steps and never runs backward; ``rollout_step`` may be rewound and drives seeds
and schedules. State has two kinds: training state (weights, optimizer, scheduler, cursor, ``rollout_step``, callbacks
that rewind) and run state (``clock``, ``policy_version`` and everything that must not be forgotten).
"""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lit_rl import distributed as ranks
from lit_rl.hooks import HOOKS, RolloutCallback, callbacks_with, required_signals, warn_of_misspelt_hooks
from lit_rl.methods.placement import Placement, Whole, check_strategy, placed
from lit_rl.methods.reporting import Ledger, tensorboard_file
from lit_rl.spelling import did_you_mean

if TYPE_CHECKING:
    from lit_rl.data import PromptDataModule
    from lit_rl.methods.module import RLModule
    from lit_rl.methods.recalling import Provider
    from lit_rl.methods.terms import Term
    from lit_rl.rollouts import Rollouts


class RunState:
    """What an `RLModule` is between steps."""

    tokenizer: Any
    encoder: Any
    clock: int
    rollout_step: int
    cursor: int
    policy_version: int
    skipped_updates: int
    interrupted: bool  # the step that runs, or ran last, was cut short and will be undone
    placement: Placement  # where the weights are
    required: list[str]
    providers: dict[str, Provider]
    _mismatch_known: bool
    _idle: dict[str, float]
    update_index: int  # optimizer steps before the one that runs
    validation_is_due: bool  # it was cut short by a signal
    sampled_plainly: bool  # with the module's own temperature, from the full support
    loss_terms: list[Term]
    last_rollouts: Rollouts | None

    def init_run_state(self: RLModule) -> None:
        """Start of a run: nothing drawn, nothing trained."""
        self.clock = self.rollout_step = self.cursor = self.policy_version = self.skipped_updates = 0
        self.required, self.loss_terms = [], []
        self.placement = Whole()
        self._whole_weights = ExitStack()  # open while an evaluation runs
        self.init_reporting()
        self.last_rollouts = None
        self._sampler_state: dict[str, Any] | None = None
        self._frozen_states: dict[str, Any] = {}
        self.update_index = 0
        self._mismatch_known = False
        self._idle = {}
        self._boundary: dict[str, Any] | None = None
        self._prepared = False
        self.interrupted = self.sampled_plainly = self.validation_is_due = False

    # Set-up --------------------------------------------------------------------------------------------------------

    @property
    def data(self: RLModule) -> PromptDataModule:
        """The datamodule of the running trainer."""
        from lit_rl.data import PromptDataModule

        data = self.trainer.datamodule  # type: ignore[attr-defined]
        if not isinstance(data, PromptDataModule):
            raise TypeError(
                "lit-rl methods draw their prompts from a PromptDataModule: pass one as `datamodule=` "
                f"(got {type(data).__name__}). lit_rl.datamodules has several; see docs/data.md."
            )
        return data

    @property
    def run_dir(self: RLModule) -> Path:
        """Where this run writes its files."""
        return Path(self.trainer.log_dir or self.trainer.default_root_dir)

    def setup(self: RLModule, stage: str) -> None:
        """Check the run and print its header, before any model is loaded."""
        self.check_setup(stage)
        if stage == "fit":
            from lit_rl.header import run_header

            rank_zero_info(run_header(self, self.trainer.world_size))

    def check_setup(self: RLModule, stage: str) -> None:
        """Check that data, rewards, terms and callbacks fit together; ``ValueError`` says what to change."""
        self.loss_terms = self.terms()
        check_strategy(self)
        self.check_columns(stage)
        if stage == "fit":
            self.stream = self.data.train_stream
            self.check_batch_numbers()
            self.resolve_requirements()

    def check_columns(self: RLModule, stage: str) -> None:
        """Every column that a reward reads must be in the data."""
        data = self.data
        streams = [data.train_stream] if stage == "fit" else []
        streams += [eval_set.stream for eval_set in data.eval_sets]
        for reward in self.rewards:
            for stream in streams:
                missing = [c for c in reward.requires_columns if c not in stream.columns()]
                if missing and reward.sources is None:
                    raise ValueError(
                        f"Reward {reward.name!r} reads the column {missing[0]!r}, but the data has only "
                        f"{sorted(stream.columns())}. Name the right column in the reward's arguments, or restrict the "
                        "reward to the sources that have it with `sources`."
                    )

    def check_batch_numbers(self: RLModule) -> None:
        """The batch must divide evenly over the ranks and updates."""
        world = self.trainer.world_size
        if self.prompts_per_step % world:
            raise ValueError(
                f"prompts_per_step={self.prompts_per_step} does not divide over {world} ranks: "
                f"use a multiple of {world}."
            )
        if (self.prompts_per_step // world) % self.updates_per_rollout:
            raise ValueError(
                f"Each rank draws {self.prompts_per_step // world} prompts, which does not divide into "
                f"updates_per_rollout={self.updates_per_rollout} mini-batches: change one of the two."
            )

    def resolve_requirements(self: RLModule) -> None:
        """Find a provider for everything that terms and callbacks require, or refuse."""
        wanted = required_signals(self.trainer)
        for term in self.loss_terms:
            for signal in term.requires:
                wanted.setdefault(signal, []).append(f"the loss term {term.name!r}")
        present = {"lengths", *self.sampler.provides}
        if self.rewards:
            present.add("rewards")
        present |= {f"reward_terms.{r.name}" for r in self.rewards}
        if not self.keep_entropy:
            present.discard("entropy")
        if any(r.verifier for r in self.rewards):
            present.add("correct")
        self.providers = {**self.default_providers(), **self.providers}
        hints = {
            "logprobs.reference": "set `reference` of the method (lit_rl.policies.FrozenCopy, for example)",
            "logprobs.sampler": f"{type(self.sampler).__name__} does not sample, so there are none",
            "correct": "mark one reward as the verifier (verifier: true)",
        }
        taught = [s for s in wanted if s == "logprobs.teacher" or s.startswith("divergence.")]
        hints |= dict.fromkeys(
            taught, f"{type(self).__name__} has no teacher, use a method that has one (docs/methods)"
        )
        for signal, by in wanted.items():
            if signal not in present and signal not in self.providers:
                hint = hints.get(signal, f"register a provider in module.providers[{signal!r}]")
                known = {*present, *self.providers}
                meant = did_you_mean(signal, (known | hints.keys()) - {signal})
                raise ValueError(
                    f"{' and '.join(by)} requires {signal!r}, which nothing provides: {hint}.{meant} "
                    f"There are: {', '.join(sorted(known))}."
                )
        self.required = [s for s in self.providers if s in wanted and s not in present]
        self.sampler.check_setup(self)
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
            warn_of_misspelt_hooks(callback)
            check = getattr(callback, "check_setup", None)
            if check is not None:
                check(self)

    def configure_model(self: RLModule) -> None:
        """Load the policy (once), and let the reference take what it needs of the untrained weights."""
        if self.model is not None:
            return
        self.model, self.tokenizer = self.policy.load()
        self.encoder = self.encoder_factory(self.tokenizer, max_prompt_tokens=self.max_prompt_tokens)
        self.strict_loading: bool = all(p.requires_grad for p in self.model.parameters())
        for frozen in self.frozen_policies().values():
            frozen.setup(self.model)
        self.placement = placed(self)

    def configure_optimizers(self: RLModule) -> Any:
        """The optimizer over the trainable parameters, with the scheduler if there is one."""
        optimizer = self.optimizer_factory([p for p in self.model.parameters() if p.requires_grad])
        if self.scheduler_factory is None:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": self.scheduler_factory(optimizer)}

    def prepare_run(self: RLModule) -> None:
        """Once the weights are in place: rewards are tested, the sampler is connected."""
        if self._prepared:
            return
        for reward in self.rewards:
            reward.self_test()
        for name, frozen in self.frozen_policies().items():
            frozen.to(self.device)
            frozen.convert(self.trainer.precision_plugin.convert_module)
            if name in self._frozen_states:
                frozen.load_state_dict(self._frozen_states.pop(name))
        self.placement.prepare(self)
        with self.placement.gathered(self):
            self.sampler.setup(self.model, self.tokenizer)
            self.sampler.sync(self.model, self.policy_version)
            if self._sampler_state is not None:
                self.sampler.load_state_dict(self._sampler_state)
                self._sampler_state = None
        self._prepared = True

    def on_fit_start(self: RLModule) -> None:
        if not self.trainer.strategy.restore_checkpoint_after_setup:
            self.prepare_run()
        self.stop_if_over()

    def on_train_start(self: RLModule) -> None:
        """After a resume, tell TensorBoard to forget what was logged beyond the checkpoint."""
        self.prepare_run()
        self.stop_if_over()
        if self.clock == 0:
            return
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog

        for file in filter(None, map(tensorboard_file, self.loggers)):
            file.add_event(Event(session_log=SessionLog(status=SessionLog.START), step=self.clock))

    def stop_if_over(self: RLModule) -> None:
        """End a run that was continued from its last step, and say so."""
        if self.rollout_step >= self.max_rollouts and not self.trainer.should_stop:
            self.trainer.should_stop = True
            rank_zero_info(
                f"Nothing is left to do: the checkpoint is at rollout step {self.rollout_step} and the run ends at "
                f"max_rollouts={self.max_rollouts}. Raise model.init_args.max_rollouts to train on."
            )

    def begin_step(self: RLModule) -> None:
        """Between two steps (called by the datamodule): let whoever saves the run do so."""
        self.undo_interrupted_step()
        self.begin_reporting()
        # Where callbacks of Lightning log; it counts a validation after a resume as one more step.
        self.trainer.fit_loop.epoch_loop._batches_that_stepped = self.clock
        for callback in callbacks_with(self.trainer, "on_step_boundary"):
            callback.on_step_boundary(self.trainer, self)

    def on_train_batch_start(self: RLModule, batch: Any, batch_idx: int) -> int | None:
        """-1 ends the run without another step, if it was stopped at the boundary."""
        return -1 if self.trainer.should_stop and self.stop_requested() else None

    def on_train_batch_end(self: RLModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        """After the callbacks: one of them may have rewound the run, and each may have logged something."""
        self.validation_is_due = False
        if self.rollout_step >= self.max_rollouts:
            self.trainer.should_stop = True
        self.end_reporting()

    def teardown(self: RLModule, stage: str) -> None:
        """Release processes; a later stage starts them again."""
        for reward in self.rewards:
            reward.close()
        self._whole_weights.close()
        self.sampler.close()
        self.ledger = Ledger()  # stages may be called by themselves after a run
        self._prepared = False

    # Signals -------------------------------------------------------------------------------------------------------

    def stop_requested(self: RLModule) -> bool:
        """Whether a callback (`RolloutCheckpoint`, on a signal) wants the run to stop at the next token."""
        callbacks = self.trainer.callbacks  # type: ignore[attr-defined]
        return any(c.stop_requested() for c in callbacks if hasattr(c, "stop_requested"))

    def agree_to_stop(self: RLModule) -> bool:
        """Whether any rank was asked to stop: then all of them throw the step away."""
        return bool(ranks.all_max(torch.tensor(int(self.stop_requested()), device=self.device)))

    def remember_boundary(self: RLModule) -> None:
        """Keep what the step that begins may change before it is interrupted."""
        states = {c.state_key: _clone(c.state_dict()) for c in self._rollout_callbacks()}
        self._boundary = {"cursor": self.cursor, "callbacks": states, "sampler": self.sampler.boundary()}

    def undo_interrupted_step(self: RLModule) -> None:
        """Go back to the boundary before a step that was interrupted: it will be drawn again."""
        if not self.interrupted or self._boundary is None:
            return
        self.cursor = self._boundary["cursor"]
        self.sampler.return_to(self._boundary["sampler"])
        for callback in self._rollout_callbacks():
            callback.load_state_dict(self._boundary["callbacks"][callback.state_key])
        for reward in self.rewards:
            reward.pop_failures()
        self.interrupted, self._boundary = False, None

    def _rollout_callbacks(self: RLModule) -> list[Any]:
        """Callbacks that take part in a step."""
        callbacks: list[Any] = self.trainer.callbacks  # type: ignore[attr-defined]
        return [c for c in callbacks if isinstance(c, RolloutCallback) or any(hasattr(c, hook) for hook in HOOKS)]

    # Checkpoints ---------------------------------------------------------------------------------------------------

    def on_save_checkpoint(self: RLModule, checkpoint: dict[str, Any]) -> None:
        """Add both clocks, the cursor, the sampler's and the reference's state; leave frozen weights out."""
        named = self.model.named_parameters(remove_duplicate=False)  # tied weights have two names
        frozen = {f"model.{n}" for n, p in named if not p.requires_grad}
        checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k not in frozen}
        if "fit_loop" in checkpoint.get("loops", {}):
            count_as_clock(checkpoint["loops"]["fit_loop"], self.clock, self.validation_is_due)
        checkpoint["lit_rl"] = {
            "clock": self.clock,
            "rollout_step": self.rollout_step,
            "cursor": self.cursor,
            "policy_version": self.policy_version,
            "skipped_updates": self.skipped_updates,
            "seed": self.seed,
            "threads": torch.get_num_threads(),
            "data": self.stream.fingerprint() if hasattr(self, "stream") else None,
            "sampler": ranks.gather_objects(self.sampler.state_dict()),  # each rank carries over its own
            "frozen": {name: frozen.state_dict() for name, frozen in self.frozen_policies().items()},
        }

    def on_load_checkpoint(self: RLModule, checkpoint: dict[str, Any]) -> None:
        """Restore what `on_save_checkpoint` added, and warn about what would make the continuation differ."""
        if "lit_rl" not in checkpoint:
            raise ValueError("This checkpoint was not written by lit-rl: it has no 'lit_rl' entry.")
        state = checkpoint["lit_rl"]
        for name in ("clock", "rollout_step", "cursor", "policy_version", "skipped_updates"):
            setattr(self, name, state[name])
        if len(state["sampler"]) == ranks.world_size():
            self._sampler_state = state["sampler"][ranks.rank()]
        elif any(state["sampler"]):
            rank_zero_warn(
                f"The checkpoint was written by {len(state['sampler'])} ranks and is resumed by {ranks.world_size()}: "
                "prompts and completions that the sampler carried over are dropped."
            )
        self._frozen_states = dict(state["frozen"])  # loaded once the policies have the precision they were saved in
        mine: dict[str, Any] = {"seed": self.seed, "threads": torch.get_num_threads()}
        mine["data"] = self.stream.fingerprint() if hasattr(self, "stream") else state["data"]
        for name, value in mine.items():
            if state[name] is not None and value != state[name]:
                rank_zero_warn(
                    f"Resuming with {name}={value}, but the checkpoint was written with {name}={state[name]}: "
                    "the run will not continue exactly as it would have."
                )

    def training_state(self: RLModule) -> dict[str, Any]:
        """Everything that a rewind restores, as tensors and plain values (cloned)."""
        scheduler: Any = self.lr_schedulers()
        rewinding = [c for c in self.trainer.callbacks if getattr(c, "rewinds", False)]  # type: ignore[attr-defined]
        return {
            "weights": {n: p.detach().clone() for n, p in self.named_parameters() if p.requires_grad},
            "optimizers": [_clone(o.state_dict()) for o in self._plain_optimizers()],
            "scheduler": None if scheduler is None else _clone(scheduler.state_dict()),
            "cursor": self.cursor,
            "rollout_step": self.rollout_step,
            "frozen": {name: frozen.state_dict() for name, frozen in self.frozen_policies().items()},
            "callbacks": {c.state_key: _clone(c.state_dict()) for c in rewinding},
        }

    def _plain_optimizers(self: RLModule) -> list[Any]:
        optimizers: Any = self.optimizers(use_pl_optimizer=False)
        return optimizers if isinstance(optimizers, list) else [optimizers]

    @torch.no_grad()
    def load_training_state(self: RLModule, state: dict[str, Any]) -> None:
        """Rewind: weights, optimizers, scheduler, reference, cursor, ``rollout_step``, the callbacks that rewind.

        Call it between steps (from ``on_train_batch_end``). ``clock`` and ``policy_version`` go on forward.
        """
        for name, parameter in self.named_parameters():
            if name in state["weights"]:
                parameter.copy_(state["weights"][name])
        for optimizer, saved in zip(self._plain_optimizers(), state["optimizers"]):
            optimizer.load_state_dict(_clone(saved))
        for name, frozen in self.frozen_policies().items():
            frozen.load_state_dict(state["frozen"][name])
        if state["scheduler"] is not None:
            self.lr_schedulers().load_state_dict(_clone(state["scheduler"]))  # type: ignore[union-attr]
        self.cursor, self.rollout_step = state["cursor"], state["rollout_step"]
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
            if getattr(callback, "rewinds", False) and callback.state_key in state["callbacks"]:
                callback.load_state_dict(_clone(state["callbacks"][callback.state_key]))
        self.policy_version += 1
        self.sampler.on_rewind(self.model)
        self.sampler.sync(self.model, self.policy_version)


def count_as_clock(loop: dict[str, Any], clock: int, validation_is_due: bool) -> None:
    """Write Lightning's counters as they are between two batches of its one endless epoch, after ``clock`` batches.

    Then it makes no difference where in its loops a checkpoint was saved, nor whether a step was interrupted.

    Args:
        loop: the state of Lightning's fit loop.
        clock: batches so far.
        validation_is_due: a validation was cut short, and is to be done before anything else.
    """
    for scope in ("total", "current"):
        loop["epoch_loop.batch_progress"][scope] |= dict.fromkeys(("ready", "started", "processed", "completed"), clock)
        loop["epoch_progress"][scope] |= {"ready": 1, "started": 1, "processed": 0, "completed": 0}
    loop["epoch_loop.batch_progress"]["is_last_batch"] = False
    loop["epoch_loop.state_dict"]["_batches_that_stepped"] = clock
    validation = loop["epoch_loop.val_loop.batch_progress"]
    begun = 1 if validation_is_due else 0  # one batch that was started and not processed: "go back and finish"
    validation["total"] |= {"ready": begun, "started": begun, "processed": 0, "completed": 0}
    validation["current"] |= dict.fromkeys(("ready", "started", "processed", "completed"), 0)


def _clone(value: Any) -> Any:
    """A deep copy of nested containers whose tensors share nothing with the original."""
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {k: _clone(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)) and not hasattr(value, "_fields"):
        return type(value)(_clone(v) for v in value)
    return value
