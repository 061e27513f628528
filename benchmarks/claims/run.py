# SPDX-License-Identifier: Apache-2.0
"""``make claims``: run claims, or continue them where they stopped, and write ``docs/claims.md``."""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks.claims.report import DOCS, Results, assemble, table, write
from benchmarks.claims.runner import run_claim, warm_policy

CLAIMS = (
    "dot",
    "grpo_lambda",
    "recap",
    "npo",
    "opd",
    "gopd",
    "kdrl",
    "tip",
    "self_distillation",
    "paced",
    "caopd",
    "samplers",
)


def main() -> None:
    """Run the named claims, or all of them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", default=[], help=f"any of {', '.join(CLAIMS)}; default: all")
    parser.add_argument("--seeds", type=int, nargs="+", help="other seeds than the claim's own")
    parser.add_argument("--workers", type=int, default=2, help="runs side by side, one thread each")
    parser.add_argument("--json", type=Path, help="also write all numbers to this file")
    arguments = parser.parse_args()
    numbers = {}
    for name in arguments.names or CLAIMS:
        module = importlib.import_module(f"benchmarks.claims.{name}")
        claim, seeds = module.CLAIM, arguments.seeds or module.CLAIM.seeds
        print(f"{claim.title}: {len(claim.arms)} arms x {len(seeds)} seeds", flush=True)
        results = Results(claim, seeds, run_claim(claim, seeds, arguments.workers), warm_policy(claim.warm_start))
        print(table(results), flush=True)
        numbers[name] = write(results, module.verdict(results))
    assemble(CLAIMS)
    print(f"Wrote docs/claims.md and {DOCS}")
    if arguments.json:
        arguments.json.write_text(json.dumps(numbers, indent=1) + "\n")


if __name__ == "__main__":
    main()
