# SPDX-License-Identifier: Apache-2.0
"""Methods: one LightningModule each."""

from lit_rl.methods.gopd import GOPD
from lit_rl.methods.grpo import GRPO
from lit_rl.methods.kdrl import KDRL
from lit_rl.methods.module import RLModule
from lit_rl.methods.opd import OPD
from lit_rl.methods.opsd import OPSD
from lit_rl.methods.reasoning import ReasonFirst
from lit_rl.methods.rlad import RLAD
from lit_rl.methods.rlsd import RLSD
from lit_rl.methods.sft import SFT
from lit_rl.methods.terms import Current, LossTerm, Term, TokenTerm

__all__ = [
    "GOPD",
    "GRPO",
    "KDRL",
    "OPD",
    "OPSD",
    "RLAD",
    "RLSD",
    "SFT",
    "Current",
    "LossTerm",
    "RLModule",
    "ReasonFirst",
    "Term",
    "TokenTerm",
]
