# SPDX-License-Identifier: Apache-2.0
"""Rollouts on disk: a readable jsonl file with one completion a line, and its tensors as safetensors beside it."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from lit_rl.rollouts import Edit, Prompts, Rollouts


def write_atomically(path: Path, write: Callable[[IO[bytes]], Any]) -> Path:
    """Write a file so that a reader sees the old or the new content, never a part.

    Args:
        path: where; its folder is made.
        write: receives the open binary file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with open(partial, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    return path


def save_rollouts(rollouts: Rollouts, folder: Path | str, name: str, texts: list[str] | None = None) -> Path:
    """Save a batch as ``<name>.jsonl`` and ``<name>.safetensors``.

    Args:
        rollouts: the batch.
        folder: where to.
        name: file name without suffix.
        texts: decoded completions for the readable file.

    Returns:
        Path of the jsonl file.
    """
    from safetensors.torch import save

    folder = Path(folder)
    tensors = {f"row/{k}": v for k, v in rollouts.row.items()} | {f"token/{k}": v for k, v in rollouts.token.items()}
    tensors = {k: v.detach().cpu().clone().contiguous() for k, v in tensors.items()}  # none may share memory
    head = {"prompts": _prompts_as_json(rollouts.prompts), "edits": [list(e) for e in rollouts.edits]}
    blob = save(tensors, metadata={"head": json.dumps(head, default=str)})
    write_atomically(folder / f"{name}.safetensors", lambda f: f.write(blob))
    lines = "".join(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in readable_rows(rollouts, texts))
    return write_atomically(folder / f"{name}.jsonl", lambda f: f.write(lines.encode()))


def load_rollouts(folder: Path | str, name: str) -> Rollouts:
    """Load what `save_rollouts` saved."""
    from safetensors import safe_open

    parts: dict[str, dict[str, Tensor]] = {"row": {}, "token": {}}
    with safe_open(str(Path(folder) / f"{name}.safetensors"), framework="pt") as file:
        head = json.loads(file.metadata()["head"])
        for key in file.keys():  # noqa: SIM118 (not a mapping)
            kind, _, signal = key.partition("/")
            parts[kind][signal] = file.get_tensor(key)
    return Rollouts(prompts=_prompts_from_json(head["prompts"]), **parts, edits=[Edit(*e) for e in head["edits"]])


def pack_rollouts(rollouts: Rollouts) -> dict[str, Any]:
    """A batch as plain containers and CPU tensors, for a checkpoint.

    Columns of the prompts are kept as they are: values other than numbers, text, lists and dictionaries of them make a
    checkpoint that loads only with ``weights_only=False``.
    """
    tensors = {
        kind: {name: value.detach().cpu().clone() for name, value in getattr(rollouts, kind).items()}
        for kind in ("row", "token")
    }
    return {"prompts": dict(vars(rollouts.prompts)), **tensors, "edits": [list(e) for e in rollouts.edits]}


def unpack_rollouts(state: dict[str, Any]) -> Rollouts:
    """What `pack_rollouts` packed."""
    return Rollouts(
        prompts=Prompts(**state["prompts"]),
        row=dict(state["row"]),
        token=dict(state["token"]),
        edits=[Edit(*e) for e in state["edits"]],
    )


def readable_rows(rollouts: Rollouts, texts: list[str] | None = None) -> list[dict[str, Any]]:
    """One dictionary a completion, of plain values; NaN becomes None."""
    rewards = rollouts.rewards.tolist()
    columns = {k: v.tolist() for k, v in rollouts.row.items()}
    out = []
    for i, g in enumerate(rollouts.group.tolist()):
        row: dict[str, Any] = {"prompt": rollouts.prompts.text[g], "source": rollouts.prompts.source[g]}
        if texts is not None:
            row["completion"] = texts[i]
        row["reward"] = plain_value(rewards[i])
        row |= {k: plain_value(v[i]) for k, v in columns.items()}
        if "advantages" in rollouts.token and rollouts.width:
            row["advantage"] = plain_value(float(rollouts.advantages[i, 0]))
        out.append(row)
    return out


def plain_value(value: Any) -> Any:
    """None for NaN and infinities, which JSON does not have; anything else as it is."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _prompts_as_json(prompts: Prompts) -> dict[str, Any]:
    return {
        "ids": [x.tolist() for x in prompts.ids],
        "text": prompts.text,
        "uid": prompts.uid.tolist(),
        "draw": prompts.draw.tolist(),
        "source": prompts.source,
        "columns": prompts.columns,
    }


def _prompts_from_json(head: dict[str, Any]) -> Prompts:
    return Prompts(
        ids=[torch.tensor(x, dtype=torch.long) for x in head["ids"]],
        text=head["text"],
        uid=torch.tensor(head["uid"], dtype=torch.long),
        draw=torch.tensor(head["draw"], dtype=torch.long),
        source=head["source"],
        columns=head["columns"],
    )
