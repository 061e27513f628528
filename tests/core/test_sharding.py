# SPDX-License-Identifier: Apache-2.0
"""Two ranks with sharded weights (FSDP2, gloo, CPU) compute what one rank computes, and resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy, SingleDeviceStrategy

from lit_rl.checkpoint import RolloutCheckpoint, last_good_checkpoint
from lit_rl.methods import OPSD
from lit_rl.methods.placement import check_strategy, is_sharded, whole
from lit_rl.policies import EMA, AdapterOff, FrozenCopy, Live, LoRA, Policy, PrivilegedPrompt, export
from lit_rl.testing import assert_same_weights, make_module, make_policy, run_on_ranks, train
from tests.core.runs import Refill
from tests.core.test_ranks import Keep, Record, build, sgd

SCENARIOS: dict[str, dict[str, Any]] = {
    "whole batches": {},
    "different numbers of micro-batches": {"micro_batch_tokens": 1, "places": (0, 1, 2)},
    "a rank without anything to train on": {"places": (0, 1)},
    "nothing to train on anywhere": {"places": ()},
    "several updates": {"updates_per_rollout": 2, "epochs_per_rollout": 2, "micro_batch_tokens": 40},
    "a reference that follows": {"reference": "ema"},
    "adapters": {"lora": True, "reference": "off"},
    "layers computed again": {"checkpointing": True},
}


def sharded(**options: Any) -> dict[str, Any]:
    strategy = {"data_parallel_size": 2, "tensor_parallel_size": 1, "save_distributed_checkpoint": False} | options
    return {"strategy": ModelParallelStrategy(**strategy), "devices": 2}


def whole_weights(module: Any) -> dict[str, torch.Tensor]:
    return {name: whole(p.detach()).clone() for name, p in module.model.named_parameters()}


def run(folder: Path, path: Path, world: int, **settings: Any) -> dict[str, Any]:
    settings = build(settings)
    places = settings.pop("places", (0, 1, 2, 3))
    lora, checkpointing = settings.pop("lora", False), settings.pop("checkpointing", False)
    policy = Policy(str(path), lora=LoRA(r=4, target_modules=["c_attn"]) if lora else None)
    policy.gradient_checkpointing = checkpointing
    references = {"ema": EMA(0.5), "off": AdapterOff()}
    settings["reference"] = references.get(settings.get("reference", ""), FrozenCopy())
    options = {"optimizer": sgd, "max_rollouts": 3, "kl_coef": 0.1, "max_grad_norm": 0.2}
    torch.manual_seed(0)  # adapters begin at random
    module = make_module(path, **{**options, **settings})
    module.policy = policy
    record = Record()
    train(folder, module, [Keep(places), record], **(sharded() if world > 1 else {}))
    assert is_sharded(module) == (world > 1) == all(hasattr(p, "full_tensor") for p in module.model.parameters())
    return {"weights": whole_weights(module), "steps": record.steps, "cursor": module.cursor}


def run_scenarios(rank: int, folder: Path, policy: Path) -> None:
    for i, settings in enumerate(SCENARIOS.values()):
        torch.save(run(folder / f"{i}", policy, 2, **settings), folder / f"{i}-rank{rank}.pt")


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return double_policy(tmp_path_factory.mktemp("policy"))


def double_policy(folder: Path) -> Path:
    """Weights in float64, because the strategy takes no ``precision="64-true"``."""
    make_policy(folder, "gpt2", resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    model, tokenizer = Policy(str(folder)).load()
    return export(model.double(), tokenizer, folder)


@pytest.fixture(scope="module")
def on_two_ranks(policy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sharded")
    run_on_ranks(run_scenarios, 2, folder, policy)
    return folder


@pytest.mark.parametrize("name", SCENARIOS)
def test_sharded_ranks_train_like_one(on_two_ranks: Path, policy: Path, tmp_path: Path, name: str):
    single = run(tmp_path, policy, 1, **SCENARIOS[name])
    for r in range(2):
        other = torch.load(on_two_ranks / f"{list(SCENARIOS).index(name)}-rank{r}.pt")
        assert other["cursor"] == single["cursor"]
        for key, value in single["weights"].items():
            assert (value - other["weights"][key]).abs().max() < 1e-10, key
        for mine, theirs in zip(single["steps"], other["steps"], strict=True):
            assert ("policy/grad_norm" in mine) == (name != "nothing to train on anywhere")
            assert mine == pytest.approx(theirs, abs=1e-6)


def save_and_resume(rank: int, folder: Path, policy: Path) -> None:
    def fit(name: str, steps: int, checkpoint: Path | None = None) -> Any:
        module = make_module(policy, max_rollouts=steps, updates_per_rollout=2, reference=EMA(0.5), kl_coef=0.1)
        options = {"limit_val_batches": 1.0, "val_check_interval": 2, "check_val_every_n_epoch": None} | sharded()
        train(folder / name, module, [Refill(), RolloutCheckpoint(every_n_rollouts=100)], checkpoint, **options)
        return module

    whole_run, cut = fit("whole", 6), fit("cut", 3)
    assert cut.clock == 3
    rest = fit("cut", 6, last_good_checkpoint(folder / "cut"))
    assert rest.clock == 6
    assert rest.cursor == whole_run.cursor
    assert_same_weights(whole_weights(whole_run), whole_weights(rest))
    with rest.placement.gathered(rest):
        if rank == 0:
            export(rest.model, rest.tokenizer, folder / "export")
    torch.save(whole_weights(rest), folder / f"weights{rank}.pt")


def test_a_sharded_run_resumes_exactly_and_can_be_exported(policy: Path, tmp_path: Path):
    run_on_ranks(save_and_resume, 2, tmp_path, policy)
    weights = torch.load(tmp_path / "weights0.pt")
    exported = dict(Policy(str(tmp_path / "export")).load()[0].named_parameters())
    assert_same_weights(weights, {name: p.detach() for name, p in exported.items()})
    # One process can go on with the same file.
    module = make_module(policy, max_rollouts=7, updates_per_rollout=2, reference=EMA(0.5), kl_coef=0.1)
    train(tmp_path / "cut", module, [Refill()], last_good_checkpoint(tmp_path / "cut"))
    assert module.clock == 7


class FakeTrainer:
    def __init__(self, strategy: Any, precision: str = "32-true") -> None:
        self.strategy, self.precision, self.world_size = strategy, precision, 2


def module_with(trainer: Any, policy: Path, **options: Any) -> Any:
    module = make_module(policy, **options)
    module.__dict__["_trainer"], module.loss_terms = trainer, module.terms()
    return module


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"tensor_parallel_size": 2}, "data_parallel_size=2 and .*tensor_parallel_size=1"),
        ({"data_parallel_size": "auto"}, "data_parallel_size=2"),
        ({"save_distributed_checkpoint": True}, "save_distributed_checkpoint=false"),
    ],
)
def test_strategies_that_do_not_work_are_refused(policy: Path, change: dict[str, Any], sentence: str):
    module = module_with(FakeTrainer(sharded(**change)["strategy"]), policy)
    with pytest.raises(ValueError, match=sentence):
        check_strategy(module)


def test_fp16_quantised_weights_and_the_older_fsdp_are_refused(policy: Path):
    with pytest.raises(ValueError, match="bf16-mixed"):
        check_strategy(module_with(FakeTrainer(sharded()["strategy"], "16-mixed"), policy))
    with pytest.raises(ValueError, match="use ModelParallelStrategy"):
        check_strategy(module_with(FakeTrainer(FSDPStrategy()), policy))
    quantised = module_with(FakeTrainer(sharded()["strategy"]), policy)
    quantised.policy.quantization = "nf4"
    with pytest.raises(ValueError, match="quantization=none"):
        check_strategy(quantised)


def test_the_live_policy_as_a_teacher_within_the_update_is_refused(policy: Path):
    options = {"method": OPSD, "teacher": Live(), "prompt": PrivilegedPrompt("{prompt} {answer}")}
    module = module_with(FakeTrainer(sharded()["strategy"]), policy, **options)
    with pytest.raises(ValueError, match="use FrozenCopy, EMA or Checkpoint"):
        check_strategy(module)
    check_strategy(module_with(FakeTrainer(SingleDeviceStrategy(torch.device("cpu"))), policy, **options))


def test_the_configuration_file_names_a_strategy_that_is_accepted(policy: Path):
    file = Path(__file__).parents[2] / "configs/strategies/fsdp2.yaml"
    settings = yaml.safe_load(file.read_text())["trainer"]
    assert settings["strategy"]["class_path"].endswith(".ModelParallelStrategy")
    assert settings["devices"] == settings["strategy"]["init_args"]["data_parallel_size"]
    strategy = ModelParallelStrategy(**settings["strategy"]["init_args"])
    check_strategy(module_with(FakeTrainer(strategy), policy))
