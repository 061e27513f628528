# SPDX-License-Identifier: Apache-2.0
"""Policies that are not trained: references and teachers.

A `FrozenPolicy` is a plain holder, not a module: kept as an attribute of a LightningModule it is invisible to
``state_dict``, to optimizers, to DDP and to strict loading. Copies share whatever the policy does not train, so that a
snapshot of a LoRA policy costs its adapters only.
"""

from __future__ import annotations

import copy
import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lit_rl.policies.loading import DTypeName, Policy, Quantization
from lit_rl.policies.scoring import evaluation_mode
from lit_rl.policies.vocabulary import check_same_vocabulary

if TYPE_CHECKING:
    from lit_rl.policies.plan import MemoryPlan
    from lit_rl.rollouts import Rollouts


class FrozenPolicy(ABC):
    """A policy to score with. ``setup`` gives it the policy being trained, before the first step or restored state."""

    def setup(self, model: nn.Module) -> None:  # noqa: B027
        """Take what is needed of the policy ``model`` while its weights are still the initial ones."""

    def to(self, device: torch.device | str) -> None:  # noqa: B027
        """Move own weights."""

    def convert(self, convert: Callable[[nn.Module], nn.Module]) -> None:  # noqa: B027
        """Do to own weights what the trainer's precision did to the policy's (``bf16-true`` and the like)."""

    def check_vocabulary(self, live: nn.Module, tokenizer: Any) -> None:
        """Raise ``ValueError`` unless token ids mean the same to this policy and to the one being trained.

        Args:
            live: the policy being trained.
            tokenizer: its tokenizer.
        """
        with self.model(live) as own:
            if own is not live:
                check_same_vocabulary(live, tokenizer, own, getattr(self, "tokenizer", None))

    def require_states(self) -> None:  # noqa: B027
        """Raise ``ValueError`` if this policy scores tokens only, and has no distributions to compare with."""

    def score(
        self, live: nn.Module, rollouts: Rollouts, by: Callable[[Rollouts, nn.Module], Tensor], temperature: float
    ) -> Tensor:
        """``[N, T]``: log-probabilities of the completions of a batch, 0 outside of them.

        Args:
            live: the policy being trained.
            rollouts: the batch, with the prompts that this policy is to see.
            by: scores a batch under a model of this process.
            temperature: divides the logits; ``by`` knows it.
        """
        with self.model(live) as model:
            return by(rollouts, model)

    @abstractmethod
    @contextmanager
    def model(self, live: nn.Module) -> Iterator[nn.Module]:
        """The model to score with, in evaluation mode and without gradients.

        Args:
            live: the policy being trained. While inside it must not be trained or sampled from.
        """

    def refresh(self, model: nn.Module, step: int) -> None:  # noqa: B027
        """Called with the policy after each rollout step; ``step`` counts them so far. Most kinds ignore it."""

    def planned_bytes(self, plan: MemoryPlan, device: str) -> int:
        """Bytes that own weights will take on the device, told before anything is loaded.

        Args:
            plan: of the policy that is trained.
            device: ``"cuda"`` or ``"cpu"``.
        """
        return 0

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """What this policy is: its kind, where it comes from, and a checksum of its own weights."""

    def state_dict(self) -> dict[str, Any]:
        """Identity, and own weights where they exist nowhere else."""
        return {"identity": self.identity()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore own weights, or check that the ones at hand are those of the checkpoint.

        Raises:
            ValueError: if this is another policy than the checkpoint's.
        """
        mine, stored = self.identity(), state["identity"]
        if mine != stored:
            raise ValueError(
                f"The frozen policy is not the one that the checkpoint was written with: {mine} instead of {stored}. "
                "Restore the files it was loaded from, or start a new run."
            )


class Live(FrozenPolicy):
    """The current weights themselves: a teacher that differs only by what stands in its prompt."""

    @contextmanager
    def model(self, live: nn.Module) -> Iterator[nn.Module]:
        with evaluation_mode(live), torch.no_grad():
            yield live

    def identity(self) -> dict[str, Any]:
        return {"kind": "live"}


class AdapterOff(Live):
    """The initial policy of a LoRA run: the live model with its adapters switched off. Costs no memory."""

    def setup(self, model: nn.Module) -> None:
        if not hasattr(model, "disable_adapter"):
            raise ValueError("AdapterOff needs a policy with LoRA: set policy.lora, or use FrozenCopy.")

    @contextmanager
    def model(self, live: nn.Module) -> Iterator[nn.Module]:
        wrapper: Any = live
        with super().model(live), wrapper.disable_adapter():
            yield live

    def identity(self) -> dict[str, Any]:
        return {"kind": "adapter off"}


class FrozenCopy(FrozenPolicy):
    """A copy of the initial weights. Not stored in checkpoints, as long as loading the policy again restores them."""

    kind = "frozen copy"

    def __init__(self) -> None:
        self.copy: Any = None
        self.taken_at = 0  # rollout step of the weights
        self._wrapped = False
        self._checksum: str | None = None  # of the weights at hand, computed when asked for
        self._pending: Mapping[str, Any] | None = None

    def setup(self, model: nn.Module) -> None:
        if self.copy is not None:
            return
        self.copy, self._wrapped = copy_of(model), hasattr(model, "peft_config")
        if self._pending is not None:
            self.load_state_dict(self._pending)
            self._pending = None

    def to(self, device: torch.device | str) -> None:
        self._own_model().to(device)

    def convert(self, convert: Callable[[nn.Module], nn.Module]) -> None:
        self.copy, self._checksum = convert(self._own_model()), None

    @contextmanager
    def model(self, live: nn.Module) -> Iterator[nn.Module]:
        with torch.no_grad():
            yield self._own_model()

    def planned_bytes(self, plan: MemoryPlan, device: str) -> int:
        return plan.gradients  # as large as the weights that are trained; the others are shared

    def identity(self) -> dict[str, Any]:
        if self._checksum is None:
            self._checksum = checksum(self._own_weights().items())
        return {"kind": self.kind, "taken_at": self.taken_at, "weights": self._checksum}

    def state_dict(self) -> dict[str, Any]:
        # Fresh adapters are drawn at random: loading the policy again would not restore them.
        return super().state_dict() | ({"weights": self._copied_weights()} if self._wrapped else {})

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if self.copy is None:  # the checkpoint came first
            self._pending = state
            return
        if state["identity"]["kind"] != self.kind:
            raise ValueError(
                f"The checkpoint's frozen policy is a {state['identity']['kind']!r}, this one a {self.kind!r}: "
                "continue with the same kind, or start a new run."
            )
        if "weights" in state:
            own = self._own_weights()
            if own.keys() != state["weights"].keys():
                raise ValueError("The checkpoint's frozen policy trains other weights than this policy: same LoRA?")
            for name, tensor in own.items():
                tensor.copy_(state["weights"][name])
            self.taken_at, self._checksum = state["identity"]["taken_at"], None
        super().load_state_dict(state)

    def _own_model(self) -> nn.Module:
        if self.copy is None:
            raise RuntimeError(f"{type(self).__name__}.setup(model) must be called first.")
        return self.copy

    def _own_weights(self) -> dict[str, Tensor]:
        """Tensors that are not shared with the live policy."""
        return {name: p.data for name, p in self._own_model().named_parameters() if name in self.copy.copied_names}

    def _copied_weights(self) -> dict[str, Tensor]:
        return {name: tensor.detach().clone() for name, tensor in self._own_weights().items()}

    @torch.no_grad()
    def take(self, model: nn.Module, step: int, share: float = 1.0) -> None:
        """Make the weights of ``model`` this policy's.

        Args:
            model: a policy with parameters of the same names and shapes.
            step: rollout step, for the identity.
            share: of the new weights; the rest remains of the old ones.
        """
        self._own_model()
        live = dict(model.named_parameters())
        for name, tensor in self._own_weights().items():
            wide = _wide(tensor.dtype)
            tensor.copy_(torch.lerp(tensor.to(wide), whole(live[name]).to(tensor.device, wide), share))
        self.taken_at, self._checksum = step, None


class Snapshot(FrozenCopy):
    """The policy as it was some steps ago.

    Args:
        every: take new weights whenever the rollout step is a multiple of this; None: only when a callback does.
    """

    kind = "snapshot"

    def __init__(self, every: int | None = None) -> None:
        if every is not None and every < 1:
            raise ValueError(f"every must be at least 1, or None to leave it to a callback, got {every}.")
        super().__init__()
        self.every = every

    def refresh(self, model: nn.Module, step: int) -> None:
        if self.every is not None and step % self.every == 0:
            self.take(model, step)

    def state_dict(self) -> dict[str, Any]:
        return FrozenPolicy.state_dict(self) | {"weights": self._copied_weights()}


class EMA(Snapshot):
    """An exponential moving average of the policy: ``average <- decay * average + (1 - decay) * weights``.

    The average is kept in float32, because in bfloat16 a change of 1 - decay of a weight's size would be rounded away.

    Args:
        decay: weight of the past, in [0, 1). With 0 it is a copy of the last step's policy.
        copy_first: the first refresh only copies, as in On-Policy Self-Distillation (arXiv 2601.18734); otherwise the
            average begins at the initial weights, as in CaOPD (arXiv 2604.16830).
    """

    kind = "moving average"

    def __init__(self, decay: float = 0.999, copy_first: bool = True) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"decay must be in [0, 1), got {decay}; use FrozenCopy for weights that never change.")
        super().__init__()
        self.decay, self.copy_first, self.updates = decay, copy_first, 0
        self.average: dict[str, Tensor] = {}

    def setup(self, model: nn.Module) -> None:
        super().setup(model)
        if not self.average:
            self._start_average()

    def to(self, device: torch.device | str) -> None:
        super().to(device)
        self.average = {name: tensor.to(device) for name, tensor in self.average.items()}

    def planned_bytes(self, plan: MemoryPlan, device: str) -> int:
        return super().planned_bytes(plan, device) + max(4 * plan.trainable, plan.gradients)  # the average is wide

    @torch.no_grad()
    def refresh(self, model: nn.Module, step: int) -> None:
        if self.updates == 0 and self.copy_first:
            self.take(model, step)
            self._start_average()
        else:
            live, own = dict(model.named_parameters()), self._own_weights()
            for name, average in self.average.items():
                average.lerp_(whole(live[name]).to(average.dtype), 1 - self.decay)
                own[name].copy_(average)
        self.updates, self.taken_at, self._checksum = self.updates + 1, step, None

    def _start_average(self) -> None:
        self.average = {name: t.to(_wide(t.dtype), copy=True) for name, t in self._own_weights().items()}

    def state_dict(self) -> dict[str, Any]:
        average = {name: tensor.clone() for name, tensor in self.average.items()}
        return super().state_dict() | {"average": average, "updates": self.updates}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        if self.copy is not None:
            self.updates = state["updates"]
            for name, tensor in self._own_weights().items():
                self.average[name] = state["average"][name].to(tensor.device, copy=True)


class Checkpoint(FrozenPolicy):
    """Another model: a teacher, or the reference of an earlier run. Its token ids must mean what the policy's mean.

    Args:
        path: a local folder, or an id of the Hugging Face hub.
        dtype: type of the weights.
        quantization: hold the weights in 4 or 8 bits (needs bitsandbytes and a GPU).
        attn_implementation: see `Policy`.
        trust_remote_code: see `Policy`.
        revision: branch, tag or commit of the hub repository.
    """

    def __init__(
        self,
        path: str,
        dtype: DTypeName = "auto",
        quantization: Quantization = "none",
        attn_implementation: str | None = None,
        trust_remote_code: bool = False,
        revision: str | None = None,
    ) -> None:
        self.policy = Policy(
            path,
            dtype=dtype,
            quantization=quantization,
            attn_implementation=attn_implementation,
            trust_remote_code=trust_remote_code,
            revision=revision,
        )
        self.loaded: Any = None
        self.tokenizer: Any = None
        self._pending: Mapping[str, Any] | None = None

    def setup(self, model: nn.Module) -> None:
        if self.loaded is None:
            self.loaded, self.tokenizer = self.policy.load_frozen()
            self._checksum = checksum(self.loaded.named_parameters())
        if self._pending is not None:
            state, self._pending = self._pending, None
            self.load_state_dict(state)

    def to(self, device: torch.device | str) -> None:
        if self.loaded is not None and self.policy.quantization == "none":  # quantised weights are placed at loading
            self.loaded.to(device)

    @contextmanager
    def model(self, live: nn.Module) -> Iterator[nn.Module]:
        if self.loaded is None:
            self.setup(live)
            self.to(next(live.parameters()).device)
        with torch.no_grad():
            yield self.loaded

    def planned_bytes(self, plan: MemoryPlan, device: str) -> int:
        from lit_rl.policies.plan import weight_bytes

        return weight_bytes(self.policy)

    def identity(self) -> dict[str, Any]:
        return {"kind": "checkpoint", "path": self.policy.path, "weights": self._checksum}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if self.loaded is None:
            self._pending = state
            return
        # The same weights may lie somewhere else by now.
        super().load_state_dict({"identity": state["identity"] | {"path": self.policy.path}})


def copy_of(model: nn.Module) -> Any:
    """A frozen copy in evaluation mode that shares every parameter which ``model`` does not train.

    The copy's attribute ``copied_names`` says which parameters are its own. A model that trains nothing is copied in
    full: it may be unfrozen later.
    """
    parameters = dict(model.named_parameters())
    own = {name for name, p in parameters.items() if p.requires_grad} or set(parameters)
    twin: Any = copy.deepcopy(model, {id(p): p for name, p in parameters.items() if name not in own})
    for name, parameter in twin.named_parameters():
        if name in own:
            parameter.requires_grad_(False)
    twin.copied_names = own
    return twin.eval()


def checksum(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """16 hexadecimal digits that depend on every bit of some named tensors and on no order of summation.

    The bits are summed as integers, plainly and weighted with their position: exact, fast on any device, and the same
    on all of them.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors, key=lambda item: item[0]):
        flat = tensor.detach().contiguous().flatten()
        bits = flat.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[flat.element_size()])
        plain, weighted = 0, 0
        for start in range(0, len(bits), 1 << 22):
            part = bits[start : start + (1 << 22)].long()
            position = torch.arange(start + 1, start + len(part) + 1, device=part.device)
            plain += int(part.sum())
            weighted += int((part * position).sum())
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} {plain} {weighted};".encode())
    return digest.hexdigest()[:16]


def whole(tensor: Tensor) -> Tensor:
    """The tensor itself, or all of it if it is sharded over the ranks (a collective call)."""
    full = getattr(tensor, "full_tensor", None)
    return tensor if full is None else full()


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype
