# SPDX-License-Identifier: Apache-2.0
"""DOT: shorter completions at equal accuracy, by cutting a few outliers."""

from __future__ import annotations

from benchmarks.claims.claim import Arm, Claim, Metric, WarmStart, at_end, total
from benchmarks.claims.forced_length import forced_length_section
from benchmarks.claims.report import Results, cell, compare

CLAIM = Claim(
    name="dot",
    title="Dynamic Outlier Truncation",
    sentence="Cutting the longest completions of fully solved groups shortens completions at equal or better accuracy, "
    "while under a few percent of the completions are cut.",
    source="arXiv 2601.03969",
    setup="The teacher of the warm start is careful but long-winded: 85 % of its first passes are right, and after "
    "each pass another follows with probability 0.6 although it is rarely needed. Plain GRPO has no reason to drop the "
    "redundant passes. G = 16, so that the largest possible z-score is 3.75.",
    warm_start=WarmStart(
        overrides={
            "data.init_args.first_correct": 0.6,
            "data.init_args.later_correct": 1.0,
            "data.init_args.another": 0.6,
            "data.init_args.answer_only": 0.1,
        }
    ),
    overrides={
        "model.init_args.group_size": 16,
        "model.init_args.prompts_per_step": 8,
        "model.init_args.max_rollouts": 120,
        "model.init_args.sampling.max_tokens": 192,
        "trainer.val_check_interval": 20,
    },
    arms=[
        Arm("grpo"),
        Arm(
            "dot",
            overrides={
                "trainer.callbacks+": [
                    {
                        "class_path": "lit_rl.callbacks.DynamicOutlierTruncation",
                        "init_args": {"alpha": 2.0, "min_margin": 8},
                    }
                ]
            },
        ),
    ],
    metrics=[
        Metric("held-out pass@1 at the end", at_end("val/pass@1", over=3), "higher"),
        Metric("tokens a held-out completion at the end", at_end("val/length_mean", over=3), "lower"),
        Metric("generated tokens, whole run", total("rollout/tokens"), "lower"),
    ],
    curves=["val/pass@1", "val/length_mean", "rollout/length_mean"],
    extra=forced_length_section,
)


def verdict(results: Results) -> str:
    """What the numbers say."""
    length = compare(results, "grpo", "dot", "tokens a held-out completion at the end")
    accuracy = compare(results, "grpo", "dot", "held-out pass@1 at the end")
    cut = cell([100 * at_end("dot/truncated", over=10**9)(run) for run in results.runs["dot"]])
    return f"Length: {length}. Accuracy: {accuracy}. Share of completions that were cut: {cut} %."
