# SPDX-License-Identifier: Apache-2.0
"""CaOPD: confidence from the facts, the rest from the teacher."""

from __future__ import annotations

from typing import Any

from benchmarks.claims.claim import Arm, Claim, Metric, WarmStart, at_end
from benchmarks.claims.privileged import SHOWN, SHOWN_WITH_RATE
from benchmarks.claims.report import Results, compare

CONFIGS = "benchmarks/claims/configs"
PASSED = "held-out pass@1 at the end, familiar problems"


def calibrated(rewrite: bool) -> list[dict[str, Any]]:
    """The callback, to measure only or to rewrite."""
    own = {"rewrite": rewrite, "skip_tokens": 0}
    return [{"class_path": "lit_rl.callbacks.CalibratedOPD", "init_args": own}]


CLAIM = Claim(
    name="caopd",
    title="CaOPD",
    sentence="Distilling from a teacher that knows the answer makes a student overconfident; with its confidence replaced by "
    "its measured success rate it learns as much and is calibrated.",
    source="arXiv 2604.16830",
    setup="Self-distillation with the answer in view, as in OPSD, by a policy whose solutions end with a line like "
    "`Confidence: 0.38`. In the warm start, on additions of two or three digits, whoever does not see the answer is careless "
    "and says anything between 0.50 and 1.00, whoever sees it (`57+68=[125]`) carries and says 0.95 or more, and whoever is told "
    "a rate with it (`57+68=[125;0.38]`) says that rate. Half of the problems of training and of evaluation are of that kind, "
    "half have five or six digits and are hardly ever solved. The teacher is a moving average of the student. `opsd` distils all "
    "that the teacher says; `caopd` replaces the confidence by the share of right completions among the 8 of the prompt, in the "
    "completion and in the teacher's prompt. Confidence and correctness are read from completions of held-out problems.",
    tried=[
        "Familiar problems alone, 100 steps: overconfidence fell from 0.235 to 0.011, but the calibration error rose from 0.235 to "
        "0.275 (five seeds): the student states a rate drawn from those that it has seen, and on problems that are about equally "
        "hard this says nothing about the completion at hand. One to five digits, 200 steps, one seed: 0.156 and 0.171.",
    ],
    warm_start=WarmStart(
        ("configs/quickstart-warmup.yaml", f"{CONFIGS}/confident-warmup.yaml"),
        vocabulary_size=99,
    ),
    configs=["configs/quickstart.yaml", f"{CONFIGS}/confident.yaml", "configs/methods/opsd.yaml"],
    overrides={
        "model.init_args.teacher": {
            "class_path": "lit_rl.policies.EMA",
            "init_args": {"decay": 0.99, "copy_first": False},
        },
        "model.init_args.divergence.entry_clip": None,
        "model.init_args.aggregation": "sequence_mean",
        "model.init_args.group_size": 8,
        "model.init_args.max_rollouts": 100,
        "trainer.val_check_interval": 10,
        "data.init_args.sources.familiar.init_args.seed": "{seed}",
        "data.init_args.sources.beyond.init_args.seed": "{seed}",
    },
    arms=[
        Arm(
            "opsd",
            overrides={"model.init_args.prompt.template": SHOWN, "trainer.callbacks+": calibrated(rewrite=False)},
        ),
        Arm(
            "caopd",
            overrides={
                "model.init_args.prompt.template": SHOWN_WITH_RATE,
                "trainer.callbacks+": calibrated(rewrite=True),
            },
        ),
    ],
    metrics=[
        Metric("calibration error (ECE) at the end", at_end("val/ece", over=3), "lower"),
        Metric("Brier score at the end", at_end("val/brier", over=3), "lower"),
        Metric("overconfidence at the end", at_end("val/overconfidence", over=3), "lower"),
        Metric(PASSED, at_end("val/familiar/pass@1", over=3), "higher"),
    ],
    curves=["val/familiar/pass@1", "val/ece", "val/overconfidence"],
)


def verdict(results: Results) -> str:
    """What the numbers say."""
    error, final = "calibration error (ECE) at the end", PASSED
    return f"ECE: {compare(results, 'opsd', 'caopd', error)}; pass@1: {compare(results, 'opsd', 'caopd', final)}."
