# SPDX-License-Identifier: Apache-2.0
"""The tiled head against the plain softmax over all logits."""

import pytest
import torch
from torch import Tensor

from lit_rl.policies import head as head_module
from lit_rl.policies.head import selected_logprobs

M, H, V = 7, 5, 23


@pytest.fixture(autouse=True)
def several_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of at most 40 float64 logits, so that every test crosses tile borders in both directions."""
    monkeypatch.setitem(head_module._TILE_BYTES, "cpu", 40 * 8)


def inputs(dtype: torch.dtype = torch.float64, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(M, H, generator=g, dtype=torch.float64).to(dtype)
    weight = torch.randn(V, H, generator=g, dtype=torch.float64).to(dtype)
    bias = torch.randn(V, generator=g, dtype=torch.float64).to(dtype)
    return hidden, weight, bias, torch.randint(0, V - 3, (M,), generator=g)


def naive(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    vocab_size: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-probabilities and entropies, one token after the other."""
    logprobs, entropies = [], []
    for h, target in zip(hidden, targets, strict=True):
        logits = weight @ h
        if bias is not None:
            logits = logits + bias
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        logp = torch.log_softmax(logits[:vocab_size] / temperature, -1)
        logprobs.append(logp[target])
        entropies.append(-(logp.exp() * logp).sum())
    return torch.stack(logprobs), torch.stack(entropies)


