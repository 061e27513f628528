# SPDX-License-Identifier: Apache-2.0
"""Look at what the policy writes: a table in TensorBoard, readable files on disk, histograms, a first page."""

from __future__ import annotations

from typing import Any

import torch

from lit_rl import distributed as ranks
from lit_rl.header import hyperparameters, run_header
from lit_rl.hooks import RolloutCallback
from lit_rl.rollouts import Origin, Rollouts, StopReason
from lit_rl.storage import save_rollouts

# Shown beside the hyperparameters of a run in TensorBoard's HPARAMS tab: the last value of each.
FINAL_METRICS = ("val/pass@1", "val/length_mean", "reward/mean", "rollout/length_mean")

# The tab CUSTOM SCALARS: what to look at first.
LAYOUT = {
    "The run": {
        "held-out accuracy": ["Multiline", ["val/pass@1", "rollout/correct_ratio"]],
        "reward": ["Multiline", ["reward/mean"]],
        "completion length": ["Multiline", ["rollout/length_mean", "val/length_mean"]],
        "exploration": ["Multiline", ["policy/entropy"]],
    },
    "Is it healthy?": {
        "groups without signal": ["Multiline", ["rollout/zero_signal_ratio"]],
        "truncated": ["Multiline", ["rollout/truncated_ratio"]],
        "sampler against trainer": ["Multiline", ["policy/kl_sampler"]],
        "gradient norm": ["Multiline", ["policy/grad_norm"]],
        "seconds": ["Multiline", ["time/rollout", "time/reward", "time/recall", "time/update", "time/step"]],
    },
}


# Text in a markdown table as it is: completions are full of signs that mean something in markdown, LaTeX and HTML.
LITERAL = str.maketrans({"\n": "<br>", "\r": None} | {c: f"&#{ord(c)};" for c in "&<>|\\`*_[]#~$\"'"})


class RolloutLogger(RolloutCallback):
    """Writes completions to TensorBoard text and to one rollout file for each clock.

    Also writes the run header (text ``run``), the hyperparameters with the metrics that the run arrives at, and a first
    page of curves (custom scalars).

    Files are ``rollouts/clock<clock>-rank<rank>.jsonl`` (readable) with the tensors as safetensors beside them,
    replaced atomically, with the edits that callbacks made. They are what ``lit-rl replay`` reads.

    Args:
        every: write at clocks that are a multiple of this.
        rows: completions in the TensorBoard table.
        files: whether to write files.
        histograms: whether to log histograms of lengths and advantages.
        max_characters: longest text of a table cell.
    """

    rewinds = False

    def __init__(
        self,
        every: int = 10,
        rows: int = 8,
        files: bool = True,
        histograms: bool = True,
        max_characters: int = 400,
    ) -> None:
        if every < 1:
            raise ValueError(f"every must be at least 1, got {every}.")
        self.every, self.rows, self.files = every, rows, files
        self.histograms, self.max_characters = histograms, max_characters

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Lay out TensorBoard's first page, and say what this run is."""
        from torch.utils.tensorboard.summary import hparams

        for writer in self._writers(trainer):
            writer.add_custom_scalars(LAYOUT)
            header = run_header(pl_module, trainer.world_size)
            writer.add_text("run", f"```\n{header}\n```", max(0, pl_module.clock - 1))
            # Only the names of the metrics: their values are those of the curves of the same names.
            for summary in hparams(hyperparameters(pl_module), dict.fromkeys(FINAL_METRICS, 0.0)):
                writer.file_writer.add_summary(summary)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Write the batch of the step that just ended."""
        rollouts, clock = pl_module.last_rollouts, pl_module.clock - 1
        if pl_module.interrupted or rollouts is None or clock % self.every:
            return
        texts = pl_module.tokenizer.batch_decode(rollouts.completions(kept=False), skip_special_tokens=True)
        if self.files:
            save_rollouts(rollouts, pl_module.run_dir / "rollouts", f"clock{clock:08d}-rank{ranks.rank()}", texts)
        for writer in self._writers(trainer):
            writer.add_text("completions", self.table(rollouts, texts), clock)
            if self.histograms and len(rollouts):
                writer.add_histogram("rollout/lengths", rollouts.lengths.float().cpu(), clock)
                advantages = rollouts.advantages[rollouts.kept_mask()]
                if len(advantages):
                    writer.add_histogram("rollout/advantages", advantages.cpu(), clock)

    def table(self, rollouts: Rollouts, texts: list[str]) -> str:
        """A markdown table of the rows with the highest and the lowest rewards."""
        rewards = rollouts.rewards
        order = torch.argsort(torch.nan_to_num(rewards, nan=-torch.inf), descending=True, stable=True).tolist()
        half = self.rows // 2
        picked = order if len(order) <= self.rows else order[: self.rows - half] + order[len(order) - half :]
        lines = [
            "| prompt | completion | reward | correct | advantage | tokens | ends |",
            "|---|---|---|---|---|---|---|",
        ]
        for i in picked:
            advantage = float(rollouts.advantages[i, 0]) if rollouts.width else 0.0
            origin = Origin(int(rollouts.origin[i]))
            end = StopReason(int(rollouts.row["stop_reason"][i])).name.lower()
            end += "" if origin == Origin.POLICY else f", {origin.name.lower()}"
            cells = [
                self._cell(rollouts.prompts.text[int(rollouts.group[i])]),
                self._cell(texts[i]),
                f"{float(rewards[i]):.3g}",
                f"{float(rollouts.correct[i]):.3g}",
                f"{advantage:+.3f}",
                str(int(rollouts.lengths[i])),
                end,
            ]
            lines.append("| " + " | ".join(cells) + " |")
        return "\n".join(lines)

    def _cell(self, text: str) -> str:
        text = text if len(text) <= self.max_characters else text[: self.max_characters] + " …"
        return text.translate(LITERAL) or " "

    def _writers(self, trainer: Any) -> list[Any]:
        if not trainer.is_global_zero:
            return []
        writers = (getattr(logger, "experiment", None) for logger in trainer.loggers)
        return [w for w in writers if hasattr(w, "add_custom_scalars")]
