# SPDX-License-Identifier: Apache-2.0
"""The same logits through TRL's GKD loss and ours; skipped where TRL is not installed."""

import pytest
import torch

from lit_rl.objectives import Divergence

pytest.importorskip("trl")


def generalized_jsd_loss():
    """TRL keeps moving the trainer."""
    try:
        from trl.experimental.gkd import GKDTrainer
    except ImportError:
        from trl import GKDTrainer
    return GKDTrainer.generalized_jsd_loss


@pytest.mark.peer
@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("temperature", [1.0, 0.9])
def test_value_and_gradient_equal_trls(beta: float, temperature: float):
    """beta 0 is the forward and beta 1 the reverse KL; the mean is over unmasked positions."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 3, 5, 17, generator=generator, dtype=torch.float64)
    labels = torch.where(torch.rand(3, 5, generator=generator) < 0.3, -100, 1)
    results = []
    for peer in (True, False):
        logits = student.clone().requires_grad_()
        if peer:
            loss = generalized_jsd_loss()(logits, teacher, labels=labels, beta=beta, temperature=temperature)
        else:
            values = Divergence(beta).of_logits(logits / temperature, teacher / temperature)
            loss = values[labels != -100].mean()
        results.append((loss.detach(), torch.autograd.grad(loss, logits)[0]))
    for theirs, ours in zip(*results):
        torch.testing.assert_close(ours, theirs)
