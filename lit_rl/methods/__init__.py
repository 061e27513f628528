# SPDX-License-Identifier: Apache-2.0
"""Methods: one LightningModule each."""

from lit_rl.methods.grpo import GRPO
from lit_rl.methods.module import RLModule
from lit_rl.methods.sft import SFT
from lit_rl.methods.terms import Current, LossTerm, Term, TokenTerm

__all__ = ["GRPO", "SFT", "Current", "LossTerm", "RLModule", "Term", "TokenTerm"]
