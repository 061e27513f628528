# SPDX-License-Identifier: Apache-2.0
"""The samplers side by side: tokens a second, weight sync and memory; and what two of them do to a whole step.

    python benchmarks/rollouts.py
    python benchmarks/rollouts.py --parts engines                # one table of the three: engines, partial, async
    python benchmarks/rollouts.py --device cuda --parts engines  # the shape of Qwen2.5-0.5B, random weights

*engines*: every sampler generates for the same prompts with the same weights, in turn. *partial*: GRPO steps, training
included, on completions whose lengths follow a long-tailed law. *async*: GRPO steps of the quickstart, worker and
trainer with one thread each, beside synchronous runs with one thread and with all. vLLM takes part where it is there.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.common import Goal, Report, Table, add_device, arguments, finish, hardware, median, spread

PARTS = ("engines", "partial", "async")
MIB = 2**20
WARM = 2  # turns of an engine that do not count


# Engines -------------------------------------------------------------------------------------------------------------


class Generate:
    """`generate` of transformers in the place of a sampler: it has no weights of its own and returns no numbers."""

    def __init__(self, model: Any, tokenizer: Any, problems: list[dict[str, Any]], sizes: Any, clock: Any) -> None:
        from benchmarks.driving import Stream

        self.model, self.tokenizer, self.sizes, self.clock = model, tokenizer, sizes, clock
        self.stream, self.cursor = Stream(tokenizer, problems), 0

    def sync(self) -> float:
        """Nothing to do."""
        return 0.0

    def late_sync(self) -> float:
        """Nothing was left to do."""
        return 0.0

    def turn(self, steps: int) -> tuple[int, float]:
        """Tokens and seconds of some steps."""
        start = self.clock()
        return sum(self.step() for _ in range(steps)), self.clock() - start

    def step(self) -> int:
        """Tokens of the next step's completions, up to their ends."""
        import torch

        prompts = self.stream.at(self.cursor, self.sizes.prompts)
        self.cursor += self.sizes.prompts
        inputs = self.tokenizer.pad({"input_ids": [x.tolist() for x in prompts.ids]}, return_tensors="pt")
        end = self.tokenizer.eos_token_id
        torch.manual_seed(self.cursor)
        with torch.no_grad():
            out = self.model.generate(
                **inputs.to(self.model.device), do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
                max_new_tokens=self.sizes.max_tokens, num_return_sequences=self.sizes.group_size,
                pad_token_id=self.tokenizer.pad_token_id, eos_token_id=end,
            )[:, inputs["input_ids"].shape[1] :]  # fmt: skip
        ended = (out == end).int()
        return int((ended.cumsum(1) - ended == 0).sum())


def installed(module: str) -> bool:
    """Whether a package can be imported, without importing it."""
    return importlib.util.find_spec(module) is not None


def kinds(threads: int) -> dict[str, Callable[[], Any] | None]:
    """Row of the table -> what builds the sampler; None: `generate`."""
    from lit_rl.samplers import AsyncSampler, HFSampler, LowPrecisionSampler, PartialSampler, TwoStageSampler

    def vllm() -> Any:
        from lit_rl.samplers import VLLMSampler

        return VLLMSampler()

    def two_stage() -> Any:
        return TwoStageSampler(LowPrecisionSampler(HFSampler(), low), pool_size=32)

    low: Any = "nf4" if installed("bitsandbytes") else "nf4-rounded"
    found: dict[str, Callable[[], Any] | None] = {"transformers `generate`": None, "HFSampler": HFSampler}
    if installed("vllm"):
        found["VLLMSampler"] = vllm
    return found | {
        "PartialSampler(HFSampler), M / N = 2": lambda: PartialSampler(HFSampler(max_rows=1024)),
        "AsyncSampler(HFSampler)": lambda: AsyncSampler(HFSampler(), threads=threads),
        f"TwoStageSampler, 32 explored in {low}": two_stage,
    }


def clock_of(options: argparse.Namespace) -> Callable[[], float]:
    """What seconds are."""
    import time

    from benchmarks.driving import tree_cpu_seconds

    return tree_cpu_seconds if options.clock == "processor" else time.perf_counter


def load(policy: str, device: str) -> tuple[Any, Any]:
    """The policy and its tokenizer."""
    from lit_rl.policies import Policy

    model, tokenizer = Policy(policy, dtype="bfloat16" if device == "cuda" else "float32").load()
    return model.to(device).eval(), tokenizer


def side_of(name: str, policy: str, sizes: Any, problems: list[dict[str, Any]], device: str, clock: Any) -> Any:
    """What generates in the row of that name, ready to work."""
    import torch

    from benchmarks.driving import Steps

    model, tokenizer = load(policy, device)
    build = kinds(torch.get_num_threads())[name]
    if build is None:
        return Generate(model, tokenizer, problems, sizes, clock)
    return Steps(build(), model, tokenizer, problems, sizes, clock)


