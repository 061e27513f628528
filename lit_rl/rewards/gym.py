# SPDX-License-Identifier: Apache-2.0
"""reasoning-gym's own verifiers as a reward (the extra ``reasoning-gym``)."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import lru_cache
from importlib.util import find_spec
from typing import Any

from lit_rl.rewards.base import RewardExample
from lit_rl.rewards.rows import PerRowReward

_TAGGED = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)


class ReasoningGymReward(PerRowReward):
    """What the verifier of the row's task gives to the answer: from 0 to 1, often with credit for coming close.

    The answer stands in the last ``<answer>…</answer>``; a completion without it has no answer. Reads the columns
    ``question``, ``answer``, ``metadata`` and ``task`` of `lit_rl.datamodules.ReasoningGymDataModule`.

    Args:
        exact: give 0 to answers that the verifier does not score 1: no credit for coming close.
        timeout: seconds for one row, where it runs isolated.
        isolate: run in worker processes: some verifiers evaluate expressions that a policy wrote.
        workers: number of worker processes, if isolated.
        name: see `Reward`.
        weight: see `Reward`.
        verifier: see `Reward`.
        sources: see `Reward`.

    Raises:
        ImportError: reasoning-gym is not installed.
    """

    requires_columns = ("question", "answer", "metadata", "task")

    def __init__(
        self,
        exact: bool = False,
        timeout: float = 5.0,
        isolate: bool = True,
        workers: int | None = None,
        name: str = "gym",
        weight: float = 1.0,
        verifier: bool = True,
        sources: list[str] | None = None,
    ) -> None:
        require_reasoning_gym(type(self).__name__)
        super().__init__(name, weight, verifier, sources, isolate=isolate, timeout=timeout, workers=workers)
        self.exact = exact

    def score_row(self, completion: str, **columns: Any) -> float | None:
        return self.row_function()(completion, **columns)

    def known_examples(self) -> Sequence[RewardExample]:
        columns = {"question": "State the final answer: 1 + 1 =", "answer": "2", "metadata": {}, "task": "chain_sum"}
        cases = [("So <answer>2</answer>", 1.0), ("<answer>2</answer> or <answer>3</answer>", 0.0), ("It is 2", 0.0)]
        return [RewardExample(completion, value, columns) for completion, value in cases]

    def row_function(self) -> Callable[..., float | None]:
        return exact_answer if self.exact else score_answer


def score_answer(completion: str, *, question: str, answer: str, metadata: dict[str, Any], task: str) -> float:
    """Score one completion with the verifier of its task; 0 if it has no answer.

    Args:
        completion: generated text.
        question: the problem.
        answer: its solution.
        metadata: what the task remembers of it.
        task: name of the task.
    """
    found = _TAGGED.findall(completion)
    if not found:
        return 0.0
    entry = {"question": question, "answer": answer, "metadata": metadata}
    return float(verifier_of(task)(found[-1].strip(), entry))


@lru_cache(maxsize=256)
def verifier_of(task: str) -> Callable[[str, dict[str, Any]], float]:
    """The verifier of a task, which takes an answer and a problem."""
    from reasoning_gym import get_score_answer_fn

    verifier: Any = get_score_answer_fn(task)
    return verifier


def exact_answer(completion: str, **columns: Any) -> float:
    """1 where `score_answer` gives 1, else 0."""
    return float(score_answer(completion, **columns) == 1)


def require_reasoning_gym(what: str) -> None:
    """Refuse, with advice, if reasoning-gym is missing."""
    if find_spec("reasoning_gym") is None:
        raise ImportError(f'{what} needs the package reasoning-gym: pip install "lit-rl[reasoning-gym]".')
