# SPDX-License-Identifier: Apache-2.0
"""Muon with AdamW beside it, as one optimizer that Lightning, schedulers and checkpoints treat like any other."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import AdamW, Optimizer


class MuonAdamW(Optimizer):
    """Muon (Jordan et al., 2024; ``torch.optim.Muon``) for matrices, AdamW for everything else.

    Muon's updates are scaled to the size of AdamW's (Liu et al., arXiv 2502.16982: 0.2 √max(rows, columns)), so that
    one learning rate, in AdamW's units, serves both. Suits training from scratch; a model that AdamW trained is best
    tuned further with AdamW.

    Args:
        params: parameters, or groups of parameters as dictionaries with key ``params``; a group may set ``lr`` and
            ``weight_decay`` of its own.
        lr: learning rate.
        weight_decay: decoupled weight decay.
        momentum: of Muon.
        betas: of AdamW.
        embedding_rows: a matrix with at least this many rows is taken for an embedding or a head, whose rows do not
            act together, and is left to AdamW.

    Raises:
        RuntimeError: if this version of torch has no Muon (it came with 2.9).
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.95),
        embedding_rows: int = 30_000,
    ) -> None:
        if not hasattr(torch.optim, "Muon"):
            raise RuntimeError(
                f"MuonAdamW needs torch 2.9 or newer, this is {torch.__version__}: use torch.optim.AdamW."
            )
        given: list[Any] = list(params)
        groups = given if given and isinstance(given[0], dict) else [{"params": given}]
        shared: dict[str, Any] = {"lr": lr, "weight_decay": weight_decay}
        matrices, others = [], []
        for group in groups:
            settings = {**shared, **{k: v for k, v in group.items() if k != "params"}}
            members = list(group["params"])
            is_matrix = [p.ndim == 2 and len(p) < embedding_rows for p in members]
            matrices.append({**settings, "params": [p for p, m in zip(members, is_matrix) if m]})
            others.append({**settings, "params": [p for p, m in zip(members, is_matrix) if not m]})
        muon: dict[str, Any] = {"momentum": momentum, "adjust_lr_fn": "match_rms_adamw"}
        adamw: dict[str, Any] = {"betas": tuple(betas)}
        parts = [(torch.optim.Muon, matrices, muon), (AdamW, others, adamw)]
        self.parts = [
            kind([g for g in groups if g["params"]], **options)
            for kind, groups, options in parts
            if any(g["params"] for g in groups)
        ]
        super().__init__([g for part in self.parts for g in part.param_groups], shared)
        self._share()

    def _share(self) -> None:
        """Let the parts work on the groups and the state that schedulers and checkpoints see here."""
        start = 0
        for part in self.parts:
            stop = start + len(part.param_groups)
            part.param_groups, part.state = self.param_groups[start:stop], self.state
            start = stop

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step of both; the closure, if any, is evaluated once."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self.parts:
            part.step()
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what ``state_dict`` returned."""
        super().load_state_dict(state_dict)
        self._share()