def memory_of(name: str, **where: Any) -> int:
    """Peak of the process and its children beyond what the policy alone takes, after two turns, in this process."""
    from benchmarks.driving import tree_peak_bytes

    load(where["policy"], where["device"])
    before = tree_peak_bytes()
    side = side_of(name, **where)
    for _ in range(2):
        side.sync()
        side.turn(1)
    peak = tree_peak_bytes() - before
    close(side)
    return peak


def close(side: Any) -> None:
    """End a sampler's processes."""
    if hasattr(side, "sampler"):
        side.sampler.close()


def engines(options: argparse.Namespace, report: Report) -> None:
    """Add the table of all samplers."""
    import torch

    policy, problems, sizes = workload(options)
    clock = clock_of(options)
    where = {"policy": policy, "problems": problems, "sizes": sizes, "device": options.device, "clock": clock}
    sides = {name: side_of(name, **where) for name in kinds(torch.get_num_threads())}
    rates: dict[str, list[float]] = {name: [] for name in sides}
    syncs: dict[str, list[float]] = {name: [] for name in sides}
    tokens: dict[str, list[int]] = {name: [] for name in sides}
    for turn in range(WARM + options.repeats):
        for name, side in sides.items():
            sync = side.sync()
            count, seconds = side.turn(options.steps)
            late = side.late_sync()
            if turn >= WARM:
                syncs[name].append(sync + late)
                tokens[name].append(count)
                rates[name].append(count / (seconds - late))
    for side in sides.values():
        close(side)
    weighed = list(sides)[: 2 if options.smoke else None] if options.device == "cpu" else []
    rows = [
        {
            "": name,
            "tokens": int(median(tokens[name])),
            "tokens/s": int(median(rates[name])),
            "range": spread([int(r) for r in rates[name]]),
            "sync, seconds": median(syncs[name]) if name != "transformers `generate`" else None,
            "memory beyond the policy, MiB": memory(name, options) / MIB if name in weighed else None,
        }
        for name in sides
    ]
    turns = f"{options.steps} steps a turn, medians of {options.repeats} turns"
    seconds = "; seconds are of the processor" if options.clock == "processor" else ""
    report.tables.append(Table(f"Generation: {sizes}; {turns}{seconds}", rows))
    speed = {name: median(found) for name, found in rates.items()}
    ratio = speed["HFSampler"] / speed["VLLMSampler"] if "VLLMSampler" in speed else None
    report.goals.append(Goal("HFSampler, times the tokens/s of VLLMSampler", ratio, "at least", 1.5))
    if ratio is None:
        report.text += " vLLM is not installed where this was measured, so its row is missing."


def workload(options: argparse.Namespace) -> tuple[str, list[dict[str, Any]], Any]:
    """Policy, problems and sizes of the table of engines."""
    from benchmarks.driving import Sizes
    from benchmarks.workloads import addition_problems, digit_problems, random_policy, warm_started_policy

    sizes = Sizes(options.prompts, options.group_size, options.max_tokens)
    if options.smoke:
        return str(random_policy("tiny")), digit_problems(64, 4), sizes
    if options.device == "cuda":
        return str(random_policy("0.5B")), digit_problems(512), sizes
    return str(warm_started_policy()), addition_problems(2048), sizes


def memory(name: str, options: argparse.Namespace) -> int:
    """`memory_of` in a fresh interpreter."""
    command = [sys.executable, __file__, "--memory", name, "--device", options.device]
    command += [f"--{n.replace('_', '-')}={getattr(options, n)}" for n in ("prompts", "group_size", "max_tokens")]
    command += ["--smoke"] if options.smoke else []
    process = subprocess.run(command, capture_output=True, text=True)
    if process.returncode:
        raise RuntimeError(f"Measuring the memory of {name} failed:\n{process.stderr[-3000:]}")
    return int(json.loads(process.stdout.splitlines()[-1]))


# Whole steps ---------------------------------------------------------------------------------------------------------


