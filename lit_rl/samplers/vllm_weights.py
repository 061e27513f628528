# SPDX-License-Identifier: Apache-2.0
"""The policy's weights on their way into vLLM: adapters added, names as in the checkpoint, no stale copies behind.

vLLM has changed how weights are exchanged several times. What is used here is found by attribute; `weight_loader`
says so if it is not there.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor, nn

TESTED = "0.32"  # the version that the tests run with


def merged_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Name in the checkpoint and value of every weight of the policy, LoRA adapters added to their base.

    Tied weights come once. One merged weight at a time is in memory.

    Args:
        model: a transformers model, or one with LoRA adapters of PEFT.

    Raises:
        ValueError: the base is quantised, or an adapter is no plain LoRA.
    """
    unwrap = getattr(model, "get_base_model", None)
    base: Any = unwrap() if callable(unwrap) else model
    if getattr(base, "quantization_method", None) is not None:
        raise ValueError(
            "vLLM cannot take the weights of a policy with quantised base weights: train with an unquantised base, or "
            "use HFSampler."
        )
    for name, weight in base.named_parameters():
        owner, _, leaf = name.rpartition(".")
        if ".lora_" in f".{name}" or ".original_module." in name:
            continue
        if owner.endswith(".base_layer"):
            owner = owner.removesuffix(".base_layer")
            delta = _delta(base.get_submodule(owner)) if leaf == "weight" else None
            weight = weight if delta is None else weight + delta.to(weight.dtype)
        yield _without_adapter(f"{owner}.{leaf}"), weight.detach()


def _delta(layer: Any) -> Tensor | None:
    """What the active adapters of a layer add to its weight."""
    total: Tensor | None = None
    for adapter in layer.active_adapters:
        if adapter not in layer.lora_A:
            continue
        if getattr(layer, "use_dora", {}).get(adapter):
            raise ValueError("vLLM cannot take a DoRA adapter from training: use LoRA without use_dora, or HFSampler.")
        delta = layer.get_delta_weight(adapter).detach()
        total = delta if total is None else total + delta
    return total


def _without_adapter(name: str) -> str:
    """A name without PEFT's detour for modules that are trained in full (``modules_to_save.<adapter>``)."""
    head, found, tail = name.partition(".modules_to_save.")
    return f"{head}.{tail.partition('.')[2]}" if found else name


def weight_loader(worker: Any) -> Any:
    """The method of a vLLM worker that loads weights in the form of a checkpoint.

    Raises:
        RuntimeError: this version of vLLM has none.
    """
    runner = getattr(worker, "model_runner", None)
    loader = getattr(worker, "reload_weights", None) or getattr(runner, "reload_weights", None)
    if loader is None:
        import vllm

        raise RuntimeError(
            f"vLLM {vllm.__version__} has no worker.reload_weights, by which lit-rl brings it new weights: install "
            f"vllm {TESTED}, or use HFSampler."
        )
    return loader


def load_weights(worker: Any, weights: Iterable[tuple[str, Tensor]]) -> None:
    """Give a vLLM worker new weights.

    Args:
        worker: as `collective_rpc` passes it.
        weights: by name in the checkpoint.
    """
    weight_loader(worker)(weights_iterator=iter(weights))
    refresh_packed_copies(worker.model_runner.get_model())


def refresh_packed_copies(model: nn.Module) -> None:
    """Pack again what vLLM's CPU build has packed for its kernels and keeps beside the weight itself.

    For most layers the packed form replaces the weight, and loading makes it anew. Where the weight is needed in its
    own form as well (an embedding that is also the head), the packed copy would stay that of the old weights.
    """
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if hasattr(module, "cpu_linear") and isinstance(weight, Tensor) and weight.numel():
            module.quant_method.process_weights_after_loading(module)  # type: ignore[union-attr, operator]
