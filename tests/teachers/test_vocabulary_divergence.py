# SPDX-License-Identifier: Apache-2.0
"""Divergences over the vocabulary: the paper cards' numbers, naive loops, tiles against plain autograd."""

import math

import pytest
import torch
from torch import Tensor, nn

from lit_rl.objectives import Divergence, forward_kl, jsd, reverse_kl
from lit_rl.policies import divergence_tiles as tiles
from lit_rl.policies import head as head_module
from lit_rl.policies.divergence import compare, gathered_logprobs, top_logprobs, vocabulary_divergence
from lit_rl.policies.divergence_tiles import View
from lit_rl.policies.scoring import Head

TEACHER, STUDENT = (0.7, 0.2, 0.1), (0.2, 0.5, 0.3)
M, V = 7, 23

DIVERGENCES = [
    Divergence(beta=0.0),
    Divergence(beta=1.0),
    Divergence(beta=0.3),
    Divergence(beta=0.0, entry_clip=0.05),
    Divergence(beta=1.0, entry_clip=0.05),
    Divergence(beta=0.5, entry_clip=0.02),
    Divergence(beta=0.0, token_clip=0.8),
    Divergence(beta=0.0, top_k=4),
    Divergence(beta=0.4, top_k=4, tail="renormalize"),
    Divergence(beta=0.0, top_k=4, tail="drop"),
    Divergence(beta=1.0, top_k=V, entry_clip=0.1),
]


def logits(*probabilities: float) -> Tensor:
    return torch.tensor(probabilities, dtype=torch.float64).log()


def value_and_gradient(divergence: Divergence, student: tuple, teacher: tuple, temperature: float = 1.0):
    z = logits(*student).requires_grad_()
    value = divergence.of_logits(z / temperature, logits(*teacher) / temperature)
    return value.item(), torch.autograd.grad(value, z)[0].tolist()


# --- closed forms ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("beta", "value", "gradient"),
    [
        (0.0, 0.583815, (-0.5, 0.3, 0.2)),
        (1.0, 0.537176, (-0.357988, 0.189557, 0.168431)),
        (0.5, 0.132918, (-0.094872, 0.054721, 0.040151)),
        (0.1, 0.050995, None),
    ],
)
def test_values_and_gradients_of_the_family(beta, value, gradient):
    found, slope = value_and_gradient(Divergence(beta), STUDENT, TEACHER)
    assert found == pytest.approx(value, abs=1e-6)
    assert sum(slope) == pytest.approx(0, abs=1e-12)
    if gradient is not None:
        assert slope == pytest.approx(gradient, abs=1e-6)


def test_swapping_the_models_mirrors_beta():
    one = value_and_gradient(Divergence(0.1), STUDENT, TEACHER)[0]
    assert one == pytest.approx(value_and_gradient(Divergence(0.9), TEACHER, STUDENT)[0])


def test_the_mixture_formula_vanishes_at_the_ends_so_they_are_branches():
    assert value_and_gradient(Divergence(1e-3), STUDENT, TEACHER)[0] == pytest.approx(5.8303e-4, abs=1e-8)
    assert value_and_gradient(Divergence(0.0), STUDENT, TEACHER)[0] > 0.5


def test_a_temperature_divides_both_and_scales_the_gradient():
    gradient = value_and_gradient(Divergence(0.0), STUDENT, TEACHER, temperature=1.1)[1]
    assert gradient == pytest.approx((-0.418297, 0.245347, 0.172950), abs=1e-6)


def test_clipping_entries_can_point_away_from_the_teacher_and_clipping_tokens_cannot():
    student, teacher = (0.1, 0.9), (0.9, 0.1)
    value, gradient = value_and_gradient(Divergence(0.0), student, teacher)
    assert value == pytest.approx(1.757780, abs=1e-6)
    assert gradient == pytest.approx((-0.8, 0.8))
    value, gradient = value_and_gradient(Divergence(0.0, entry_clip=0.05), student, teacher)
    assert value == pytest.approx(-0.169722, abs=1e-6)
    assert gradient == pytest.approx((0.01, -0.01))
    value, gradient = value_and_gradient(Divergence(0.0, token_clip=0.05), student, teacher)
    assert value == pytest.approx(0.05)
    assert gradient == [0.0, 0.0]


