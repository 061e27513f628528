# SPDX-License-Identifier: Apache-2.0
"""Explore cheap, train exact: what the three regeneration modes give and cost, and what low precision costs here.

    python benchmarks/two_stage.py
    python benchmarks/two_stage.py --kind nf4        # with bitsandbytes; default where it is installed
    python benchmarks/two_stage.py --device cuda

The first tables compare the modes of `TwoStageSampler` with plain sampling, weights frozen. *Contrast* is the standard
deviation of the final rewards in a group, mean over the groups: what a group baseline can learn from. *Worth* compares
at equal numbers of tokens that pass through the full-precision policy, decoded or only scored: above 1, the mode makes
more of them than plain sampling does. The last tables measure sampling from copies of a policy in low precision.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.common import Report, Table, add_device, arguments, finish, hardware, median
from benchmarks.rollouts import MIB, clock_of, installed, load

MODES = ("coupled", "verified", "fresh")


def counting_sampler() -> Any:
    """An `HFSampler` that counts: ``decoded`` tokens, and ``residual`` ones of which it gave the distribution."""
    from lit_rl.rollouts import Rollouts
    from lit_rl.samplers import HFSampler

    class Counting(HFSampler):
        decoded = residual = 0

        def next_token_logprobs(self, contexts: Any, sampling: Any) -> Any:
            self.residual += len(contexts)
            return super().next_token_logprobs(contexts, sampling)

        def collect(self) -> Rollouts:
            prefix = self._pending[0].prefix
            rollouts = super().collect()
            self.decoded += int(rollouts.lengths.sum()) - (0 if prefix is None else int(prefix.lengths.sum()))
            return rollouts

    return Counting(max_rows=1024)


# Modes ---------------------------------------------------------------------------------------------------------------


def drive(name: str, workload: dict[str, Any], options: argparse.Namespace) -> dict[str, float]:
    """Some steps of plain sampling or of a mode: means a step, and of the sampler's own numbers."""
    from benchmarks.driving import Sizes, Steps
    from lit_rl.samplers import HFSampler, LowPrecisionSampler, TwoStageSampler
    from lit_rl.samplers.selection import contrast

    exact = counting_sampler()
    sampler: Any = exact
    if name != "plain":
        explore = LowPrecisionSampler(HFSampler(max_rows=1024), options.kind)
        factor = options.oversampling if name == "fresh" else 1.0
        sampler = TwoStageSampler(explore, exact, pool_size=options.pool, mode=name, oversampling=factor)  # type: ignore[arg-type]
    sizes = Sizes(options.prompts, options.group_size, options.max_tokens)
    steps = Steps(sampler, sizes=sizes, **workload)
    steps.sync()
    sampler.metrics(steps.next())  # libraries load and caches are made
    found: dict[str, list[float]] = {}
    clock = clock_of(options)
    for _ in range(options.repeats):
        exact.decoded = exact.residual = 0
        steps.score.take()
        start = clock()
        rollouts = steps.next()
        seconds = clock() - start
        explored = steps.score.take()[1]
        rollouts = steps.score(rollouts.to("cpu"))
        groups = contrast(rollouts.rewards, rollouts.group, len(rollouts.prompts))
        numbers = sampler.metrics(rollouts)
        accepted = int(rollouts.lengths.sum()) - exact.decoded - exact.residual
        numbers |= {"scored": accepted / numbers["accepted_ratio"] if numbers.get("accepted_ratio") else 0.0}
        numbers |= {"contrast": float(groups.mean()), "informative": float((groups > 0).double().mean())}
        numbers |= {"pass": float(rollouts.rewards.mean()), "decoded": exact.decoded, "explored": explored}
        for key, value in (numbers | {"seconds": seconds}).items():
            found.setdefault(key, []).append(value)
    sampler.close()
    return {key: statistics.fmean(values) for key, values in found.items()} | {"seconds": median(found["seconds"])}


