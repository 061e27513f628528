# SPDX-License-Identifier: Apache-2.0
"""Interventions: Lightning callbacks over the stage hooks of a training step, one idea a file."""

from lit_rl.callbacks.alarm import RewardAlarm
from lit_rl.callbacks.autonpo import AutoNPO
from lit_rl.callbacks.caopd import CalibratedOPD
from lit_rl.callbacks.dot import DynamicOutlierTruncation
from lit_rl.callbacks.dynamic_sampling import DynamicSampling
from lit_rl.callbacks.entropy import EntropyMonitor
from lit_rl.callbacks.gradients import TermGradients
from lit_rl.callbacks.grpo_lambda import GRPOLambda
from lit_rl.callbacks.guard import Bound, DivergenceGuard
from lit_rl.callbacks.margin import MarginCalibration
from lit_rl.callbacks.npo import NPOSchedule
from lit_rl.callbacks.outcome_balance import UniOPDBalance
from lit_rl.callbacks.paced import PACED
from lit_rl.callbacks.pds import PredictiveDynamicSampling
from lit_rl.callbacks.recap import RECAP
from lit_rl.callbacks.recap_objective import Objective
from lit_rl.callbacks.reference_update import ReferenceUpdate
from lit_rl.callbacks.rollout_logger import RolloutLogger
from lit_rl.callbacks.schedule import ScalarSchedule
from lit_rl.callbacks.tip import TokenImportance

__all__ = [
    "PACED",
    "RECAP",
    "AutoNPO",
    "Bound",
    "CalibratedOPD",
    "DivergenceGuard",
    "DynamicOutlierTruncation",
    "DynamicSampling",
    "EntropyMonitor",
    "GRPOLambda",
    "MarginCalibration",
    "NPOSchedule",
    "Objective",
    "PredictiveDynamicSampling",
    "ReferenceUpdate",
    "RewardAlarm",
    "RolloutLogger",
    "ScalarSchedule",
    "TermGradients",
    "TokenImportance",
    "UniOPDBalance",
]