def test_entry_clip_in_a_mild_case():
    assert value_and_gradient(Divergence(0.0), (0.5, 0.5), (0.6, 0.4))[0] == pytest.approx(0.020136, abs=1e-6)
    clipped = value_and_gradient(Divergence(0.0, entry_clip=0.05), (0.5, 0.5), (0.6, 0.4))[0]
    assert clipped == pytest.approx(-0.039257, abs=1e-6)


def test_top_k():
    renormalised = value_and_gradient(Divergence(0.0, top_k=2, tail="renormalize"), STUDENT, TEACHER)[0]
    assert renormalised == pytest.approx(0.519437, abs=1e-6)
    dropped = value_and_gradient(Divergence(0.0, top_k=2, tail="drop"), STUDENT, TEACHER)[0]
    assert dropped == pytest.approx(0.7 * math.log(3.5) + 0.2 * math.log(0.4))
    bucket = value_and_gradient(Divergence(0.0, top_k=1), STUDENT, TEACHER)[0]
    assert bucket == pytest.approx(0.7 * math.log(0.7 / 0.2) + 0.3 * math.log(0.3 / 0.8))
    for tail in ("bucket", "renormalize", "drop"):
        whole = value_and_gradient(Divergence(0.3, top_k=3, tail=tail), STUDENT, TEACHER)
        assert whole == value_and_gradient(Divergence(0.3), STUDENT, TEACHER)


def test_a_bucket_hides_only_what_happens_inside_it():
    """Merging outcomes never increases a divergence, and k = V - 1 merges nothing."""
    full = value_and_gradient(Divergence(0.0), STUDENT, TEACHER)[0]
    values = [value_and_gradient(Divergence(0.0, top_k=k), STUDENT, TEACHER)[0] for k in (1, 2)]
    assert values[0] <= values[1] == pytest.approx(full, abs=1e-6)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_equal_models_have_neither_divergence_nor_gradient(divergence):
    if divergence.tail == "drop":
        pytest.skip("a dropped tail has a gradient at its minimum: the student's mass outside the top")
    value, gradient = value_and_gradient(divergence, STUDENT, STUDENT)
    assert value == pytest.approx(0, abs=1e-7)
    assert gradient == pytest.approx((0, 0, 0), abs=1e-7)


@pytest.mark.parametrize("divergence", [Divergence(b, entry_clip=c) for b in (0.0, 1.0, 0.4) for c in (None, 0.05)])
def test_a_naive_loop_over_the_vocabulary(divergence):
    generator = torch.Generator().manual_seed(0)
    p, q = torch.randn(2, 9, generator=generator, dtype=torch.float64).softmax(-1).tolist()
    total = 0.0
    for x, y in zip(p, q):
        m = divergence.beta * y + (1 - divergence.beta) * x
        summand = {0.0: y * math.log(y / x), 1.0: x * math.log(x / y)}.get(
            divergence.beta, divergence.beta * y * math.log(y / m) + (1 - divergence.beta) * x * math.log(x / m)
        )
        total += summand if divergence.entry_clip is None else min(summand, divergence.entry_clip)
    assert value_and_gradient(divergence, p, q)[0] == pytest.approx(total, abs=1e-12)


@pytest.mark.parametrize("divergence", [Divergence(b) for b in (0.0, 1.0, 0.4)])
def test_slopes_are_the_derivative_of_the_summands(divergence):
    log_p = torch.tensor([-0.5, -2.0, -6.0], dtype=torch.float64, requires_grad=True)
    log_q = torch.tensor([-1.5, -0.4, -5.0], dtype=torch.float64)
    (expected,) = torch.autograd.grad(divergence.entries(log_p, log_q).sum(), log_p)
    torch.testing.assert_close(divergence.slopes(log_p, log_q).detach(), expected)


