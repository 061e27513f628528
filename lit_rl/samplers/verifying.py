# SPDX-License-Identifier: Apache-2.0
"""Text of one policy as text of another: token by token accepted, or drawn again (speculative sampling)."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from lit_rl.policies.scoring import completion_logprobs, evaluation_mode
from lit_rl.rollouts import Rollouts, StopReason
from lit_rl.samplers.base import RolloutSampler, Sampling
from lit_rl.samplers.noise import row_keys, uniforms
from lit_rl.samplers.stopping import Stopping
from lit_rl.samplers.support import draw_tokens
from lit_rl.seeding import mix_seeds

_CHUNK_TOKENS = 16384  # padded tokens of one scoring forward


def accept_prefixes(
    drafts: Rollouts,
    model: nn.Module,
    exact: RolloutSampler,
    draft: RolloutSampler,
    sampling: Sampling,
    stopping: Stopping,
    seed: int,
    entropy: bool = False,
) -> Rollouts:
    """Turn completions drawn from q into beginnings of completions drawn from p.

    Token t is accepted with probability min(1, p_t / q_t); at the first rejection a token is drawn from the normalised
    max(p - q, 0), and what follows is dropped (Leviathan et al., arXiv 2211.17192). Continued by sampling from p, the
    result is distributed exactly as samples from p.

    Args:
        drafts: N completions with ``logprobs.sampler`` = log q, over the full vocabulary.
        model: the policy p.
        exact: a sampler of p.
        draft: the sampler of q.
        sampling: how tokens are drawn, from both; nothing but a temperature.
        stopping: what ends a completion.
        seed: of the decisions.
        entropy: also give the entropies of p.

    Returns:
        The accepted tokens of each row and one more where a token was rejected, with log-probabilities (and entropies)
        under p. Rows that have not ended have `StopReason.ABORTED`. The row signal ``accepted`` counts accepted tokens.
    """
    drafts = drafts.to("cpu")
    logprobs, entropies = policy_logprobs(model, drafts, sampling.temperature, entropy)
    draws = drafts.prompts.draw[drafts.group]
    keys = row_keys(mix_seeds(seed, "accept"), draws, drafts.row["sample"])  # [N]
    position = torch.arange(drafts.width)
    inside = position < drafts.lengths[:, None]  # [N, T]
    ratio = (logprobs - drafts.logprobs["sampler"]).double().exp()
    rejected = inside & ~(uniforms(keys[:, None], position) < ratio)
    accepted = torch.where(rejected.any(1), rejected.int().argmax(1), drafts.lengths)  # [N]
    out = cut_drafts(drafts, accepted)
    out.logprobs["sampler"] = torch.where(inside, logprobs, 0.0)
    if entropies is not None:
        out.token["entropy"] = torch.where(inside, entropies, 0.0)
    rows = rejected.any(1).nonzero()[:, 0]
    if len(rows):
        _draw_again(out, rows, exact, draft, sampling, stopping, mix_seeds(seed, "residual"))
    kept = position < out.lengths[:, None]
    out.token = {name: torch.where(kept, values, torch.zeros_like(values)) for name, values in out.token.items()}
    out.row["accepted"] = accepted
    return out


def cut_drafts(drafts: Rollouts, accepted: Tensor) -> Rollouts:
    """The drafts, those that were not accepted as a whole open again at the first token that was not."""
    out = drafts.clone()
    cut = accepted < drafts.lengths
    out.row["lengths"] = accepted.clone()
    out.row["finished"] = out.finished & ~cut
    out.row["stop_reason"] = torch.where(cut, int(StopReason.ABORTED), out.row["stop_reason"])
    return out


def _draw_again(
    out: Rollouts,
    rows: Tensor,
    exact: RolloutSampler,
    draft: RolloutSampler,
    sampling: Sampling,
    stopping: Stopping,
    seed: int,
) -> None:
    """Draw the token at the first rejection of each row from what p has and q lacks, in place."""
    at = out.lengths[rows]
    prompts = out.prompts.ids
    groups = out.group[rows].tolist()
    contexts = [
        torch.cat([prompts[g], out.completion_ids[i, :n]]) for i, g, n in zip(rows.tolist(), groups, at.tolist())
    ]
    p = exact.next_token_logprobs(contexts, sampling).cpu().double()  # [n, V]
    q = draft.next_token_logprobs(contexts, sampling).cpu().double()
    residual = (p.exp() - q.exp()).clamp(min=0)
    lost = residual[:, : stopping.usable].sum(1) <= 0  # p and q agree up to rounding
    residual = torch.where(lost[:, None], p.exp(), residual)
    keys = row_keys(seed, out.prompts.draw[out.group[rows]], out.row["sample"][rows])
    tokens = draw_tokens(residual, uniforms(keys, at), stopping.usable)
    out.completion_ids[rows, at] = tokens
    out.logprobs["sampler"][rows, at] = p.gather(1, tokens[:, None])[:, 0].float()
    if "entropy" in out.token:
        out.token["entropy"][rows, at] = -(p.exp() * p).sum(1).float()
    out.row["lengths"][rows] = at + 1
    _close_ended(out, rows, tokens, stopping)


def _close_ended(out: Rollouts, rows: Tensor, tokens: Tensor, stopping: Stopping) -> None:
    """Note which rows have ended with their new token, in place."""
    for i, token in zip(rows.tolist(), tokens.tolist()):
        stopped = bool(stopping.ends[token])
        if not stopped and stopping.strings is not None:
            stopped = stopping.strings.completed(out.completion_ids[i, : int(out.lengths[i])].tolist())
        if stopped:
            reason = StopReason.END if bool(stopping.is_end[token]) else StopReason.STOP
            out.row["stop_reason"][i], out.row["finished"][i] = int(reason), True


@torch.no_grad()
def policy_logprobs(
    model: nn.Module, rollouts: Rollouts, temperature: float, entropy: bool
) -> tuple[Tensor, Tensor | None]:
    """Log-probabilities (and entropies) of a batch under a policy in evaluation mode, ``[N, T]`` on the CPU."""
    logprobs = torch.zeros(len(rollouts), rollouts.width)
    entropies = torch.zeros_like(logprobs) if entropy else None
    with evaluation_mode(model):
        for rows in _chunks(rollouts):
            part = rollouts.select(rows).trim()
            values, more = completion_logprobs(
                model,
                part.prompts.ids,
                part.completion_ids,
                part.completion_mask,
                part.lengths,
                prompt_index=part.group,
                temperature=temperature,
                entropy=entropy,
            )
            logprobs[rows, : part.width] = values.float().cpu()
            if entropies is not None and more is not None:
                entropies[rows, : part.width] = more.float().cpu()
    return logprobs, entropies


def _chunks(rollouts: Rollouts) -> Iterator[Tensor]:
    """Row indices, rows of similar length together, within `_CHUNK_TOKENS`."""
    prompt = torch.tensor([len(x) for x in rollouts.prompts.ids])
    total = prompt[rollouts.group] + rollouts.lengths if len(rollouts) else rollouts.lengths
    order = total.argsort(descending=True, stable=True)
    first = 0
    while first < len(order):
        count = max(1, _CHUNK_TOKENS // max(1, int(total[order[first]])))
        yield order[first : first + count]
        first += count
