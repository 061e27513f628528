# SPDX-License-Identifier: Apache-2.0
"""The mathematics: pure functions and small value objects on tensors, without trainer, module or configuration.

Shapes: N rows (completions), T tokens, V vocabulary, P pairs.
"""

from lit_rl.objectives.advantages import (
    AdvantageNormalizer,
    AllReduce,
    discounted_returns,
    gdpo_advantages,
    generalized_advantages,
    identity,
    whiten,
)
from lit_rl.objectives.aggregation import Aggregation, aggregation_weights, row_weights
from lit_rl.objectives.corrections import (
    MismatchSums,
    OffPolicyCorrection,
    importance_weight,
    log_mismatch,
    mismatch_metrics,
    off_policy_sequence_mask,
    rejection_mask,
)
from lit_rl.objectives.covariance import ClipCov, KLCov, predicted_entropy_change, token_covariance
from lit_rl.objectives.divergences import Divergence, KLPenalty, forward_kl, jsd, kl_estimate, reverse_kl
from lit_rl.objectives.preferences import (
    PreferenceLoss,
    dpo_hinge,
    dpo_ipo,
    dpo_robust,
    dpo_sigmoid,
    sequence_log_ratios,
)
from lit_rl.objectives.surrogates import (
    CISPO,
    DPPO,
    GMPO,
    GSPO,
    SAPO,
    VESPO,
    Clip,
    PolicyLoss,
    Reinforce,
    Surrogate,
    TokenBatch,
)

__all__ = [
    "CISPO",
    "DPPO",
    "Divergence",
    "GMPO",
    "GSPO",
    "SAPO",
    "VESPO",
    "AdvantageNormalizer",
    "Aggregation",
    "AllReduce",
    "Clip",
    "ClipCov",
    "KLCov",
    "KLPenalty",
    "MismatchSums",
    "OffPolicyCorrection",
    "PolicyLoss",
    "PreferenceLoss",
    "Reinforce",
    "Surrogate",
    "TokenBatch",
    "aggregation_weights",
    "discounted_returns",
    "dpo_hinge",
    "dpo_ipo",
    "dpo_robust",
    "dpo_sigmoid",
    "forward_kl",
    "gdpo_advantages",
    "generalized_advantages",
    "identity",
    "importance_weight",
    "jsd",
    "kl_estimate",
    "log_mismatch",
    "mismatch_metrics",
    "off_policy_sequence_mask",
    "predicted_entropy_change",
    "rejection_mask",
    "reverse_kl",
    "row_weights",
    "sequence_log_ratios",
    "token_covariance",
    "whiten",
]