def test_excluded_words_are_finite():
    z = torch.tensor([0.3, -math.inf], requires_grad=True)
    for divergence in (Divergence(0.0), Divergence(1.0), Divergence(0.5)):
        value = divergence.of_logits(z, torch.tensor([0.1, -math.inf]))
        assert value.isfinite()
        assert torch.autograd.grad(value, z)[0].isfinite().all()


@pytest.mark.parametrize(
    ("arguments", "match"),
    [({"beta": 1.5}, "beta"), ({"entry_clip": 0.0}, "entry_clip"), ({"top_k": 0}, "top_k"), ({"tail": "x"}, "tail")],
)
def test_impossible_settings_are_refused(arguments, match):
    with pytest.raises(ValueError, match=match):
        Divergence(**arguments)


def test_describe():
    assert Divergence(0.0).describe() == "KL(teacher || policy)"
    assert "at most 0.05" in Divergence(0.5, entry_clip=0.05).describe()
    assert "top 8, renormalised" in Divergence(1.0, top_k=8, tail="renormalize").describe()


# --- tiles -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def several_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of two tokens, blocks of three words and backward tiles of 40 numbers: every border is crossed."""
    monkeypatch.setitem(head_module._TILE_BYTES, "cpu", 40 * 8)
    monkeypatch.setitem(tiles._FULL_ROWS_BYTES, "cpu", 2 * 2 * V * 8)
    monkeypatch.setitem(tiles._BLOCK_BYTES, "cpu", 2 * 3 * 4)


def random_head(rows: int, width: int, seed: int, dtype: torch.dtype, bias: bool, softcap: float | None, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    linear = nn.Linear(width, rows, bias=bias).to(dtype)
    with torch.no_grad():
        for parameter in linear.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(dtype))
    return Head(linear, linear.weight, linear.bias, softcap, scale, rows)


