# SPDX-License-Identifier: Apache-2.0
"""Errors of the user end with a sentence and status 2; a bug still shows its trace.

So does everything with ``LIT_RL_TRACEBACK=1``.
"""

from __future__ import annotations

import linecache
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from traceback import walk_tb
from typing import Any, get_args, get_type_hints

TRACEBACK = "LIT_RL_TRACEBACK"


@contextmanager
def plain_errors(command: str) -> Iterator[None]:
    """Inside, an error that is a sentence for the user ends the process with status 2; a bug passes through.

    Args:
        command: what to name in front of the sentence.
    """
    try:
        yield
    except Exception as error:
        if os.environ.get(TRACEBACK):
            raise
        told: Any = next((e for e in causes(error) if is_for_the_user(e)), None) or null_argument(error)
        if told is None:
            raise _unwrapped(error) from None
        rank = os.environ.get("LOCAL_RANK", "0")
        label = command if rank == "0" else f"{command} (rank {rank})"
        print(f"{label}: {told}\n({TRACEBACK}=1 shows where this was raised.)", file=sys.stderr)
        sys.exit(2)


def is_for_the_user(error: BaseException) -> bool:
    """Whether an error is a sentence that was raised on purpose, about what lit-rl was given.

    That is an error that our own code raises itself (rather than one that it runs into), Lightning's
    MisconfigurationException, and what Transformers says about a model that it cannot find.
    """
    module, line = _raised_at(error)
    own = type(error).__module__.startswith("lit_rl.")
    if type(error).__name__ == "MisconfigurationException":
        return True
    if isinstance(error, OSError) and module.startswith(("transformers.", "huggingface_hub.")):
        return True
    on_purpose = own or isinstance(error, (ValueError, TypeError, OSError, ImportError))
    return module.startswith("lit_rl.") and line.startswith("raise") and on_purpose


def null_argument(error: BaseException) -> str | None:
    """A sentence, if a constructor of ours ran into a None that its argument does not allow.

    The parser lets null pass for every argument that has a default.
    """
    for cause in causes(error):
        for frame, _ in walk_tb(cause.__traceback__):
            inside, owner = frame.f_code.co_name, frame.f_locals.get("self")
            if inside not in ("__init__", "__post_init__") or not type(owner).__module__.startswith("lit_rl."):
                continue
            for name, hint in _own_arguments(type(owner)).items():
                value = frame.f_locals.get(name, getattr(owner, name, hint))
                if value is None and type(None) not in get_args(hint) and hint is not Any:
                    return f"{name} of {type(owner).__name__} must be {_spelled(hint)}, got null."
    return None


def _own_arguments(cls: type) -> dict[str, Any]:
    """Types of the arguments of a class of ours and of its bases."""
    inits = [vars(c).get("__init__") for c in reversed(cls.__mro__) if c.__module__.startswith("lit_rl.")]
    return {name: hint for init in inits if init for name, hint in get_type_hints(init).items() if name != "return"}


def _spelled(hint: Any) -> str:
    """A type as a user would write it."""
    return hint.__name__ if isinstance(hint, type) else re.sub(r"\b(\w+\.)+", "", str(hint))


def _raised_at(error: BaseException) -> tuple[str, str]:
    """Module and source line that an error comes from."""
    trace = error.__traceback__
    if trace is None:
        return "", ""
    while trace.tb_next is not None:
        trace = trace.tb_next
    frame = trace.tb_frame
    line = linecache.getline(frame.f_code.co_filename, trace.tb_lineno, frame.f_globals)
    return str(frame.f_globals.get("__name__", "")), line.strip()


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error and what it was raised from."""
    cause = error
    while cause is not None:
        yield cause
        cause = cause.__cause__


def _unwrapped(error: Exception) -> BaseException:
    """A bug inside a constructor, without the parser's message about subtypes around it."""
    for cause in causes(error):
        if not _raised_at(cause)[0].startswith("jsonargparse"):
            return cause
    return error
