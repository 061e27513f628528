# SPDX-License-Identifier: Apache-2.0
"""Where the policy's weights are: whole on every rank, or sharded over the ranks (FSDP2).

One rule makes sharding safe. **Without gradient the weights are whole, with gradient they are sharded.** Sampling and
scoring run on a plain copy that is filled for as long as it is used, so a rank may make as many forward passes as it
has rows. Forward passes with gradient gather one layer at a time, so there every rank makes the same number of them.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lit_rl import distributed as ranks
from lit_rl.policies.frozen import Live, whole
from lit_rl.policies.scoring import bare_model, completion_logprobs

if TYPE_CHECKING:
    from lit_rl.methods.module import RLModule
    from lit_rl.methods.terms import Current
    from lit_rl.rollouts import Rollouts


class Placement(ABC):
    """What an `RLModule` has to know of the place of its weights."""

    def prepare(self, module: RLModule) -> None:  # noqa: B027
        """Once the weights are on their device and in their precision."""

    @contextmanager
    def gathered(self, module: RLModule) -> Iterator[None]:
        """Inside, ``module.model`` has all its weights on this rank and is not trained. A collective call."""
        yield

    @abstractmethod
    def passes(self, parts: list[Rollouts]) -> list[Rollouts | None]:
        """The passes with gradient that this rank makes for its micro-batches; None: one without rows."""

    @abstractmethod
    def reduction(self, module: RLModule, last: bool) -> AbstractContextManager[Any]:
        """Around a pass: whether its gradient is reduced over the ranks."""

    @abstractmethod
    def empty_loss(self, module: RLModule) -> Tensor:
        """A zero whose backward pass takes part in the collectives of the other ranks' passes."""

    def anchor(self, current: Current) -> Tensor | float:
        """A zero that every micro-batch's loss begins with."""
        return 0.0

    def joined(self, module: RLModule, loss: Tensor, last: bool) -> Tensor:
        """The loss of a micro-batch, made to take part in the reduction."""
        return loss


class Whole(Placement):
    """Every rank holds all weights: a single process, or DDP. Gradients are reduced in the last pass alone."""

    def passes(self, parts: list[Rollouts]) -> list[Rollouts | None]:
        return [*parts] or [None]  # every rank takes part in the one synchronised backward pass

    def reduction(self, module: RLModule, last: bool) -> AbstractContextManager[Any]:
        strategy: Any = module.trainer.strategy
        return nullcontext() if last or ranks.world_size() == 1 else strategy.block_backward_sync()

    def empty_loss(self, module: RLModule) -> Tensor:
        return _zero_anchor(module.model)

    def joined(self, module: RLModule, loss: Tensor, last: bool) -> Tensor:
        if (last and ranks.world_size() > 1) or not loss.requires_grad:  # a callback may have silenced every term
            return loss + _zero_anchor(module.model)
        return loss


class Sharded(Placement):
    """FSDP2: each layer, and what is outside of the layers, is sharded over the ranks (arXiv 2304.11277).

    Every pass reduces its gradient at once, so that no rank holds more than one layer's gradient whole. The log-
    probabilities of a pass reach every trained weight, so its loss always begins with a zero times their sum.

    Args:
        model: the policy, on the CPU or its device; sharded in place.
        mesh: one-dimensional device mesh.
    """

    def __init__(self, model: nn.Module, mesh: Any) -> None:
        self.plain = _hollow_copy(model)
        self._depth = 0
        _shard(model, mesh)

    def prepare(self, module: RLModule) -> None:
        self.plain.to(module.device)
        convert: Any = module.trainer.precision_plugin.convert_module
        self.plain = convert(self.plain)

    @contextmanager
    def gathered(self, module: RLModule) -> Iterator[None]:
        if self._depth:  # gathered already
            yield
            return
        sharded = module.model
        for mine, shard in zip(self.plain.parameters(), sharded.parameters(), strict=True):
            mine.data = whole(shard.detach())
        module.model, self._depth = self.plain, 1
        try:
            yield
        finally:
            module.model, self._depth = sharded, 0
            for mine in self.plain.parameters():
                mine.data = mine.data.new_empty(0)

    def passes(self, parts: list[Rollouts]) -> list[Rollouts | None]:
        most = int(ranks.all_max(torch.tensor(len(parts), device=_device(self.plain))))
        return [*parts, *[None] * (most - len(parts))]

    def reduction(self, module: RLModule, last: bool) -> AbstractContextManager[Any]:
        return nullcontext()

    def empty_loss(self, module: RLModule) -> Tensor:
        one = torch.zeros(1, 1, dtype=torch.long, device=module.device)
        logprobs, _ = completion_logprobs(module.model, [one[0]], one, one + 1, one[0] + 1)
        return logprobs.sum() * 0.0

    def anchor(self, current: Current) -> Tensor | float:
        return current.logprobs.sum() * 0.0


