# SPDX-License-Identifier: Apache-2.0
"""Tasks of reasoning-gym (the extra ``reasoning-gym``): about a hundred generators, each with its own verifier."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lit_rl.data import EvalSet, MixedStream, PromptDataModule, PromptStream, Record, complete, digest
from lit_rl.datamodules.sources import PromptTemplate, fill
from lit_rl.rewards.gym import require_reasoning_gym
from lit_rl.seeding import mix_seeds

TAGGED = "{question}\n\nThink first, then give your final answer alone between <answer> and </answer>."


class ReasoningGymDataModule(PromptDataModule):
    """Endless problems of reasoning-gym tasks; `lit_rl.rewards.ReasoningGymReward` scores them.

    Columns: ``question``, ``answer``, ``metadata`` and ``task``; the ``source`` is the name of the task. Validation
    problems have other seeds than training problems and do not depend on ``seed``; a task with few different problems
    (small numbers, say) may still pose the same one in both.

    Args:
        tasks: settings of each task by its name: ``{chain_sum: {min_terms: 2, max_terms: 4}, countdown: {}}``.
        weights: relative frequency of each task in training; default: all alike.
        template: prompt template with ``{question}``, see `Source`; default: a user message with the question and a
            request for an answer between ``<answer>`` and ``</answer>``.
        val_size: validation problems of each task; 0: no validation.
        samples: completions of each validation problem.
        temperature: sampling temperature of validation; None: as in training.
        seed: decides the training problems.
        eval_batch_size: prompts of one evaluation batch on one rank.
    """

    def __init__(
        self,
        tasks: dict[str, dict[str, Any]],
        weights: dict[str, float] | None = None,
        template: PromptTemplate | None = None,
        val_size: int = 64,
        samples: int = 1,
        temperature: float | None = None,
        seed: int = 0,
        eval_batch_size: int = 64,
    ) -> None:
        super().__init__(eval_batch_size)
        require_reasoning_gym(type(self).__name__)
        if not tasks:
            raise ValueError("tasks must name at least one task of reasoning-gym, such as {chain_sum: {}}.")
        if val_size < 0:
            raise ValueError(f"val_size must not be negative, got {val_size}; 0 means no validation.")
        self.tasks, self.weights, self.seed = dict(tasks), weights, seed
        self.template = [{"role": "user", "content": TAGGED}] if template is None else template
        self.val_size, self.sampling = val_size, {"samples": samples, "temperature": temperature}

    def build(self, stage: str) -> None:
        streams = {name: self.stream(name, mix_seeds(self.seed, "training")) for name in self.tasks}
        only = next(iter(streams.values()))
        self.train_stream = MixedStream(streams, self.weights, self.seed) if len(streams) > 1 else only
        held_out = {name: self.stream(name, mix_seeds("validation")) for name in self.tasks if self.val_size}
        sampling: dict[str, Any] = self.sampling
        self.eval_sets = [EvalSet(name, s, limit=self.val_size, **sampling) for name, s in held_out.items()]

    def stream(self, task: str, seed: int) -> GymStream:
        """The problems of one task."""
        return GymStream(task, self.tasks[task], self.template, seed)


class GymStream(PromptStream):
    """Endless problems of one task.

    A task seeds problem i of a dataset with the dataset's seed + i, and some tasks know no more problems than their
    size. So problems come in chunks, each a dataset with a seed of its own: datasets with consecutive seeds would
    repeat each other's problems.

    Args:
        task: name of the task.
        settings: of the task, see reasoning-gym.
        template: prompt template with ``{question}``.
        seed: decides the problems.
        chunk: problems of one dataset.

    Raises:
        ValueError: there is no such task, or it does not take these settings.
    """

    def __init__(
        self, task: str, settings: Mapping[str, Any], template: PromptTemplate, seed: int = 0, chunk: int = 500
    ) -> None:
        self.task, self.settings, self.template = task, dict(settings), template
        self.seed, self.chunk = seed, chunk
        reserved = sorted({"seed", "size"} & set(settings))
        if reserved:
            raise ValueError(f"{reserved} of the task {task!r} are set by the datamodule: leave them out.")
        self._number, self._dataset = 0, self.dataset(0)

    def dataset(self, number: int) -> Any:
        """The dataset of one chunk."""
        from reasoning_gym import create_dataset

        try:
            seed = mix_seeds(self.seed, self.task, number) % 2**32
            return create_dataset(self.task, **self.settings, seed=seed, size=self.chunk)
        except (ValueError, TypeError, AssertionError) as error:
            raise ValueError(f"reasoning-gym refuses the task {self.task!r} with {self.settings}: {error}") from error

    def draw(self, index: int) -> Record:
        number, position = divmod(index, self.chunk)
        if number != self._number:
            self._number, self._dataset = number, self.dataset(number)
        problem = self._dataset[position]
        record = {**problem, "task": self.task, "prompt": fill(self.template, problem)}
        return complete(record, self.task)

    def columns(self) -> set[str]:
        return {"question", "answer", "metadata", "task"}

    def fingerprint(self) -> str:
        """Hash of the first 16 records: other settings, seeds or versions nearly always differ there."""
        return digest("reasoning-gym", self.task, [record["prompt"] for record in self.at(0, 16)])
