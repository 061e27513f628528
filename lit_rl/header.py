# SPDX-License-Identifier: Apache-2.0
"""What a run will do, in one screen, before anything is loaded: the run header; and its hyperparameters."""

from __future__ import annotations

import dataclasses
import enum
import inspect
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, get_args

import torch

from lit_rl import __version__
from lit_rl.data import MixedStream, PromptStream
from lit_rl.hooks import RolloutCallback

if TYPE_CHECKING:
    from lit_rl.methods.module import RLModule

WIDTH = 12  # of the column of names
MOVING = ("last_epoch",)  # arguments that start an attribute which then moves on


def run_header(module: RLModule, world_size: int = 1) -> str:
    """The run in one screen: algorithm, batch numbers, rewards, sampler, seeds, callbacks, memory.

    Reads the configuration only. What is not known yet (callbacks and evaluation sets before a trainer is attached) is
    left out.

    Args:
        module: a method, its policy not necessarily loaded.
        world_size: number of ranks that share a step.
    """
    try:
        trainer: Any = module.trainer
    except RuntimeError:  # not attached to one
        trainer = None
    lines: list[tuple[str, Iterable[str]]] = [
        ("policy", [_policy(module)]),
        *_algorithm(module),
        ("optimizer", [_optimization(module)]),
        ("batch", _batch(module, world_size)),
        ("sampling", [f"{summary(module.sampling)} by {summary(module.sampler)}"]),
        ("rewards", [_reward(r) for r in module.rewards]),
        ("data", _data(getattr(trainer, "datamodule", None))),
        ("seed", [f"{module.seed}; {torch.get_num_threads()} threads"]),
        ("callbacks", _callbacks(getattr(trainer, "callbacks", []))),
        ("memory", _memory(module, world_size)),
    ]
    out = [f"lit-rl {__version__}: {type(module).__name__}"]
    for name, texts in lines:
        for i, text in enumerate(texts):
            out.append(f"  {'' if i else name:<{WIDTH}}{text}")
    return "\n".join(out)


def _algorithm(module: RLModule) -> list[tuple[str, list[str]]]:
    """``describe()`` says ``name: text``; lines of one name stand under each other. Then the frozen policies."""
    parts: dict[str, list[str]] = {}
    for line in module.describe():
        name, _, text = line.partition(": ")
        parts.setdefault(name, []).append(text)
    for name, frozen in module.frozen_policies().items():
        parts.setdefault(name, [summary(frozen)])  # a method may have said more about it
    return list(parts.items())


def _policy(module: RLModule) -> str:
    policy = module.policy
    path = getattr(policy, "path", type(policy).__name__)
    lora = getattr(policy, "lora", None)
    rest = {k: v for k, v in changed_arguments(policy).items() if k not in ("path", "lora")}
    trained = "all weights are trained" if lora is None else f"{summary(lora)} is trained"
    return ", ".join([str(path), trained, *(f"{k}={_short(v)}" for k, v in rest.items())])


def _optimization(module: RLModule) -> str:
    optimizer, scheduler = example_optimizer(module)
    parts = [_name_of(module.optimizer_factory) if optimizer is None else describe_optimizer(optimizer)]
    if module.scheduler_factory is not None:
        parts.append(_name_of(module.scheduler_factory) if scheduler is None else summary(scheduler))
    if module.max_grad_norm is not None:
        parts.append(f"gradient norm at most {module.max_grad_norm:g}")
    return ", ".join(parts)


def example_optimizer(module: RLModule) -> tuple[torch.optim.Optimizer | None, Any]:
    """Optimizer and scheduler as the factories build them, over one throw-away weight; None where that fails."""
    try:
        optimizer = module.optimizer_factory([torch.nn.Parameter(torch.zeros(1, 1))])
    except Exception:  # a factory may insist on names or shapes that the weight does not have
        return None, None
    try:
        return optimizer, module.scheduler_factory(optimizer) if module.scheduler_factory else None
    except Exception:
        return optimizer, None


