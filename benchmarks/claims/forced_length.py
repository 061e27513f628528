# SPDX-License-Identifier: Apache-2.0
"""Accuracy against forced length: how often a policy is right when it must answer after exactly k passes.

A length claim means something only on a task where answering too shortly costs accuracy; this is the proof of that.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from lit_rl.datamodules import ArithmeticDataModule
from lit_rl.policies import Policy
from lit_rl.prompts import PromptEncoder
from lit_rl.samplers import HFSampler, RolloutRequest, Sampling

START, AGAIN, ANSWER = ">", "?", "#"  # the marks of a solution: first pass, another pass, answer


@torch.no_grad()
def accuracy_by_passes(folder: Path, passes: Sequence[int] = (0, 1, 2, 3), problems: int = 256) -> list[dict[str, Any]]:
    """Make the policy answer after exactly k passes, for each k.

    Args:
        folder: the policy in hub format.
        passes: the forced numbers of passes; 0 answers at once.
        problems: held-out problems, one completion each.

    Returns:
        For each k: ``passes``, ``accuracy`` and ``tokens`` (mean completion length).
    """
    model, tokenizer = Policy(str(folder)).load()
    sampler, encoder = HFSampler(), PromptEncoder(tokenizer)
    sampler.setup(model, tokenizer)
    records = ArithmeticDataModule(val_size=problems).validation_records()
    written = [""] * len(records)

    def go_on(sampling: Sampling) -> list[str]:
        """The policy's continuation of every problem with what is already written."""
        prompts = encoder.encode([r | {"prompt": r["prompt"] + w} for r, w in zip(records, written)], range(problems))
        rollouts = sampler.sample(RolloutRequest.for_groups(prompts, 1, sampling, seed=len(written[0])))
        return tokenizer.batch_decode(rollouts.completions(), skip_special_tokens=True)

    answering = Sampling(max_tokens=8)
    working = dataclasses.replace(answering, max_tokens=96, stop=(AGAIN, ANSWER))
    found = []
    for k in range(max(passes) + 1):
        if k:
            opened = START if k == 1 else AGAIN
            written = [w + opened for w in written]
            written = [w + more.rstrip(AGAIN + ANSWER) for w, more in zip(written, go_on(working))]
        if k in passes:
            before, written = written, [w + ANSWER for w in written]
            answers = go_on(answering)
            right = [float(answer == record["answer"]) for answer, record in zip(answers, records)]
            lengths = [len(w) + len(answer) + 1 for w, answer in zip(written, answers)]  # a token a character, and EOS
            found.append(
                {"passes": k, "accuracy": statistics.fmean(right), "tokens": statistics.fmean(map(float, lengths))}
            )
            written = before
    return found


def forced_length_section(results: Any) -> str:
    """For a claim about length: the curve of the policy that its arms start from."""
    curve = as_table(accuracy_by_passes(results.policy))
    return (
        f"Answering too shortly costs accuracy here. The warm-started policy, made to answer after k passes:\n\n{curve}"
    )


def as_table(found: Sequence[dict[str, Any]]) -> str:
    """The curve as a table."""
    lines = ["| forced passes | held-out accuracy | tokens a completion |", "|---|---|---|"]
    lines += [f"| {row['passes']} | {row['accuracy']:.3f} | {row['tokens']:.1f} |" for row in found]
    return "\n".join(lines)