def row_of(name: str, one: dict[str, float], plain: dict[str, float]) -> dict[str, Any]:
    """A line of the table of modes."""
    exact = one["decoded"] + one["scored"]
    worth = one["contrast"] / exact / (plain["contrast"] / plain["decoded"]) if plain["contrast"] else None
    return {
        "": name,
        "contrast": one["contrast"],
        "with signal, %": 100 * one["informative"],
        "decoded": int(one["decoded"]),
        "scored": int(one["scored"]),
        "worth": worth,
        "explored": int(one["explored"]),
        "text kept, %": 100 * one["kept_prefix_ratio"] if "kept_prefix_ratio" in one else None,
        "accepted, %": 100 * one["accepted_ratio"] if "accepted_ratio" in one else None,
        "sign agreement": one.get("sign_agreement"),
        "seconds": one["seconds"],
        "× plain": one["seconds"] / plain["seconds"],
    }


def modes(title: str, workload: dict[str, Any], options: argparse.Namespace) -> Table:
    """Plain sampling and the three modes on one set of problems."""
    found = {name: drive(name, workload, options) for name in ("plain", *MODES)}
    rows = [row_of(name, one, found["plain"]) for name, one in found.items()]
    of = f"{options.prompts} × {options.group_size} completions from pools of {options.pool} in {options.kind}"
    return Table(f"{title} (pass rate {found['plain']['pass']:.2f}): {of}; means of {options.repeats} steps", rows)


# Low precision -------------------------------------------------------------------------------------------------------


def copies(shape: str, rows: int, tokens: int, options: argparse.Namespace) -> Table:
    """Speed and memory of sampling from a policy and from its copies in low precision."""
    from benchmarks.driving import Sizes, Steps
    from benchmarks.workloads import digit_problems, random_policy
    from lit_rl.samplers import HFSampler, LowPrecisionSampler

    model, tokenizer = load(str(random_policy(shape)), options.device)
    problems, sizes = digit_problems(64, 8), Sizes(1, rows, tokens)
    kinds = ["the policy itself", "bfloat16", *(["nf4", "fp4"] if installed("bitsandbytes") else []), "nf4-rounded"]
    table: list[dict[str, Any]] = []
    for kind in kinds:
        sampler: Any = HFSampler() if kind == kinds[0] else LowPrecisionSampler(HFSampler(), kind)  # type: ignore[arg-type]
        steps = Steps(sampler, model, tokenizer, problems, sizes, clock_of(options))
        sync = median([steps.sync() for _ in range(3)])
        steps.turn(1)
        rates = [count / seconds for count, seconds in (steps.turn(1) for _ in range(options.repeats))]
        held = weight_bytes(model if kind == kinds[0] else sampler.copy) / MIB
        row = {"weights": kind, "MiB": held, "tokens/s": median(rates), "quantise, seconds": sync}
        table.append({**row, "times the policy's speed": median(rates) / table[0]["tokens/s"] if table else 1.0})
        sampler.close()
    count = sum(p.numel() for p in model.parameters()) / 1e6
    return Table(f"Sampling from copies: {count:.3g}M parameters, {rows} rows of at most {tokens} tokens", table)


def weight_bytes(model: Any) -> int:
    """Bytes of the weights of a model, the scales of quantised ones included, shared ones once."""
    found: dict[int, int] = {}
    for parameter in model.parameters():
        found[parameter.data_ptr()] = parameter.numel() * parameter.element_size()
        state = getattr(parameter, "quant_state", None)
        if state is not None:
            found[state.absmax.data_ptr()] = state.absmax.numel() * state.absmax.element_size()
    return sum(found.values())


# All of it -----------------------------------------------------------------------------------------------------------


