# SPDX-License-Identifier: Apache-2.0
"""One GRPO run, done by lit-rl and by TRL with the same model, prompts and settings, each in a process of its own."""
