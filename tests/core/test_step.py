# SPDX-License-Identifier: Apache-2.0
"""One training step: what is drawn, recalled, trained and logged, also in the corner cases."""

from __future__ import annotations

import math
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.loggers import TensorBoardLogger

from lit_rl.data import GeneratedStream
from lit_rl.hooks import RolloutCallback
from lit_rl.methods import RLModule
from lit_rl.methods.reporting import Ledger, tensorboard_file, write_scalars
from lit_rl.methods.terms import Current, LossTerm
from lit_rl.methods.updating import IDLE_UPDATES
from lit_rl.objectives import KLCov
from lit_rl.policies import FrozenCopy
from lit_rl.rewards import FunctionReward
from lit_rl.rollouts import Rollouts, StopReason
from lit_rl.samplers import HFSampler, Sampling
from lit_rl.samplers.base import RolloutRequest, RolloutSampler
from lit_rl.testing import ToyData, assert_same_weights, final_state, make_module, make_policy, train
from lit_rl.testing.toys import toy_reward
from tests.core.runs import scalars, schedule
from tests.core.test_rollouts import make_rollouts

LOGGED = """reward/mean reward/std reward/digit rollout/correct_ratio rollout/zero_signal_ratio rollout/length_mean
rollout/kept_length_mean rollout/length_p95 rollout/truncated_ratio rollout/unscorable_ratio policy/entropy
policy/kl_reference policy/kl_sampler policy/ratio_max policy/clip_ratio policy/grad_norm policy/lr loss/policy loss/kl
val/pass@1 val/length_mean time/rollout time/reward time/recall time/update time/sync speed/tokens_per_second
memory/peak_gib rollout_step"""


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_policy(tmp_path_factory.mktemp("policy"))


class Watch(RolloutCallback):
    """Keeps the metrics, and the weights, after every step."""

    def __init__(self) -> None:
        self.metrics: list[dict[str, float]] = []
        self.weights: list[dict[str, torch.Tensor]] = []

    def on_metrics(self, trainer: Any, module: Any, metrics: dict[str, float]) -> None:
        self.metrics.append(dict(metrics))
        self.weights.append(final_state(module))


def run(folder: Path, policy: Path, *callbacks: Callback, data: Any = None, **options: Any) -> tuple[RLModule, Watch]:
    module, watch = make_module(policy, **({"max_rollouts": 1} | options)), Watch()
    train(folder, module, [*callbacks, watch], data=data)
    return module, watch


def moved(module: RLModule, policy: Path) -> bool:
    from lit_rl.policies import Policy

    before = dict(Policy(str(policy)).load()[0].named_parameters())
    return any(not torch.equal(value, before[name]) for name, value in final_state(module).items())


# Logging ------------------------------------------------------------


def test_everything_that_the_documentation_names_is_logged_at_the_clock(policy, tmp_path):
    module = make_module(policy, max_rollouts=2, reference=FrozenCopy(), kl_coef=0.1)
    logger = TensorBoardLogger(str(tmp_path), name="", version="")
    train(tmp_path, module, logger=logger, limit_val_batches=1.0, val_check_interval=1, check_val_every_n_epoch=None)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path)).Reload()
    for name in LOGGED.split():
        assert [e.step for e in events.Scalars(name)] == [0, 1], name
    assert [e.value for e in events.Scalars("rollout_step")] == [0, 1]


def test_everything_that_is_logged_is_on_the_page_of_logged_names(policy, tmp_path):
    """Names in full, or the last part where the page lists several of one kind in a row."""
    module = make_module(policy, max_rollouts=1, reference=FrozenCopy(), kl_coef=0.1, updates_per_rollout=2)
    logger = TensorBoardLogger(str(tmp_path), name="", version="")
    train(tmp_path, module, logger=logger, limit_val_batches=1.0, val_check_interval=1, check_val_every_n_epoch=None)
    page = (Path(__file__).parents[2] / "docs" / "logged-names.md").read_text()
    named = set(re.findall(r"`([^`]+)`", page))
    families = ("reward/", "loss/", "val/pass@", "val/maj@")
    logged = [name for name in scalars(tmp_path) if not name.startswith(families)]
    assert len(logged) > 20
    unknown = [n for n in logged if n not in named | {"epoch", "hp_metric"} and n.partition("/")[2] not in named]
    assert not unknown


