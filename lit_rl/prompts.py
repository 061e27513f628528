# SPDX-License-Identifier: Apache-2.0
"""From records of a data source to `Prompts`: chat template, special tokens and length budget in one place."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch

from lit_rl.data import RESERVED, Record, content_uid
from lit_rl.rollouts import Prompts

Overlong = Literal["error", "drop", "truncate_left"]
Template = Literal["auto", "chat", "plain"]


class PromptEncoder:
    """Turns records into token ids.

    Args:
        tokenizer: the policy's tokenizer.
        max_prompt_tokens: budget of a prompt; None: no limit.
        overlong: what to do with a longer one: ``"error"`` stops the run, ``"drop"`` leaves it out and counts it,
            ``"truncate_left"`` keeps its last tokens.
        system_prompt: first message of prompts that have no system message of their own.
        template: ``"auto"`` puts messages through the chat template and takes a string as a document; ``"chat"`` makes
            a string one user message first; ``"plain"`` takes everything as a document (messages joined by an empty
            line), for models without a chat template.
        chat_template_kwargs: further arguments of the chat template, such as ``{"enable_thinking": false}``.

    Attributes:
        dropped: prompts left out since the start.

    Raises:
        ValueError: the arguments contradict each other or the tokenizer.
    """

    def __init__(
        self,
        tokenizer: Any,
        max_prompt_tokens: int | None = None,
        overlong: Overlong = "error",
        system_prompt: str | None = None,
        template: Template = "auto",
        chat_template_kwargs: dict[str, Any] | None = None,
    ) -> None:
        if max_prompt_tokens is not None and max_prompt_tokens < 1:
            raise ValueError(f"max_prompt_tokens must be at least 1, got {max_prompt_tokens}.")
        for name, value, allowed in (("overlong", overlong, Overlong), ("template", template, Template)):
            if value not in get_args(allowed):
                raise ValueError(f"{name} must be one of {list(get_args(allowed))}, got {value!r}.")
        if template == "chat" and not tokenizer.chat_template:
            raise ValueError(f"template='chat' needs a chat template, {NO_TEMPLATE}")
        if template == "plain" and system_prompt is not None:
            raise ValueError("system_prompt is a chat message: set template='chat', or leave system_prompt out.")
        self.tokenizer = tokenizer
        self.max_prompt_tokens, self.overlong = max_prompt_tokens, overlong
        self.system_prompt, self.template = system_prompt, template
        self.chat_template_kwargs = dict(chat_template_kwargs or {})
        self.dropped = 0

    def encode(self, records: Sequence[Record], draws: Sequence[int]) -> Prompts:
        """Encode records.

        Args:
            records: dictionaries with ``prompt`` and any of ``uid``, ``source`` and other columns.
            draws: position of each in its stream.

        Returns:
            The prompts, without those that were dropped.

        Raises:
            ValueError: a prompt is empty, too long, or needs a chat template that there is not.
        """
        if len(records) != len(draws):
            raise ValueError(f"encode needs one draw for each record, got {len(records)} and {len(draws)}.")
        kept: list[tuple[Record, int, str, list[int]]] = []
        for record, draw, (text, ids) in zip(records, draws, self.tokenize(records)):
            encoded = self.within_budget(record, text, ids)
            if encoded is not None:
                kept.append((record, draw, *encoded))
        names = dict.fromkeys(k for record, *_ in kept for k in record if k not in RESERVED)
        return Prompts(
            ids=[torch.tensor(ids, dtype=torch.long) for *_, ids in kept],
            text=[text for _, _, text, _ in kept],
            uid=torch.tensor([uid_of(record) for record, *_ in kept], dtype=torch.long),
            draw=torch.tensor([draw for _, draw, _, _ in kept], dtype=torch.long),
            source=[record.get("source", "") for record, *_ in kept],
            columns={name: [record.get(name) for record, *_ in kept] for name in names},
        )

    def tokenize(self, records: Sequence[Record]) -> list[tuple[str, list[int]]]:
        """Text of each prompt as the policy sees it, and its token ids."""
        rendered = [self.render(record) for record in records]
        texts = [text for text, _ in rendered]
        # One call for all texts of a kind: a call costs as much as a hundred short prompts.
        documents = iter(self.as_documents([text for text, chat in rendered if not chat]))
        chats = iter(self.ids_of([text for text, chat in rendered if chat], add_special_tokens=False))
        return list(zip(texts, [next(chats) if chat else next(documents) for _, chat in rendered]))

    def render(self, record: Record) -> tuple[str, bool]:
        """Text of one prompt as the policy sees it, and whether a chat template wrote it."""
        prompt = record["prompt"]
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
        if not any(m["content"] for m in messages):
            raise ValueError(f"The prompt of {label(record)} is empty: filter it out of the data.")
        if self.template == "chat" or (self.template == "auto" and not isinstance(prompt, str)):
            return self.render_chat(record, messages), True
        if self.system_prompt is not None:
            raise ValueError(
                f"The prompt of {label(record)} is plain text, which cannot take the system_prompt: set "
                "template='chat' to make it a user message, or leave system_prompt out."
            )
        return "\n\n".join(m["content"] for m in messages), False

    def render_chat(self, record: Record, messages: list[dict[str, Any]]) -> str:
        """Messages through the chat template, which alone decides about special tokens."""
        if not self.tokenizer.chat_template:
            raise ValueError(f"The prompt of {label(record)} is a list of messages, {NO_TEMPLATE}")
        if messages[-1]["role"] == "assistant":
            raise ValueError(
                f"The prompt of {label(record)} ends with an assistant message, but the policy is to write the next "
                "one: move the assistant's text to another column."
            )
        if self.system_prompt is not None and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": self.system_prompt}, *messages]
        text: str = self.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, **self.chat_template_kwargs
        )
        return text

    def ids_of(self, texts: list[str], **options: Any) -> list[list[int]]:
        """Token ids of each text."""
        return [list(ids) for ids in self.tokenizer(texts, **options)["input_ids"]] if texts else []

    def as_documents(self, texts: list[str]) -> list[list[int]]:
        """Plain texts with the tokenizer's own special tokens: at most one begin of sequence, no end of sequence."""
        bos, eos = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        documents = []
        for text, ids in zip(texts, self.ids_of(texts)):
            if bos is not None and ids[:2] == [bos, bos]:  # the text was rendered with its own
                ids = ids[1:]
            if eos is not None and ids[-1:] == [eos] and not text.endswith(self.tokenizer.eos_token):
                ids = ids[:-1]
            documents.append(ids)
        return documents

    def within_budget(self, record: Record, text: str, ids: list[int]) -> tuple[str, list[int]] | None:
        """Apply ``overlong``; None for a dropped prompt."""
        limit = self.max_prompt_tokens
        if limit is None or len(ids) <= limit:
            return text, ids
        if self.overlong == "truncate_left":
            return self.tokenizer.decode(ids[-limit:]), ids[-limit:]
        if self.overlong == "error":
            raise ValueError(
                f"The prompt of {label(record)} has {len(ids)} tokens, more than max_prompt_tokens={limit}: raise the "
                "budget, filter the data, or set overlong='drop' or 'truncate_left'."
            )
        if not self.dropped:
            warnings.warn(
                f"The prompt of {label(record)} has {len(ids)} tokens, more than max_prompt_tokens={limit}, and is "
                "left out. Further ones are counted without a warning.",
                stacklevel=3,
            )
        self.dropped += 1
        return None


NO_TEMPLATE = (
    "and the tokenizer has none: use a tokenizer with a chat template, or set template='plain' to join the messages' "
    "texts without roles."
)


def uid_of(record: Record) -> int:
    """The record's own integer uid, or a stable hash of its prompt."""
    uid = record.get("uid")
    return uid if isinstance(uid, int) else content_uid(record["prompt"] if uid is None else uid)


def label(record: Record) -> str:
    """Which record a message is about."""
    return f"uid {uid_of(record)} (source {record.get('source', '')!r})"
