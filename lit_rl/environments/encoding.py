# SPDX-License-Identifier: Apache-2.0
"""An environment's observation as the tokens that stand between two turns of the policy."""

from __future__ import annotations

from typing import Any

from lit_rl.environments.base import Observation

_MARK = "LITRLTURN"


class ObservationEncoder:
    """Turns observations into token ids. What the policy has written is never tokenised again.

    Args:
        tokenizer: the policy's tokenizer.
        chat_template_kwargs: further arguments of its chat template.
    """

    def __init__(self, tokenizer: Any, chat_template_kwargs: dict[str, Any] | None = None) -> None:
        self.tokenizer, self.chat_template_kwargs = tokenizer, dict(chat_template_kwargs or {})

    def encode(self, observation: Observation, last_token: int | None) -> list[int]:
        """Token ids of an observation.

        Args:
            observation: text, which follows as it is, or messages, for which the policy's turn is closed as the chat
                template would close it and the next one opened.
            last_token: the token by which the policy ended its turn (the template's closing is completed, not
                repeated); None if a stop string ended it, or nothing was written yet.
        """
        text = observation if isinstance(observation, str) else self.between_turns(observation, last_token)
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"]) if text else []

    def between_turns(self, messages: list[dict[str, str]], last_token: int | None) -> str:
        """What the chat template writes from the end of an assistant's text to the beginning of the next one.

        Raises:
            ValueError: there is no template, or it changes earlier messages when later ones follow.
        """
        if not self.tokenizer.chat_template:
            raise ValueError(
                "The environment answers with messages and the tokenizer has no chat template: use a tokenizer with "
                "one, or an environment that answers with text."
            )
        before = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": _MARK}]
        closed = self._render(before, generate=False)
        continued = self._render([*before, *messages], generate=True)
        closing = closed[closed.rfind(_MARK) + len(_MARK) :]
        if _MARK not in closed or not continued.startswith(closed):
            raise ValueError(
                "The chat template writes a finished turn in another way when messages follow, so that the policy's "
                "tokens could not stay as they were sampled: use a template that leaves earlier turns alone."
            )
        if last_token is not None:
            closing = closing.removeprefix(self.tokenizer.decode([last_token], skip_special_tokens=False))
        return closing + continued[len(closed) :]

    def _render(self, messages: list[dict[str, str]], generate: bool) -> str:
        return self.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=generate, **self.chat_template_kwargs
        )