SETTINGS = [
    {},
    {"temperature": 0.7},
    {"softcap": 1.5},
    {"softcap": 2.0, "temperature": 1.3, "vocab_size": V - 3},
    {"vocab_size": V - 3},
]


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("chunk_tokens", [None, 1, 3, 100])
def test_equals_naive_with_gradients(settings: dict, with_bias: bool, chunk_tokens: int | None) -> None:
    hidden, weight, bias, targets = inputs()
    leaves = [x.requires_grad_() for x in (hidden, weight, bias)]
    bias_or_none = bias if with_bias else None
    upstream = torch.randn(2, M, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    results = []
    for outputs in (
        selected_logprobs(
            hidden, weight, targets, bias=bias_or_none, entropy=True, chunk_tokens=chunk_tokens, **settings
        ),
        naive(hidden, weight, targets, bias_or_none, **settings),
    ):
        grads = torch.autograd.grad((torch.stack(outputs) * upstream).sum(), leaves, allow_unused=True)
        results.append([*outputs, *(g for g in grads if g is not None)])
    assert len(results[0]) == len(results[1]) == (5 if with_bias else 4)
    for ours, reference in zip(*results, strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("settings", SETTINGS)
def test_gradcheck(settings: dict) -> None:
    hidden, weight, bias, targets = inputs()
    leaves = tuple(x.requires_grad_() for x in (hidden, weight, bias))

    def both(h: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        logprobs, entropy = selected_logprobs(h, w, targets, bias=b, entropy=True, **settings)
        assert entropy is not None
        return logprobs, entropy

    assert torch.autograd.gradcheck(both, leaves)


@pytest.mark.parametrize("which", [0, 1])
def test_each_output_alone_has_its_gradient(which: int) -> None:
    hidden, weight, _, targets = inputs()
    hidden.requires_grad_()
    (ours,) = torch.autograd.grad(selected_logprobs(hidden, weight, targets, entropy=True)[which].sum(), hidden)
    (reference,) = torch.autograd.grad(naive(hidden, weight, targets)[which].sum(), hidden)
    torch.testing.assert_close(ours, reference, rtol=1e-12, atol=1e-12)


def test_closed_form() -> None:
    """A zero head is uniform: log-probability -log V, entropy log V, and a hidden state sees no gradient."""
    hidden = torch.randn(3, H, requires_grad=True)
    logprobs, entropy = selected_logprobs(hidden, torch.zeros(V, H), torch.tensor([0, 1, V - 1]), entropy=True)
    log_v = torch.tensor(float(V)).log()
    torch.testing.assert_close(logprobs, -log_v.expand(3))
    torch.testing.assert_close(entropy, log_v.expand(3))
    (logprobs.sum() + entropy.sum()).backward()
    assert hidden.grad is not None
    assert hidden.grad.abs().max() == 0


def test_large_logits_stay_finite() -> None:
    hidden, weight, _, targets = inputs(torch.float32)
    logprobs, entropy = selected_logprobs(hidden * 1e4, weight, targets, entropy=True)
    reference, reference_entropy = naive(hidden.double() * 1e4, weight.double(), targets)
    torch.testing.assert_close(logprobs.double(), reference, rtol=1e-5, atol=1e-2)
    torch.testing.assert_close(entropy.double(), reference_entropy, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_inputs_are_computed_in_float32(dtype: torch.dtype) -> None:
    hidden, weight, bias, targets = inputs(dtype)
    leaves = [x.requires_grad_() for x in (hidden, weight, bias)]
    logprobs, entropy = selected_logprobs(hidden, weight, targets, bias=bias, entropy=True)
    exact = [x.detach().double().requires_grad_() for x in leaves]
    reference, reference_entropy = naive(exact[0], exact[1], targets, exact[2])
    assert logprobs.dtype == entropy.dtype == torch.float32
    torch.testing.assert_close(logprobs.double(), reference, rtol=1e-6, atol=1e-5)  # half logits would miss by 1e-2
    torch.testing.assert_close(entropy.double(), reference_entropy, rtol=1e-6, atol=1e-5)
    ours = torch.autograd.grad((logprobs + entropy).sum(), leaves)
    theirs = torch.autograd.grad((reference + reference_entropy).sum(), exact)
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == dtype
        torch.testing.assert_close(a.double(), b, rtol=2 * torch.finfo(dtype).eps, atol=torch.finfo(dtype).eps)


def test_float32_tolerance() -> None:
    hidden, weight, _, targets = inputs(torch.float32)
    reference, _ = naive(hidden.double(), weight.double(), targets)
    torch.testing.assert_close(selected_logprobs(hidden, weight, targets)[0].double(), reference, rtol=1e-6, atol=1e-5)


def test_autocast_computes_in_half_and_returns_full_gradients() -> None:
    hidden, weight, _, targets = inputs(torch.float32)
    weight.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logprobs, _ = selected_logprobs(hidden, weight, targets)
    rounded, _ = selected_logprobs(hidden.bfloat16(), weight.bfloat16(), targets)
    torch.testing.assert_close(logprobs, rounded, rtol=0, atol=0)
    logprobs.sum().backward()
    assert weight.grad is not None
    assert weight.grad.dtype == torch.float32


def test_no_tokens() -> None:
    hidden, weight, _, _ = inputs()
    hidden = hidden[:0].requires_grad_()
    weight.requires_grad_()
    logprobs, entropy = selected_logprobs(hidden, weight, torch.zeros(0, dtype=torch.long), entropy=True)
    assert logprobs.shape == entropy.shape == (0,)
    (logprobs.sum() + entropy.sum()).backward()
    assert weight.grad is not None
    assert hidden.grad is not None
    assert hidden.grad.shape == (0, H)
    assert weight.grad.abs().max() == 0


def test_rows_without_gradient_are_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight, _, targets = inputs()
    hidden.requires_grad_()
    keep = torch.tensor([0.0, 2.0, 0.0, 0.0, -1.0, 0.0, 0.0], dtype=torch.float64)
    logprobs, _ = selected_logprobs(hidden, weight, targets)
    seen = []
    original = head_module._Gradients.run
    monkeypatch.setattr(
        head_module._Gradients, "run", lambda self, tokens: (seen.append(len(tokens.lse)), original(self, tokens))[1]
    )
    (ours,) = torch.autograd.grad((logprobs * keep).sum(), hidden)
    (reference,) = torch.autograd.grad((naive(hidden, weight, targets)[0] * keep).sum(), hidden)
    torch.testing.assert_close(ours, reference, rtol=1e-12, atol=1e-12)
    assert seen == [2]


def test_all_rows_without_gradient() -> None:
    hidden, weight, _, targets = inputs()
    weight.requires_grad_()
    (selected_logprobs(hidden, weight, targets)[0] * 0.0).sum().backward()
    assert weight.grad is not None
    assert weight.grad.abs().max() == 0


def test_padding_rows_get_no_gradient_and_no_probability() -> None:
    hidden, weight, _, targets = inputs()
    weight.requires_grad_()
    logprobs, _ = selected_logprobs(hidden, weight, targets, vocab_size=V - 3)
    shorter, _ = selected_logprobs(hidden, weight[: V - 3], targets)
    torch.testing.assert_close(logprobs, shorter, rtol=0, atol=0)
    logprobs.sum().backward()
    assert weight.grad is not None
    assert weight.grad[V - 3 :].abs().max() == 0
    assert weight.grad[: V - 3].abs().max() > 0


def test_tied_weight_receives_both_gradients() -> None:
    _, weight, _, targets = inputs()
    weight.requires_grad_()
    words = torch.arange(M)
    (ours,) = torch.autograd.grad(selected_logprobs(weight[words], weight, targets)[0].sum(), weight)
    (reference,) = torch.autograd.grad(naive(weight[words], weight, targets)[0].sum(), weight)
    torch.testing.assert_close(ours, reference, rtol=1e-12, atol=1e-12)


def test_backward_twice_gives_the_same() -> None:
    hidden, weight, _, targets = inputs()
    hidden.requires_grad_()
    loss = selected_logprobs(hidden, weight, targets)[0].sum()
    first, second = (torch.autograd.grad(loss, hidden, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"temperature": 0.0}, "temperature must be"),
        ({"temperature": float("inf")}, "temperature must be"),
        ({"softcap": -1.0}, "softcap must be"),
        ({"vocab_size": V + 1}, "vocab_size must be"),
        ({"vocab_size": 2}, "targets must be in"),
        ({"chunk_tokens": 0}, "chunk_tokens must be"),
        ({"bias": torch.zeros(V - 1)}, "bias must have"),
    ],
)
def test_refuses(change: dict, sentence: str) -> None:
    hidden, weight, _, targets = inputs()
    with pytest.raises(ValueError, match=sentence):
        selected_logprobs(hidden, weight, targets, **change)


def test_refuses_shapes_and_targets() -> None:
    hidden, weight, _, targets = inputs()
    with pytest.raises(ValueError, match="hidden and weight"):
        selected_logprobs(hidden[:, 1:], weight, targets)
    with pytest.raises(ValueError, match="integer ids"):
        selected_logprobs(hidden, weight, targets[1:])
    with pytest.raises(ValueError, match="integer ids"):
        selected_logprobs(hidden, weight, targets.double())
    with pytest.raises(ValueError, match="targets must be in"):
        selected_logprobs(hidden, weight, targets - V)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_cuda(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(head_module._TILE_BYTES, "cuda", 64 * 1024)
    g = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 64, generator=g).to(dtype) * 0.5 for n in (96, 1024))
    targets = torch.randint(0, 1024, (96,), generator=g)
    leaves = [x.cuda().requires_grad_() for x in (hidden, weight)]
    logprobs, entropy = selected_logprobs(*leaves, targets.cuda(), entropy=True, temperature=0.8)
    exact = [x.double().requires_grad_() for x in (hidden, weight)]
    reference, reference_entropy = naive(*exact, targets, temperature=0.8)
    torch.testing.assert_close(logprobs.cpu().double(), reference, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(entropy.cpu().double(), reference_entropy, rtol=1e-4, atol=1e-3)
    ours = torch.autograd.grad((logprobs + entropy).sum(), leaves)
    theirs = torch.autograd.grad((reference + reference_entropy).sum(), exact)
    for a, b in zip(ours, theirs, strict=True):
        assert (a.cpu().double() - b).norm() <= 0.01 * b.norm()
