# SPDX-License-Identifier: Apache-2.0
"""What a run shows in TensorBoard and leaves on disk."""

from __future__ import annotations

import html
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugin_util import markdown_to_safe_html
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from lit_rl.callbacks import RolloutLogger
from lit_rl.callbacks.rollout_logger import FINAL_METRICS, LAYOUT
from lit_rl.methods import RLModule
from lit_rl.progress import RolloutProgressBar
from lit_rl.storage import load_rollouts
from lit_rl.testing import make_module, make_policy, train


class Recorded(RolloutProgressBar):
    """A progress bar that keeps what it shows."""

    def __init__(self) -> None:
        super().__init__()
        self.shown: list[dict[str, Any]] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        super().on_train_batch_end(trainer, pl_module, *args)
        self.shown.append(self.get_metrics(trainer, pl_module))


class Run:
    """Five steps with everything that is logged."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "run"
        self.module: RLModule = make_module(make_policy(folder / "policy"), max_rollouts=5)
        logger = TensorBoardLogger(self.folder, name="", version="", default_hp_metric=False)
        self.callback, self.bar = RolloutLogger(every=2, rows=6), Recorded()
        options = {"limit_val_batches": 1.0, "val_check_interval": 2, "check_val_every_n_epoch": None}
        self.trainer = train(
            self.folder, self.module, [self.callback, self.bar], logger=logger, enable_progress_bar=True, **options
        )
        guidance = {"scalars": 0, "tensors": 0, "histograms": 0}
        self.events = EventAccumulator(str(self.folder), size_guidance=guidance).Reload()

    def texts(self, tag: str) -> dict[int, str]:
        """Text by clock."""
        found = self.events.Tensors(f"{tag}/text_summary")
        return {e.step: e.tensor_proto.string_val[0].decode() for e in found}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return Run(tmp_path_factory.mktemp("logged"))


def test_completions_appear_as_a_table_at_every_second_clock(run: Run):
    texts = run.texts("completions")
    assert list(texts) == [0, 2, 4]
    lines = texts[4].splitlines()
    assert lines[0].split(" | ")[:2] == ["| prompt", "completion"]
    rows = [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in lines[2:]]
    assert len(rows) == 6
    rewards = [float(r[2]) for r in rows]
    assert rewards == sorted(rewards, reverse=True)
    batch = load_rollouts(run.folder / "rollouts", "clock00000004-rank0")
    assert max(rewards) == batch.rewards.max()
    assert min(rewards) == batch.rewards.min()
    prompts = [html.unescape(r[0]) for r in rows]
    assert set(prompts) <= set(batch.prompts.text)
    assert "<table>" in markdown_to_safe_html(texts[4])


@pytest.mark.parametrize(
    "text",
    [
        "<think>a < b</think>",
        "a | b\nc",
        r"so $\frac{1}{2}$ and \(x\) in \boxed{\text{no}}",
        "**bold** _i_ `code` [a](http://b) # no title",
        "&lt;",
        "",
    ],
)
def test_text_is_shown_as_it_is(text: str):
    table = f"| a | b |\n|---|---|\n| {RolloutLogger()._cell(text)} | next |"
    cells = re.findall(r"<td>(.*?)</td>", markdown_to_safe_html(table), re.DOTALL)
    assert cells[1] == "next"
    shown = html.unescape(re.sub(r"<[^>]*>", "", cells[0].replace("<br>", "\n")))
    assert shown.strip() == text


def test_long_text_is_cut():
    assert RolloutLogger(max_characters=3)._cell("abcdef") == "abc …"


def test_histograms_of_lengths_and_advantages(run: Run):
    assert set(run.events.Tags()["histograms"]) == {"rollout/lengths", "rollout/advantages"}
    batch = load_rollouts(run.folder / "rollouts", "clock00000002-rank0")
    last = {e.step: e.histogram_value for e in run.events.Histograms("rollout/lengths")}[2]
    assert (last.num, last.min, last.max) == (len(batch), batch.lengths.min(), batch.lengths.max())
    advantages = {e.step: e.histogram_value for e in run.events.Histograms("rollout/advantages")}[2]
    assert advantages.num == int(batch.kept_mask().sum())


def test_the_first_page_shows_curves_that_exist(run: Run):
    (event,) = run.events.Tensors("custom_scalars__config__")
    layout = Layout.FromString(event.tensor_proto.string_val[0])
    assert [c.title for c in layout.category] == list(LAYOUT)
    tags = {tag for c in layout.category for chart in c.chart for tag in chart.multiline.tag}
    assert {"val/pass@1", "reward/mean", "policy/entropy"} <= tags
    assert tags <= set(run.events.Tags()["scalars"])


def test_hyperparameters_stand_beside_the_metrics_that_the_run_arrives_at(run: Run):
    contents = run.events.summary_metadata
    experiment = HParamsPluginData.FromString(contents["_hparams_/experiment"].plugin_data.content).experiment
    assert [m.name.tag for m in experiment.metric_infos] == list(FINAL_METRICS)
    assert set(FINAL_METRICS) <= set(run.events.Tags()["scalars"])
    start = HParamsPluginData.FromString(contents["_hparams_/session_start_info"].plugin_data.content)
    values = start.session_start_info.hparams
    assert values["group_size"].number_value == 4
    assert values["surrogate"].string_value == "Clip"
    assert values["lr"].number_value == pytest.approx(0.01)
    first = [e for e in run.events.Scalars("val/pass@1") if e.step == 0]
    assert first == []  # naming a metric writes no value of it


def test_the_run_header_is_among_the_texts(run: Run):
    assert "16 completions a step" in run.texts("run")[0]


def test_the_progress_bar_shows_reward_accuracy_length_and_speed(run: Run):
    assert run.bar.shown[0].keys() == {"reward", "length", "tokens/s"}
    assert run.bar.shown[-1].keys() == {"reward", "pass@1", "length", "tokens/s"}
    assert float(run.bar.shown[-1]["reward"]) == pytest.approx(run.events.Scalars("reward/mean")[-1].value, abs=1e-2)
    assert run.bar.total_train_batches == 5
    assert run.bar.train_progress_bar.desc.startswith("step")


def test_files_are_readable_lines_with_tensors_beside_them(run: Run):
    files = sorted(p.name for p in (run.folder / "rollouts").iterdir())
    expected = [f"clock{c:08d}-rank0.{end}" for c in (0, 2, 4) for end in ("jsonl", "safetensors")]
    assert files == expected
    rows = [json.loads(line) for line in (run.folder / "rollouts" / expected[-2]).read_text().splitlines()]
    assert len(rows) == 16
    batch = run.module.last_rollouts
    assert batch is not None
    again = load_rollouts(run.folder / "rollouts", "clock00000004-rank0")
    assert torch.equal(again.completion_ids, batch.completion_ids)
    assert torch.equal(again.advantages, batch.advantages)
    assert [r["reward"] for r in rows] == batch.rewards.tolist()


def test_an_interval_below_one_is_refused():
    with pytest.raises(ValueError, match="every must be at least 1, got 0"):
        RolloutLogger(every=0)
