# SPDX-License-Identifier: Apache-2.0
"""Teachers: frozen policies that score what the student wrote, under a prompt of their own if need be.

What a teacher is made of is exchangeable: `Checkpoint` is another model, `FrozenCopy` or `AdapterOff` the policy as it
was, `Snapshot` and `EMA` follow it, `Live` is the policy itself. With a `PrivilegedPrompt` each of them sees what the
student must not see.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from lit_rl.policies.frozen import Checkpoint, FrozenCopy, FrozenPolicy

if TYPE_CHECKING:
    from lit_rl.policies.plan import MemoryPlan
    from lit_rl.prompts import PromptEncoder
    from lit_rl.rollouts import Prompts, Rollouts

_FIELD = re.compile(r"\{(\w+)\}")

SOLUTION_TEMPLATE = """{prompt}

Here is a reference solution to this problem:
{solution}

Understand the solution, then derive the answer once more in your own words, in the format asked for above."""


class PrivilegedPrompt:
    """What a teacher is shown instead of the student's prompt: the prompt, and something out of the dataset.

    ``{name}`` stands for a column; other braces, such as those of ``\\boxed{}``, are left alone. For a conversation,
    ``{prompt}`` stands for the last user message, which the filled template replaces.

    Args:
        template: text with ``{prompt}`` and the names of the columns to show, such as ``{solution}`` or ``{answer}``.
        missing: what to do with a prompt of which a column is empty: ``"error"``, or ``"plain"``: it is shown to the
            teacher as the student sees it.
        max_tokens: budget of the teacher's prompt; None: no limit. The student's budget does not apply.
        chat_template_kwargs: further arguments of the chat template, for the teacher only, such as
            ``{"enable_thinking": true}``.

    Raises:
        ValueError: the template lacks ``{prompt}`` or any column.
    """

    def __init__(
        self,
        template: str = SOLUTION_TEMPLATE,
        missing: Literal["error", "plain"] = "error",
        max_tokens: int | None = None,
        chat_template_kwargs: dict[str, Any] | None = None,
    ) -> None:
        self.fields = tuple(dict.fromkeys(_FIELD.findall(template)))
        if "prompt" not in self.fields or len(self.fields) == 1:
            raise ValueError(
                "The template of a PrivilegedPrompt needs {prompt} and at least one column to show, such as "
                f"{{solution}}; it has {list(self.fields)}."
            )
        if missing not in ("error", "plain"):
            raise ValueError(f"missing must be 'error' or 'plain', got {missing!r}.")
        self.template, self.missing, self.max_tokens = template, missing, max_tokens
        self.chat_template_kwargs = dict(chat_template_kwargs or {})

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that the template shows."""
        return tuple(name for name in self.fields if name != "prompt")

    def check_columns(self, available: set[str]) -> None:
        """Raise ``ValueError`` if the data lacks a column."""
        for name in self.columns:
            if name not in available:
                raise ValueError(
                    f"The teacher's prompt shows the column {name!r}, but the data has only {sorted(available)}: "
                    "name the right column in the template."
                )

    def fill(self, prompt: str, values: dict[str, Any]) -> str:
        """The template with its fields replaced; what is filled in is not searched for fields again."""
        fields = {**values, "prompt": prompt}
        return _FIELD.sub(lambda match: str(fields[match[1]]), self.template)

    def record(self, record: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
        """A copy of a record of the dataset with the prompt that the teacher sees.

        Args:
            record: the record, with ``prompt`` as text or messages.
            values: the columns to show.

        Raises:
            ValueError: a column is empty and ``missing`` is ``"error"``.
        """
        empty = [name for name in self.columns if values.get(name) is None]
        if empty:
            if self.missing == "plain":
                return record
            raise ValueError(
                f"The teacher's prompt shows the column {empty[0]!r}, which is empty for uid {record.get('uid')}: "
                "filter such records out, or set missing='plain' to show the teacher the student's prompt there."
            )
        prompt = record["prompt"]
        if isinstance(prompt, str):
            return {**record, "prompt": self.fill(prompt, values)}
        messages = [dict(m) for m in prompt]
        last = next((m for m in reversed(messages) if m["role"] == "user"), messages[-1])
        last["content"] = self.fill(last["content"], values)
        return {**record, "prompt": messages}

    def encode(self, encoder: PromptEncoder, records: Sequence[dict[str, Any]], prompts: Prompts) -> list[Tensor]:
        """Token ids of the teacher's prompts.

        Args:
            encoder: the student's encoder; budget and arguments of the chat template are this object's.
            records: the B records that the prompts were encoded from.
            prompts: the B prompts; their columns are what is shown, so that callbacks can change them.
        """
        own = copy.copy(encoder)
        own.max_prompt_tokens, own.overlong = self.max_tokens, "error"
        own.chat_template_kwargs = {**encoder.chat_template_kwargs, **self.chat_template_kwargs}
        shown = [
            self.record(record, {name: prompts.columns.get(name, [None] * len(prompts))[i] for name in self.columns})
            for i, record in enumerate(records)
        ]
        return own.encode(shown, prompts.draw.tolist()).ids


class Teacher(FrozenPolicy):
    """A frozen policy that scores the student's completions.

    Args:
        policy: whose probabilities are asked for.
        prompt: what it sees instead of the student's prompt; None: the same.
        sources: data sources (``Prompts.source``) that it teaches; None: all. With several teachers each prompt goes to
            the first one that teaches its source.
        offload: keep the weights on the CPU while they are not used. For a `Checkpoint`, or the `FrozenCopy` of a
            policy that is trained in full.

    Raises:
        ValueError: ``offload`` for a policy that has no weights to move.
    """

    def __init__(
        self,
        policy: FrozenPolicy,
        prompt: PrivilegedPrompt | None = None,
        sources: list[str] | None = None,
        offload: bool = False,
    ) -> None:
        quantised = isinstance(policy, Checkpoint) and policy.policy.quantization != "none"
        if offload and (type(policy) not in (Checkpoint, FrozenCopy) or quantised):
            raise ValueError(
                f"offload moves the weights of another model; {type(policy).__name__} "
                f"{'is quantised and stays where it was loaded' if quantised else 'follows or is the policy itself'}."
            )
        self.policy, self.prompt, self.offload = policy, prompt, offload
        self.sources = None if sources is None else list(sources)

    def setup(self, model: nn.Module) -> None:
        """Take what is needed of the untrained policy; ``ValueError`` if ``offload`` would move shared weights."""
        self.policy.setup(model)
        if self.offload:
            with self.policy.model(model) as own:
                shared = {id(p) for p in model.parameters()} & {id(p) for p in own.parameters()}
            if shared:
                raise ValueError("offload=True would move weights that the teacher shares with the policy: remove it.")

    def check_vocabulary(self, live: nn.Module, tokenizer: Any) -> None:
        self.policy.check_vocabulary(live, tokenizer)

    def to(self, device: torch.device | str) -> None:
        self.policy.to("cpu" if self.offload else device)

    def convert(self, convert: Callable[[nn.Module], nn.Module]) -> None:
        self.policy.convert(convert)

    def score(
        self, live: nn.Module, rollouts: Rollouts, by: Callable[[Rollouts, nn.Module], Tensor], temperature: float
    ) -> Tensor:
        if self.offload:
            return super().score(live, rollouts, by, temperature)
        return self.policy.score(live, rollouts, by, temperature)

    def require_states(self) -> None:
        self.policy.require_states()

    @contextmanager
    def model(self, live: nn.Module) -> Iterator[nn.Module]:
        if self.offload:
            self.policy.to(next(live.parameters()).device)
        try:
            with self.policy.model(live) as model:
                yield model
        finally:
            if self.offload:
                self.policy.to("cpu")

    def refresh(self, model: nn.Module, step: int) -> None:
        self.policy.refresh(model, step)

    def planned_bytes(self, plan: MemoryPlan, device: str) -> int:
        return 0 if self.offload and device != "cpu" else self.policy.planned_bytes(plan, device)

    def identity(self) -> dict[str, Any]:
        return self.policy.identity()

    def state_dict(self) -> dict[str, Any]:
        return self.policy.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.policy.load_state_dict(state)

    def describe(self) -> str:
        """One line for the run header."""
        kind = type(self.policy).__name__
        path = f"({self.policy.policy.path})" if isinstance(self.policy, Checkpoint) else ""
        shown = f", shown {', '.join(self.prompt.columns)}" if self.prompt is not None else ""
        taught = f", for {', '.join(self.sources)}" if self.sources is not None else ""
        return f"{kind}{path}{shown}{taught}"


def assign(teachers: Sequence[Teacher], prompts: Prompts) -> Tensor:
    """``[B]`` int: the first teacher that teaches the source of each prompt, -1 where none does."""
    at = [
        next((i for i, t in enumerate(teachers) if t.sources is None or source in t.sources), -1)
        for source in prompts.source
    ]
    return torch.tensor(at, dtype=torch.long)
