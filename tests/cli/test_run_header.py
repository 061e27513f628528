# SPDX-License-Identifier: Apache-2.0
"""The run header: what it says, when it is printed, and that nothing is loaded for it."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from lit_rl.callbacks import RewardAlarm, RolloutLogger
from lit_rl.data import PromptDataModule
from lit_rl.datamodules import EvalSource, MixtureDataModule, Source, TextDataModule
from lit_rl.header import changed_arguments, describe_optimizer, hyperparameters, plan_of, run_header, summary
from lit_rl.methods import SFT
from lit_rl.objectives import AdvantageNormalizer, Aggregation
from lit_rl.policies import FrozenCopy, LoRA, Policy
from lit_rl.samplers import Sampling
from lit_rl.schedules import WarmupLinear
from lit_rl.testing import ToyData, make_module, make_policy, make_trainer, toy_reward, train


def warmup(optimizer: torch.optim.Optimizer) -> WarmupLinear:
    return WarmupLinear(optimizer, warmup=5)


def lines_of(header: str) -> dict[str, list[str]]:
    """Name -> its lines."""
    found: dict[str, list[str]] = {}
    name = ""
    for line in header.splitlines()[1:]:
        label, text = line[2:14].strip(), line[14:]
        name = label or name
        found.setdefault(name, []).append(text)
    return found


def test_the_header_names_everything_that_decides_a_run(tmp_path: Path):
    policy = make_policy(tmp_path / "policy")
    module = make_module(
        policy,
        rewards=[toy_reward(weight=2.0)],
        advantage=AdvantageNormalizer(scale="none"),
        aggregation=Aggregation.CONSTANT,
        reference=FrozenCopy(),
        kl_coef=0.05,
        scheduler=warmup,
        prompts_per_step=8,
        updates_per_rollout=2,
        micro_batch_tokens=512,
        sampling=Sampling(temperature=0.7, max_tokens=6),
    )
    data = ToyData(seed=5)
    data.setup("fit")
    trainer = make_trainer(tmp_path, [RolloutLogger(every=3), RewardAlarm()])
    trainer.datamodule, module.trainer = data, trainer
    found = lines_of(run_header(module, world_size=2))
    assert found["policy"] == [f"{policy}, all weights are trained"]
    assert found["advantage"] == ["A = r - mean_group"]
    assert [line.split(" = ")[0] for line in found["loss"]] == ["policy", "0.05 × kl"]
    assert "constant" in found["loss"][0]
    assert found["reference"] == ["FrozenCopy"]
    assert found["optimizer"] == [
        "AdamW(lr=0.01, weight_decay=0), WarmupLinear(warmup=5), gradient norm at most 1",
    ]
    assert found["batch"] == [
        "8 prompts × 4 completions = 32 completions a step, 6 steps",
        "prompts of at most 1,024 tokens, completions of at most 6 tokens",
        "2 optimizer steps on each batch (16 completions each), micro-batches of at most 512 padded tokens",
        "on each of 2 ranks: 4 prompts, 16 completions",
    ]
    assert found["sampling"][0].startswith("Sampling(temperature=0.7, max_tokens=6) by HFSampler")
    assert found["rewards"] == ["digit: FunctionReward, weight 2, verifier"]
    assert found["data"] == ["ToyData(seed=5)", "evaluation toy: 8 prompts × 1 completion"]
    assert found["seed"] == [f"3; {torch.get_num_threads()} threads"]
    names = [line.split(",")[0] for line in found["callbacks"]]
    assert names == ["1. RolloutLogger(every=3)", *names[1:-1], f"{len(names)}. RolloutCheckpoint"]
    assert found["memory"][0].startswith("weights")
    (reference,) = [line for line in found["memory"] if line.startswith("reference")]
    weights = found["memory"][0]
    assert reference.split()[1:3] == weights.split()[1:3]  # a copy of all that is trained


def data_lines(data: PromptDataModule, folder: Path) -> list[str]:
    """What the header of a run on this data says of it."""
    module, trainer = make_module(folder / "policy"), make_trainer(folder)
    data.setup("fit")
    trainer.datamodule, module.trainer = data, trainer
    return lines_of(run_header(module))["data"]


def test_the_data_is_named_with_its_path_and_its_number_of_prompts(tmp_path: Path):
    for name, count in (("train", 3), ("test", 2)):
        (tmp_path / f"{name}.jsonl").write_text("".join(f'{{"prompt": "{i}+1="}}\n' for i in range(count)))
    train, test = tmp_path / "train.jsonl", tmp_path / "test.jsonl"

    def text(**options: Any) -> TextDataModule:
        return TextDataModule(Source(str(train)), [EvalSource(str(test))], **options)

    assert data_lines(text(seed=5), tmp_path) == [
        f"TextDataModule({train}, seed=5): 3 prompts",
        "evaluation test: 2 prompts × 1 completion",
    ]
    assert data_lines(MixtureDataModule({"toy": ToyData(), "text": text()}), tmp_path) == [
        f"MixtureDataModule(toy: ToyData, text: TextDataModule({train})): 3 prompts of text",
        "evaluation toy: 8 prompts × 1 completion",
        "evaluation text: 2 prompts × 1 completion",
    ]


def test_the_header_reads_the_configuration_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    policy = make_policy(tmp_path / "policy")
    monkeypatch.setattr(Policy, "load", lambda self: pytest.fail("the policy was loaded"))
    (policy / "model.safetensors").unlink()
    assert "peak, update" in run_header(make_module(policy))


def test_a_policy_that_cannot_be_planned_does_not_stop_the_header(tmp_path: Path):
    header = run_header(make_module(tmp_path / "nothing"))
    assert "memory      no plan: FileNotFoundError" in header


def test_the_plan_counts_what_a_rank_samples_and_trains(tmp_path: Path):
    policy = make_policy(tmp_path / "policy")
    model, _ = Policy(str(policy)).load()
    parameters = sum(p.numel() for p in model.parameters())
    one, two = (plan_of(make_module(policy), world) for world in (1, 2))
    assert one.parameters == one.trainable == parameters
    assert one.weights == 4 * parameters
    assert one.optimizer == 8 * parameters
    assert one.kv_cache == 2 * two.kv_cache
    pytest.importorskip("peft")
    module = make_module(policy)
    module.policy = Policy(str(policy), lora=LoRA(r=2))
    adapters = plan_of(module)
    assert adapters.trainable < parameters / 2
    assert adapters.optimizer == 8 * adapters.trainable


def test_it_is_printed_at_the_start_of_each_fit_also_from_code(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    module = make_module(make_policy(tmp_path / "policy"), max_rollouts=1)
    with caplog.at_level(logging.INFO):
        train(tmp_path / "run", module)
    headers = [r.getMessage() for r in caplog.records if r.getMessage().startswith("lit-rl ")]
    assert len(headers) == 1
    assert "16 completions a step" in headers[0]


def test_supervised_training_has_a_header_too(tmp_path: Path):
    found = lines_of(run_header(make_module(make_policy(tmp_path / "policy"), SFT)))
    assert found["loss"] == ["sft = -log pi of demonstrations and replayed text; token mean"]


# Objects as text -------------------------------------------------------------------------------------------------


class Base:
    def __init__(self, size: int = 1, names: tuple[str, ...] = ()) -> None:
        self.size, self.names = size, names


class Derived(Base):
    def __init__(self, rate: float = 0.5, hidden: Any = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.rate, self._hidden = rate, hidden


def test_only_arguments_that_are_not_defaults_are_named_those_of_bases_included():
    assert summary(Derived()) == "Derived"
    assert (
        summary(Derived(rate=0.25, hidden=object(), size=3, names=("a",))) == "Derived(rate=0.25, size=3, names=('a',))"
    )
    assert changed_arguments(Derived(size=2)) == {"size": 2}


def test_an_optimizer_is_described_by_its_rate_and_what_is_not_default():
    weight = [torch.nn.Parameter(torch.zeros(1))]
    assert describe_optimizer(torch.optim.AdamW(weight)) == "AdamW(lr=0.001)"
    assert describe_optimizer(torch.optim.SGD(weight, lr=0.1, momentum=0.9)) == "SGD(lr=0.1, momentum=0.9)"


def test_hyperparameters_are_plain_values_under_dotted_names(tmp_path: Path):
    found = hyperparameters(make_module(tmp_path / "policy", kl_coef=0.1, reference=FrozenCopy()))
    expected = {
        "method": "GRPO",
        "group_size": 4,
        "kl_coef": 0.1,
        "surrogate": "Clip",
        "surrogate.clip_high": 0.2,
        "advantage.scale": "group",
        "aggregation": "token_mean",
        "sampling.max_tokens": 6,
        "policy.path": str(tmp_path / "policy"),
        "optimizer": "AdamW",
        "lr": 0.01,
        "reward_weight.digit": 1.0,
        "seed": 3,
    }
    assert {k: found.get(k) for k in expected} == expected
    assert all(isinstance(v, (bool, int, float, str)) for v in found.values())
