# SPDX-License-Identifier: Apache-2.0
"""The loop that turns one request into completions, over any decoder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lit_rl.rollouts import Rollouts, StopReason
from lit_rl.samplers.base import RolloutRequest
from lit_rl.samplers.noise import gumbels, row_keys, uniforms
from lit_rl.samplers.stopping import Stopping
from lit_rl.samplers.support import draw_tokens, processed_logprobs

if TYPE_CHECKING:
    from lit_rl.samplers.decoder import ModelDecoder

_BLOCK = 64  # positions whose noise is hashed at once, and steps after which drawn tokens are written to their place


@dataclass
class _Seen:
    """What `RolloutRequest.should_stop` may look at."""

    step: int
    finished: Tensor
    lengths: Tensor


@dataclass
class _Active:
    """The rows in the batch, in the decoder's order. A *column* counts the tokens of a completion, prefix included."""

    index: Tensor  # [n] which row of the request
    column: Tensor  # [n] where the next token goes
    budget: Tensor  # [n]
    alive: Tensor  # [n] bool; a row that has ended stays until dropping pays
    noise: Tensor  # [n, _BLOCK]

    def __len__(self) -> int:
        return len(self.index)

    def take(self, order: Tensor) -> None:
        for name, value in vars(self).items():
            setattr(self, name, value[order])