def describe_optimizer(optimizer: torch.optim.Optimizer) -> str:
    """``AdamW(lr=1e-06, weight_decay=0)``: the settings that are numbers, and the learning rate in any case."""
    group = {k: v for k, v in optimizer.defaults.items() if k == "lr" or _differs(type(optimizer), k, v)}
    return f"{type(optimizer).__name__}({', '.join(f'{k}={_short(v)}' for k, v in group.items())})"


def _batch(module: RLModule, world_size: int) -> list[str]:
    prompts, group = module.prompts_per_step, module.group_size
    updates = module.updates_per_rollout * module.epochs_per_rollout
    rows = prompts * group
    limit = "any length" if module.max_prompt_tokens is None else f"at most {module.max_prompt_tokens:,} tokens"
    lines = [
        f"{prompts} prompts × {group} completions = {rows:,} completions a step, {module.max_rollouts:,} steps",
        f"prompts of {limit}, completions of at most {module.sampling.max_tokens:,} tokens",
        f"{_count(updates, 'optimizer step')} on each batch ({rows // module.updates_per_rollout:,} completions each), "
        f"micro-batches of at most {module.micro_batch_tokens:,} padded tokens",
    ]
    if world_size > 1:
        share = f"{prompts // world_size} prompts, {rows // world_size:,} completions"
        lines.append(f"on each of {world_size} ranks: {share}")
    return lines


def _reward(reward: Any) -> str:
    notes = [f"weight {reward.weight:g}"]
    notes += ["verifier"] if reward.verifier else []
    notes += [f"for {', '.join(reward.sources)}"] if reward.sources else []
    return f"{reward.name}: {type(reward).__name__}, {', '.join(notes)}"


def _data(data: Any) -> list[str]:
    if data is None:
        return []
    lines = [f"{summary(data)}{_size(data.train_stream) if getattr(data, 'trains', False) else ''}"]
    for s in getattr(data, "eval_sets", []):
        settings = {k: getattr(s, k) for k in ("temperature", "top_p", "max_tokens") if getattr(s, k) is not None}
        text = "".join(f", {k} {_short(v)}" for k, v in settings.items())
        lines.append(f"evaluation {s.name}: {len(s):,} prompts × {_count(s.samples, 'completion')}{text}")
    return lines


def _size(stream: PromptStream) -> str:
    """How many prompts there are to train on, as far as there is an end to them."""
    if isinstance(stream, MixedStream):
        sizes = [f"{_count(s.size, 'prompt')} of {name}" for name, s in stream.sources.items() if s.size is not None]
        return f": {', '.join(sizes)}" if sizes else ""
    return "" if stream.size is None else f": {_count(stream.size, 'prompt')}"


def _callbacks(callbacks: Iterable[Any]) -> list[str]:
    lines = []
    for number, callback in enumerate(callbacks, 1):
        requires = sorted(getattr(callback, "requires", ()))
        needs = f", requires {', '.join(requires)}" if requires else ""
        name = summary(callback) if isinstance(callback, RolloutCallback) else type(callback).__name__
        lines.append(f"{number}. {name}{needs}")
    return lines


def _memory(module: RLModule, world_size: int) -> list[str]:
    try:
        return str(plan_of(module, world_size)).splitlines()
    except Exception as error:  # the plan needs a model type that Transformers can build without its weights
        return [f"no plan: {type(error).__name__}: {error}".splitlines()[0]]


