# SPDX-License-Identifier: Apache-2.0
"""Tables for the tests of this folder."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def rows_file(file: Path, rows: Sequence[Any]) -> str:
    """Write rows (dictionaries, or broken lines as text) as JSON lines; the path as text."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(file)
