# SPDX-License-Identifier: Apache-2.0
"""A run built in code: GRPO with three interventions on the quickstart's policy and task."""

import sys

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import TensorBoardLogger

from lit_rl import GRPO, Policy, Sampling
from lit_rl.callbacks import DynamicOutlierTruncation, GRPOLambda, ScalarSchedule
from lit_rl.checkpoint import DurableCheckpointIO, RolloutCheckpoint
from lit_rl.datamodules import ArithmeticDataModule
from lit_rl.rewards import ExactMatchReward


def main(policy: str = "runs/quickstart/policy", folder: str = "runs/compose", steps: int = 100) -> Trainer:
    """Train ``policy`` (in hub format) for ``steps`` steps and log to ``folder``."""
    method = GRPO(
        policy=Policy(policy),
        rewards=ExactMatchReward(marker="#", verifier=True),
        sampling=Sampling(max_tokens=128),
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1.5e-4, weight_decay=0.0),
        max_rollouts=steps,
    )
    interventions = [
        DynamicOutlierTruncation(alpha=2.0, min_margin=8),
        GRPOLambda(fraction=0.2),
        ScalarSchedule("sampling.temperature", start=1.0, end=0.8, steps=steps),
    ]
    logger = TensorBoardLogger(folder, name="", version="", default_hp_metric=False)
    options = {"max_epochs": -1, "log_every_n_steps": 1, "plugins": [DurableCheckpointIO()]}
    trainer = Trainer(logger=logger, callbacks=[*interventions, RolloutCheckpoint()], **options)
    trainer.fit(method, datamodule=ArithmeticDataModule())
    return trainer


if __name__ == "__main__":
    main(*sys.argv[1:3])
