# SPDX-License-Identifier: Apache-2.0
"""Moving the reference: resets, shares, bounds, checkpoints; its identity is saved and rewinds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from callback_batches import Module
from npo_runs import Diary, Numbers

from lit_rl.callbacks import Bound, DivergenceGuard, ReferenceUpdate
from lit_rl.policies import EMA, FrozenCopy, Snapshot
from lit_rl.testing import assert_same_weights, check_resume, make_module, make_policy, train


def module_with_reference(policy: Path, **options: Any) -> Any:
    return make_module(policy, **{"reference": Snapshot(), "kl_coef": 0.1, "max_rollouts": 5, **options})


def reference_weights(module: Any) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in module.reference.copy.named_parameters()}


class Watch(Diary):
    """Also remembers the reference that each step was scored with."""

    def on_advantages(self, trainer: Any, module: Any, rollouts: Any) -> None:
        super().on_advantages(trainer, module, rollouts)
        self.references[-1] = reference_weights(module)


def test_the_reference_becomes_the_policy_every_so_many_steps(tmp_path: Path) -> None:
    watch, numbers = Watch(), Numbers()
    module = module_with_reference(make_policy(tmp_path / "policy"))
    train(tmp_path / "run", module, [ReferenceUpdate(every=2), watch, numbers])
    for step, taken in enumerate([0, 0, 2, 2, 4]):
        assert_same_weights(watch.references[step], watch.weights[taken])
    assert numbers.series("reference/age") == [1, 0, 1, 0, 1]
    assert numbers.series("policy/kl_reference")[2] == pytest.approx(0, abs=1e-6)
    assert module.reference.identity()["taken_at"] == 4


def test_a_share_of_the_policy_moves_the_reference_slowly(tmp_path: Path) -> None:
    watch = Watch()
    module = module_with_reference(make_policy(tmp_path / "policy"), max_rollouts=3)
    train(tmp_path / "run", module, [ReferenceUpdate(every=1, share=0.25), watch])
    expected = watch.weights[0]
    for step in (1, 2):
        expected = {n: 0.25 * watch.weights[step][n] + 0.75 * old for n, old in expected.items()}
        for name, value in expected.items():
            torch.testing.assert_close(watch.references[step][name], value, rtol=1e-6, atol=1e-7)


def test_a_bound_on_a_logged_value_causes_an_update(tmp_path: Path) -> None:
    numbers = Numbers()
    module = module_with_reference(make_policy(tmp_path / "policy"), max_rollouts=6, kl_coef=0.0)
    update = ReferenceUpdate(monitor="policy/kl_reference", above=0.05)
    train(tmp_path / "run", module, [update, numbers])
    expected = [logged.get("policy/kl_reference", 0.0) > 0.05 for logged in numbers.logged.values()]
    assert [age == 0 for age in numbers.series("reference/age")] == expected
    assert 0 < sum(expected) < len(expected)


def test_the_reference_may_come_from_another_checkpoint(tmp_path: Path) -> None:
    other = make_policy(tmp_path / "other", seed=5)
    watch = Watch()
    module = module_with_reference(make_policy(tmp_path / "policy"), max_rollouts=3)
    train(tmp_path / "run", module, [ReferenceUpdate(every=2, path=str(other)), watch])
    theirs = make_module(other, max_rollouts=1)
    theirs.configure_model()
    assert_same_weights(watch.references[2], {n: p.detach() for n, p in theirs.model.named_parameters()})


def test_a_checkpoint_of_another_architecture_is_refused(tmp_path: Path) -> None:
    other = make_policy(tmp_path / "other", hidden_size=16)
    module = module_with_reference(make_policy(tmp_path / "policy"), max_rollouts=1)
    with pytest.raises(ValueError, match="cannot become the reference"):
        train(tmp_path / "run", module, [ReferenceUpdate(every=1, path=str(other))])


def test_an_updated_reference_resumes_exactly(tmp_path: Path) -> None:
    check_resume(tmp_path, lambda: [ReferenceUpdate(every=2, share=0.5)], module_with_reference, at=3)


def test_a_rewound_run_gets_its_earlier_reference_back(tmp_path: Path) -> None:
    watch = Watch()
    module = module_with_reference(make_policy(tmp_path / "policy"), max_rollouts=5)
    guard = DivergenceGuard([Bound("rollout_step", high=2.5)], every=1, max_rewinds=1, backoff=1.0, patience=2)
    train(tmp_path / "run", module, [ReferenceUpdate(every=2), guard, watch])
    assert watch.steps == [0, 1, 2, 3, 4, 3, 4]  # steps 3 and 4 are out of bounds: back to 3, then stopped
    assert_same_weights(watch.references[3], watch.references[5])
    assert_same_weights(watch.references[4], watch.references[6])
    with pytest.raises(AssertionError, match="differs"):
        assert_same_weights(watch.references[3], watch.references[4])


@pytest.mark.parametrize("reference", [None, FrozenCopy(), EMA(), Snapshot(every=3)])
def test_a_reference_that_cannot_be_moved_is_refused(reference: Any) -> None:
    with pytest.raises(ValueError, match="Snapshot"):
        ReferenceUpdate(every=1).check_setup(Module(reference=reference))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "when"),
        ({"every": 0}, "every"),
        ({"monitor": "policy/kl"}, "belong together"),
        ({"every": 3, "above": 0.1}, "belong together"),
        ({"every": 3, "share": 0.0}, "share"),
        ({"every": 3, "share": 1.5}, "share"),
    ],
)
def test_arguments_without_meaning_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ReferenceUpdate(**options)
