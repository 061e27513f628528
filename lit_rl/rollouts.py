# SPDX-License-Identifier: Apache-2.0
"""The data contract of every stage: ``Prompts``, ``Batch`` and ``Rollouts``.

Sizes: B prompts, N rows (completions), T tokens. A *group* is the set of rows that share a prompt.
Every tensor lives in one of two dictionaries, ``row`` (``[N]``) or ``token`` (``[N, T]``), under a dotted name
such as ``"logprobs.old"`` or ``"reward_terms.math"``. Selecting, concatenating, padding, moving and saving are written
once over these dictionaries, so a new signal is a new name and never a new field.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, MutableMapping, Sequence
from dataclasses import dataclass, field, replace
from enum import IntEnum
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

BatchT = TypeVar("BatchT", bound="Batch")


class Origin(IntEnum):
    """Who wrote a row. Each loss term names the origins that it trains."""

    POLICY = 0
    GUIDE = 1
    TEACHER = 2
    REPLAY = 3
    DEMONSTRATION = 4


class StopReason(IntEnum):
    """Why a completion ends where it ends."""

    END = 0  # the policy sampled an end-of-sequence token
    STOP = 1  # a stop string or a stop token id
    LENGTH = 2  # the token budget was used up
    CUT = 3  # shortened afterwards by `Rollouts.truncate`
    ABORTED = 4  # generation was interrupted and may be continued
    ERROR = 5  # an environment or engine failed; the row is not scorable


class Edit(NamedTuple):
    """One recorded change that a callback made to a batch: how many entries of which column differ."""

    hook: str
    callback: str
    column: str
    entries: int


@dataclass
class Prompts:
    """B prompts. Each is stored once, however many completions are sampled from it.

    Attributes:
        ids: B one-dimensional int64 tensors, the prompt tokens.
        text: B strings, the prompt as the policy sees it.
        uid: ``[B]`` int64, identity of the prompt in its data source (the same in every epoch).
        draw: ``[B]`` int64, position in the stream at which it was drawn (unique in a run; sampling noise hangs on it).
        source: B names of the data source or objective.
        columns: every other column of the dataset, each a list of B values.
        model_inputs: extra inputs of the forward pass, each a list of B values.
    """

    ids: list[Tensor]
    text: list[str]
    uid: Tensor
    draw: Tensor
    source: list[str]
    columns: dict[str, list[Any]] = field(default_factory=dict)
    model_inputs: dict[str, list[Any]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.ids)

    def select(self, index: Sequence[int]) -> Prompts:
        """The prompts at ``index``, in that order."""
        at = torch.as_tensor(list(index), dtype=torch.long)
        return Prompts(
            ids=[self.ids[i] for i in index],
            text=[self.text[i] for i in index],
            uid=self.uid[at],
            draw=self.draw[at],
            source=[self.source[i] for i in index],
            columns={k: [v[i] for i in index] for k, v in self.columns.items()},
            model_inputs={k: [v[i] for i in index] for k, v in self.model_inputs.items()},
        )

    @staticmethod
    def cat(parts: Sequence[Prompts]) -> Prompts:
        """Concatenate; a column that one part lacks holds None there."""
        names = dict.fromkeys(k for p in parts for k in p.columns)
        inputs = dict.fromkeys(k for p in parts for k in p.model_inputs)
        return Prompts(
            ids=[x for p in parts for x in p.ids],
            text=[x for p in parts for x in p.text],
            uid=torch.cat([p.uid for p in parts]) if parts else torch.zeros(0, dtype=torch.long),
            draw=torch.cat([p.draw for p in parts]) if parts else torch.zeros(0, dtype=torch.long),
            source=[x for p in parts for x in p.source],
            columns={k: [x for p in parts for x in p.columns.get(k, [None] * len(p))] for k in names},
            model_inputs={k: [x for p in parts for x in p.model_inputs.get(k, [None] * len(p))] for k in inputs},
        )


class _View(MutableMapping[str, Tensor]):
    """The entries of a dictionary that share a dotted prefix, under their short names."""

    def __init__(self, store: dict[str, Tensor], prefix: str) -> None:
        self._store, self._prefix = store, prefix + "."

    def __getitem__(self, name: str) -> Tensor:
        return self._store[self._prefix + name]

    def __setitem__(self, name: str, value: Tensor) -> None:
        self._store[self._prefix + name] = value

    def __delitem__(self, name: str) -> None:
        del self._store[self._prefix + name]

    def __iter__(self) -> Iterator[str]:
        return (k[len(self._prefix) :] for k in list(self._store) if k.startswith(self._prefix))

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __repr__(self) -> str:
        return f"{{{', '.join(f'{k!r}: {tuple(v.shape)}' for k, v in self.items())}}}"


@dataclass
class Batch:
    """Rows with named signals, grouped by prompt; knows rewards and advantages but nothing of tokens.

    Attributes:
        prompts: the B prompts.
        row: signals of shape ``[N]``. Always present: ``group`` (index into ``prompts``) and ``unit``
            (rows with the same number stay in one micro-batch).
        token: signals of shape ``[N, T]``.
        edits: what callbacks changed, as recorded by the dispatcher.
    """

    prompts: Prompts
    row: dict[str, Tensor]
    token: dict[str, Tensor]
    edits: list[Edit] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.row["group"])

    @property
    def group(self) -> Tensor:  # [N]
        return self.row["group"]

    @property
    def unit(self) -> Tensor:  # [N]
        return self.row["unit"]

    @property
    def width(self) -> int:
        """T, the padded number of token positions."""
        return next(iter(self.token.values())).shape[1] if self.token else 0

    @property
    def device(self) -> torch.device:
        return self.group.device

    @property
    def reward_terms(self) -> MutableMapping[str, Tensor]:
        """Raw values by reward name, each ``[N]``; NaN where a reward could not score the row."""
        return _View(self.row, "reward_terms")

    @property
    def reward_weights(self) -> MutableMapping[str, Tensor]:
        """Weights by reward name, each ``[N]``; 0 where the reward does not apply to the row."""
        return _View(self.row, "reward_weights")

    @property
    def rewards(self) -> Tensor:
        """``[N]``: the weighted sum of the reward terms. Derived, never stored.

        A term of weight 0 is left out even if NaN; any other NaN, or no term at all, makes the row not scorable (NaN).
        A term without weights counts once.
        """
        total = torch.zeros(len(self), device=self.device)
        applied = torch.zeros(len(self), dtype=torch.bool, device=self.device)
        for name, values in self.reward_terms.items():
            weight = self.reward_weights.get(name, torch.ones_like(values))
            total = total + torch.where(weight != 0, weight * values, 0.0)
            applied |= weight != 0
        return torch.where(applied, total, math.nan)

    @property
    def advantages(self) -> Tensor:  # [N, T]
        return self.token["advantages"]

    @advantages.setter
    def advantages(self, value: Tensor) -> None:
        self.token["advantages"] = value

    def group_sizes(self) -> Tensor:
        """``[B]`` int: number of rows of each prompt."""
        return torch.bincount(self.group, minlength=len(self.prompts))

    def group_mean(self, values: Tensor) -> Tensor:
        """``[N]`` -> ``[B]``: mean over the rows of each group, NaN rows left out; NaN for a group without any."""
        valid = ~torch.isnan(values)
        zeros = torch.zeros(len(self.prompts), dtype=values.dtype, device=values.device)
        total = zeros.index_add(0, self.group, torch.where(valid, values, 0.0))
        return total / zeros.index_add(0, self.group, valid.to(values.dtype))

    def select(self: BatchT, rows: Tensor) -> BatchT:
        """A new batch of the given rows (bool ``[N]`` or int ``[n]``), with only the prompts that they refer to."""
        index = rows.nonzero()[:, 0] if rows.dtype == torch.bool else rows.long()
        # On a CPU, `index_select` takes a third of the time of `v[index]`, which wakes up all threads.
        return self._taking(lambda v: v.index_select(0, index))

    def between(self: BatchT, start: int, stop: int) -> BatchT:
        """The rows from ``start`` up to ``stop``: like `select`, but the signals are views of this batch's."""
        return self._taking(lambda v: v[start:stop])

    def _taking(self: BatchT, take: Callable[[Tensor], Tensor]) -> BatchT:
        """A new batch of what ``take`` leaves of each signal, with the prompts that are still referred to."""
        row, token = ({k: take(v) for k, v in signals.items()} for signals in (self.row, self.token))
        kept, row["group"] = torch.unique(row["group"], return_inverse=True)
        return replace(self, prompts=self.prompts.select(kept.tolist()), row=row, token=token, edits=list(self.edits))

    def select_groups(self: BatchT, keep: Tensor) -> BatchT:
        """A new batch of the groups with ``keep[b]`` true; ``keep`` is bool ``[B]``."""
        return self.select(keep.to(self.device)[self.group])

    @classmethod
    def cat(cls: type[BatchT], parts: Sequence[BatchT]) -> BatchT:
        """Concatenate rows; groups and units stay apart.

        A signal that one part lacks is NaN there if it is a float, else 0; reward weights, loss weights and advantages
        are 0: a row without them is not scored and does not train.
        """
        if len(parts) == 1:
            return parts[0]
        width = max(p.width for p in parts)
        parts = [p.pad(width) for p in parts]
        group_start = unit_start = 0
        rows: list[dict[str, Tensor]] = []
        for p in parts:
            rows.append({**p.row, "group": p.group + group_start, "unit": p.unit + unit_start})
            group_start += len(p.prompts)
            unit_start += int(p.unit.max()) + 1 if len(p) else 0
        return replace(
            parts[0],
            prompts=Prompts.cat([p.prompts for p in parts]),
            row=_cat_columns(rows, [len(p) for p in parts], ()),
            token=_cat_columns([p.token for p in parts], [len(p) for p in parts], (width,)),
            edits=[e for p in parts for e in p.edits],
        )

    def pad(self: BatchT, width: int) -> BatchT:
        """Right-pad every token signal with 0 to ``width`` positions; ``ValueError`` if it is narrower."""
        missing = width - self.width
        if missing < 0:
            raise ValueError(f"cannot pad to {width} tokens: the batch already has {self.width}; call trim() first.")
        if missing == 0:
            return self
        token = {k: torch.nn.functional.pad(v, (0, missing)) for k, v in self.token.items()}
        return replace(self, token=token)

    def to(self: BatchT, device: torch.device | str) -> BatchT:
        """Move every tensor but the prompts."""
        return replace(
            self,
            row={k: v.to(device) for k, v in self.row.items()},
            token={k: v.to(device) for k, v in self.token.items()},
        )

    def clone(self: BatchT) -> BatchT:
        """A copy whose tensors may be edited without touching this one (prompts are shared)."""
        return replace(
            self,
            row={k: v.clone() for k, v in self.row.items()},
            token={k: v.clone() for k, v in self.token.items()},
            edits=list(self.edits),
        )

    def diff(self, before: Batch, skip: Collection[str] = ()) -> dict[str, int]:
        """Names of the signals that differ from ``before`` and in how many entries (all, where shapes differ).

        Args:
            before: the batch to compare with.
            skip: signals that are not compared.
        """
        changed: dict[str, int] = {}
        for mine, theirs in ((self.row, before.row), (self.token, before.token)):
            for name in dict.fromkeys([*mine, *theirs]):
                if name in skip:
                    continue
                new, old = mine.get(name), theirs.get(name)
                if new is None or old is None or new.shape != old.shape:
                    entries = max(0 if x is None else x.numel() for x in (new, old))
                else:
                    same = (new == old) | ((new != new) & (old != old))  # NaN equals NaN here
                    entries = int((~same).sum())
                if entries or (new is None) != (old is None):
                    changed[name] = entries
        return changed


