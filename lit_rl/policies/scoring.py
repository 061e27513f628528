# SPDX-License-Identifier: Apache-2.0
"""Log-probabilities of completions under a causal language model, without left padding and without full logits.

Each row is its prompt directly followed by its completion, padded on the right. In a causal model no token sees what
comes after it, so right padding changes nothing at real tokens: no attention mask is passed (kernels then run their
plain causal form) and positions are the model's own default 0, 1, 2, …. Only the backbone runs on all tokens; the head
runs on the hidden states that predict a wanted token.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lit_rl.policies.head import selected_logprobs

_verified: WeakSet[nn.Module] = WeakSet()  # models whose head was compared with their own logits


@dataclass(frozen=True)
class Head:
    """How a model turns hidden states into logits: ``softcap * tanh(scale * (weight @ h + bias) / softcap)``.

    Attributes:
        module: the head itself.
        weight: ``[V, H]``; None if the module is more than a plain linear layer (LoRA on the head, quantised weights).
        bias: ``[V]`` or None.
        softcap: bound of the logits (Gemma 2), or None.
        scale: factor on the raw logits (Cohere, Granite).
        vocab_size: V, the rows of the head.
    """

    module: nn.Module
    weight: Tensor | None
    bias: Tensor | None
    softcap: float | None
    scale: float
    vocab_size: int

    def logprobs(
        self,
        hidden: Tensor,
        targets: Tensor,
        *,
        temperature: float = 1.0,
        entropy: bool = False,
        vocab_size: int | None = None,
        chunk_tokens: int | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Log-probabilities of ``targets`` ``[M]`` given hidden states ``[M, H]``, and entropies ``[M]`` if asked."""
        if self.weight is None:
            return checkpointed_logprobs(self, hidden, targets, temperature, entropy, vocab_size, chunk_tokens or 256)
        # softcap * tanh(scale * x / softcap) / temperature, written without a scale
        return selected_logprobs(
            hidden,
            self.weight,
            targets,
            bias=self.bias,
            temperature=temperature / self.scale,
            softcap=None if self.softcap is None else self.softcap / self.scale,
            vocab_size=vocab_size,
            entropy=entropy,
            chunk_tokens=chunk_tokens,
        )

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits ``[M, V]`` through the module, in float32 at least."""
        logits = self.module(hidden)
        logits = (logits if logits.dtype == torch.float64 else logits.float()) * self.scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


def bare_model(model: nn.Module) -> Any:
    """The Transformers model below a PEFT wrapper; its adapters stay in place and active.

    Raises:
        ValueError: for prompt learning (prefix or prompt tuning), whose virtual tokens exist only in the wrapper.
    """
    wrapper: Any = model
    if not hasattr(wrapper, "peft_config") or not hasattr(wrapper, "get_base_model"):
        return wrapper
    if any(getattr(config, "is_prompt_learning", False) for config in wrapper.peft_config.values()):
        raise ValueError("Prompt-learning adapters (prefix or prompt tuning) are not supported: use LoRA.")
    return wrapper.get_base_model()


def find_head(model: nn.Module) -> Head:
    """Read a causal language model's head from its modules and configuration.

    Raises:
        ValueError: if the model has no language-model head, or none that is separate from its backbone.
    """
    bare = bare_model(model)
    module = bare.get_output_embeddings() if hasattr(bare, "get_output_embeddings") else None
    if module is None or getattr(bare, "base_model", bare) is bare:
        raise ValueError(f"{type(bare).__name__} has no language-model head: use a model of the …ForCausalLM classes.")
    config = bare.config.get_text_config()
    plain = type(module) is nn.Linear  # subclasses hold quantised weights or adapters
    softcap = getattr(config, "final_logit_softcapping", None) or getattr(config, "logits_soft_cap", None)
    return Head(
        module=module,
        weight=module.weight if plain else None,
        bias=module.bias if plain else None,
        softcap=softcap,
        scale=_logit_scale(config),
        vocab_size=getattr(module, "out_features", config.vocab_size),
    )


def _logit_scale(config: Any) -> float:
    """Factor on the raw logits. Families use the same names in opposite senses; `verify_head` has the last word."""
    for name in ("logit_scale", "lm_head_multiplier"):
        if getattr(config, name, None) is not None:
            return float(getattr(config, name))
    scaling = getattr(config, "logits_scaling", None)
    if scaling is None:
        return 1.0
    return 1.0 / scaling if config.model_type.startswith("granite") else float(scaling)


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside, each module's own mode afterwards."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


@torch.no_grad()
def verify_head(model: nn.Module) -> None:
    """Compare the logits of `find_head` with the model's own on a few tokens.

    Raises:
        ValueError: if they differ: the model does something between its backbone and its logits that is not known here.
    """
    bare = bare_model(model)
    head = find_head(bare)
    with evaluation_mode(bare):
        ids = torch.arange(min(8, head.vocab_size), device=bare.device)[None]
        own = bare(input_ids=ids, use_cache=False).logits[0].float()
        ours = head.logits(_backbone(bare, ids, {})[0]).float()
    gap = (own - ours).abs().max().item()
    if not gap <= 0.03 * own.abs().max().item() + 1e-4:  # half precision rounds logits to three digits
        raise ValueError(
            f"The logits of {type(bare).__name__} are not those of its head (largest difference {gap:.3g}): it changes "
            "them in a way that lit_rl.policies.scoring does not know, and log-probabilities would be wrong. "
            "Extend lit_rl.policies.scoring.find_head for this family."
        )


class TokenStates(NamedTuple):
    """Hidden states that predict M tokens of N completions, in the order of ``wanted.nonzero()``.

    Attributes:
        hidden: ``[M, H]`` last hidden states after the final norm, each of the position before its token.
        row: ``[M]`` int, the completion of each.
        token: ``[M]`` int, the position of each in its completion.
        head: what turns them into logits.
    """

    hidden: Tensor
    row: Tensor
    token: Tensor
    head: Head


def completion_logprobs(
    model: nn.Module,
    prompt_ids: Sequence[Tensor],
    completion_ids: Tensor,
    completion_mask: Tensor,
    lengths: Tensor,
    *,
    prompt_index: Tensor | None = None,
    temperature: float = 1.0,
    entropy: bool = False,
    wanted: Tensor | None = None,
    vocab_size: int | None = None,
    pad_token_id: int = 0,
    pad_to_multiple_of: int = 1,
    chunk_tokens: int | None = None,
    model_inputs: Mapping[str, Any] | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Log-probabilities, and entropies, of the tokens of N completions given their prompts.

    Args:
        model: a causal language model of Transformers, bare or wrapped by PEFT (not by DDP).
        prompt_ids: N one-dimensional int tensors, one a row, or B of them with ``prompt_index``. None may be empty.
        completion_ids: ``[N, T]``, right-padded. Tokens that no model produced (tool output) are context.
        completion_mask: ``[N, T]``, 1 where a model produced the token.
        lengths: ``[N]``, tokens of each completion.
        prompt_index: ``[N]``, which of ``prompt_ids`` belongs to each row.
        temperature: divides the logits.
        entropy: also return the entropy of the distribution that each wanted token was drawn from.
        wanted: ``[N, T]`` bool, where a result is needed; default everything with mask 1. Positions beyond
            ``lengths`` are never computed. Rows and trailing tokens that no wanted token depends on are not fed.
        vocab_size: mask out ids from here on (padding rows of the head); default none.
        pad_token_id: fills the right of shorter rows; any id of the vocabulary will do.
        pad_to_multiple_of: round the width of the batch up to this, for kernels and compilers that prefer few shapes.
        chunk_tokens: see `selected_logprobs`.
        model_inputs: further arguments of the backbone (images, say), one entry a row. An attention mask is then
            passed too, because such models may look at more than causal attention.

    Returns:
        Log-probabilities and entropies (or None) ``[N, T]`` in nats, 0 where nothing was wanted. Without any wanted
        token the zeros still belong to the graph, so that a backward pass works.

    Raises:
        ValueError: if a prompt is empty or shapes do not fit.
    """
    states = completion_states(
        model,
        prompt_ids,
        completion_ids,
        completion_mask,
        lengths,
        prompt_index=prompt_index,
        wanted=wanted,
        pad_token_id=pad_token_id,
        pad_to_multiple_of=pad_to_multiple_of,
        model_inputs=model_inputs,
    )
    return token_logprobs(
        states,
        completion_ids,
        temperature=temperature,
        entropy=entropy,
        vocab_size=vocab_size,
        chunk_tokens=chunk_tokens,
    )


