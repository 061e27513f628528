# SPDX-License-Identifier: Apache-2.0
"""Presets of the GRPO family: each is its algorithm, whatever stands in the configuration that it is put on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonargparse import ArgumentParser
from lightning.pytorch import LightningModule

import lit_rl.objectives as objectives
from lit_rl.lightning_cli import LitRLCLI
from lit_rl.methods import GRPO
from lit_rl.objectives import AdvantageNormalizer, Aggregation, Clip, KLPenalty
from lit_rl.policies import FrozenCopy

CONFIGS = Path(__file__).parents[2] / "configs"

# Everything that a preset decides, set to something that no preset has.
HOSTILE: dict[str, Any] = {
    "policy": {"path": "a/policy"},
    "rewards": {"class_path": "lit_rl.rewards.ExactMatchReward"},
    "advantage": {"center": "group", "scale": "batch", "ddof": 0, "eps": 0.5, "level": "token"},
    "surrogate": {
        "class_path": "lit_rl.objectives.Clip",
        "init_args": {"clip_low": 0.7, "clip_high": 0.9, "dual_clip": 3.0},
    },
    "aggregation": "constant",
    "kl": {"estimator": "k2", "surrogate": "k3+", "importance_weighted": True},
    "kl_coef": 0.7,
    "reference": {"class_path": "lit_rl.policies.EMA", "init_args": {"decay": 0.5}},
    "entropy_coef": 0.3,
    "mask_truncated": True,
}

NO_KL: dict[str, Any] = {"kl": KLPenalty("k3", "k2"), "kl_coef": 0.0, "reference": None}
EXPECTED: dict[str, dict[str, Any]] = {
    "grpo": {
        "advantage": AdvantageNormalizer("group", "group"),
        "surrogate": Clip(0.2, 0.2),
        "aggregation": Aggregation.SEQUENCE_MEAN,
        "kl": KLPenalty("k3", "k3"),
        "kl_coef": 0.04,
        "reference": FrozenCopy,
    },
    "dr_grpo": {
        "advantage": AdvantageNormalizer("group", "none"),
        "surrogate": Clip(0.2, 0.2),
        "aggregation": Aggregation.CONSTANT,
        **NO_KL,
    },
    "dapo": {
        "advantage": AdvantageNormalizer("group", "group"),
        "surrogate": Clip(0.2, 0.28),
        "aggregation": Aggregation.TOKEN_MEAN,
        **NO_KL,
    },
    "gspo": {
        "advantage": AdvantageNormalizer("group", "group"),
        "surrogate": objectives.GSPO(3e-4, 4e-4),
        "aggregation": Aggregation.SEQUENCE_MEAN,
        **NO_KL,
    },
    "cispo": {
        "advantage": AdvantageNormalizer("group", "group"),
        "surrogate": objectives.CISPO(None, 5.0),
        "aggregation": Aggregation.TOKEN_MEAN,
        **NO_KL,
    },
    "rloo": {
        "advantage": AdvantageNormalizer("group", "none", leave_one_out=True),
        "surrogate": objectives.Reinforce(),
        "aggregation": Aggregation.SEQUENCE_SUM,
        **NO_KL,
        "kl": KLPenalty("k1", "k2"),
    },
    "reinforce_pp": {
        "advantage": AdvantageNormalizer("batch", "batch", level="token"),
        "surrogate": Clip(0.2, 0.2),
        "aggregation": Aggregation.TOKEN_MEAN,
        **NO_KL,
    },
    "kl_cov": {
        "advantage": AdvantageNormalizer("group", "group"),
        "surrogate": objectives.KLCov(2e-3, 1.0),
        "aggregation": Aggregation.TOKEN_MEAN,
        **NO_KL,
    },
    "clip_cov": {
        "advantage": AdvantageNormalizer("group", "group"),
        "surrogate": objectives.ClipCov(2e-4, 1.0, 5.0, 1.0, 1.0),
        "aggregation": Aggregation.TOKEN_MEAN,
        **NO_KL,
    },
}
PRESETS = [CONFIGS / "methods" / f"{name}.yaml" for name in EXPECTED]


class Mine(GRPO):
    """Somebody's own method on top of GRPO."""


def method(folder: Path, *configs: dict[str, Any]) -> Any:
    """The method that several configurations describe together; only their key ``model`` is read."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(LightningModule, "model", fail_untyped=False)
    parser.add_argument("--config", action="config")
    args = []
    for i, config in enumerate(configs):
        file = folder / f"{i}.yaml"
        file.write_text(yaml.safe_dump({"model": config["model"]}))
        args += ["--config", str(file)]
    return parser.instantiate(parser.parse_args(args)).model


def load(path: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load(path.read_text())
    return loaded


def check(module: Any, expected: dict[str, Any]) -> None:
    found = {name: getattr(module, name) for name in expected}
    if isinstance(expected["reference"], type):
        assert type(found.pop("reference")) is expected["reference"]
        expected = {k: v for k, v in expected.items() if k != "reference"}
    assert found == expected
    assert (module.entropy_coef, module.mask_truncated) == (0.0, False)


def test_every_preset_is_tested():
    """Files that name a method of their own are configurations of that method."""
    presets = [p for p in (CONFIGS / "methods").glob("*.yaml") if "class_path" not in load(p)["model"]]
    assert {p.stem for p in presets} == EXPECTED.keys()


@pytest.mark.parametrize("preset", PRESETS, ids=lambda p: p.stem)
def test_a_preset_on_the_quickstart_is_the_method_of_its_paper(preset: Path, tmp_path: Path):
    module = method(tmp_path, load(CONFIGS / "quickstart.yaml"), load(preset))
    check(module, EXPECTED[preset.stem])
    assert module.group_size == 8  # what is not the method's stays as it was


@pytest.mark.parametrize("preset", PRESETS, ids=lambda p: p.stem)
def test_a_preset_leaves_nothing_of_the_method_that_it_replaces(preset: Path, tmp_path: Path):
    module = method(tmp_path, {"model": {"class_path": f"{__name__}.Mine", "init_args": HOSTILE}}, load(preset))
    assert type(module).__name__ == "Mine"  # a preset changes settings, not the class
    check(module, EXPECTED[preset.stem])


def test_the_parser_keeps_equal_names_across_classes_which_is_why_presets_write_everything_out(tmp_path: Path):
    base = {"model": {"class_path": "lit_rl.GRPO", "init_args": HOSTILE}}
    careless = {"model": {"init_args": {"surrogate": {"class_path": "lit_rl.objectives.GSPO"}}}}
    assert method(tmp_path, base, careless).surrogate == objectives.GSPO(clip_low=0.7, clip_high=0.9)


class Parsed(LitRLCLI):
    """Instantiates everything and runs nothing."""

    def before_instantiate_classes(self) -> None:
        pass

    def fit(self, **kwargs: Any) -> None:
        pass


def callbacks_of(*configs: Path) -> list[str]:
    args = [word for c in configs for word in ("--config", str(c))]
    cli = Parsed(["fit", *args, "--trainer.logger=false"], save_config_callback=None)
    return [type(c).__name__ for c in cli.trainer.callbacks]  # type: ignore[attr-defined]


def test_callbacks_of_a_preset_and_of_a_recipe_are_added_to_those_that_are_there():
    base = CONFIGS / "quickstart.yaml"
    plain = callbacks_of(base)
    more = callbacks_of(base, CONFIGS / "methods" / "dapo.yaml", CONFIGS / "best_checkpoint.yaml")
    assert sorted(more) == sorted([*plain, "DynamicSampling", "ModelCheckpoint"])
    assert [c for c in more if c in plain] == plain
