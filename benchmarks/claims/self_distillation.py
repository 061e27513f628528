# SPDX-License-Identifier: Apache-2.0
"""OPSD and RLSD: what a teacher that knows the answer leaks, and what a verifier's direction prevents."""

from __future__ import annotations

from typing import Any

from benchmarks.claims.claim import Arm, Claim, Metric, WarmStart, at_end, collapsed, largest
from benchmarks.claims.privileged import SHOWN
from benchmarks.claims.report import Results, compare

CONFIGS = "benchmarks/claims/configs"
SHOW: dict[str, Any] = {"model.init_args.prompt.template": SHOWN}
ONE_EACH = {"model.init_args.prompts_per_step": 128, "model.init_args.group_size": 1}
UNCLIPPED = {"model.init_args.divergence.entry_clip": None}
LIVE = {"model.init_args.teacher": {"class_path": "lit_rl.policies.Snapshot", "init_args": {"every": 20}}}

CLAIM = Claim(
    name="self_distillation",
    title="OPSD and RLSD",
    sentence="Distilling from oneself with the answer in view learns fast at first and then leaks: the student copies what "
    "only somebody who knows the answer can do. Where the verifier decides the direction and the teacher only how much each "
    "token counts, training stays stable.",
    source="arXiv 2601.18734, arXiv 2604.03128",
    setup="The quickstart's policy after a warm start in which half of the problems showed their answer (`57+68=[125]`) and "
    "were solved by somebody who then works carefully or, half of the time, skips the work and writes the answer. The teacher "
    "is the policy with the answer in view, so what it knows better is to carry, and what it can afford and the student "
    "cannot is to skip the work: the share of completions without any is the leak. `opsd` distils from the initial weights, "
    "`opsd-follows` from a snapshot of the student every 20 steps, the teacher of `rlsd`. The paper clips summands of the "
    "divergence at 0.05; here nearly all of the signal is in a few tokens above that, so they are not clipped. All arms "
    "sample 128 completions a step.",
    warm_start=WarmStart(("configs/quickstart-warmup.yaml", f"{CONFIGS}/privileged-warmup.yaml")),
    configs=["configs/quickstart.yaml", f"{CONFIGS}/privileged.yaml"],
    overrides={"model.init_args.max_rollouts": 200, "trainer.val_check_interval": 5},
    arms=[
        Arm("grpo"),
        Arm("opsd", ["configs/methods/opsd.yaml"], {**SHOW, **ONE_EACH, **UNCLIPPED}),
        Arm("opsd-follows", ["configs/methods/opsd.yaml"], {**SHOW, **ONE_EACH, **UNCLIPPED, **LIVE}),
        Arm("rlsd", ["configs/methods/rlsd.yaml"], SHOW),
    ],
    metrics=[
        Metric("held-out pass@1 at the end", at_end("val/pass@1", over=3), "higher"),
        Metric("highest held-out pass@1", largest("val/pass@1"), "higher"),
        Metric("share of completions without work, end", at_end("reward/skipped_work", over=10), "lower"),
        Metric("runs that collapsed (end below half of their best)", collapsed("val/pass@1"), "lower", counts=True),
    ],
    curves=["val/pass@1", "reward/skipped_work", "rollout/length_mean"],
)


def verdict(results: Results) -> str:
    """What the numbers say."""
    final, best = "held-out pass@1 at the end", "highest held-out pass@1"
    return (
        f"pass@1 at the end, rlsd against opsd: {compare(results, 'opsd', 'rlsd', final)}. The leak and its end are as "
        "claimed: a fixed teacher settles at the share of skipped work that the teacher itself has, a teacher that follows "
        "the student drives it to no work at all. A fast beginning is not seen: the best evaluation of opsd against "
        f"grpo's: {compare(results, 'grpo', 'opsd', best)}."
    )