def test_a_number_belongs_to_its_step_only(policy, tmp_path):
    class Sometimes(Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
            if pl_module.clock == 2:
                pl_module.log("sometimes", 5.0)
            self.seen = [*getattr(self, "seen", []), float(trainer.callback_metrics.get("sometimes", -1))]

    sometimes = Sometimes()
    module = make_module(policy, max_rollouts=4)
    train(tmp_path, module, [sometimes], logger=TensorBoardLogger(str(tmp_path), name="", version=""))
    assert scalars(tmp_path)["sometimes"] == [(1, 5.0)]
    assert sometimes.seen == [-1, 5, -1, -1]


class Measures(RolloutCallback):
    """Logs in the ways that are open to a callback."""

    def on_rewards(self, trainer: Any, module: Any, rollouts: Any) -> None:
        module.ledger.mean("mine/rows", rollouts.lengths.float(), rollouts.lengths > 1)
        module.ledger.mean("mine/number", 0.5)
        module.ledger.mean("mine/number", 1)
        module.ledger.largest("mine/largest", 3.0)

    def on_metrics(self, trainer: Any, module: Any, metrics: dict[str, float]) -> None:
        metrics["mine/late"] = 2 * metrics["mine/number"]


def test_a_callback_logs_rows_numbers_and_what_follows_from_them(policy, tmp_path):
    watch = Watch()
    logger = TensorBoardLogger(str(tmp_path), name="", version="")
    train(tmp_path, make_module(policy, max_rollouts=1), [Measures(), watch], logger=logger)
    written = {name: values[0][1] for name, values in scalars(tmp_path).items()}
    assert (written["mine/number"], written["mine/largest"], written["mine/late"]) == (0.75, 3.0, 1.5)
    assert written["mine/rows"] > 1
    assert watch.metrics[0]["mine/late"] == 1.5


def test_a_number_that_comes_too_late_for_the_ledger_is_refused(policy, tmp_path):
    class Late(RolloutCallback):
        def on_metrics(self, trainer: Any, module: Any, metrics: dict[str, float]) -> None:
            module.ledger.mean("late", 1.0)

    with pytest.raises(RuntimeError, match=r"'late' comes too late: .* put numbers .* into `metrics`"):
        train(tmp_path, make_module(policy, max_rollouts=1), [Late()])


def test_log_every_n_steps_of_the_trainer_is_obeyed(policy, tmp_path):
    module = make_module(policy, max_rollouts=5)
    train(tmp_path, module, logger=TensorBoardLogger(str(tmp_path), name="", version=""), log_every_n_steps=2)
    assert [step for step, _ in scalars(tmp_path)["reward/mean"]] == [1, 3, 4]  # and the last one


@pytest.mark.parametrize("prefix", ["", "mine"])
def test_a_logger_with_a_prefix_or_a_mind_of_its_own_is_handed_the_numbers_as_lightning_does(prefix, tmp_path):
    class Own(TensorBoardLogger):
        def log_metrics(self, metrics: Any, step: int | None = None) -> None:
            super().log_metrics({k: 2 * v for k, v in metrics.items()}, step)

    for kind, factor in ((TensorBoardLogger, 1), (Own, 2)):
        folder = tmp_path / kind.__name__
        logger = kind(str(folder), name="", version="", prefix=prefix)
        write_scalars(logger, {"a": 1.5, "b": 2.0}, step=3)
        logger.save()
        start = f"{prefix}-" if prefix else ""
        assert scalars(folder) == {f"{start}a": [(3, 1.5 * factor)], f"{start}b": [(3, 2.0 * factor)]}


def test_ranks_that_do_not_write_have_no_file(monkeypatch, tmp_path):
    from lightning.pytorch.utilities import rank_zero_only

    monkeypatch.setattr(rank_zero_only, "rank", 1)
    logger = TensorBoardLogger(str(tmp_path), name="", version="")
    assert tensorboard_file(logger) is None  # the stand-in answers every attribute
    write_scalars(logger, {"a": 1.0}, step=0)
    assert not list(tmp_path.rglob("events*"))


def test_the_learning_rate_that_is_logged_is_the_one_that_was_used(policy, tmp_path):
    _, watch = run(tmp_path, policy, max_rollouts=4, scheduler=schedule)
    assert [m["policy/lr"] for m in watch.metrics] == pytest.approx([0.01 / 3, 0.02 / 3, 0.01, 0.01])


def test_statistics_of_a_batch_equal_plain_loops(policy, tmp_path):
    module, watch = run(tmp_path, policy, max_rollouts=1, prompts_per_step=8)
    rollouts, logged = module.last_rollouts, watch.metrics[0]
    rewards = rollouts.rewards.double()
    assert logged["reward/mean"] == pytest.approx(rewards.mean().item())
    assert logged["reward/std"] == pytest.approx(rewards.std(correction=0).item(), abs=1e-6)
    lengths = [len(c) for c in rollouts.completions()]
    assert logged["rollout/length_mean"] == pytest.approx(sum(lengths) / 32)
    assert logged["rollout/length_p95"] == pytest.approx(torch.tensor(lengths).float().quantile(0.95).item())
    silent = sum(len(set(rewards[rollouts.group == g].tolist())) == 1 for g in range(8))
    assert logged["rollout/zero_signal_ratio"] == silent / 8
    assert logged["rollout/tokens"] == sum(lengths)


def test_a_reward_of_weight_0_is_watched_and_changes_nothing(policy, tmp_path):
    ones = FunctionReward(lambda batch: [1.0] * len(batch), name="ones", weight=0.0)
    plain, before = run(tmp_path / "plain", policy, max_rollouts=2)
    watched, after = run(tmp_path / "watched", policy, max_rollouts=2, rewards=[toy_reward(), ones])
    assert_same_weights(final_state(plain), final_state(watched))
    assert [m["reward/ones"] for m in after.metrics] == [1.0, 1.0]
    assert [m["reward/mean"] for m in after.metrics] == [m["reward/mean"] for m in before.metrics]


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
def test_numbers_and_rewards_stay_in_single_precision_whatever_the_weights_are(policy, tmp_path, precision):
    thirds = FunctionReward(lambda batch: [1 / 3 + i / 300 for i in range(len(batch))], name="thirds")
    module, watch = make_module(policy, rewards=[thirds], max_rollouts=2, reference=FrozenCopy(), kl_coef=0.1), Watch()
    train(tmp_path, module, [watch], precision=precision)
    expected = sum(1 / 3 + i / 300 for i in range(16)) / 16
    assert watch.metrics[0]["reward/mean"] == pytest.approx(expected, abs=1e-6)
    assert module.last_rollouts.rewards.dtype == torch.float32
    weight = {"bf16-mixed": torch.float32, "bf16-true": torch.bfloat16, "64-true": torch.float64}[precision]
    assert {p.dtype for p in module.reference.copy.parameters()} == {weight}  # the policy's own
    assert abs(watch.metrics[0]["policy/kl_reference"]) < 1e-4


def test_losses_are_averaged_over_the_updates_of_a_step(policy, tmp_path):
    options = {"optimizer": frozen, "entropy_coef": 0.1}
    _, one = run(tmp_path / "1", policy, **options)
    _, four = run(tmp_path / "4", policy, **options, epochs_per_rollout=2, updates_per_rollout=2)
    assert one.metrics[0]["loss/entropy"] == pytest.approx(-one.metrics[0]["policy/entropy"], rel=1e-4)
    assert four.metrics[0]["loss/entropy"] == pytest.approx(one.metrics[0]["loss/entropy"], rel=0.01)


def frozen(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.0)


# Drawing ------------------------------------------------------------


class Lengthy(ToyData):
    """Every third prompt (or, with 1, every prompt) is too long."""

    def __init__(self, every: int) -> None:
        super().__init__()
        self.every = every

    def build(self, stage: str) -> None:
        super().build(stage)

        def record(rng: Any) -> dict[str, Any]:
            long = rng.randrange(self.every) == 0
            return {"prompt": "1+1=" * (20 if long else 1), "answer": "2"}

        self.train_stream = GeneratedStream(record, seed=0, source="toy")


def dropping(tokenizer: Any, **settings: Any) -> Any:
    from lit_rl.prompts import PromptEncoder

    return PromptEncoder(tokenizer, overlong="drop", **settings)


def test_prompts_that_are_dropped_are_replaced_and_counted(policy, tmp_path):
    options = {"encoder": dropping, "max_prompt_tokens": 10, "max_rollouts": 3}
    with pytest.warns(UserWarning, match="left out"):
        module, watch = run(tmp_path, policy, data=Lengthy(3), **options)
    dropped = sum(m.get("rollout/prompts_dropped", 0) for m in watch.metrics)
    assert dropped > 0
    assert [m["rollout/completions"] for m in watch.metrics] == [16, 16, 16]
    assert module.cursor == 3 * 4 + dropped


def test_a_source_of_which_every_prompt_is_dropped_is_refused(policy, tmp_path, monkeypatch):
    monkeypatch.setattr("lit_rl.methods.module._MAX_DRAWS", 5)
    with pytest.raises(ValueError, match="5 attempts did not find 4 prompts of at most 10 tokens"):
        run(tmp_path, policy, data=Lengthy(1), encoder=dropping, max_prompt_tokens=10)


class Scripted(RolloutSampler):
    """Returns completions of given lengths, however unlikely."""

    def __init__(self, lengths: list[int], gap: float = 0.0) -> None:
        self.lengths, self.gap = lengths, gap
        self.evaluator = HFSampler()

    def setup(self, model: Any, tokenizer: Any) -> None:
        super().setup(model, tokenizer)
        self.evaluator.setup(model, tokenizer)

    def submit(self, request: RolloutRequest) -> None:
        self.request = request

    def collect(self) -> Rollouts:
        n = len(self.request)
        lengths = [self.lengths[i % len(self.lengths)] for i in range(n)]
        return Rollouts.build(
            self.request.prompts,
            self.request.group,
            [torch.full((length,), 5 + i % 3) for i, length in enumerate(lengths)],
            sampler_logprobs=[torch.full((length,), -4.0 - self.gap) for length in lengths],
            stop_reason=torch.full((n,), int(StopReason.END)),
            sample=self.request.sample,
            policy_version=self.policy_version,
        )


def by_length(batch: Any) -> list[float]:
    return [float(n) for n in batch.lengths]


@pytest.mark.parametrize("updates", [1, 2])
def test_empty_completions_count_as_rows_and_train_nothing(policy, tmp_path, updates):
    reward = FunctionReward(by_length, name="length")
    options = {"rewards": [reward], "sampler": Scripted([0, 3, 0, 2]), "keep_entropy": False}
    module, watch = run(tmp_path, policy, updates_per_rollout=updates, **options)
    assert watch.metrics[0]["rollout/length_mean"] == pytest.approx(5 / 4)
    assert math.isfinite(watch.metrics[0]["loss/policy"])
    assert moved(module, policy)


def test_a_batch_of_nothing_but_empty_completions_takes_no_step(policy, tmp_path):
    module, watch = run(tmp_path, policy, sampler=Scripted([0]), keep_entropy=False, updates_per_rollout=2)
    assert (module.clock, module.rollout_step) == (1, 1)
    assert not moved(module, policy)
    assert "policy/grad_norm" not in watch.metrics[0]


def test_a_step_whose_groups_were_all_dropped_takes_no_update_but_counts(policy, tmp_path):
    class DropAll(RolloutCallback):
        def on_rewards(self, trainer: Any, module: Any, rollouts: Any) -> Any:
            return rollouts.select_groups(torch.zeros(len(rollouts.prompts), dtype=torch.bool))

    module, watch = run(tmp_path, policy, DropAll(), max_rollouts=2, reference=FrozenCopy(), kl_coef=0.1)
    assert (module.clock, module.cursor) == (2, 8)
    assert not moved(module, policy)
    assert watch.metrics[0]["rollout/completions"] == 0


# π_old ------------------------------------------------------------


class CountForwards(RolloutCallback):
    """Counts how many rows are scored without gradient."""

    def on_batch_ready(self, trainer: Any, module: Any, rollouts: Any) -> None:
        self.rows = 0
        score = module.policy_logprobs

        def counted(batch: Any, *args: Any, **kwargs: Any) -> Any:
            self.rows += len(batch)
            return score(batch, *args, **kwargs)

        module.policy_logprobs = counted


class Sample(RolloutCallback):
    """Changes the sampling settings of a request."""

    def __init__(self, **settings: Any) -> None:
        self.settings = settings

    def on_rollout_request(self, trainer: Any, module: Any, request: Any) -> None:
        for name, value in self.settings.items():
            setattr(request.sampling, name, value)


class Touch(RolloutCallback):
    """Makes the first row stale, foreign, or of unknown probability."""

    def __init__(self, what: str) -> None:
        self.what = what

    def on_rollouts(self, trainer: Any, module: Any, rollouts: Any) -> None:
        if self.what == "stale":
            rollouts.token["policy_version"][0, 0] -= 1
        elif self.what == "foreign":
            rollouts.row["origin"][0] = 1
        else:
            rollouts.logprobs["sampler"][0] = math.nan


@pytest.mark.parametrize(
    ("callbacks", "options", "rows"),
    [
        ([], {}, 0),
        ([], {"old_logprobs": "recompute"}, 16),
        ([Sample(temperature=0.7)], {}, 16),
        ([Sample(top_p=0.9)], {}, 16),
        ([Sample(max_tokens=4)], {}, 0),
        ([Sample(top_p=0.9)], {"old_logprobs": "sampler"}, 0),
        ([], {"sampling": Sampling(max_tokens=6, top_k=5)}, 16),
        ([Touch("stale")], {}, 1),
        ([Touch("foreign")], {}, 1),
        ([Touch("unknown")], {}, 1),
    ],
    ids=["plain", "recompute", "temperature", "top_p", "max_tokens", "trusted", "top_k", "stale", "foreign", "unknown"],
)
def test_old_logprobs_are_taken_from_the_sampler_only_where_they_are_the_policys_own(
    policy, tmp_path, callbacks, options, rows
):
    count = CountForwards()
    module, _ = run(tmp_path, policy, *callbacks, count, updates_per_rollout=2, optimizer=frozen, **options)
    assert count.rows == rows
    old, mask = module.last_rollouts.logprobs["old"], module.last_rollouts.completion_mask
    if options.get("old_logprobs") != "sampler":
        module.policy_logprobs = type(module).policy_logprobs.__get__(module)
        exact = module.policy_logprobs(module.last_rollouts, module.model)[0]
        assert torch.allclose(old[mask], exact[mask], atol=1e-5)
    assert not old[~mask].any()


def test_a_term_that_is_never_fed_is_warned_about_once(policy, tmp_path, recwarn):
    train(tmp_path / "a", make_module(policy, max_rollouts=IDLE_UPDATES - 1, sft_coef=1.0))
    assert not [w for w in recwarn if "has trained nothing" in str(w.message)]
    train(tmp_path / "b", make_module(policy, max_rollouts=IDLE_UPDATES + 3, sft_coef=1.0))
    (said,) = [str(w.message) for w in recwarn if "has trained nothing" in str(w.message)]
    assert (
        "'sft' has trained nothing in 10 optimizer steps: there was no token of origin demonstration or replay" in said
    )


def test_a_term_that_is_switched_off_when_it_is_warned_about_is_left_alone(policy, tmp_path, recwarn):
    class SwitchOff(RolloutCallback):
        def on_metrics(self, trainer: Any, module: Any, metrics: dict[str, float]) -> None:
            if module.clock == IDLE_UPDATES - 1:
                module.sft_coef = 0.0

    train(tmp_path, make_module(policy, max_rollouts=IDLE_UPDATES + 3, sft_coef=1.0), [SwitchOff()])
    assert sum("has trained nothing" in str(w.message) for w in recwarn) == 1


def test_a_small_distance_of_sampler_and_trainer_is_not_lost_in_rounding():
    batch = make_rollouts([3, 2], [0, 0])
    batch.logprobs["sampler"] = torch.full(batch.completion_ids.shape, -1.0)
    current = Current(torch.full(batch.completion_ids.shape, -1.0 + 1e-5), None, None)
    gap = float((current.logprobs - batch.logprobs["sampler"])[0, 0])
    module: Any = SimpleNamespace(ledger=Ledger())
    RLModule.record_mismatch(module, batch, current, batch.completion_mask)
    assert module.ledger.reduce(torch.device("cpu"))["policy/kl_sampler"] == pytest.approx(gap**2 / 2, rel=0.01)


def test_with_one_update_nothing_is_scored_twice(policy, tmp_path):
    count = CountForwards()
    module, _ = run(tmp_path, policy, count)
    assert count.rows == 0
    assert "old" not in module.last_rollouts.logprobs


def test_half_precision_recomputes_what_the_sampler_rounded_differently(policy, tmp_path):
    count = CountForwards()
    module = make_module(policy, max_rollouts=1, updates_per_rollout=2)
    train(tmp_path, module, [count], precision="bf16-mixed")
    assert count.rows == 16


def test_a_sampler_that_speaks_of_another_distribution_is_announced_once(policy, tmp_path):
    reward = FunctionReward(by_length, name="length")
    options = {"rewards": [reward], "sampler": Scripted([2, 3], gap=1.0), "keep_entropy": False, "max_rollouts": 2}
    with pytest.warns(UserWarning, match="differ from the policy's own by a KL of") as caught:
        run(tmp_path, policy, **options)
    assert sum("differ from the policy's own" in str(w.message) for w in caught) == 1


# Terms and coefficients ------------------------------------------------------------


def constant(batch: Any) -> list[float]:
    return [1.0] * len(batch)


class Disturb(RolloutCallback):
    """Moves the reference away, so that there is something to come back from."""

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        with torch.no_grad():
            for p in pl_module.reference.copy.parameters():
                p.mul_(1.1)


@pytest.mark.parametrize(("kl_coef", "moves"), [(0.5, True), (0.0, False)])
def test_rows_without_advantage_still_feel_the_kl_term(policy, tmp_path, kl_coef, moves):
    options = {"rewards": [FunctionReward(constant, name="one")], "reference": FrozenCopy(), "kl_coef": kl_coef}
    module, watch = run(tmp_path, policy, Disturb(), **options)
    assert watch.metrics[0]["rollout/zero_signal_ratio"] == 1
    assert moved(module, policy) == moves
    assert ("policy/grad_norm" in watch.metrics[0]) == moves


def test_a_coefficient_that_begins_at_0_can_be_raised_during_the_run(policy, tmp_path):
    class Raise(Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, *args: Any) -> None:
            pl_module.entropy_coef = 0.1 * pl_module.rollout_step

    module, watch = run(tmp_path, policy, Raise(), max_rollouts=2, rewards=[FunctionReward(constant, name="one")])
    assert ["loss/entropy" in m for m in watch.metrics] == [False, True]
    assert watch.metrics[1]["loss/entropy"] == pytest.approx(-watch.metrics[1]["policy/entropy"], rel=1e-4)
    assert moved(module, policy)


class SetCoefficient(RolloutCallback):
    def __init__(self, name: str, value: float) -> None:
        self.name, self.value = name, value

    def on_loss_terms(self, trainer: Any, module: Any, terms: list[LossTerm]) -> None:
        for term in terms:
            if term.name == self.name:
                term.coefficient = self.value


def test_a_callback_may_silence_every_term(policy, tmp_path):
    module, watch = run(tmp_path, policy, SetCoefficient("policy", 0.0))
    assert watch.metrics[0]["policy/grad_norm"] == 0
    assert not moved(module, policy)


def test_a_callback_cannot_switch_on_what_was_computed_without_gradient(policy, tmp_path):
    with pytest.raises(RuntimeError, match="on_loss_terms gave the term 'kl' a coefficient"):
        run(tmp_path, policy, SetCoefficient("kl", 1.0), reference=FrozenCopy())


def test_a_coefficient_of_a_callback_scales_the_update(policy, tmp_path):
    def descent(parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, lr=1.0)

    options = {"optimizer": descent, "max_grad_norm": None}
    _, plain = run(tmp_path / "a", policy, **options)
    _, double = run(tmp_path / "b", policy, SetCoefficient("policy", 2.0), **options)
    assert double.metrics[0]["policy/grad_norm"] == pytest.approx(2 * plain.metrics[0]["policy/grad_norm"], rel=1e-5)
    assert double.metrics[0]["loss/policy"] == plain.metrics[0]["loss/policy"]  # logged without the coefficient


@pytest.mark.parametrize(
    ("denominator", "expected"),
    [(4.0, (2 * 1.0 + 3 * 0.5) / 4), (0.25, (2 * 1.0 + 3 * 0.5) / 0.25), (0.0, 2 * 1.0 + 3 * 0.5)],
)
def test_a_loss_term_is_a_weighted_sum_over_its_count_however_small(denominator, expected):
    values = torch.tensor([[2.0, 3.0, math.nan]])
    term = LossTerm("x", values, torch.tensor([[1.0, 0.5, 0.0]]), torch.tensor(denominator), coefficient=0.5)
    assert float(term.raw()) == pytest.approx(expected)
    assert float(term.loss()) == pytest.approx(0.5 * expected)


def test_a_row_without_advantage_is_passed_through_the_model_if_a_surrogate_has_selected_its_tokens(policy, tmp_path):
    options = {"surrogate": KLCov(fraction=1.0, beta=1.0), "rewards": [FunctionReward(constant, name="one")]}
    module, watch = run(tmp_path, policy, updates_per_rollout=2, **options)
    assert module.last_rollouts.advantages.abs().max() == 0
    assert "policy/grad_norm" in watch.metrics[0]  # the penalty of KL-Cov does not depend on the advantage
