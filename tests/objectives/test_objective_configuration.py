# SPDX-License-Identifier: Apache-2.0
"""Objectives as configuration: constructor arguments are what a YAML file says."""

import subprocess
import sys

import pytest
from jsonargparse import ArgumentParser

from lit_rl.objectives import (
    GSPO,
    AdvantageNormalizer,
    Aggregation,
    Clip,
    ClipCov,
    KLPenalty,
    OffPolicyCorrection,
    PreferenceLoss,
    Surrogate,
)


class Method:
    """Stands for a module that takes objectives as arguments."""

    def __init__(
        self,
        surrogate: Surrogate,
        advantage: AdvantageNormalizer | None = None,
        aggregation: Aggregation = Aggregation.TOKEN_MEAN,
        kl: KLPenalty | None = None,
        correction: OffPolicyCorrection | None = None,
        preference: PreferenceLoss | None = None,
    ) -> None:
        self.surrogate, self.advantage, self.aggregation = surrogate, advantage, aggregation
        self.kl, self.correction, self.preference = kl, correction, preference


def build(config: dict) -> Method:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(Method, "method")
    return parser.instantiate_classes(parser.parse_object({"method": config})).method


@pytest.mark.parametrize(
    ("name", "arguments", "expected"),
    [
        ("Clip", {"clip_high": 0.28}, Clip(clip_high=0.28)),
        ("GSPO", {}, GSPO()),
        ("ClipCov", {"seed": 4}, ClipCov(seed=4)),
    ],
)
def test_surrogate_by_class_path(name, arguments, expected):
    method = build({"surrogate": {"class_path": f"lit_rl.objectives.{name}", "init_args": arguments}})
    assert method.surrogate == expected


def test_value_objects():
    method = build(
        {
            "surrogate": {"class_path": "lit_rl.objectives.Clip"},
            "advantage": {"scale": "none", "leave_one_out": True},
            "aggregation": "constant",
            "kl": {"surrogate": "k3"},
            "correction": {"weight": "sequence", "weight_high": 3.0},
            "preference": {"kind": "ipo"},
        }
    )
    assert method.advantage == AdvantageNormalizer(scale="none", leave_one_out=True)
    assert method.aggregation is Aggregation.CONSTANT
    assert method.kl == KLPenalty(surrogate="k3")
    assert method.correction == OffPolicyCorrection("sequence", weight_high=3.0)
    assert method.preference == PreferenceLoss("ipo")


def test_a_misspelt_argument_is_refused():
    with pytest.raises(Exception, match="clip_hihg"):
        build({"surrogate": {"class_path": "lit_rl.objectives.Clip", "init_args": {"clip_hihg": 0.3}}})


def test_objectives_import_torch_and_nothing_heavier():
    code = (
        "import sys, lit_rl.objectives\n"
        "print([m for m in ('lightning', 'transformers', 'peft', 'datasets', 'jsonargparse') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