def completion_states(
    model: nn.Module,
    prompt_ids: Sequence[Tensor],
    completion_ids: Tensor,
    completion_mask: Tensor,
    lengths: Tensor,
    *,
    prompt_index: Tensor | None = None,
    wanted: Tensor | None = None,
    pad_token_id: int = 0,
    pad_to_multiple_of: int = 1,
    model_inputs: Mapping[str, Any] | None = None,
) -> TokenStates:
    """The hidden states behind the wanted tokens: everything of `completion_logprobs` but the head.

    Two models that score the same completions return states in the same order, whatever their prompts: that is what
    divergences over the vocabulary are computed from. Arguments are those of `completion_logprobs`.
    """
    bare = bare_model(model)
    if bare not in _verified:
        verify_head(bare)
        _verified.add(bare)
    device = next(bare.parameters()).device
    completion_ids, lengths = completion_ids.to(device), lengths.to(device)
    n, width = completion_ids.shape
    within = torch.arange(width, device=device) < lengths[:, None]
    wanted = (completion_mask if wanted is None else wanted).to(device).bool() & within  # [N, T]
    if completion_mask.shape != completion_ids.shape or lengths.shape != (n,):
        raise ValueError("completion_mask must be [N, T] like completion_ids, and lengths [N].")
    row, token = wanted.nonzero(as_tuple=True)  # [M]
    if len(row) == 0:
        return TokenStates(_no_states(bare), row, token, find_head(bare))
    prompts = _Prompts.stack(prompt_ids, prompt_index, n, device)
    fed, row_of_batch = wanted.any(1).nonzero()[:, 0], wanted.any(1).cumsum(0) - 1
    needed = prompts.length + torch.where(wanted, torch.arange(1, width + 1, device=device), 0).amax(1) - 1  # [N]
    ids, mask = _right_padded(prompts.select(fed), completion_ids[fed], needed[fed], pad_token_id, pad_to_multiple_of)
    inputs: dict[str, Any] = {}
    if model_inputs:
        inputs = {k: v[fed.to(v.device)] if isinstance(v, Tensor) else v for k, v in model_inputs.items()}
        inputs["attention_mask"] = mask.long()
    hidden = _backbone(bare, ids, inputs)  # [N', S, H]
    at = row_of_batch[row] * ids.shape[1] + prompts.length[row] + token - 1  # the position before predicts a token
    # Only after the backbone: before it, a sharded head has no whole weight.
    return TokenStates(hidden.flatten(0, 1).index_select(0, at), row, token, find_head(bare))


