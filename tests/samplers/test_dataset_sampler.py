# SPDX-License-Identifier: Apache-2.0
"""Completions from the data and sampled ones side by side, from the sampler to the two kinds of loss terms."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback

from lit_rl.data import EvalSet, GeneratedStream, ListStream, PromptDataModule
from lit_rl.datamodules import MixtureDataModule
from lit_rl.methods.grpo import GRPO
from lit_rl.methods.sft import SFT
from lit_rl.methods.terms import Term
from lit_rl.policies import Policy
from lit_rl.rollouts import Origin, Rollouts, StopReason
from lit_rl.samplers.base import RolloutRequest
from lit_rl.samplers.dataset import DatasetSampler, for_prompts
from lit_rl.samplers.hf import HFSampler
from lit_rl.samplers.partial import PartialSampler
from lit_rl.testing import (
    SamplerBench,
    ToyData,
    check_resume,
    check_split_invariance,
    final_state,
    make_module,
    make_policy,
    run_on_ranks,
    toy_reward,
    train,
)
from lit_rl.testing.toys import toy_record

MIXED = [None, "3", None, ["12", "1"], [4, 5], [[4, 5], [6]]]  # of six prompts


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("dataset_sampler")


@pytest.fixture
def bench(folder: Path) -> Iterator[SamplerBench]:
    with SamplerBench(lambda: DatasetSampler(origin="replay"), folder) as bench:
        yield bench


def mixed_request(bench: SamplerBench, column: list[Any] = MIXED, **changes: Any) -> RolloutRequest:
    prompts = bench.prompts(count=len(column))
    prompts.columns["completion"] = column
    request = RolloutRequest.for_groups(prompts, 3, bench.request().sampling, seed=5)
    request.wanted = len(column)
    for name, value in changes.items():
        setattr(request, name, value)
    return request


# The sampler --------------------------------------------------------------------------------------------------------


def test_each_prompt_is_replayed_or_sampled_for(bench: SamplerBench) -> None:
    rollouts = bench.sampler.sample(mixed_request(bench))
    assert rollouts.group.tolist() == [0, 0, 0, 1, 2, 2, 2, 3, 3, 4, 5, 5]
    assert rollouts.row["sample"].tolist() == [0, 1, 2, 0, 0, 1, 2, 0, 1, 0, 0, 1]
    replayed = torch.tensor([g not in (0, 2) for g in rollouts.group.tolist()])
    assert rollouts.origin.tolist() == [int(Origin.REPLAY) if r else int(Origin.POLICY) for r in replayed]
    assert torch.equal(rollouts.sampled, ~replayed)
    end = bench.tokenizer.eos_token_id
    encode = lambda text: bench.tokenizer(text)["input_ids"]  # noqa: E731
    written = [encode("3"), encode("12"), encode("1"), [4, 5], [4, 5], [6]]
    assert rollouts.select(replayed).completions() == [[*ids, end] for ids in written]
    assert rollouts.finished[replayed].all()
    assert torch.isnan(rollouts.logprobs["sampler"][replayed]).all()  # nobody drew these tokens
    assert [p.tolist() for p in rollouts.prompts.ids] == [p.tolist() for p in bench.prompts(count=6).ids]
    assert rollouts.unit.unique().numel() == len(rollouts)


def test_sampled_rows_are_those_that_the_generator_alone_would_give(bench: SamplerBench) -> None:
    mixed = bench.sampler.sample(mixed_request(bench))
    alone = HFSampler()
    alone.setup(bench.model, bench.tokenizer)
    plain = alone.sample(mixed_request(bench))
    mine, theirs = mixed.select(mixed.sampled), plain.select(torch.isin(plain.group, torch.tensor([0, 2])))
    assert mine.completions() == theirs.completions()
    width = min(mine.width, theirs.width)
    gap = mine.logprobs["sampler"][:, :width] - theirs.logprobs["sampler"][:, :width]
    assert torch.where(mine.completion_mask[:, :width], gap, 0.0).abs().max() < 1e-5


@pytest.mark.parametrize(("column", "origin"), [(["1"] * 4, Origin.REPLAY), ([None] * 4, Origin.POLICY)])
def test_a_request_may_be_of_one_kind_only(bench: SamplerBench, column: list[Any], origin: Origin) -> None:
    rollouts = bench.sampler.sample(mixed_request(bench, column))
    assert set(rollouts.origin.tolist()) == {int(origin)}
    assert len(rollouts) == 4 * (1 if origin == Origin.REPLAY else 3)


def test_outside_of_a_training_step_nothing_is_replayed(bench: SamplerBench) -> None:
    rollouts = bench.sampler.sample(mixed_request(bench, wanted=None))
    assert rollouts.sampled.all()
    assert rollouts.group_sizes().tolist() == [3] * 6


def test_budgets_stay_with_their_rows(bench: SamplerBench) -> None:
    budgets = torch.arange(1, 19)  # rows 0-2 and 6-8 are sampled
    part = for_prompts(mixed_request(bench, budgets=budgets), [0, 2])
    assert part.budgets is not None
    assert part.budgets.tolist() == [1, 2, 3, 7, 8, 9]
    assert part.group.tolist() == [0, 0, 0, 1, 1, 1]
    assert part.prompts.draw.tolist() == [0, 2]
    assert part.wanted == 2
    rollouts = bench.sampler.sample(mixed_request(bench, budgets=budgets))
    assert (rollouts.lengths[rollouts.sampled] <= part.budgets).all()


def test_completions_may_go_without_an_end_and_are_cut_at_their_budget(bench: SamplerBench) -> None:
    def replay(column: list[Any], **options: Any) -> Rollouts:
        sampler = DatasetSampler(**options)
        sampler.setup(bench.model, bench.tokenizer)
        return sampler.sample(mixed_request(bench, column))

    open_ended = replay(["12", ""], append_end=False)
    assert open_ended.lengths.tolist() == [2, 0]
    assert open_ended.row["stop_reason"].tolist() == [int(StopReason.STOP)] * 2
    cut = replay(["1234", "123", "12"], max_tokens=3)
    assert cut.lengths.tolist() == [3, 3, 3]
    assert cut.finished.tolist() == [False, False, True]
    assert cut.row["stop_reason"].tolist() == [int(StopReason.LENGTH)] * 2 + [int(StopReason.END)]


def test_senseless_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="origin must be one of"):
        DatasetSampler(origin="teacher")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="max_tokens must be at least 1"):
        DatasetSampler(max_tokens=0)
    with pytest.raises(ValueError, match="cannot"):
        PartialSampler(DatasetSampler())
    with pytest.raises(ValueError, match="cannot wrap PartialSampler"):
        DatasetSampler(generator=PartialSampler())


# Both kinds of loss terms -------------------------------------------------------------------------------------------

KEPT = [{"prompt": f"{a}+1=", "completion": f"{a}{a}"} for a in range(6)]


class Kept(PromptDataModule):
    """Text to keep."""

    def build(self, stage: str) -> None:
        self.train_stream = ListStream(KEPT)


def mixture() -> MixtureDataModule:
    return MixtureDataModule({"toy": ToyData(), "kept": Kept()})


def mixed_module(policy: Path | str, **options: Any) -> GRPO:
    defaults: dict[str, Any] = {
        "rewards": [toy_reward(sources=["toy"])],
        "sampler": DatasetSampler(origin="replay"),
        "sft_coef": 1.0,
        "prompts_per_step": 8,
    }
    module = make_module(policy, GRPO, **{**defaults, **options})
    assert isinstance(module, GRPO)
    return module


class Record(Callback):
    """Keeps every step's numbers and batch."""

    def __init__(self) -> None:
        self.numbers: list[dict[str, float]] = []
        self.batches: list[Rollouts] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        self.numbers.append({k: float(v) for k, v in trainer.callback_metrics.items()})
        self.batches.append(pl_module.last_rollouts)


