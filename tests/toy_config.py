# SPDX-License-Identifier: Apache-2.0
"""The toy task as a configuration file, to be put under others."""

BASE = """
model:
  class_path: lit_rl.GRPO
  init_args:
    policy: {path: to be set}
    rewards:
      - class_path: lit_rl.rewards.FunctionReward
        init_args: {function: lit_rl.testing.toys.starts_with_digit, name: digit, verifier: true}
    sampling: {max_tokens: 8}
    optimizer: {class_path: torch.optim.AdamW, init_args: {lr: 1.0e-2}}
    prompts_per_step: 2
    group_size: 2
    max_rollouts: 2
data:
  class_path: lit_rl.testing.ToyData
trainer:
  accelerator: cpu
  limit_val_batches: 0
  enable_progress_bar: false
"""
