# SPDX-License-Identifier: Apache-2.0
"""`MuonAdamW` is Muon on the matrices and AdamW on the rest, and one optimizer to everybody else."""

import copy

import pytest
import torch
from torch.optim.lr_scheduler import LambdaLR

from lit_rl.optimizers import MuonAdamW

needs_muon = pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch has no Muon")


def shapes_and_gradients(steps: int, shapes: list[tuple[int, ...]], seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    parameters = [torch.nn.Parameter(torch.randn(s, generator=generator)) for s in shapes]
    return parameters, [[torch.randn(s, generator=generator) for s in shapes] for _ in range(steps)]


def run(optimizer: torch.optim.Optimizer, parameters: list, gradients: list) -> None:
    for step in gradients:
        for p, g in zip(parameters, step):
            p.grad = g.clone()
        optimizer.step()


SHAPES: list[tuple[int, ...]] = [(6, 4), (5,), (40, 3), (4, 6), (2, 2, 2)]


@needs_muon
def test_equals_its_parts_run_apart():
    parameters, gradients = shapes_and_gradients(4, SHAPES)
    apart = copy.deepcopy(parameters)
    run(MuonAdamW(parameters, lr=0.02, weight_decay=0.3, embedding_rows=40), parameters, gradients)
    muon = torch.optim.Muon([apart[0], apart[3]], lr=0.02, weight_decay=0.3, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW([apart[1], apart[2], apart[4]], lr=0.02, weight_decay=0.3, betas=(0.9, 0.95))
    for step in gradients:
        for p, g in zip(apart, step):
            p.grad = g.clone()
        muon.step()
        adamw.step()
    for mine, theirs in zip(parameters, apart):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0)


@needs_muon
def test_continues_exactly_from_its_state():
    parameters, gradients = shapes_and_gradients(6, SHAPES)
    whole, halves = copy.deepcopy(parameters), copy.deepcopy(parameters)
    run(MuonAdamW(whole, lr=0.02), whole, gradients)
    first = MuonAdamW(halves, lr=0.02)
    run(first, halves, gradients[:3])
    second = MuonAdamW(halves, lr=0.5)  # the rate is part of the state
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    run(second, halves, gradients[3:])
    for a, b in zip(whole, halves):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@needs_muon
def test_a_scheduler_reaches_both_parts_also_after_loading():
    parameters, gradients = shapes_and_gradients(1, [(3, 3), (3,)])
    optimizer = MuonAdamW(parameters, lr=1.0, weight_decay=0.0)
    optimizer.load_state_dict(optimizer.state_dict())
    LambdaLR(optimizer, lambda step: 0.0)
    before = copy.deepcopy(parameters)
    run(optimizer, parameters, gradients)
    assert all(torch.equal(a, b) for a, b in zip(before, parameters))


@needs_muon
def test_groups_keep_their_own_rates():
    frozen, moving = torch.nn.Parameter(torch.ones(2, 2)), torch.nn.Parameter(torch.ones(2, 2))
    optimizer = MuonAdamW([{"params": [frozen], "lr": 0.0}, {"params": [moving]}], lr=0.1)
    run(optimizer, [frozen, moving], [[torch.eye(2), torch.eye(2)]])
    assert torch.equal(frozen, torch.ones(2, 2))
    assert not torch.equal(moving, torch.ones(2, 2))


@needs_muon
@pytest.mark.parametrize("shape", [(3, 3), (3,)])
def test_one_kind_of_parameter_is_enough(shape: tuple[int, ...]):
    parameters, gradients = shapes_and_gradients(1, [shape])
    before = copy.deepcopy(parameters)
    run(MuonAdamW(parameters, lr=0.1), parameters, gradients)
    assert not torch.equal(before[0], parameters[0])