def test_grpo_trains_rewarded_prompts_by_reward_and_replayed_ones_by_likelihood(tmp_path: Path) -> None:
    record = Record()
    module = mixed_module(make_policy(tmp_path / "policy"), max_rollouts=15)
    train(tmp_path, module, [record], data=mixture())
    for batch in record.batches:
        sources = [batch.prompts.source[g] for g in batch.group.tolist()]
        assert [s == "toy" for s in sources] == batch.sampled.tolist()
        assert (sources.count("toy"), sources.count("kept")) == (4 * 4, 4)  # groups of 4, and one row each
        assert torch.isnan(batch.rewards[~batch.sampled]).all()
        assert torch.isnan(batch.correct[~batch.sampled]).all()
        assert (batch.advantages[~batch.sampled] == 0).all()
    first, last = record.numbers[0], record.numbers[-1]
    assert last["loss/sft"] < 0.5 * first["loss/sft"]
    assert last["reward/mean"] > first["reward/mean"] + 0.3


def test_numbers_of_a_step_are_about_what_the_policy_wrote(tmp_path: Path) -> None:
    record = Record()
    train(tmp_path, mixed_module(make_policy(tmp_path / "policy"), max_rollouts=2), [record], data=mixture())
    for batch, numbers in zip(record.batches, record.numbers):
        mine = batch.select(batch.sampled)
        assert numbers["reward/mean"] == pytest.approx(float(mine.rewards.mean()))
        assert numbers["rollout/length_mean"] == pytest.approx(float(mine.generated.float().mean()))
        assert numbers["rollout/correct_ratio"] == pytest.approx(float(mine.correct.mean()))
        assert numbers["rollout/unscorable_ratio"] == 0
        flat = [float(mine.rewards[mine.group == g].std()) == 0 for g in range(len(mine.prompts))]
        assert numbers["rollout/zero_signal_ratio"] == pytest.approx(sum(flat) / len(flat))
        assert numbers["rollout/completions"] == len(mine)