def partial(options: argparse.Namespace, report: Report) -> None:
    """Add a table of partial rollouts for each of two long-tailed laws of lengths and each number of prompts a step.

    With many rows a decode step costs as much as its tokens, and a tail of few rows is cheap. With few rows it costs
    the same however few they are, as on an accelerator, and the tail is what the step waits for.
    """
    longest = 64 if options.smoke else options.longest
    laws: dict[str, dict[str, Any]] = {
        f"log-normal lengths of mean {longest // 8}, as in `simulate_rollouts`": {
            "name": "log-normal", "mean": longest // 8, "between": 0.6, "within": 0.5, "limit": longest,
        },
        f"Pareto lengths, P(more than t) = ({longest // 64} / t)^1.1": {
            "name": "Pareto", "smallest": longest // 64, "exponent": 1.1, "limit": longest,
        },
    }  # fmt: skip
    for prompts in [2] if options.smoke else options.partial_prompts:
        best = 0.0
        for title, law in laws.items():
            table = partial_table(title, law, prompts, options)
            report.tables.append(table)
            best = max(best, *(row["times"] for row in table.rows[1:]))
        what = f"PartialSampler, trained completions a second as a multiple of HFSampler's, N = {prompts}"
        report.goals.append(Goal(what, best, "at least", 1.2))


def partial_table(title: str, law: dict[str, Any], prompts: int, options: argparse.Namespace) -> Table:
    """Whole GRPO steps with and without partial rollouts on one law of lengths."""
    from benchmarks.peer.spec import Spec
    from benchmarks.rollout_runs import Variant, measure
    from benchmarks.workloads import digit_problems, random_policy, write_jsonl

    warm, steps = (1, 2) if options.smoke else (8, 8 + options.train_steps)
    spec = Spec(
        policy=str(random_policy("tiny" if options.smoke else "0.56M")),
        prompts=str(write_jsonl(digit_problems(512, 8), "digits-short")), steps=steps, group_size=options.group_size,
        prompts_per_step=prompts, max_tokens=law["limit"], reward="spread",
    )  # fmt: skip
    busy = options.clock == "processor"
    threads = 1 if busy else len(os.sched_getaffinity(0))
    variants = [Variant("HFSampler", "plain", threads, lengths=law)]
    different = {math.ceil(ratio * prompts): ratio for ratio in options.ratios}  # M is a whole number of prompts
    for ratio in different.values():
        name = f"PartialSampler, M / N = {ratio:g}"
        variants.append(Variant(name, "partial", threads, {"oversampling": ratio}, law))
    found = measure(spec, variants, options.rounds, warm)
    base, speed = found["HFSampler"], "completions/processor second" if busy else "completions/s"
    rows = [
        {
            "": name,
            speed: one[speed],
            "times": one[speed] / base[speed],
            "step, seconds": one["processor"] if busy else one["seconds"],
            "share of generation, %": 100 * one["rollout"] / one["seconds"],
            "tokens a step": int(one["tokens"]),
            "old tokens, %": 100 * one.get("sampler/off_policy_ratio", 0.0),
            "computed again, a step": int(one.get("sampler/prefilled_tokens", 0.0)),
        }
        for name, one in found.items()
    ]
    sizes = f"whole GRPO steps of {spec.prompts_per_step} × {spec.group_size} completions of at most {law['limit']}"
    how = "one thread, seconds of the processor" if busy else f"{threads} threads"
    return Table(f"Partial rollouts: {sizes}; {title}; {base['steps']} steps each, {how}", rows)


def asynchronous(options: argparse.Namespace, report: Report) -> None:
    """Add the table of asynchronous rollouts at the quickstart's size."""
    from benchmarks.peer.spec import Spec
    from benchmarks.rollout_runs import Variant, measure
    from benchmarks.workloads import addition_problems, digit_problems, random_policy, warm_started_policy, write_jsonl

    if options.smoke:
        policy, problems = random_policy("tiny"), write_jsonl(digit_problems(64, 4), "digits-short")
    else:
        policy, problems = warm_started_policy(), write_jsonl(addition_problems(2048), "additions-2048")
    warm, steps = (1, 2) if options.smoke else (4, 4 + options.train_steps)
    spec = Spec(
        policy=str(policy), prompts=str(problems), steps=steps, prompts_per_step=options.prompts,
        group_size=options.group_size, max_tokens=options.max_tokens, reward="spread", device=options.device,
    )  # fmt: skip
    cores = len(os.sched_getaffinity(0))
    alone, ahead = "synchronous, 1 thread", "AsyncSampler, 1 thread each"
    variants = [Variant(alone, "plain", 1)]
    if cores > 1 and options.clock == "wall":  # beside busy neighbours several threads wait for the slowest of them
        variants.append(Variant(f"synchronous, {cores} threads", "plain", cores))
    variants += [
        Variant(ahead, "async", 1, {"threads": 1}),
        Variant(f"{ahead}, π_old = π_sampler", "async", 1, {"threads": 1, "correction": "behaviour"}),
    ]
    found = measure(spec, variants, options.rounds, warm)
    rows = [
        {
            "": name,
            "step, seconds": one["seconds"],
            "generation, or waiting for it": one["rollout"],
            "all else": one["train"],
            "completions/s": one["completions/s"],
            "old tokens, %": 100 * one.get("sampler/off_policy_ratio", 0.0),
        }
        for name, one in found.items()
    ]
    title = f"Asynchronous rollouts: whole GRPO steps, {spec.prompts_per_step} × {spec.group_size} completions"
    beside = ", beside other programs" if options.clock == "processor" else ""
    report.tables.append(Table(f"{title}; {found[alone]['steps']} steps each{beside}", rows))
    slower = max(found[alone]["rollout"], found[alone]["train"])
    what = "AsyncSampler, step as a multiple of the slower of generation and training at one thread"
    report.goals.append(Goal(what, found[ahead]["seconds"] / slower, "at most", 1.2))
    report.text += verdict(found, f"synchronous, {cores} threads", ahead)


