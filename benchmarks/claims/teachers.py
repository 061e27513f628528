# SPDX-License-Identifier: Apache-2.0
"""Teachers that several claims share, and how good they are."""

from __future__ import annotations

from benchmarks.claims.claim import Teacher, at_end
from benchmarks.claims.report import Results, number
from benchmarks.claims.runner import teacher_policy

HALF_TRAINED = Teacher(overrides={"model.init_args.max_rollouts": 12, "trainer.val_check_interval": 12})
"""The quickstart's policy early in its reinforcement learning: better than the student, far from perfect."""


def teacher_score(results: Results) -> str:
    """A sentence with the teacher's own held-out accuracy."""
    assert results.claim.teacher is not None
    run = teacher_policy(results.claim.teacher).parent / "run"
    return f"The teacher's own held-out pass@1 is {number(at_end('val/pass@1')(run))}."