def test_replayed_text_that_nothing_trains_is_refused_or_warned_about(tmp_path: Path) -> None:
    policy = make_policy(tmp_path / "policy")
    rewards = [toy_reward(sources=["toy"], weight=0.0)]  # no signal from rewards either
    module = mixed_module(policy, sft_coef=0.0, rewards=rewards, max_rollouts=2)
    with pytest.warns(UserWarning, match="only loss/sft trains, with coefficient 0: set sft_coef"):
        train(tmp_path / "run", module, data=mixture())
    before = dict(Policy(str(policy)).load()[0].named_parameters())
    assert all(torch.equal(p, before[name]) for name, p in module.model.named_parameters())

    class RewardsOnly(GRPO):
        def terms(self) -> list[Term]:
            return [term for term in super().terms() if term.name != "sft"]

    module = make_module(policy, RewardsOnly, sampler=DatasetSampler())
    with pytest.raises(ValueError, match="as demonstration, which no loss term trains"):
        train(tmp_path / "other", module, data=ToyData())


def test_a_mixed_run_resumes_exactly(tmp_path: Path) -> None:
    def module(policy: Path) -> GRPO:
        return mixed_module(policy, max_rollouts=4)

    check_resume(tmp_path, module=module, at=2, data=mixture)


def test_no_split_changes_the_loss_of_a_mixed_batch(tmp_path: Path) -> None:
    record = Record()
    module = mixed_module(make_policy(tmp_path / "policy"), max_rollouts=1)
    train(tmp_path, module, [record], data=mixture())
    module.model.double()
    check_split_invariance(module, record.batches[0])


# Supervised training ------------------------------------------------------------------------------------------------


class Demonstrations(PromptDataModule):
    def __init__(self, rows: list[dict[str, Any]]) -> None:
        super().__init__()
        self.rows = rows

    def build(self, stage: str) -> None:
        self.train_stream = ListStream(self.rows)
        self.eval_sets = [EvalSet("toy", GeneratedStream(toy_record), limit=4)]


def test_sft_refuses_data_without_completions(tmp_path: Path) -> None:
    policy = make_policy(tmp_path / "policy")
    with pytest.raises(ValueError, match=r"there is no column 'completion', only \['answer'\]"):
        train(tmp_path, make_module(policy, SFT), data=ToyData())
    some = [*KEPT, {"prompt": "9+9="}]
    with pytest.raises(ValueError, match=r"the prompt '9\+9=' of source 'data' has none"):
        train(tmp_path, make_module(policy, SFT, prompts_per_step=7), data=Demonstrations(some))