def parse() -> argparse.Namespace:
    """The command line."""
    parser = arguments(__doc__, repeats=20)
    add_device(parser)
    parser.add_argument("--kind", help="precision of the explorer; default nf4, or nf4-rounded without bitsandbytes")
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--group-size", type=int, default=8)
    parser.add_argument("--pool", type=int, default=32, help="completions explored for each prompt")
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument(
        "--oversampling", type=float, default=2.0, help="prompts explored for each one that mode fresh keeps"
    )
    parser.add_argument("--clock", choices=["wall", "processor"], default="wall", help="as in rollouts.py")
    options = parser.parse_args()
    options.kind = options.kind or ("nf4" if installed("bitsandbytes") else "nf4-rounded")
    if options.smoke:
        options.prompts, options.group_size, options.pool, options.max_tokens, options.repeats = 2, 2, 4, 8, 1
    return options


def problem_sets(options: argparse.Namespace) -> tuple[str, dict[str, list[dict[str, Any]]]]:
    """The policy, and title -> problems."""
    from benchmarks.workloads import addition_problems, digit_problems, random_policy, warm_started_policy

    if options.smoke:
        return str(random_policy("tiny")), {"Random digits": digit_problems(64, 4)}
    if options.device == "cuda":
        return str(random_policy("0.5B")), {"Random digits": digit_problems(512)}
    policy, problems = str(warm_started_policy()), addition_problems(512)
    return policy, {"The quickstart's problems": problems, "The hardest tenth of them": hardest(policy, problems)}


def hardest(policy: str, problems: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The tenth of the problems at which the policy fails most often, judged by 32 completions of each."""
    from benchmarks.driving import Sizes, Steps
    from lit_rl.samplers import HFSampler

    model, tokenizer = load(policy, "cpu")
    steps = Steps(HFSampler(), model, tokenizer, problems, Sizes(len(problems), 32, 128), seed=1)
    steps.sync()
    rollouts = steps.score(steps.next())
    rates = rollouts.group_mean(rollouts.correct)
    return [problems[i] for i in rates.argsort(stable=True)[: len(problems) // 10].tolist()]


def verdict(tables: list[Table]) -> str:
    """How fast 4 bits are here, in words."""
    found = []
    for table in tables:
        speed = {row["weights"]: row["times the policy's speed"] for row in table.rows}
        if "nf4" in speed:
            size = table.title.split(": ")[1].split(",")[0]
            against = f"{speed['nf4'] / speed['bfloat16']:.2f} times that of one in bfloat16"
            found.append(f"{speed['nf4']:.2f} times the speed of the policy itself and {against} ({size})")
    if not found:
        return " bitsandbytes is not installed here: there are no copies in 4 bits, and the explorer is a rounded one."
    return f" A copy in NF4 samples here at {'; '.join(found)}."


def main() -> None:
    """Measure and print."""
    options = parse()
    report = Report(
        "two_stage",
        "Explore cheap, train exact",
        "The three ways in which `TwoStageSampler` makes completions of its low-precision explorer exact, beside plain "
        "sampling from the policy, weights frozen. *Contrast* is the standard deviation of the final rewards in a "
        "group; *worth* is contrast for each token that passed through the full-precision policy (decoded or scored), "
        "as a multiple of plain sampling's. Numbers of tokens are those of a step."
        + (" Seconds are of the processor." if options.clock == "processor" else ""),
        hardware(options.device),
        {k: v for k, v in vars(options).items() if k != "json"},
    )
    policy, sets = problem_sets(options)
    model, tokenizer = load(policy, options.device)
    for title, problems in sets.items():
        report.tables.append(modes(title, {"model": model, "tokenizer": tokenizer, "problems": problems}, options))
    sizes = [("tiny", 4, 8)] if options.smoke else [("0.56M", 128, 32), ("100M", 32, 8)]
    sizes = [("0.5B", 128, 32)] if options.device == "cuda" and not options.smoke else sizes
    measured = [copies(*size, options) for size in sizes]
    report.tables += measured
    report.text += verdict(measured)
    finish(report, options)


if __name__ == "__main__":
    main()