class DecodeLoop:
    """One request being decoded.

    Args:
        request: what to sample.
        decoder: computes logits.
        stopping: what ends a completion.
    """

    def __init__(self, request: RolloutRequest, decoder: ModelDecoder, stopping: Stopping) -> None:
        self.request, self.decoder, self.stopping = request, decoder, stopping
        self.device = device = decoder.device
        n, prefix = len(request), request.prefix
        budgets = request.budgets if request.budgets is not None else torch.full((n,), request.sampling.max_tokens)
        self.budgets = budgets.long().to(device)  # [N]
        self.start = prefix.lengths.to(device) if prefix is not None else torch.zeros_like(self.budgets)  # [N]
        self.lengths = self.start.clone()  # [N]
        self.ended = self.start >= self.budgets  # [N] bool
        self.reason = torch.full((n,), int(StopReason.LENGTH), device=device)  # [N]
        self.keys = row_keys(request.seed, request.prompts.draw[request.group], request.sample).to(device)  # [N]
        width = int(torch.maximum(self.budgets, self.start).max()) if n else 0
        self.ids = torch.zeros(n, width, dtype=torch.long, device=device)  # [N, T], as are the next two
        self.logprobs = torch.zeros(n, width, dtype=torch.float32, device=device)
        self.entropy = torch.zeros_like(self.logprobs) if request.entropy else None
        self.records: list[tuple[Tensor, ...]] = []  # what was drawn and is not yet in these
        self.steps = 0
        if prefix is not None:
            self._take_prefix(prefix)

    def _take_prefix(self, prefix: Rollouts) -> None:
        finished = prefix.finished.to(self.device)
        self.reason[finished] = prefix.row["stop_reason"].to(self.device)[finished]
        self.ended |= finished
        width = min(prefix.width, self.ids.shape[1])
        inside = torch.arange(width, device=self.device) < self.start[:, None]  # [N, width]
        columns = {"completion_ids": self.ids, "logprobs.sampler": self.logprobs, "entropy": self.entropy}
        for name, mine in columns.items():
            if mine is not None and name in prefix.token:
                mine[:, :width] = torch.where(inside, prefix.token[name][:, :width].to(self.device), 0)

    def check(self) -> None:
        """Whether every row can be decoded to the end of its budget.

        Raises:
            ValueError: a prompt is empty, or positions would run out.
        """
        sizes = [len(ids) for ids in self.request.prompts.ids]
        wants = [sizes[g] for g in self.request.group.tolist()]
        if 0 in wants:
            empty = self.request.prompts.uid[sizes.index(0)]
            raise ValueError(
                f"The prompt with uid {int(empty)} has no tokens, so there is nothing to predict a first token from: "
                "let it be the beginning-of-sequence token."
            )
        most = self.decoder.max_positions
        for size, budget in zip(wants, self.budgets.tolist()) if most is not None else ():
            if size + budget > most:
                raise ValueError(
                    f"A prompt of {size} tokens and a budget of {budget} need {size + budget} positions, but the model "
                    f"has only {most}: lower max_tokens or max_prompt_tokens."
                )

    def generate(self, max_rows: int) -> None:
        """Decode every row that has not ended, at most ``max_rows`` at once."""
        for rows in (~self.ended).nonzero()[:, 0].split(max_rows):
            if len(rows) and self._decode(rows):
                self.reason[~self.ended] = int(StopReason.ABORTED)
                return

    def _decode(self, rows: Tensor) -> bool:
        """Decode one wave of rows to their end. Returns whether it was interrupted."""
        contexts, owner = self._contexts(rows.tolist())
        limit = int((self.budgets - self.start)[rows].max())
        logits = self.decoder.start(contexts, owner, limit)
        batch = _Active(rows, self.start[rows], self.budgets[rows], torch.ones_like(rows, dtype=torch.bool), rows)
        left, stop = len(batch), False
        for step in range(limit):
            if step % _BLOCK == 0:
                self._flush()
                ahead = batch.column[:, None] + torch.arange(_BLOCK, device=self.device)
                batch.noise = uniforms(self.keys[batch.index, None], ahead)
            tokens = self._draw(logits, batch, batch.noise[:, step % _BLOCK])
            left = self._retire(tokens, batch, left)
            stop = self._interrupted(batch)
            if stop or not left:
                break
            # Dropping a row copies its replacement, so it waits until a share worth it has ended.
            if self.decoder.batch_rows(left) <= len(batch) - max(1, len(batch) // 16):
                order = self.decoder.keep(batch.alive)
                batch.take(order)
                tokens = tokens[order]
            logits = self.decoder.step(tokens)
        self._flush()
        return stop

    def _contexts(self, rows: Sequence[int]) -> tuple[list[Tensor], Tensor]:
        """The distinct token sequences that the rows continue, and which of them each row continues."""
        contexts: list[Tensor] = []
        owner: list[int] = []
        shared: dict[int, int] = {}
        group, start = self.request.group.tolist(), self.start.tolist()
        for i in rows:
            prompt = self.request.prompts.ids[group[i]]
            if start[i]:
                owner.append(len(contexts))
                contexts.append(torch.cat([prompt, self.ids[i, : start[i]].to(prompt.device)]))
            else:
                if group[i] not in shared:
                    shared[group[i]] = len(contexts)
                    contexts.append(prompt)
                owner.append(shared[group[i]])
        return contexts, torch.tensor(owner, device=self.device)

    def _draw(self, logits: Tensor, batch: _Active, noise: Tensor) -> Tensor:
        """Draw and record a token for each row: ``[n, V]`` logits and ``[n]`` noise -> ``[n]`` ids."""
        sampling, usable = self.request.sampling, self.stopping.usable
        logprobs = processed_logprobs(logits, sampling, usable)  # [n, V]
        probs = logprobs.exp()
        if sampling.temperature == 0:
            tokens = logprobs[:, :usable].argmax(-1)
        elif self.request.noise == "gumbel":
            tokens = (logprobs[:, :usable] + gumbels(self.keys[batch.index], batch.column, usable)).argmax(-1)
        else:
            tokens = draw_tokens(probs, noise, usable)
        chosen = logprobs.gather(1, tokens[:, None])[:, 0]
        record = [batch.index, batch.column, tokens, chosen]
        if self.entropy is not None:
            # 0 · log 0 counts as 0
            finite = logprobs if sampling.full_support else logprobs.clamp(min=torch.finfo(logprobs.dtype).min)
            record.append(-(probs * finite).sum(-1))
        self.records.append(tuple(record))
        batch.column = batch.column + 1
        return tokens

    def _retire(self, tokens: Tensor, batch: _Active, left: int) -> int:
        """Note which rows have ended with these tokens and why. Returns how many are still alive."""
        stopped = self.stopping.ends[tokens]
        if self.stopping.suspect is not None:
            stopped |= self._stop_strings(self.stopping.suspect[tokens] & batch.alive & ~stopped, batch)
        done = (stopped | (batch.column >= batch.budget)) & batch.alive
        if not bool(done.any()):
            return left
        reason = torch.where(self.stopping.is_end[tokens], int(StopReason.END), int(StopReason.STOP))
        who = batch.index[done]
        self.reason[who] = torch.where(stopped, reason, int(StopReason.LENGTH))[done]
        self.lengths[who] = batch.column[done]
        self.ended[who] = True
        batch.alive = batch.alive & ~done
        return int(batch.alive.sum())

    def _stop_strings(self, suspects: Tensor, batch: _Active) -> Tensor:
        """Which of the suspects (bool ``[n]``) have completed a stop string."""
        strings = self.stopping.strings
        at = suspects.nonzero()[:, 0].tolist()
        if at and strings is not None:
            self._flush()
            for i, row, end in zip(at, batch.index[at].tolist(), batch.column[at].tolist()):
                suspects[i] = strings.completed(self.ids[row, max(0, end - strings.window) : end].tolist())
        return suspects

    def _interrupted(self, batch: _Active) -> bool:
        self.steps += 1
        if self.request.should_stop is None:
            return False
        self.lengths[batch.index[batch.alive]] = batch.column[batch.alive]
        return bool(self.request.should_stop(_Seen(self.steps, self.ended.cpu(), self.lengths.cpu())))

    def _flush(self) -> None:
        """Write what was drawn to its place, except what rows drew after their end."""
        if not self.records:
            return
        index, column, tokens, logprobs, *entropy = (torch.cat(parts) for parts in zip(*self.records))
        self.records.clear()
        kept = ~self.ended[index] | (column < self.lengths[index])
        at = (index[kept], column[kept])
        self.ids[at], self.logprobs[at] = tokens[kept], logprobs[kept]
        if self.entropy is not None:
            self.entropy[at] = entropy[0][kept]

    def rollouts(self, version: int) -> Rollouts:
        """The finished batch on the decoder's device."""
        request, ends = self.request, self.lengths.tolist()
        out = Rollouts.build(
            request.prompts,
            request.group,
            [row[:end] for row, end in zip(self.ids.cpu(), ends)],
            sampler_logprobs=[row[:end] for row, end in zip(self.logprobs.cpu(), ends)],
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
        inside = torch.arange(width, device=self.device) < self.start[:, None]  # [N, width]
        for name in ("completion_mask", "loss_weights", "policy_version"):
            if name in prefix.token:
                old, new = prefix.token[name][:, :width].to(self.device), out.token[name]
                new[:, :width] = torch.where(inside, old, new[:, :width])