def test_sft_evaluates_what_the_policy_writes_even_where_the_data_holds_completions(tmp_path: Path) -> None:
    class Copied(Demonstrations):
        def build(self, stage: str) -> None:
            super().build(stage)
            rows = [{"prompt": "1+1=", "completion": "x"}]
            self.eval_sets = [EvalSet("copied", ListStream(rows, shuffle=False), samples=64)]

    module = make_module(make_policy(tmp_path / "policy"), SFT, max_rollouts=1)
    trainer = train(tmp_path, module, data=Copied(KEPT), limit_val_batches=1, val_check_interval=1)
    # A copied completion would never start with a digit; a random policy's does now and then.
    assert 0 < float(trainer.callback_metrics["val/pass@1"]) < 1


@pytest.mark.parametrize("updates", [1, 2])
def test_replayed_rows_stay_out_of_corrections_and_penalties(tmp_path: Path, updates: int) -> None:
    """Nobody drew their tokens: the unknown probability must not reach a gradient."""
    from lit_rl.objectives import OffPolicyCorrection
    from lit_rl.policies import FrozenCopy

    record = Record()
    options: dict[str, Any] = {
        "kl_coef": 0.1,
        "reference": FrozenCopy(),
        "entropy_coef": 0.01,
        "micro_batch_tokens": 64,
    }
    options |= {"correction": OffPolicyCorrection("token", weight_high=2.0), "updates_per_rollout": updates}
    module = mixed_module(make_policy(tmp_path / "policy"), max_rollouts=2, old_logprobs="recompute", **options)
    train(tmp_path, module, [record], data=mixture())
    assert all(torch.isfinite(p).all() for p in module.model.parameters())
    for numbers in record.numbers:
        known = {k: v for k, v in numbers.items() if k.startswith(("loss/", "policy/"))}
        assert {"loss/policy", "loss/kl", "loss/entropy", "loss/sft"} <= set(known)
        assert all(v == v and abs(v) < 1e6 for v in known.values()), known


# Two ranks ----------------------------------------------------------------------------------------------------------


class Apart(PromptDataModule):
    """Of four prompts the first two are sampled for and the others replayed: a rank has one kind only."""

    def build(self, stage: str) -> None:
        rows = [{"prompt": f"{i}+1=", "completion": None if i % 4 < 2 else f"{i}{i}"} for i in range(8)]
        self.train_stream = ListStream(rows, shuffle=False)


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1)


def run_apart(folder: Path, policy: Path, world: int) -> tuple[dict[str, Any], list[dict[str, float]]]:
    record = Record()
    module = mixed_module(policy, rewards=[toy_reward()], prompts_per_step=4, max_rollouts=3, optimizer=sgd)
    parallel: dict[str, Any] = {"strategy": "ddp", "devices": world} if world > 1 else {}
    train(folder, module, [record], data=Apart(), precision="64-true", **parallel)
    return final_state(module), record.numbers


def save_apart(rank: int, folder: Path, policy: Path) -> None:
    weights, numbers = run_apart(folder / "two", policy, 2)
    torch.save((weights, numbers), folder / f"rank{rank}.pt")


def test_a_rank_with_replayed_text_only_and_one_without_compute_what_one_rank_does(tmp_path: Path) -> None:
    policy = make_policy(tmp_path / "policy")
    weights, numbers = run_apart(tmp_path / "one", policy, 1)
    run_on_ranks(save_apart, 2, tmp_path, policy)
    for rank in range(2):
        theirs, their_numbers = torch.load(tmp_path / f"rank{rank}.pt", weights_only=True)
        for name, value in weights.items():
            assert (value - theirs[name]).abs().max() < 1e-7, name
        for mine, other in zip(numbers, their_numbers):
            assert other.keys() == mine.keys()
            stable = [k for k in mine if not k.startswith(("time/", "speed/", "memory/"))]
            assert {k: other[k] for k in stable} == pytest.approx({k: mine[k] for k in stable}, abs=1e-6)
