# SPDX-License-Identifier: Apache-2.0
"""Sampling in the trainer's process with the trainer's own weights: `HFSampler`."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from lit_rl.rollouts import Rollouts, StopReason
from lit_rl.samplers.base import RolloutRequest, RolloutSampler
from lit_rl.samplers.noise import row_keys, uniforms
from lit_rl.samplers.stopping import StopStrings, end_token_ids, membership
from lit_rl.samplers.support import draw_tokens, processed_logprobs

if TYPE_CHECKING:
    from lit_rl.samplers.decoder import ModelDecoder

_log = logging.getLogger(__name__)
_BLOCK = 64  # steps between two flushes of what was drawn; noise is hashed for as many positions at once


class HFSampler(RolloutSampler):
    """Decodes with a transformers causal language model that it shares with the trainer.

    Each prompt is computed once for its whole group, finished rows leave the batch, and log-probabilities and entropies
    come from the logits that were sampled from. A token's noise is a hash of (seed, draw, sample, position), so a row
    comes out the same alone, in any batch, and continued after an interruption (up to the rounding of the logits).

    Ids beyond the tokenizer's vocabulary (padding rows of the head) are never drawn; log-probabilities are nevertheless
    over the whole head, as the trainer computes them.

    Args:
        max_rows: completions decoded at once; more are done in waves.
        prefill_tokens: padded prompt tokens of one prefill forward.
        fallback: what to do with a model whose cache this sampler cannot handle (encoder-decoders, recurrent states):
            ``"warn"`` uses the model's own ``generate``, ``"error"`` raises.
    """

    in_process = True

    def __init__(
        self, max_rows: int = 256, prefill_tokens: int = 16384, fallback: Literal["warn", "error"] = "warn"
    ) -> None:
        if max_rows < 1:
            raise ValueError(f"max_rows must be at least 1, got {max_rows}.")
        if prefill_tokens < 1:
            raise ValueError(f"prefill_tokens must be at least 1, got {prefill_tokens}.")
        if fallback not in ("warn", "error"):
            raise ValueError(f"fallback must be 'warn' or 'error', got {fallback!r}.")
        self.max_rows, self.prefill_tokens, self.fallback = max_rows, prefill_tokens, fallback
        self.decoder: ModelDecoder | None = None
        self._pending: deque[RolloutRequest] = deque()

    def setup(self, model: torch.nn.Module, tokenizer: Any) -> None:
        """Find out how to decode with this model. ``ValueError`` if that takes a fallback and it is not wanted."""
        super().setup(model, tokenizer)
        from lit_rl.samplers.decoder import ModelDecoder, decoding, mismatch, unsupported

        self.decoder = None
        causal = model.get_base_model() if hasattr(model, "get_base_model") else model
        problem = unsupported(causal)
        if problem is None:
            decoder = ModelDecoder(causal, self.prefill_tokens)
            with decoding(causal):
                problem = mismatch(decoder)
            if problem is None:
                self.decoder = decoder
                return
        sentence = f"{type(causal).__name__} cannot be decoded by HFSampler's own loop: {problem}."
        if self.fallback == "error":
            raise ValueError(f"{sentence} Set fallback='warn' to use the model's generate(), or take another sampler.")
        _log.warning(
            "%s Falling back to the model's generate(): slower, and the noise of a completion depends on its batch.",
            sentence,
        )

    def submit(self, request: RolloutRequest) -> None:
        """Keep the request for `collect`, which does the work."""
        if not hasattr(self, "model"):
            raise RuntimeError("HFSampler has no model yet: call setup(model, tokenizer) before submit().")
        self._pending.append(request)

    def collect(self) -> Rollouts:
        """Generate the completions of the oldest request; all tensors on the model's device."""
        from lit_rl.samplers.decoder import decoding

        if not self._pending:
            raise RuntimeError("HFSampler has nothing to collect: submit a request first.")
        request = self._pending.popleft()
        with decoding(self.model):
            run = _Run(request, self.decoder, self.tokenizer)
            run.generate(self.max_rows)
            return run.rollouts(self.policy_version)

    def on_rewind(self, model: torch.nn.Module) -> None:
        """Forget requests that were not collected."""
        self._pending.clear()

    def describe(self) -> str:
        """One line for the run header."""
        how = type(self.decoder).__name__ if self.decoder is not None else "transformers generate"
        return f"HFSampler(max_rows={self.max_rows}, {how})"


@dataclass
class _Seen:
    """What `RolloutRequest.should_stop` may look at."""

    step: int
    finished: Tensor
    lengths: Tensor


