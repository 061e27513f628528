# SPDX-License-Identifier: Apache-2.0
"""The single-file GRPO and `lit_rl.GRPO` do the same arithmetic: advantages, loss and gradient on the same batch."""

from __future__ import annotations

import importlib.util
import random
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from lit_rl.methods import GRPO
from lit_rl.rollouts import Prompts, Rollouts
from lit_rl.testing import loss_and_gradients, make_module, make_policy, train

FILE = Path(__file__).parents[2] / "examples" / "grpo_from_scratch.py"
PROMPTS, GROUP = 3, 5


@pytest.fixture(scope="module")
def scratch() -> ModuleType:
    spec = importlib.util.spec_from_file_location("grpo_from_scratch", FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Batch(NamedTuple):
    """The same completions as the two programs hold them."""

    model: Any
    prompts: Tensor  # [N, P], padded left
    prompt_mask: Tensor
    completions: Tensor  # [N, T]
    mask: Tensor
    rewards: Tensor
    old: Tensor
    rollouts: Rollouts


@pytest.fixture(scope="module")
def batch(scratch: ModuleType) -> Batch:
    """Completions of the example's model, whose weights then move, so that some ratios leave the trust region."""
    torch.manual_seed(0)
    model = scratch.build_model()
    with torch.no_grad():  # an end token now and then: completions of different lengths
        model.lm_head.weight[scratch.END] *= 3
    digits = [scratch.draw_digits(random.Random(i)) for i in range(PROMPTS)]
    ids = [scratch.encode(d + "=") for d in digits]
    prompts, prompt_mask = scratch.pad(ids, side="left")
    completions, mask = scratch.sample(model, prompts, prompt_mask, GROUP)
    prompts, prompt_mask = (x.repeat_interleave(GROUP, 0) for x in (prompts, prompt_mask))
    rewards = torch.randint(0, 2, (PROMPTS * GROUP,)).float()
    rewards[-GROUP:] = 1.0  # a group that teaches nothing
    with torch.no_grad():
        old = scratch.completion_logprobs(model, prompts, prompt_mask, completions)
        for parameter in model.parameters():
            parameter += 0.05 * parameter.std() * torch.randn_like(parameter)
    rows = [row[kept.bool()] for row, kept in zip(completions, mask)]
    rollouts = Rollouts.build(
        Prompts(
            ids=[torch.tensor(i) for i in ids],
            text=digits,
            uid=torch.arange(PROMPTS),
            draw=torch.arange(PROMPTS),
            source=["digits"] * PROMPTS,
        ),
        torch.arange(PROMPTS).repeat_interleave(GROUP),
        rows,
    )
    rollouts.reward_terms["right"] = rewards.clone()
    rollouts.reward_weights["right"] = torch.ones_like(rewards)
    rollouts.logprobs["old"] = torch.where(rollouts.completion_mask, old[:, : rollouts.width], 0.0)
    return Batch(model, prompts, prompt_mask, completions, mask, rewards, old, rollouts)


@pytest.fixture(scope="module")
def method(batch: Batch, tmp_path_factory: pytest.TempPathFactory) -> GRPO:
    """`lit_rl.GRPO` with its defaults, on the example's model."""
    folder = tmp_path_factory.mktemp("scratch")
    module = make_module(make_policy(folder / "policy"), max_rollouts=1)
    train(folder, module)
    module.model = batch.model
    assert isinstance(module, GRPO)
    return module


def test_the_batch_has_what_could_tell_the_two_apart(scratch: ModuleType, batch: Batch):
    lengths = batch.mask.sum(1)
    assert lengths.min() < lengths.max()
    assert batch.prompt_mask.min() == 0
    with torch.no_grad():
        logprobs = scratch.completion_logprobs(batch.model, batch.prompts, batch.prompt_mask, batch.completions)
    ratio = (logprobs - batch.old).exp()[batch.mask.bool()]
    assert ratio.max() > 1 + scratch.CLIP
    assert ratio.min() < 1 - scratch.CLIP


def test_advantages_are_equal(scratch: ModuleType, batch: Batch, method: GRPO):
    mine = scratch.advantages(batch.rewards, GROUP)
    theirs = method.advantages(batch.rollouts)
    assert mine[-GROUP:].abs().max() < 1e-6
    torch.testing.assert_close(theirs, torch.where(batch.rollouts.completion_mask, mine[:, None], 0.0))


@pytest.mark.parametrize("micro_batch_tokens", [10**9, 40])
def test_loss_and_gradient_are_equal(micro_batch_tokens: int, scratch: ModuleType, batch: Batch, method: GRPO):
    batch.model.zero_grad()
    logprobs = scratch.completion_logprobs(batch.model, batch.prompts, batch.prompt_mask, batch.completions)
    loss = scratch.grpo_loss(logprobs, batch.old, scratch.advantages(batch.rewards, GROUP), batch.mask)
    loss.backward()
    expected = {n: p.grad.clone() for n, p in batch.model.named_parameters()}

    batch.rollouts.advantages = method.advantages(batch.rollouts)
    found, gradients = loss_and_gradients(method, batch.rollouts, micro_batch_tokens)
    assert found == pytest.approx(float(loss.detach()), abs=1e-6)
    assert gradients.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


def test_the_example_runs_without_the_package(scratch: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: Any):
    assert "import lit_rl" not in FILE.read_text()
    assert "from lit_rl" not in FILE.read_text()
    monkeypatch.setattr(scratch, "PRETRAINING_STEPS", 5)
    monkeypatch.setattr(scratch, "RL_STEPS", 10)
    scratch.main()
    assert "step  10  reward " in capsys.readouterr().out
