# SPDX-License-Identifier: Apache-2.0
"""Students, teachers and batches for tests: exact arithmetic, other widths, prompts of their own, and a naive loss."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from lit_rl.data import GeneratedStream, PromptDataModule
from lit_rl.hooks import RolloutCallback
from lit_rl.methods import RLModule
from lit_rl.methods.reporting import Ledger
from lit_rl.policies import Checkpoint, FrozenPolicy, PrivilegedPrompt, Teacher, build_small_model, export
from lit_rl.rollouts import Prompts, Rollouts
from lit_rl.samplers import Sampling
from lit_rl.testing import make_module, make_policy, train
from lit_rl.testing.toys import toy_record
from lit_rl.tokenizers import build_character_tokenizer

NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
ANSWER_FIRST = "{answer};{prompt}"


def exact_policy(folder: Path, seed: int = 0, **sizes: Any) -> Path:
    """GPT-2 without dropout: the norms of Llama and its like compute in float32, whatever the precision."""
    return make_policy(folder, "gpt2", seed=seed, **NO_DROPOUT, **sizes)


def exact_teacher(folder: Path) -> Path:
    """A wider model of the same tokenizer."""
    return exact_policy(folder, seed=5, hidden_size=48)


def padded_policy(folder: Path, rows: int, vocabulary: int = 64) -> Path:
    """A policy whose head has ``rows`` rows and whose tokenizer has ``vocabulary`` entries."""
    tokenizer = build_character_tokenizer(vocabulary)
    model = build_small_model("gpt2", vocab_size=rows, hidden_size=32, num_heads=2, eos_token_id=1, pad_token_id=0)
    export(model, tokenizer, folder)
    return folder


def told_the_answer(policy: FrozenPolicy) -> Teacher:
    """A teacher that sees the answer before the question."""
    return Teacher(policy, PrivilegedPrompt(ANSWER_FIRST))


def exact_module(folder: Path, method: type[RLModule], policy: Path | None = None, **options: Any) -> Any:
    """A method in float64 after one step on the toy task; ``last_rollouts`` is its batch."""
    own = policy or exact_policy(folder / "policy")
    module: Any = make_module(own, method, **({"max_rollouts": 1, "prompts_per_step": 3, "group_size": 4} | options))
    train(folder / "run", module, precision="64-true")
    module.model.double()
    module.last_rollouts.loss_weights = module.last_rollouts.loss_weights.double()
    module.last_rollouts.truncate(torch.tensor([1]), torch.tensor([3]))  # rows of different lengths
    for frozen in module.frozen_policies().values():
        inner = getattr(frozen, "policy", frozen)
        if isinstance(inner, Checkpoint):  # another model keeps its own precision
            inner.loaded.double()
    return module


def checkpoint_teacher(folder: Path) -> Teacher:
    """A wider model, read from disk."""
    return Teacher(Checkpoint(str(exact_teacher(folder / "teacher"))))


def full_logits(model: torch.nn.Module, prompt: Tensor, completion: Tensor) -> Tensor:
    """``[T, V]`` logits that predict a completion, from one unpadded forward pass."""
    ids = torch.cat([prompt, completion])[None]
    return model(input_ids=ids).logits[0, len(prompt) - 1 : -1]


def token_losses(
    module: Any, batch: Rollouts, loss: Callable[[Tensor, Tensor], Tensor], prompts: list[Tensor] | None = None
) -> list[Tensor]:
    """``loss(student logits, teacher logits)`` of every kept token, row after row, one forward pass a row."""
    values = []
    (teacher,) = module.teachers
    shown = prompts if prompts is not None else batch.prompts.ids
    for i in range(len(batch)):
        g, n = int(batch.group[i]), int(batch.lengths[i])
        completion = batch.completion_ids[i, :n]
        own = full_logits(module.model, batch.prompts.ids[g], completion)
        with torch.no_grad(), teacher.model(module.model) as model:
            theirs = full_logits(model, shown[g], completion)
        values.append(torch.stack([loss(z, y) for z, y in zip(own, theirs)]) if n else own.new_zeros(0))
    return values


def gradients_of(module: Any, loss: Tensor) -> dict[str, Tensor]:
    """Gradients by parameter name."""
    module.model.zero_grad(set_to_none=True)
    loss.backward()
    return {n: p.grad.clone() for n, p in module.model.named_parameters() if p.grad is not None}


def assert_close(mine: dict[str, Tensor], theirs: dict[str, Tensor], tolerance: float = 1e-9) -> None:
    """Fail, naming the parameter, unless two sets of gradients are equal."""
    assert mine.keys() == theirs.keys()
    for name, gradient in mine.items():
        gap = float((gradient - theirs[name]).abs().max())
        assert gap < tolerance, f"the gradient of {name} differs by {gap:.3g}"


class SolvedData(PromptDataModule):
    """The toy task with a completion column: the answer, and nothing for odd answers if ``sparse``."""

    def __init__(self, sparse: bool = False, sources: tuple[str, ...] = ("toy",)) -> None:
        super().__init__()
        self.sparse, self.sources = sparse, sources

    def record(self, rng: Any) -> dict[str, Any]:
        record = toy_record(rng)
        absent = self.sparse and int(record["answer"]) % 2
        return {**record, "completion": None if absent else record["answer"], "source": rng.choice(self.sources)}

    def build(self, stage: str) -> None:
        self.train_stream = GeneratedStream(self.record, seed=0, source="toy")
        self.eval_sets = []


class Metrics(RolloutCallback):
    """Keeps what every step logged."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []

    def on_metrics(self, trainer: Any, module: Any, metrics: dict[str, float]) -> None:
        self.steps.append(dict(metrics))


def scored(correct: list[list[float]], length: int = 4, draws: list[int] | None = None) -> Rollouts:
    """A batch of rows with the given verdicts, one list a prompt; every row has ``length`` tokens."""
    count = len(correct)
    prompts = Prompts(
        ids=[torch.tensor([3, 4]) for _ in range(count)],
        text=["1+2="] * count,
        uid=torch.arange(count) + 100,
        draw=torch.tensor(draws) if draws is not None else torch.arange(count),
        source=["toy"] * count,
    )
    group = torch.tensor([g for g, rows in enumerate(correct) for _ in rows], dtype=torch.long)
    batch = Rollouts.build(prompts, group, [torch.arange(3, 3 + length) for _ in range(len(group))])
    batch.correct = torch.tensor([c for rows in correct for c in rows])
    return batch


class Method(SimpleNamespace):
    """What callbacks see of a method."""

    def __init__(self, **options: Any) -> None:
        defaults = {"ledger": Ledger(), "seed": 0, "group_size": 4, "sampling": Sampling(max_tokens=40)}
        super().__init__(**(defaults | options))

    def logged(self) -> dict[str, float]:
        """Everything that was recorded so far."""
        return self.ledger.reduce(torch.device("cpu"))