class _Run:
    """One request being decoded. Columns count the tokens of a completion, prefix included."""

    def __init__(self, request: RolloutRequest, decoder: ModelDecoder, tokenizer: Any) -> None:
        self.request, self.sampling, self.decoder = request, request.sampling, decoder
        device, n, vocab = decoder.device, len(request), decoder.vocab_size
        self.device = device
        self.usable = min(vocab, len(tokenizer)) if tokenizer is not None else vocab
        end, stop = end_token_ids(decoder.model, tokenizer), self.sampling.stop_token_ids
        self.is_end = membership(end, vocab, device)
        self.ends = membership([*end, *stop], vocab, device)
        self.strings = StopStrings(tokenizer, self.sampling.stop, vocab) if self.sampling.stop else None
        self.candidates = self.strings.candidates.to(device) if self.strings else None

        budgets = request.budgets if request.budgets is not None else torch.full((n,), self.sampling.max_tokens)
        self.budgets = budgets.long().to(device)
        prefix = request.prefix
        self.prefix_lengths = prefix.lengths.to(device) if prefix is not None else torch.zeros_like(self.budgets)
        self.complete = self.prefix_lengths >= self.budgets  # [N] bool: nothing (more) to decode
        self.reason = torch.full((n,), int(StopReason.LENGTH), device=device)
        if prefix is not None:
            finished = prefix.finished.to(device)
            self.reason[finished] = prefix.row["stop_reason"].to(device)[finished]
            self.complete = self.complete | finished
        self.lengths = self.prefix_lengths.clone()
        self.keys = row_keys(request.seed, request.prompts.draw[request.group], request.sample).to(device)

        width = int(torch.maximum(self.budgets, self.prefix_lengths).max()) if n else 0
        self.ids = torch.zeros(n, width, dtype=torch.long, device=device)
        self.logprobs = torch.zeros(n, width, device=device)
        self.entropy = torch.zeros(n, width, device=device) if request.entropy else None
        if prefix is not None:
            self._take_prefix(prefix)
        self.step = 0
        self.aborted = False

    def _take_prefix(self, prefix: Rollouts) -> None:
        width = min(prefix.width, self.ids.shape[1])
        inside = torch.arange(width, device=self.device) < self.prefix_lengths[:, None]  # [N, width]
        columns = {"completion_ids": self.ids, "logprobs.sampler": self.logprobs, "entropy": self.entropy}
        for name, mine in columns.items():
            if mine is not None and name in prefix.token:
                mine[:, :width] = torch.where(inside, prefix.token[name][:, :width].to(self.device), 0)

    def generate(self, max_rows: int) -> None:
        """Decode every row that is not complete, at most ``max_rows`` at once."""
        for rows in (~self.complete).nonzero()[:, 0].split(max_rows):
            if self.aborted:
                break
            self._decode(rows)
        if self.aborted:
            self.reason[~self.complete] = int(StopReason.ABORTED)

    def _decode(self, rows: Tensor) -> None:
        contexts, owner = self._contexts(rows.tolist())
        limit = int((self.budgets - self.prefix_lengths)[rows].max())
        logits = self.decoder.start(contexts, owner.to(self.device), limit)
        column = self.prefix_lengths[rows]  # [n] where the next token goes
        records: list[tuple[Tensor, ...]] = []
        noise = torch.empty(0)
        alive = torch.ones(len(rows), dtype=torch.bool, device=self.device)
        for step in range(limit):
            if step % _BLOCK == 0:
                self._flush(records)
                ahead = torch.arange(_BLOCK, device=self.device)
                noise = uniforms(self.keys[rows, None], column[:, None] + ahead)  # [n, _BLOCK]
            tokens, logprobs, entropy = self._draw(logits, noise[:, step % _BLOCK])
            records.append((rows, column, tokens, logprobs, entropy))
            column = column + 1
            alive = self._retire(rows, column, tokens, alive, records)
            left = int(alive.sum())
            if self._interrupted(rows, column, alive) or not left:
                break
            # Dropping rows copies their replacements, so it waits until a share worth it has finished.
            if left <= len(rows) - max(1, len(rows) // 16):
                order = self.decoder.keep(alive)
                rows, column, tokens, noise = rows[order], column[order], tokens[order], noise[order]
                alive = alive[order]
            logits = self.decoder.step(tokens)
        self._flush(records)

    def _contexts(self, rows: Sequence[int]) -> tuple[list[Tensor], Tensor]:
        """The distinct token sequences that the rows continue, and which of them each row continues."""
        contexts: list[Tensor] = []
        owner: list[int] = []
        shared: dict[int, int] = {}
        group, lengths = self.request.group.tolist(), self.prefix_lengths.tolist()
        for i in rows:
            prompt = self.request.prompts.ids[group[i]]
            if lengths[i]:
                contexts.append(torch.cat([prompt.to(self.device), self.ids[i, : lengths[i]]]))
                owner.append(len(contexts) - 1)
                continue
            if group[i] not in shared:
                shared[group[i]] = len(contexts)
                contexts.append(prompt)
            owner.append(shared[group[i]])
        return contexts, torch.tensor(owner)

    def _draw(self, logits: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens, their log-probabilities and the entropy of what they were drawn from, each ``[n]``."""
        logprobs = processed_logprobs(logits, self.sampling)  # [n, V]
        probs = logprobs.exp()
        if self.sampling.temperature == 0:
            tokens = logprobs[:, : self.usable].argmax(-1)
        else:
            tokens = draw_tokens(probs, noise, self.usable)
        chosen = logprobs.gather(1, tokens[:, None])[:, 0]
        entropy = torch.special.entr(probs).sum(-1) if self.entropy is not None else chosen
        return tokens, chosen, entropy

    def _retire(self, rows: Tensor, column: Tensor, tokens: Tensor, alive: Tensor, records: list[Any]) -> Tensor:
        """Note which rows have ended with these tokens and why. Returns the rows that go on."""
        stopped = self.ends[tokens]
        if self.strings is not None:
            stopped = stopped | self._stop_strings(rows, column, tokens, alive & ~stopped, records)
        done = (stopped | (column >= self.budgets[rows])) & alive
        if not bool(done.any()):
            return alive
        who = rows[done]
        reason = torch.where(self.is_end[tokens], int(StopReason.END), int(StopReason.STOP))
        self.reason[who] = torch.where(stopped, reason, int(StopReason.LENGTH))[done]
        self.lengths[who] = column[done]
        self.complete[who] = True
        return alive & ~done

    def _stop_strings(self, rows: Tensor, column: Tensor, tokens: Tensor, alive: Tensor, records: list[Any]) -> Tensor:
        """Bool ``[n]``: the newest token completes a stop string."""
        assert self.strings is not None
        assert self.candidates is not None
        found = torch.zeros_like(alive)
        suspects = (self.candidates[tokens] & alive).nonzero()[:, 0].tolist()
        if suspects:
            self._flush(records)
        for i in suspects:
            end = int(column[i])
            tail = self.ids[rows[i], max(0, end - self.strings.window) : end].tolist()
            found[i] = self.strings.completed(tail)
        return found

    def _interrupted(self, rows: Tensor, column: Tensor, alive: Tensor) -> bool:
        self.step += 1
        if self.request.should_stop is None:
            return False
        self.lengths[rows[alive]] = column[alive]
        self.aborted = bool(self.request.should_stop(_Seen(self.step, self.complete.cpu(), self.lengths.cpu())))
        return self.aborted

    def _flush(self, records: list[tuple[Tensor, ...]]) -> None:
        """Write what was drawn since the last flush to its place; rows that had already ended are left out."""
        if not records:
            return
        rows, column, tokens, logprobs, entropy = (torch.cat(parts) for parts in zip(*records))
        records.clear()
        inside = ~self.complete[rows] | (column < self.lengths[rows])
        at = (rows[inside], column[inside])
        self.ids[at], self.logprobs[at] = tokens[inside], logprobs[inside]
        if self.entropy is not None:
            self.entropy[at] = entropy[inside]

    def rollouts(self, version: int) -> Rollouts:
        """The finished batch on the model's device."""
        request, lengths = self.request, self.lengths.tolist()
        ids, logprobs = self.ids.cpu(), self.logprobs.cpu()
        out = Rollouts.build(
            request.prompts,
            request.group,
            [row[:end] for row, end in zip(ids, lengths)],
            sampler_logprobs=[row[:end] for row, end in zip(logprobs, lengths)],
            stop_reason=self.reason.cpu(),
            sample=request.sample,
            policy_version=version,
        ).to(self.device)
        if self.entropy is not None:
            out.token["entropy"] = self.entropy[:, : out.width].contiguous()
        if request.prefix is not None:
            self._restore_prefix(out, request.prefix)
        return out

    def _restore_prefix(self, out: Rollouts, prefix: Rollouts) -> None:
        """Tokens of the prefix keep their masks and the version of the policy that wrote them."""
        width = min(prefix.width, out.width)
        inside = torch.arange(width, device=self.device) < self.prefix_lengths[:, None]  # [N, width]
        for name in ("completion_mask", "loss_weights", "policy_version"):
            if name in prefix.token:
                old = prefix.token[name][:, :width].to(self.device)
                out.token[name][:, :width] = torch.where(inside, old, out.token[name][:, :width])
