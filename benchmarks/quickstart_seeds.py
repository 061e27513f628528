# SPDX-License-Identifier: Apache-2.0
"""The quickstart with several seeds: does every one get from a third to nine tenths, and how long does it take?

    python benchmarks/quickstart_seeds.py
    python benchmarks/quickstart_seeds.py --seeds 1 2 3 --fresh

Runs ``examples/quickstart.py`` for each seed of weights, problems and sampling. A seed that is finished is not run
again and an interrupted one goes on (``--fresh`` starts all over). Seconds are those of the training steps, from the
log files; start-up, validation and checkpoints come on top, in the last column, if a seed was run in one go.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.common import ROOT, WORK, Goal, Report, Table, arguments, finish, hardware


def run(seed: int, fresh: bool) -> dict[str, Any]:
    """The figures of one seed."""
    folder = WORK / "quickstart" / f"seed{seed}"
    done = folder / "figures.json"
    if fresh:
        shutil.rmtree(folder, ignore_errors=True)
    if not done.exists():
        in_one_go, start = not folder.exists(), time.perf_counter()
        # The script writes to a temporary name, so that figures exist only once they are complete.
        part = folder / "figures.part"
        script = [
            sys.executable,
            "examples/quickstart.py",
            "--seed",
            str(seed),
            "--run",
            str(folder),
            "--json",
            str(part),
        ]
        subprocess.run(script, cwd=ROOT, check=True)
        figures = json.loads(part.read_text())
        figures["in all, seconds"] = time.perf_counter() - start if in_one_go else None
        done.write_text(json.dumps(figures, indent=2) + "\n")
    return json.loads(done.read_text())


def main() -> None:
    """Run the seeds that are missing, and print the table."""
    parser = arguments(__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    parser.add_argument("--fresh", action="store_true", help="forget earlier runs")
    options = parser.parse_args()
    if options.smoke:
        raise SystemExit("The quickstart has one size: run one seed (--seeds 1) instead of --smoke, about two minutes.")
    rows = [{"seed": seed, **run(seed, options.fresh)} for seed in options.seeds]
    report = Report(
        "quickstart_seeds",
        "The quickstart over seeds",
        "Held-out pass@1 (256 problems, four completions each, temperature 1) after the warm start and after GRPO, and "
        "seconds of training steps. Every seed has its own weights, problems and sampling noise.",
        hardware(),
        {k: v for k, v in vars(options).items() if k != "json"},
        [Table("Seeds", rows)],
    )
    worst = {name: [row[name] for row in rows] for name in rows[0]}
    report.goals = [
        Goal("lowest pass@1 after GRPO", min(worst["pass@1 after"]), "at least", 0.9),
        Goal("lowest pass@1 after the warm start", min(worst["pass@1 before"]), "at least", 0.3),
        Goal("highest pass@1 after the warm start", max(worst["pass@1 before"]), "at most", 0.4),
        Goal("longest warm start", max(worst["warm start seconds"]), "at most", 90, "s"),
        Goal("longest GRPO", max(worst["grpo seconds"]), "at most", 180, "s"),
    ]
    finish(report, options)


if __name__ == "__main__":
    main()
