# SPDX-License-Identifier: Apache-2.0
"""Policies back in hub format: adapters merged or alone, written so that a reader never sees half a model."""

from __future__ import annotations

import copy
import os
import shutil
from pathlib import Path
from typing import Any

from torch import nn


def merge_adapter(model: nn.Module, force: bool = False) -> nn.Module:
    """A copy of the model with its LoRA adapters added to the base weights; the model itself is left alone.

    Args:
        model: a PEFT model; any other is returned as it is.
        force: merge into quantised weights too. The sum is rounded to 4 or 8 bits again, so the merged policy is a
            slightly different one from the policy that was trained.

    Raises:
        ValueError: if the base is quantised and ``force`` is not set.
    """
    wrapper: Any = model
    if not hasattr(wrapper, "peft_config"):
        return model
    kind = getattr(wrapper.get_base_model(), "quantization_method", None)
    if kind is not None and not force:
        raise ValueError(
            f"The base weights are quantised ({getattr(kind, 'value', kind)}), so merging would round the trained "
            "policy. Export the adapter alone (merge=False), or merge it into the unquantised checkpoint; force=True "
            "merges nevertheless."
        )
    return copy.deepcopy(wrapper).merge_and_unload()


def export(model: nn.Module, tokenizer: Any, folder: str | Path, merge: bool = False, force: bool = False) -> Path:
    """Write model and tokenizer as a folder in hub format, ready for ``from_pretrained``, vLLM or another run.

    The folder is written beside its place and moved there at the end. An earlier export is replaced; a folder that
    holds something else is refused.

    Args:
        model: the policy.
        tokenizer: its tokenizer.
        folder: where to.
        merge: merge LoRA adapters into the base weights instead of writing the adapter alone.
        force: see `merge_adapter`.

    Returns:
        The folder.

    Raises:
        FileExistsError: if ``folder`` exists and is not a model in hub format.
    """
    folder = Path(folder).expanduser().absolute()
    if folder.exists() and not _is_replaceable(folder):
        raise FileExistsError(f"{folder} exists and is not a model in hub format: choose another folder.")
    writable: Any = merge_adapter(model, force) if merge else model
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        writable.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        for file in partial.iterdir():
            _flush(file)
        _swap(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def _is_replaceable(path: Path) -> bool:
    names = {file.name for file in path.iterdir()} if path.is_dir() else {"not a folder"}
    return not names or bool(names & {"config.json", "adapter_config.json"})


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _swap(new: Path, folder: Path) -> None:
    """Put ``new`` in the place of ``folder``; a folder cannot be replaced in one move, so the old one steps aside."""
    old = folder.with_name(f".{folder.name}.{os.getpid()}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        os.replace(folder, old)
    os.replace(new, folder)
    _flush(folder.parent)
    shutil.rmtree(old, ignore_errors=True)