def plan_of(module: RLModule, world_size: int = 1) -> Any:
    """The `lit_rl.policies.MemoryPlan` of one rank, references and teachers included, from configurations alone.

    Raises:
        ValueError: Transformers cannot build a model type from its configuration.
    """
    from lit_rl.policies import memory_plan
    from lit_rl.policies.plan import Optimizer, planned_dtype

    policy, config = module.policy, module.policy.config()
    rows = module.prompts_per_step * module.group_size // world_size
    rows = min(rows, getattr(module.sampler, "max_rows", rows))
    budget, longest = module.sampling.max_tokens, getattr(config.get_text_config(), "max_position_embeddings", 0)
    optimizer = type(example_optimizer(module)[0]).__name__.lower()
    kind: Any = optimizer if optimizer in get_args(Optimizer) else "adamw"
    device = "cuda" if module.device.type == "cuda" else "cpu"
    plan = memory_plan(
        config,
        rows=rows,
        prompt_tokens=module.max_prompt_tokens or max(longest - budget, 0),
        completion_tokens=budget,
        micro_batch_tokens=module.micro_batch_tokens,
        dtype=planned_dtype(policy, config),
        trainable=policy.lora or "full",
        optimizer=kind,
        quantization=policy.quantization,
        gradient_checkpointing=policy.gradient_checkpointing,
        device=device,
    )
    counted: set[int] = set()
    for name, frozen in module.frozen_policies().items():
        if id(frozen) not in counted:  # one object may be the reference and a teacher
            plan.add(name, frozen, device)
            counted.add(id(frozen))
    return plan


# Objects as text -------------------------------------------------------------------------------------------------


def summary(thing: Any) -> str:
    """One line about an object: its own ``describe()``, or its class with the arguments that are not defaults."""
    describe = getattr(thing, "describe", None)
    if callable(describe) and not isinstance(thing, torch.nn.Module):
        return str(describe())
    changed = ", ".join(f"{k}={_short(v)}" for k, v in changed_arguments(thing).items())
    return f"{type(thing).__name__}({changed})" if changed else type(thing).__name__


def arguments(thing: Any) -> dict[str, tuple[Any, Any]]:
    """Constructor arguments that an object kept as attributes: name -> (value, default)."""
    found: dict[str, tuple[Any, Any]] = {}
    for cls in type(thing).__mro__:
        if "__init__" not in vars(cls):
            continue
        for name, parameter in inspect.signature(vars(cls)["__init__"]).parameters.items():
            if name != "self" and hasattr(thing, name):
                found.setdefault(name, (getattr(thing, name), parameter.default))
    return found


def changed_arguments(thing: Any) -> dict[str, Any]:
    """Arguments with simple values that differ from their defaults: name -> value."""
    found = {k: pair for k, pair in arguments(thing).items() if k not in MOVING}
    return {k: v for k, (v, default) in found.items() if _is_simple(v) and not _same(v, default)}


def hyperparameters(module: RLModule) -> dict[str, bool | int | float | str]:
    """The settings of a method as plain values under dotted names, for the logger's table of hyperparameters."""
    out: dict[str, bool | int | float | str] = {"method": type(module).__name__}
    for name, (value, _) in arguments(module).items():
        _flatten(name, value, out)
    optimizer, _ = example_optimizer(module)
    if optimizer is not None:
        out["optimizer"] = type(optimizer).__name__
        out["lr"] = float(optimizer.defaults["lr"])
    for reward in module.rewards:
        out[f"reward_weight.{reward.name}"] = float(reward.weight)
    return out


def _flatten(name: str, value: Any, out: dict[str, bool | int | float | str]) -> None:
    if isinstance(value, enum.Enum):
        out[name] = str(value.value)
    elif isinstance(value, (bool, int, float, str)):
        out[name] = value
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        out[name] = type(value).__name__
        for field in dataclasses.fields(value):
            _flatten(f"{name}.{field.name}", getattr(value, field.name), out)


def _is_simple(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(_is_simple(v) for v in value)
    return value is None or isinstance(value, (bool, int, float, str, enum.Enum))


def _same(value: Any, default: Any) -> bool:
    if isinstance(value, (list, tuple)):  # dataclasses make an empty one for each object
        return list(value) == (list(default) if isinstance(default, (list, tuple)) else [])
    return value == default


def _differs(cls: type, name: str, value: Any) -> bool:
    parameter = inspect.signature(cls).parameters.get(name)
    return parameter is not None and _is_simple(value) and not _same(value, parameter.default)


def _short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value.value if isinstance(value, enum.Enum) else value)


def _name_of(factory: Any) -> str:
    return getattr(factory, "__qualname__", None) or type(factory).__name__


def _count(n: int, what: str) -> str:
    return f"{n:,} {what}" + ("" if n == 1 else "s")
