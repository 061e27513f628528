# SPDX-License-Identifier: Apache-2.0
"""What somebody meant who misspelt a name."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


def did_you_mean(name: str, known: Iterable[str], prefix: str = "") -> str:
    """`` Did you mean …?`` with the known name that is most like ``name`` or contains it, or nothing.

    >>> did_you_mean("on_rolouts", ["on_rewards", "on_rollouts"])
    ' Did you mean on_rollouts?'
    """
    names = sorted(known)
    close = get_close_matches(name, names, n=1) or [k for k in names if name.lower() in k.lower()]
    return f" Did you mean {prefix}{close[0]}?" if close else ""