def token_logprobs(
    states: TokenStates,
    completion_ids: Tensor,
    *,
    temperature: float = 1.0,
    entropy: bool = False,
    vocab_size: int | None = None,
    chunk_tokens: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Log-probabilities and entropies (or None) of the tokens that some states predict, ``[N, T]``, 0 elsewhere."""
    row, token = states.row, states.token
    completion_ids = completion_ids.to(row.device)
    out = completion_ids.new_zeros(completion_ids.shape, dtype=torch.float32)
    if len(row) == 0:
        out = out + states.hidden.sum().to(out)
        return out, out.clone() if entropy else None
    logprobs, entropies = states.head.logprobs(
        states.hidden,
        completion_ids[row, token],
        temperature=temperature,
        entropy=entropy,
        vocab_size=vocab_size,
        chunk_tokens=chunk_tokens,
    )
    out = out.to(logprobs.dtype)
    scattered = out.index_put((row, token), logprobs)
    return scattered, None if entropies is None else out.index_put((row, token), entropies)


def checkpointed_logprobs(
    head: Head,
    hidden: Tensor,
    targets: Tensor,
    temperature: float,
    entropy: bool,
    vocab_size: int | None,
    chunk_tokens: int,
) -> tuple[Tensor, Tensor | None]:
    """The slower way, for heads that are more than a linear layer: logits through the module, a chunk at a time.

    Each chunk is computed again in the backward pass, so that the logits of one chunk exist at a time. Arguments and
    results are those of `Head.logprobs`.
    """

    def chunk(h: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        logp = torch.log_softmax(head.logits(h)[:, :vocab_size] / temperature, -1)
        entropies = -(logp.exp() * logp).sum(-1) if entropy else logp.new_zeros(len(logp))
        return logp.gather(1, target[:, None])[:, 0], entropies

    parts = [
        checkpoint(chunk, h, t, use_reentrant=False)
        for h, t in zip(hidden.split(chunk_tokens), targets.split(chunk_tokens))
    ]
    logprobs, entropies = (torch.cat(part) for part in zip(*parts))
    return logprobs, entropies if entropy else None


@dataclass(frozen=True)
class _Prompts:
    """Prompts of N rows as slices of one flat tensor, so that no row needs a Python loop."""

    flat: Tensor
    start: Tensor  # [N]
    length: Tensor  # [N]

    @classmethod
    def stack(cls, ids: Sequence[Tensor], index: Tensor | None, rows: int, device: torch.device) -> _Prompts:
        if index is None and len(ids) != rows:
            raise ValueError(
                f"{len(ids)} prompts for {rows} completions: pass one prompt a row, or prompt_index to share them."
            )
        length = torch.tensor([len(x) for x in ids])
        if not bool((length > 0).all()):
            raise ValueError(
                "Every prompt needs at least one token, because the first token of a completion is predicted from it: "
                "let an empty prompt be the beginning-of-sequence token."
            )
        start = length.cumsum(0) - length
        if index is not None:
            start, length = start[index.cpu()], length[index.cpu()]
        return cls(torch.cat(list(ids)).to(device), start.to(device), length.to(device))

    def select(self, rows: Tensor) -> _Prompts:
        return _Prompts(self.flat, self.start[rows], self.length[rows])


def _right_padded(
    prompts: _Prompts, completion_ids: Tensor, needed: Tensor, pad_token_id: int, multiple: int
) -> tuple[Tensor, Tensor]:
    """Input ids and mask ``[N, S]``: prompt, then completion, cut after ``needed`` tokens, then padding."""
    longest = int(needed.max())
    position = torch.arange(-(-longest // multiple) * multiple, device=needed.device)  # [S]
    after = position - prompts.length[:, None]  # [N, S], position within the completion
    in_prompt = prompts.flat[(prompts.start[:, None] + position).clamp(max=len(prompts.flat) - 1)]
    in_completion = completion_ids.gather(1, after.clamp(0, completion_ids.shape[1] - 1))
    mask = position < needed[:, None]
    ids = torch.where(after < 0, in_prompt, in_completion)
    return torch.where(mask, ids, pad_token_id), mask


def _backbone(bare: Any, ids: Tensor, inputs: Mapping[str, Any]) -> Tensor:
    """Last hidden states ``[N, S, H]``, after the final norm."""
    own = getattr(bare, "hidden_states", None)  # where calling the backbone takes more, see lit_rl.methods.placement
    if own is not None:
        return own(input_ids=ids, use_cache=False, **inputs)
    return bare.base_model(input_ids=ids, use_cache=False, **inputs).last_hidden_state


def _no_states(bare: Any) -> Tensor:
    """``[0, H]`` hidden states that belong to the graph of a trainable parameter, if there is one."""
    width = getattr(bare.get_output_embeddings(), "in_features", bare.config.get_text_config().hidden_size)
    trainable = next((p for p in bare.parameters() if p.requires_grad), None)
    empty = torch.zeros(0, device=next(bare.parameters()).device) if trainable is None else trainable.flatten()[:0]
    return empty.reshape(0, 1).expand(0, width)