def pair(dtype=torch.float64, bias=False, softcap=None, scale=1.0, padding=(2, 0)) -> tuple[View, View]:
    """Two views of the same M tokens: other widths, other padding."""
    generator = torch.Generator().manual_seed(9)
    hidden = torch.randn(M, 5, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    theirs = torch.randn(M, 4, generator=generator, dtype=torch.float64).to(dtype)
    student = View(hidden, random_head(V + padding[0], 5, 1, dtype, bias, softcap, scale))
    return student, View(theirs, random_head(V + padding[1], 4, 2, dtype, bias, None))


def gradients(value: Tensor, view: View) -> list[Tensor]:
    leaves = [view.hidden, *view.head.module.parameters()]
    return list(torch.autograd.grad(value, leaves))


def plain(student: View, teacher: View, divergence: Divergence, temperature: float, vocab_size: int = V) -> Tensor:
    z, y = (v.head.logits(v.hidden)[:, :vocab_size] / temperature for v in (student, teacher))
    return divergence.of_logits(z, y)


@pytest.mark.usefixtures("several_tiles")
@pytest.mark.parametrize("divergence", DIVERGENCES, ids=str)
@pytest.mark.parametrize(
    "setting", [{}, {"bias": True, "softcap": 1.5}, {"softcap": 4.0, "scale": 0.6}, {"padding": (0, 3)}], ids=str
)
@pytest.mark.parametrize("announced", [False, True])
def test_tiles_equal_the_plain_form_and_its_gradients(divergence, setting, announced):
    student, teacher = pair(**setting)
    temperature = 1.3
    upstream = torch.randn(M, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    upstream[2] = 0.0
    weights = 7 * upstream if announced else None
    results = []
    for value in (
        vocabulary_divergence(student, teacher, divergence, temperature=temperature, weights=weights),
        plain(student, teacher, divergence, temperature),
    ):
        results.append([value.detach(), *gradients((value * upstream).sum(), student)])
    for ours, reference in zip(*results, strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-9, atol=1e-12)


@pytest.mark.usefixtures("several_tiles")
@pytest.mark.parametrize("divergence", [Divergence(0.0), Divergence(0.5, token_clip=0.5)], ids=str)
def test_announced_weights_save_the_second_computation_and_nothing_else(divergence, monkeypatch):
    """Right, scaled, wrong and repeated: the gradient is always the one that was asked for."""
    student, teacher = pair(bias=True)
    recomputed = []
    original = tiles._DivergenceGradients.run
    monkeypatch.setattr(
        tiles._DivergenceGradients, "run", lambda self, tokens: (recomputed.append(1), original(self, tokens))
    )
    weights = torch.rand(M, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    for upstream, again in ((weights, 0), (-3 * weights, 0), (weights.flip(0), 1), (weights + 1e-9, 1)):
        value = vocabulary_divergence(student, teacher, divergence, weights=weights)
        expected = gradients((plain(student, teacher, divergence, 1.0) * upstream).sum(), student)
        recomputed.clear()
        loss = (value * upstream).sum()
        leaves = [student.hidden, *student.head.module.parameters()]
        first = torch.autograd.grad(loss, leaves, retain_graph=True)
        assert len(recomputed) == again
        second = torch.autograd.grad(loss, leaves)
        for found in (first, second):
            for a, b in zip(found, expected, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_without_gradients_nothing_is_made_early():
    student, teacher = pair()
    with torch.no_grad():
        value = vocabulary_divergence(student, teacher, Divergence(), weights=torch.ones(M))
    torch.testing.assert_close(value, plain(student, teacher, Divergence(), 1.0).detach())


@pytest.mark.usefixtures("several_tiles")
def test_tokens_without_gradient_are_skipped(monkeypatch: pytest.MonkeyPatch):
    student, teacher = pair()
    seen = []
    original = tiles._DivergenceGradients.run
    monkeypatch.setattr(
        tiles._DivergenceGradients,
        "run",
        lambda self, tokens: (seen.append(len(tokens.hidden)), original(self, tokens)),
    )
    value = vocabulary_divergence(student, teacher, Divergence(0.5))
    weights = torch.tensor([0, 1, 0, 0, 2, 0, 0], dtype=torch.float64)
    ours = gradients((value * weights).sum(), student)
    assert seen == [2]
    expected = gradients((plain(student, teacher, Divergence(0.5), 1.0) * weights).sum(), student)
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    assert ours[0][weights == 0].eq(0).all()


@pytest.mark.usefixtures("several_tiles")
def test_the_teacher_receives_no_gradient():
    student, teacher = pair()
    theirs = View(teacher.hidden.requires_grad_(), teacher.head)
    for divergence in (Divergence(0.0), Divergence(0.0, top_k=3)):
        value = vocabulary_divergence(student, theirs, divergence).sum()
        grads = torch.autograd.grad(value, [theirs.hidden, theirs.head.weight], allow_unused=True)
        assert grads == (None, None)


@pytest.mark.usefixtures("several_tiles")
@pytest.mark.parametrize("divergence", [Divergence(0.0), Divergence(0.6), Divergence(0.5, top_k=4)], ids=str)
def test_a_frozen_head_still_gives_the_gradient_of_the_hidden_states(divergence):
    student, teacher = pair()
    (expected,) = torch.autograd.grad(vocabulary_divergence(student, teacher, divergence).sum(), student.hidden)
    student.head.module.requires_grad_(False)
    (found,) = torch.autograd.grad(vocabulary_divergence(student, teacher, divergence).sum(), student.hidden)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("divergence", [Divergence(0.0), Divergence(0.5), Divergence(1.0, top_k=4)], ids=str)
def test_a_head_that_is_more_than_linear_takes_the_slower_way(divergence):
    student, teacher = pair()
    whole = Head(student.head.module, None, None, None, 1.0, student.head.vocab_size)
    ours = vocabulary_divergence(View(student.hidden, whole), teacher, divergence, chunk_tokens=3)
    reference = plain(student, teacher, divergence, 1.0)
    torch.testing.assert_close(ours, reference)
    for a, b in zip(gradients(ours.sum(), student), gradients(reference.sum(), student), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_lower_precision_accumulates_in_float32(dtype):
    student, teacher = pair(dtype)
    wide = [View(v.hidden.detach().double(), random_double(v.head)) for v in (student, teacher)]
    for divergence in (Divergence(0.0), Divergence(0.5), Divergence(0.0, top_k=4)):
        value = vocabulary_divergence(student, teacher, divergence)
        assert value.dtype == torch.float32
        torch.testing.assert_close(value.double(), plain(*wide, divergence, 1.0), rtol=1e-4, atol=1e-4)
        assert gradients(value.sum(), student)[0].dtype == dtype


def random_double(head: Head) -> Head:
    linear = nn.Linear(head.weight.shape[1], head.vocab_size, bias=False).double()
    with torch.no_grad():
        linear.weight.copy_(head.weight)
    return Head(linear, linear.weight, None, head.softcap, head.scale, head.vocab_size)


@pytest.mark.parametrize("divergence", [Divergence(0.0), Divergence(0.0, top_k=4)], ids=str)
def test_no_tokens_at_all(divergence):
    student, teacher = pair()
    empty = View(student.hidden[:0], student.head)
    for weights in (None, torch.zeros(0)):
        value = vocabulary_divergence(empty, View(teacher.hidden[:0], teacher.head), divergence, weights=weights)
        assert value.shape == (0,)
        value.sum().backward()
    assert compare(empty, View(teacher.hidden[:0], teacher.head)).reverse.shape == (0,)


@pytest.mark.usefixtures("several_tiles")
def test_gathered_and_top_logprobs_are_those_of_the_softmax():
    student, _ = pair(bias=True)
    full = (student.head.logits(student.hidden)[:, :V] / 0.7).log_softmax(-1)
    values, ids = top_logprobs(student, 3, temperature=0.7, vocab_size=V)
    expected = full.detach().topk(3)
    torch.testing.assert_close(values, expected.values)
    assert torch.equal(ids, expected.indices)
    several = torch.tensor([[0, 5, 5], [22, 1, 7], [3, 3, 3], [9, 10, 11], [0, 1, 2], [20, 21, 22], [4, 14, 8]])
    ours = gathered_logprobs(student, several, temperature=0.7, vocab_size=V)
    torch.testing.assert_close(ours, full.gather(1, several))
    upstream = torch.randn(M, 3, dtype=torch.float64)
    for a, b in zip(
        gradients((ours * upstream).sum(), student), gradients((full.gather(1, several) * upstream).sum(), student)
    ):
        torch.testing.assert_close(a, b)


def test_compare_gives_all_divergences_and_entropies():
    student, teacher = pair()
    found = compare(student, teacher, temperature=0.8)
    z, y = (v.head.logits(v.hidden)[:, :V].detach() / 0.8 for v in (student, teacher))
    for ours, reference in zip(found[:3], (forward_kl(z, y), reverse_kl(z, y), jsd(z, y))):
        torch.testing.assert_close(ours, reference)
    for ours, x in zip(found[3:], (z, y)):
        torch.testing.assert_close(ours, torch.distributions.Categorical(logits=x).entropy())
    assert not found.reverse.requires_grad


def test_shapes_that_do_not_fit_are_refused():
    student, teacher = pair()
    with pytest.raises(ValueError, match="same M tokens"):
        vocabulary_divergence(student, View(teacher.hidden[:3], teacher.head), Divergence())
    with pytest.raises(ValueError, match="temperature"):
        vocabulary_divergence(student, teacher, Divergence(), temperature=0.0)
    with pytest.raises(ValueError, match="shorter head"):
        vocabulary_divergence(student, teacher, Divergence(), vocab_size=V + 1)
