# SPDX-License-Identifier: Apache-2.0
"""Two ranks end where one ends: every decision of a distillation that looks at the whole batch, at once."""

from pathlib import Path
from typing import Any

import pytest
from lessons import told_the_answer

from lit_rl.callbacks import PACED, MarginCalibration, TokenImportance, UniOPDBalance
from lit_rl.methods import KDRL, OPD, RLSD
from lit_rl.policies import Live, PrivilegedPrompt, Snapshot
from lit_rl.testing import check_two_ranks, make_module

LARGE: dict[str, Any] = {"group_size": 4, "max_rollouts": 3}


def gradient(policy: Path) -> OPD:
    return make_module(policy, OPD, teacher=told_the_answer(Live()), loss="policy_gradient", **LARGE)


def everything() -> list[Any]:
    """Random balance, margins, weights and token choices, each over both ranks."""
    return [
        UniOPDBalance(scope="global", keep_for_margin=True),
        MarginCalibration(scope="global"),
        PACED(memory=0.5),
        TokenImportance(0.5),
    ]


def rewarded(policy: Path) -> KDRL:
    return make_module(policy, KDRL, teacher=told_the_answer(Live()), kd_coef=0.5, kd_mask="group", **LARGE)


def privileged(policy: Path) -> RLSD:
    prompt = PrivilegedPrompt("{answer};{prompt}")
    return make_module(policy, RLSD, prompt=prompt, teacher=Snapshot(every=2), **LARGE)


def dropping() -> list[Any]:
    """Rows that go, so that the ranks hold different numbers of them."""
    return [UniOPDBalance()]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("module", "callbacks"),
    [(gradient, everything), (rewarded, dropping), (privileged, list)],
    ids=lambda f: f.__name__,
)
def test_two_ranks_train_like_one(tmp_path: Path, module: Any, callbacks: Any):
    check_two_ranks(tmp_path, callbacks=callbacks, module=module)
