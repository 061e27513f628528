# SPDX-License-Identifier: Apache-2.0
"""What is noted beside a divergence: entropies, reverse KL, clipped summands, mass on the teacher's top words."""

import math
from pathlib import Path

import pytest
import torch
from lessons import checkpoint_teacher, exact_module, token_losses
from torch import Tensor, nn

from lit_rl.methods import OPD, OPSD
from lit_rl.objectives import Divergence, reverse_kl
from lit_rl.policies import PrivilegedPrompt, divergence
from lit_rl.policies import divergence_tiles as tiles
from lit_rl.policies.divergence import vocabulary_divergence
from lit_rl.policies.divergence_tiles import Notes, View
from lit_rl.policies.scoring import Head
from lit_rl.testing import loss_and_gradients

M, V = 9, 23


def view(seed: int, width: int) -> View:
    generator = torch.Generator().manual_seed(seed)
    linear = nn.Linear(width, V, bias=False).double()
    with torch.no_grad():
        linear.weight.normal_(generator=generator)
    hidden = torch.randn(M, width, generator=generator, dtype=torch.float64)
    return View(hidden.requires_grad_(), Head(linear, linear.weight, None, None, 1.0, V))


def probabilities(of: View, temperature: float) -> list[list[float]]:
    return (of.head.logits(of.hidden).detach() / temperature).softmax(-1).tolist()


@pytest.mark.parametrize("beta", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("clip", [None, 0.02])
def test_notes_equal_a_naive_loop_and_change_nothing(beta, clip, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(tiles._BLOCK_BYTES, "cpu", 64)  # several blocks of words
    student, teacher, kind, notes = view(1, 5), view(2, 8), Divergence(beta, entry_clip=clip), Notes()
    found = vocabulary_divergence(student, teacher, kind, temperature=1.3, chunk_tokens=4, notes=notes)
    plain = vocabulary_divergence(student, teacher, kind, temperature=1.3, chunk_tokens=4)
    assert torch.equal(found, plain)
    assert torch.equal(*(torch.autograd.grad(x.sum(), student.hidden)[0] for x in (found, plain)))
    assert set(notes) == {"student_entropy", "teacher_entropy", "reverse"} | ({"clipped"} if clip else set())
    for t, (p, q) in enumerate(zip(probabilities(student, 1.3), probabilities(teacher, 1.3))):
        assert float(notes["student_entropy"][t]) == pytest.approx(-sum(x * math.log(x) for x in p))
        assert float(notes["teacher_entropy"][t]) == pytest.approx(-sum(x * math.log(x) for x in q))
        assert float(notes["reverse"][t]) == pytest.approx(sum(x * math.log(x / y) for x, y in zip(p, q)))
        if clip is not None:
            summands = [kind.entries(torch.tensor(x).log(), torch.tensor(y).log()) for x, y in zip(p, q)]
            assert int(notes["clipped"][t]) == sum(float(s) > clip for s in summands)
    if clip is not None:
        assert 0 < notes["clipped"].sum() < M * V


@pytest.mark.parametrize("looked_at", [64, 4])
def test_mass_and_overlap_of_the_top_words(looked_at, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(divergence, "_LOOKED_AT", looked_at)
    student, teacher, notes = view(1, 5), view(2, 8), Notes()
    vocabulary_divergence(student, teacher, Divergence(0.0, top_k=6), notes=notes)
    assert set(notes) == {"student_mass", "teacher_mass", "overlap"}
    seen = ~torch.isnan(notes["overlap"])
    assert bool(seen.all()) == (looked_at >= M)
    assert 0 < int(seen.sum()) <= looked_at
    for t, (p, q) in enumerate(zip(probabilities(student, 1.0), probabilities(teacher, 1.0))):
        mine, theirs = (sorted(range(V), key=lambda v, x=x: -x[v])[:6] for x in (p, q))
        assert float(notes["student_mass"][t]) == pytest.approx(sum(p[v] for v in theirs))
        assert float(notes["teacher_mass"][t]) == pytest.approx(sum(q[v] for v in theirs))
        if seen[t]:
            assert float(notes["overlap"][t]) == pytest.approx(len({*mine} & {*theirs}) / 6)


@pytest.mark.parametrize("top_k", [None, 4])
def test_no_tokens_at_all(top_k):
    student, teacher = (View(v.hidden[:0], v.head) for v in (view(1, 5), view(2, 8)))
    notes = Notes()
    vocabulary_divergence(student, teacher, Divergence(0.0, top_k=top_k), notes=notes)
    assert all(len(values) == 0 for values in notes.values())


def logged(module) -> dict[str, float]:
    return module.ledger.reduce(torch.device("cpu"))


def test_a_method_logs_them_over_the_trained_tokens(tmp_path: Path):
    clip = 0.002
    module = exact_module(
        tmp_path, OPSD, prompt=PrivilegedPrompt("{answer};{prompt}"), group_size=2,
        divergence=Divergence(0.0, entry_clip=clip),
    )  # fmt: skip
    with torch.no_grad():
        for parameter in module.model.parameters():
            parameter.mul_(1.3)
    batch = module.last_rollouts
    module.ledger.signals.sums.clear()
    loss_and_gradients(module, batch, 40)
    shown = module.shown_to(module.teachers[0], batch.prompts)

    def over_tokens(value) -> Tensor:
        return torch.cat(token_losses(module, batch, value, shown)).detach()

    numbers = logged(module)
    assert numbers["distill/reverse_kl"] == pytest.approx(float(over_tokens(reverse_kl).mean()))
    assert numbers["distill/reverse_kl_max"] >= float(over_tokens(reverse_kl).max()) - 1e-6
    entropy = over_tokens(lambda z, y: torch.distributions.Categorical(logits=y).entropy())
    assert numbers["distill/teacher_entropy"] == pytest.approx(float(entropy.mean()))
    clipped = over_tokens(lambda z, y: (y.softmax(-1) * (y.log_softmax(-1) - z.log_softmax(-1)) > clip).double().sum())
    assert float(clipped.mean()) > 0
    assert numbers["distill/clipped_ratio"] == pytest.approx(float(clipped.mean()) / module.model.config.vocab_size)
    assert numbers["distill/clipped_token_ratio"] == pytest.approx(float((clipped > 0).double().mean()))


def test_a_method_with_top_words_logs_their_mass(tmp_path: Path):
    module = exact_module(tmp_path, OPD, teacher=checkpoint_teacher(tmp_path), divergence=Divergence(0.0, top_k=3))
    module.ledger.signals.sums.clear()
    loss_and_gradients(module, module.last_rollouts, 10**6)
    numbers = logged(module)
    assert 0 < numbers["distill/top_k_student_mass"] < 1
    assert 0 < numbers["distill/top_k_teacher_mass"] < 1
    assert 0 <= numbers["distill/top_k_overlap"] <= 1
    mass = torch.cat(token_losses(module, module.last_rollouts, lambda z, y: y.softmax(-1).topk(3).values.sum()))
    assert numbers["distill/top_k_teacher_mass"] == pytest.approx(float(mass.mean()))
