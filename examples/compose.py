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
        rewards=ExactMatchReward(marker="#"),
        sampling=Sampling(max_tokens=128),
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=2e-4, weight_decay=0.0),
        max_rollouts=steps,
    )
    interventions = [
        DynamicOutlierTruncation(alpha=2.0, min_margin=8),
        GRPOLambda(fraction=0.2),
        ScalarSchedule("sampling.temperature", start=1.0, end=0.8, steps=steps),
    ]
    logger = TensorBoardLogger(folder, name="", version="", default_hp_metric=False)
    trainer = Trainer(
        logger=logger, max_epochs=-1, callbacks=[*interventions, RolloutCheckpoint()], plugins=[DurableCheckpointIO()]
    )
    trainer.fit(method, datamodule=ArithmeticDataModule())
    return trainer


if __name__ == "__main__":
    main(*sys.argv[1:3])