def verdict(found: dict[str, dict[str, float]], together: str, ahead: str) -> str:
    """Which of the two ways to use all cores is the faster one here."""
    if together not in found:
        return ""
    ratio = found[together]["seconds"] / found[ahead]["seconds"]
    if ratio < 1:
        return (
            f" On this machine the synchronous run with all cores is faster than AsyncSampler, {1 / ratio:.2f} times."
        )
    return f" On this machine AsyncSampler is {ratio:.2f} times as fast as the synchronous run with all cores."


TITLES = {"engines": "Generation", "partial": "Partial", "async": "Asynchronous"}
GOALS = {"engines": "HFSampler", "partial": "PartialSampler", "async": "AsyncSampler"}


def keep_other_parts(report: Report, parts: list[str], path: Path) -> None:
    """Take what was not measured in this run from the report of an earlier one, in the order of the parts."""
    old = Report.load(path)
    tables, goals = list(report.tables), list(report.goals)
    report.tables, report.goals = [], []
    for part in PARTS:
        new = part in parts
        report.tables += [t for t in (tables if new else old.tables) if t.title.startswith(TITLES[part])]
        report.goals += [g for g in (goals if new else old.goals) if g.what.startswith(GOALS[part])]
    kept = [sentence for sentence in old.text.split(". ") if "On this machine" in sentence and "async" not in parts]
    report.text += "".join(f" {sentence.strip('.')}." for sentence in kept)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = arguments(__doc__)
    add_device(parser)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--update", action="store_true", help="keep the other parts of the report that --json names")
    parser.add_argument("--prompts", type=int, default=16, help="N, prompts of a step")
    parser.add_argument("--group-size", type=int, default=8)
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--steps", type=int, default=3, help="steps of one turn of an engine")
    parser.add_argument("--train-steps", type=int, default=30, help="GRPO steps of each run that count")
    parser.add_argument("--rounds", type=int, default=2, help="runs of each variant, in turn")
    parser.add_argument("--ratios", type=float, nargs="+", default=[1.5, 2.0], help="M / N of partial rollouts")
    parser.add_argument("--partial-prompts", type=int, nargs="+", default=[8, 1], help="N of partial rollouts")
    parser.add_argument("--longest", type=int, default=1024, help="budget of the long-tailed laws, in tokens")
    parser.add_argument(
        "--clock", choices=["wall", "processor"], default="wall",
        help="processor: on a busy machine, with OMP_NUM_THREADS=1. The table of async goes by the wall clock all the "
        "same; there it leaves out the synchronous run with all cores",
    )  # fmt: skip
    parser.add_argument("--memory", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.smoke:
        options.prompts, options.group_size, options.max_tokens = 2, 2, 8
        options.steps, options.repeats, options.rounds, options.ratios = 1, 1, 1, [2.0]
    return options


def main() -> None:
    """Measure what was asked for and print it."""
    options = parse()
    if options.memory:
        policy, problems, sizes = workload(options)
        where = {"problems": problems, "sizes": sizes, "device": options.device, "clock": clock_of(options)}
        print(memory_of(options.memory, policy=policy, **where))
        return
    report = Report(
        "rollouts",
        "Samplers side by side",
        "Generation alone, weights frozen: every sampler gets the same prompts and weights and they take turns. Tokens "
        "are those of the completions that it returns; PartialSampler is in its steady state, AsyncSampler's worker is "
        "never idle, TwoStageSampler also explores. *Sync* is how long the trainer waits for a weight update. Memory: "
        "peak of all processes beyond one with the policy alone. Then whole GRPO steps with everything in them: "
        "medians of seconds; completions a second are over the whole time.",
        hardware(options.device),
        {k: v for k, v in vars(options).items() if k not in ("json", "memory")},
    )
    parts = {"engines": engines, "partial": partial, "async": asynchronous}
    for name in options.parts:
        parts[name](options, report)
    if options.update and options.json and options.json.exists():
        keep_other_parts(report, options.parts, options.json)
    finish(report, options)


if __name__ == "__main__":
    main()
