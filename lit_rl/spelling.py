# SPDX-License-Identifier: Apache-2.0
"""What somebody meant who misspelt a name."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


def closest(name: str, known: Iterable[str]) -> str | None:
    """The known name that is most like ``name`` or contains it; None if there is no such name."""
    names = sorted(known)
    return next(iter(get_close_matches(name, names, n=1) or (k for k in names if name.lower() in k.lower())), None)


def did_you_mean(name: str, known: Iterable[str], prefix: str = "") -> str:
    """`` Did you mean …?`` with the `closest` known name, or nothing.

    >>> did_you_mean("on_rolouts", ["on_rewards", "on_rollouts"])
    ' Did you mean on_rollouts?'
    """
    meant = closest(name, known)
    return "" if meant is None else f" Did you mean {prefix}{meant}?"
