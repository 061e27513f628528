# SPDX-License-Identifier: Apache-2.0
"""Sampling from a copy of the policy in low precision: cheaper, and not quite the policy."""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from lit_rl.policies.exporting import merge_adapter
from lit_rl.policies.rounding import Format, rounded
from lit_rl.rollouts import Rollouts
from lit_rl.samplers.base import RolloutSampler
from lit_rl.samplers.hf import HFSampler
from lit_rl.samplers.wrapping import SamplerWrapper

_CPU_OUTPUTS, _CPU_INPUTS = 32, 64  # bitsandbytes' kernels for CPUs refuse layers whose sizes are no multiples of these

Kind = Literal["nf4", "fp4", "bfloat16", "float16", "nf4-rounded", "fp4-rounded", "int8-rounded"]


class LowPrecisionSampler(SamplerWrapper):
    """Runs the inner sampler on a copy of the policy that is made anew, in low precision, at every `sync`.

    Its log-probabilities are those of the copy. Train on its completions only through something that corrects for
    that, such as `TwoStageSampler`.

    Args:
        inner: generates. Default `HFSampler`.
        kind: how the copy's linear layers hold their weights.

            - ``"nf4"``, ``"fp4"``: 4 bits (bitsandbytes). Weights only: the copy takes about a quarter of the memory
              of one in half precision. On a CPU it is slower than that one, and for a small policy than the policy.
            - ``"bfloat16"``, ``"float16"``: the whole copy in half precision.
            - ``"nf4-rounded"``, ``"fp4-rounded"``, ``"int8-rounded"``: the values that these formats can hold, kept in
              the policy's own type: samples as the quantised policy would, at the policy's speed and memory. For tests,
              and to find out what quantisation costs in quality before paying for it.
        skip: modules whose names end in one of these keep their precision.

    Raises:
        ValueError: unknown kind.
        ImportError: ``kind`` needs bitsandbytes, which is not installed.
    """

    def __init__(
        self, inner: RolloutSampler | None = None, kind: Kind = "nf4", skip: Sequence[str] = ("lm_head",)
    ) -> None:
        super().__init__(inner or HFSampler())
        if kind not in get_args(Kind):
            raise ValueError(f"kind must be one of {', '.join(get_args(Kind))}, got {kind!r}.")
        if kind in ("nf4", "fp4"):
            from importlib.util import find_spec

            if find_spec("bitsandbytes") is None:
                raise ImportError(
                    f"kind={kind} needs the package bitsandbytes: pip install 'lit-rl[bitsandbytes]', or use "
                    f"kind={kind}-rounded, which samples the same way without saving memory."
                )
        self.kind, self.skip = kind, tuple(skip)
        self.in_process = False
        self.copy: nn.Module | None = None
        self._seconds = 0.0

    def setup(self, model: nn.Module, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.copy = make_copy(model, self.kind, self.skip)
        self.inner.setup(self.copy, tokenizer)

    def sync(self, model: nn.Module, version: int) -> None:
        """Take and round the policy's current weights."""
        assert self.copy is not None, "call setup first"
        began = time.perf_counter()
        self.policy_version = version
        refresh_copy(self.copy, model, self.kind, self.skip)
        self.inner.sync(self.copy, version)
        self._seconds += time.perf_counter() - began

    def on_rewind(self, model: nn.Module) -> None:
        assert self.copy is not None
        super().on_rewind(self.copy)

    def metrics(self, rollouts: Rollouts) -> dict[str, float]:
        """Seconds that making the copy took since the last step."""
        seconds, self._seconds = self._seconds, 0.0
        return {"requantise_seconds": seconds, **super().metrics(rollouts)}

    def close(self) -> None:
        super().close()
        self.copy = None

    def describe(self) -> str:
        return f"LowPrecisionSampler({self.inner.describe()}, {self.kind})"


def make_copy(model: nn.Module, kind: Kind, skip: Sequence[str] = ("lm_head",)) -> nn.Module:
    """A copy of a policy in evaluation mode, adapters merged, whose layers can hold ``kind``; `refresh_copy` fills it.

    Raises:
        ValueError: the policy itself is quantised.
    """
    if getattr(merge_base(model), "quantization_method", None) is not None:
        raise ValueError("The policy's own weights are quantised already: sample with it directly.")
    twin = merge_adapter(model)
    twin = copy.deepcopy(twin) if twin is model else twin
    twin.requires_grad_(False).eval()
    if kind in ("bfloat16", "float16"):
        return twin.to(getattr(torch, kind))
    if kind in ("nf4", "fp4"):
        for name in quantised_layers(twin, skip):
            parent, _, leaf = name.rpartition(".")
            layer: Any = twin.get_submodule(name)
            if not layer.weight.is_cuda and (layer.out_features % _CPU_OUTPUTS or layer.in_features % _CPU_INPUTS):
                continue
            setattr(twin.get_submodule(parent), leaf, _four_bit(layer, kind))
    refresh_copy(twin, model, kind, skip)
    return twin


def merge_base(model: Any) -> Any:
    """The model below a PEFT wrapper."""
    return model.get_base_model() if hasattr(model, "peft_config") else model


@torch.no_grad()
def refresh_copy(twin: nn.Module, model: nn.Module, kind: Kind, skip: Sequence[str] = ("lm_head",)) -> None:
    """Give a copy from `make_copy` the current weights of the policy, adapters merged."""
    source = dict(merge_adapter(model).named_parameters())
    layers = {f"{name}.weight" for name in quantised_layers(twin, skip)}
    for name, parameter in list(twin.named_parameters()):
        new = source[name].detach()
        if type(parameter).__name__ == "Params4bit":
            layer: Any = twin.get_submodule(name.removesuffix(".weight"))
            layer.weight = _four_bit_weight(new, kind, layer)
        elif name in layers and kind.endswith("-rounded"):
            format: Format = kind.removesuffix("-rounded")  # type: ignore[assignment]
            parameter.copy_(rounded(new, format))
        else:
            parameter.copy_(new)


def quantised_layers(model: nn.Module, skip: Sequence[str]) -> list[str]:
    """Names of the linear layers, those that end in an entry of ``skip`` left out."""
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    return [name for name in linear if not any(name == s or name.endswith(f".{s}") for s in skip)]


def _four_bit(layer: nn.Linear, kind: str) -> nn.Module:
    from bitsandbytes.nn import Linear4bit

    compute = torch.bfloat16 if layer.weight.is_cuda else layer.weight.dtype
    new = Linear4bit(
        layer.in_features,
        layer.out_features,
        bias=layer.bias is not None,
        compute_dtype=compute,
        compress_statistics=False,
        quant_type=kind,
        device="meta",
    )
    new.weight = _four_bit_weight(layer.weight, kind, new)
    if layer.bias is not None:
        new.bias = layer.bias
    return new.requires_grad_(False)


def _four_bit_weight(weight: Tensor, kind: str, layer: Any) -> Any:
    from bitsandbytes.nn import Params4bit

    plain = weight.detach().clone().cpu()  # quantised where it is moved to
    new = Params4bit(plain, requires_grad=False, quant_type=kind, compress_statistics=False, module=layer)
    return new.to(weight.device)