def placed(module: RLModule) -> Placement:
    """Shard the module's policy, freshly loaded, if the trainer's strategy has a device mesh."""
    mesh = module.device_mesh
    return Whole() if mesh is None else Sharded(module.model, mesh["data_parallel"])


def check_strategy(module: RLModule) -> None:
    """Refuse what cannot be trained with the trainer's strategy; ``ValueError`` says what to change."""
    from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy

    strategy: Any = module.trainer.strategy
    where = "--trainer.strategy.init_args"
    if isinstance(strategy, (DeepSpeedStrategy, FSDPStrategy)):
        raise ValueError(
            f"{type(strategy).__name__} is not supported, because it gives no access to whole weights for sampling: "
            "use ModelParallelStrategy (configs/strategies/fsdp2.yaml), which shards with FSDP2, or ddp."
        )
    if not isinstance(strategy, ModelParallelStrategy):
        return
    world, sizes = module.trainer.world_size, (strategy._data_parallel_size, strategy._tensor_parallel_size)
    if sizes != (world, 1):
        raise ValueError(
            f"The policy is sharded over all {world} ranks, tensor parallelism is not supported: set "
            f"{where}.data_parallel_size={world} and {where}.tensor_parallel_size=1."
        )
    if strategy._save_distributed_checkpoint:
        raise ValueError(
            "Checkpoints are one file with a checksum, which a folder of shards is not: set "
            f"{where}.save_distributed_checkpoint=false."
        )
    if module.trainer.precision == "16-mixed":
        raise ValueError("16-mixed with sharded weights is not supported: use --trainer.precision=bf16-mixed.")
    if module.policy.quantization != "none":
        raise ValueError("Quantised weights cannot be sharded: set policy.quantization=none, or use ddp.")
    live = [n for n, f in module.frozen_policies().items() if isinstance(getattr(f, "policy", f), Live)]
    if live and any(term.needs_states for term in module.loss_terms):
        raise ValueError(
            f"The policy {live[0]!r} is the one that is trained, and would be asked in the middle of a backward pass "
            "over sharded weights: use FrozenCopy, EMA or Checkpoint for it, or ddp."
        )


def is_sharded(module: RLModule) -> bool:
    """Whether the trainer's strategy shards the policy."""
    from lightning.pytorch.strategies import ModelParallelStrategy

    return isinstance(getattr(module.trainer, "strategy", None), ModelParallelStrategy)


def _hollow_copy(model: nn.Module) -> Any:
    """A copy with the same modules and buffers whose parameters have no elements yet."""
    empty = {id(p): nn.Parameter(p.detach().new_empty(0), requires_grad=p.requires_grad) for p in model.parameters()}
    return copy.deepcopy(model, empty).eval()


def _shard(model: nn.Module, mesh: Any) -> None:
    """Shard each layer by itself, and the rest of the model as the root."""
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    bare = bare_model(model)
    kinds = set(getattr(bare, "_no_split_modules", None) or ())
    layers = [m for m in bare.modules() if type(m).__name__ in kinds]
    for layer in layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(bare, mesh=mesh)
    bare.hidden_states = MethodType(_hidden_states, bare)
    register_fsdp_forward_method(bare, "hidden_states")


def _hidden_states(bare: Any, **inputs: Any) -> Tensor:
    """What `lit_rl.policies.scoring` asks of a backbone, through the root, whose weights are gathered for it."""
    # A copy, because FSDP hooks the backward pass to it, and a hook on a view is lost when the view is written to.
    return bare.base_model(**inputs).last_hidden_state.clone()


def _zero_anchor(model: nn.Module) -> Tensor:
    """A zero that depends on every trained parameter, so that a rank without rows still joins the reduction."""
    return sum((p.flatten()[:1].sum() * 0.0 for p in model.parameters() if p.requires_grad), start=torch.zeros(()))


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device
