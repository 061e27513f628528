# SPDX-License-Identifier: Apache-2.0
"""Move the reference policy while the run goes on."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from lightning.pytorch.utilities import rank_zero_info

from lit_rl.callbacks.monitor import Monitor
from lit_rl.hooks import RolloutCallback
from lit_rl.policies import Policy, Snapshot


class ReferenceUpdate(RolloutCallback):
    """Lets the reference follow the policy, so that the KL term holds the policy near to where it was a while ago.

    An update sets ``reference ← share · policy + (1 − share) · reference``: with ``share=1`` the reference is reset
    (ProRL, arXiv 2505.24864), below it follows slowly (TR-DPO, arXiv 2404.09656). It happens every ``every`` rollout
    steps, when a logged value leaves its bound, or both. With ``path`` the reference takes the weights of another
    checkpoint instead of the policy's.

    The method's reference must be a `Snapshot`: its weights and its identity are in every checkpoint, and a rewound run
    gets its earlier reference back. For a plain refresh or an average at every step ``Snapshot(every=…)`` and ``EMA``
    need no callback.

    Logged: ``reference/age``, rollout steps since the reference was updated last.

    Args:
        every: rollout steps between updates; None: only on ``monitor``.
        share: of the new weights, in (0, 1].
        monitor: logged value that also causes an update, such as ``policy/kl_reference``.
        above: bound of the monitored value.
        path: a policy in hub format whose weights are taken, of the same architecture.
    """

    def __init__(
        self,
        every: int | None = None,
        share: float = 1.0,
        monitor: str | None = None,
        above: float = math.inf,
        path: str | None = None,
    ) -> None:
        if every is None and monitor is None:
            raise ValueError("ReferenceUpdate needs to know when: set `every`, or `monitor` and `above`.")
        if every is not None and every < 1:
            raise ValueError(f"every must be at least 1, got {every}.")
        if (monitor is None) != (above == math.inf):
            raise ValueError("`monitor` and its bound `above` belong together: set both or neither.")
        if not 0 < share <= 1:
            raise ValueError(f"share must be in (0, 1], got {share}.")
        self.every, self.share, self.above, self.path = every, share, above, path
        self.monitor = None if monitor is None else Monitor(monitor, type(self).__name__)

    def check_setup(self, module: Any) -> None:
        """The reference must be one that can be updated and saved."""
        if type(module.reference) is not Snapshot or module.reference.every is not None:
            raise ValueError(
                "ReferenceUpdate changes the method's reference: set `reference` to lit_rl.policies.Snapshot (without "
                f"`every`). It is {type(module.reference).__name__}."
            )

    def on_metrics(self, trainer: Any, module: Any, metrics: Mapping[str, float]) -> None:
        """Update the reference if it is time or the monitored value asks for it."""
        done = module.rollout_step + 1  # rollout steps, this one included
        due = self.every is not None and done % self.every == 0
        if self.monitor is not None:
            due = self.monitor.read(metrics) > self.above or due
        if due:
            module.reference.take(self.source(module), done, self.share)
            rank_zero_info(f"ReferenceUpdate: the reference was updated after rollout step {done}.")
        module.log("reference/age", float(done - module.reference.taken_at))

    def source(self, module: Any) -> Any:
        """The model whose weights are taken.

        Raises:
            ValueError: the checkpoint's parameters are not those of the policy.
        """
        if self.path is None:
            return module.model
        model, _ = Policy(self.path).load_frozen()
        theirs = {name: p.shape for name, p in model.named_parameters()}
        ours = {name: p.shape for name, p in module.model.named_parameters() if p.requires_grad}
        different = [name for name, shape in ours.items() if theirs.get(name) != shape]
        if different:
            raise ValueError(
                f"The checkpoint {self.path} cannot become the reference: its parameter {different[0]!r} is missing or "
                "of another shape. It must have the policy's architecture, without LoRA."
            )
        return model