def _cat_columns(parts: list[dict[str, Tensor]], sizes: list[int], shape: tuple[int, ...]) -> dict[str, Tensor]:
    names = dict.fromkeys(k for p in parts for k in p)
    out: dict[str, Tensor] = {}
    for name in names:
        like = next(p[name] for p in parts if name in p)
        counts = name.startswith("reward_weights.") or name in ("loss_weights", "advantages")
        fill = math.nan if like.is_floating_point() and not counts else 0
        out[name] = torch.cat(
            [p[name] if name in p else like.new_full((n, *shape), fill) for p, n in zip(parts, sizes)]
        )
    return out


@dataclass
class Rollouts(Batch):
    """Completions of text. See ``docs/contract.md`` for the table of names.

    Row signals: ``group``, ``unit``, ``sample`` (index in its group when it was requested), ``lengths``, ``finished``,
    ``stop_reason``, ``origin``, ``correct``, ``reward_terms.*``, ``reward_weights.*``.
    Token signals: ``completion_ids`` (right-padded with 0), ``completion_mask`` (1 where a model produced the token),
    ``loss_weights``, ``logprobs.*``, ``advantages``, ``policy_version``, ``entropy`` and whatever callbacks add.
    """

    @classmethod
    def build(
        cls,
        prompts: Prompts,
        group: Tensor,
        completions: Sequence[Tensor],
        *,
        sampler_logprobs: Sequence[Tensor] | None = None,
        masks: Sequence[Tensor] | None = None,
        stop_reason: Tensor | None = None,
        sample: Tensor | None = None,
        origin: Origin = Origin.POLICY,
        policy_version: int = 0,
    ) -> Rollouts:
        """Assemble a batch from ragged completions.

        Args:
            prompts: the B prompts.
            group: ``[N]`` index of each completion's prompt.
            completions: N one-dimensional int tensors.
            sampler_logprobs: N float tensors of the same lengths; None where nobody sampled (demonstrations).
            masks: N 0/1 tensors of the same lengths, 0 for tokens that no model produced (tool output); default all 1.
            stop_reason: ``[N]`` values of `StopReason`; default `StopReason.END`.
            sample: ``[N]`` index within the group; default 0, 1, … in row order.
            origin: who wrote the completions.
            policy_version: the version of the weights that sampled them.
        """
        group = group.long()
        n = len(group)
        lengths = torch.tensor([len(c) for c in completions], dtype=torch.long)
        width = int(lengths.max()) if n else 0
        position = torch.arange(width)
        inside = position < lengths[:, None]  # [N, T]

        def padded(parts: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
            out = torch.zeros(n, width, dtype=dtype)
            if n and width:
                out[inside] = torch.cat([p.to(dtype) for p in parts])
            return out

        mask = padded(masks, torch.bool) if masks is not None else inside.clone()
        reason = stop_reason.long() if stop_reason is not None else torch.zeros(n, dtype=torch.long)
        token = {
            "completion_ids": padded(completions, torch.long),
            "completion_mask": mask,
            "loss_weights": mask.float(),
            "policy_version": torch.where(inside, policy_version, 0),
        }
        if sampler_logprobs is not None:
            token["logprobs.sampler"] = padded(sampler_logprobs, torch.float32)
        row = {
            "group": group,
            "unit": torch.arange(n),
            "sample": sample if sample is not None else occurrence(group),
            "lengths": lengths,
            "finished": (reason == StopReason.END) | (reason == StopReason.STOP),
            "stop_reason": reason,
            "origin": torch.full((n,), int(origin), dtype=torch.long),
            "correct": torch.full((n,), math.nan),
        }
        return cls(prompts=prompts, row=row, token=token)

    @property
    def completion_ids(self) -> Tensor:  # [N, T]
        return self.token["completion_ids"]

    @property
    def completion_mask(self) -> Tensor:  # [N, T] bool
        return self.token["completion_mask"]

    @property
    def lengths(self) -> Tensor:  # [N]
        return self.row["lengths"]

    @property
    def finished(self) -> Tensor:  # [N] bool
        return self.row["finished"]

    @property
    def origin(self) -> Tensor:  # [N]
        return self.row["origin"]

    @property
    def sampled(self) -> Tensor:
        """``[N]`` bool: rows that a model wrote in this run; not demonstrations and replayed text."""
        return (self.origin != Origin.DEMONSTRATION) & (self.origin != Origin.REPLAY)

    @property
    def correct(self) -> Tensor:  # [N], NaN = not scorable
        return self.row["correct"]

    @correct.setter
    def correct(self, value: Tensor) -> None:
        self.row["correct"] = value

    @property
    def loss_weights(self) -> Tensor:  # [N, T]
        return self.token["loss_weights"]

    @loss_weights.setter
    def loss_weights(self, value: Tensor) -> None:
        self.token["loss_weights"] = value

    @property
    def logprobs(self) -> MutableMapping[str, Tensor]:
        """Log-probabilities by policy name (``sampler``, ``old``, ``reference``, ``teacher`` …), each ``[N, T]``."""
        return _View(self.token, "logprobs")

    @property
    def generated(self) -> Tensor:
        """``[N]`` number of tokens that a model produced, cuts notwithstanding: what generation cost."""
        return self.completion_mask.sum(1)

    def kept_mask(self) -> Tensor:
        """``[N, T]`` bool: model-produced tokens before the end that counts."""
        position = torch.arange(self.width, device=self.device)
        return self.completion_mask & (position < self.lengths[:, None])

    def truncate(self, rows: Tensor, at: Tensor) -> None:
        """Shorten rows in place: the only way to cut. Token ids and masks stay.

        Args:
            rows: int ``[n]``, rows to cut.
            at: int ``[n]``, new length of each in tokens. A row already that short is left alone.
        """
        cut = at < self.lengths[rows]
        rows, at = rows[cut], at[cut]
        for name in ("lengths", "finished", "stop_reason"):
            self.row[name] = self.row[name].clone()
        self.row["lengths"][rows] = at
        self.row["finished"][rows] = False
        self.row["stop_reason"][rows] = int(StopReason.CUT)
        position = torch.arange(self.width, device=self.device)
        beyond = torch.zeros_like(self.completion_mask)
        beyond[rows] = position >= at[:, None]
        self.token["loss_weights"] = torch.where(beyond, 0.0, self.loss_weights)

    def trim(self) -> Rollouts:
        """Drop token positions beyond the longest generated completion."""
        used = self.completion_mask.any(0).nonzero()[:, 0].tolist()  # in ascending order
        width = max(used[-1] + 1 if used else 0, int(self.lengths.max()) if len(self) else 0)
        return replace(self, token={k: v[:, :width] for k, v in self.token.items()})

    def completions(self, kept: bool = True) -> list[list[int]]:
        """Token ids of each completion as lists, up to ``lengths`` (or all that was generated if ``kept`` is false)."""
        if kept:
            ends = self.lengths.tolist()
        else:
            positions = torch.arange(1, self.width + 1, device=self.device) * self.completion_mask
            ends = positions.amax(1).tolist() if self.width else [0] * len(self)
        return [ids[:end] for ids, end in zip(self.completion_ids.tolist(), ends)]


def occurrence(group: Tensor) -> Tensor:
    """``[N]``: how many earlier rows belong to the same group.

    >>> occurrence(torch.tensor([5, 7, 5, 5]))
    tensor([0, 0, 1, 2])
    """
    n = len(group)
    order = torch.argsort(group, stable=True)
    ordered = group[order]
    start = torch.ones(n, dtype=torch.bool, device=group.device)
    start[1:] = ordered[1:] != ordered[:-1]
    position = torch.arange(n, device=group.device)
    first = torch.where(start, position, 0).cummax(0).values if n else position
    out = torch.empty_like(position)
    out[order] = position - first
    return out
