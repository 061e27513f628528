# SPDX-License-Identifier: Apache-2.0
"""Asynchronous rollouts: order, age and versions of batches; state; a worker that fails, dies or is to stop."""

import multiprocessing
import os
import signal
import threading
import time

import pytest
import torch
from contract import contract
from lightning.pytorch import Callback
from sampler_models import tiny_model
from scripted_sampler import ScriptedSampler, Steps, prompts_at

from lit_rl.methods.terms import PolicyTerm
from lit_rl.objectives import Clip
from lit_rl.rollouts import Rollouts
from lit_rl.samplers import AsyncSampler, HFSampler, RolloutRequest, Sampling
from lit_rl.samplers.workers import Cancel, Inbox, Job, Weights
from lit_rl.samplers.wrapping import staleness
from lit_rl.testing import assert_same_weights, check_resume, final_state, make_module, make_policy, train

MODEL = torch.nn.Linear(1, 1)
# Worker processes are forked from a server; one that has imported the package starts them in milliseconds.
multiprocessing.set_forkserver_preload(["lit_rl.testing", "transformers.models.qwen2.modeling_qwen2"])


def length_of_draw(draw: int, sample: int) -> int:
    return 1 + draw % 5


class Gated(ScriptedSampler):
    """Waits for the test before it finishes a batch. Copies share the gate, so that the worker's is the test's."""

    def __init__(self) -> None:
        super().__init__(length_of_draw)
        self.gate, self.begun = threading.Semaphore(0), threading.Semaphore(0)
        self.versions: list[int] = []

    def __deepcopy__(self, memo):
        return self

    def sync(self, model, version: int) -> None:
        super().sync(model, version)
        self.versions.append(version)

    def collect(self) -> Rollouts:
        self.begun.release()
        assert self.gate.acquire(timeout=30)
        return super().collect()


def scripted(inner=None, **options) -> tuple[AsyncSampler, Steps]:
    sampler = AsyncSampler(inner or ScriptedSampler(length_of_draw), worker="thread", **options)
    sampler.setup(MODEL, None)
    sampler.sync(MODEL, 0)
    return sampler, Steps(sampler)


@pytest.fixture
def closing():
    samplers: list[AsyncSampler] = []
    yield samplers.append
    for sampler in samplers:
        sampler.close()


# --- order and age ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ahead", [0, 1, 3])
def test_batches_come_in_order_and_no_older_than_allowed(closing, ahead):
    """Deterministic: exactly ``ahead`` versions old once the run is under way."""
    sampler, run = scripted(staleness=ahead, deterministic=True)
    closing(sampler)
    for step in range(6):
        rollouts = run.step(2, MODEL)
        assert rollouts.prompts.draw.tolist() == [2 * step, 2 * step + 1]
        assert rollouts.lengths.tolist() == [length_of_draw(2 * step + i, 0) for i in range(2)]
        assert run.cursor == 2 * (step + 1 + ahead)
        age = staleness(rollouts, step)[rollouts.completion_mask]
        assert set(age.tolist()) == {min(step, ahead)}
        numbers = sampler.metrics(rollouts)
        assert numbers["staleness_max"] == numbers["staleness_mean"] == min(step, ahead)
        assert numbers["batches_ahead"] == ahead


def test_the_worker_samples_the_next_batch_while_the_current_one_trains(closing):
    inner = Gated()
    sampler, run = scripted(inner)
    closing(sampler)
    inner.gate.release()
    first = run.step(2, MODEL)
    assert first.prompts.draw.tolist() == [0, 1]
    assert inner.begun.acquire(timeout=30)
    assert inner.begun.acquire(timeout=30), "the second batch has begun before anyone asked for it"
    inner.gate.release(20)
    assert run.step(2, MODEL).prompts.draw.tolist() == [2, 3]


@pytest.mark.parametrize(("deterministic", "version"), [(True, 0), (False, 2)])
def test_the_newest_weights_overtake_waiting_batches_unless_deterministic(closing, deterministic, version):
    inner = Gated()
    sampler, run = scripted(inner, staleness=2, deterministic=deterministic)
    closing(sampler)
    inner.gate.release()
    run.step(1, MODEL)  # the worker is inside the second of three batches
    for _ in range(2):
        assert inner.begun.acquire(timeout=30)
    sampler.sync(MODEL, 2)
    inner.gate.release(20)
    run.version = 2
    versions = [int(run.step(1, MODEL).token["policy_version"].max()) for _ in range(2)]
    # Whether the second batch began before or after the step's own weights came is a race, unless deterministic.
    assert versions[0] in ((0,) if deterministic else (0, 1))
    assert versions[1] == version


def test_the_inbox_keeps_order_or_prefers_the_newest_weights():
    request = RolloutRequest.for_groups(prompts_at(0, 1), 1, Sampling(), seed=0)
    commands = [Job(1, request), Weights(1, {}), Job(2, request), Weights(2, {}), None]
    for newest_first, expected in ((False, commands), (True, [commands[3], commands[0], commands[2], None])):
        inbox = Inbox(newest_first)
        for command in commands:
            inbox.put(command)
        assert [inbox.get() for _ in expected] == expected
    inbox = Inbox(False)
    for command in (commands[0], commands[1], Cancel(), commands[2]):
        inbox.put(command)
    assert [inbox.get(), inbox.get()] == [commands[1], commands[2]]


def test_a_refill_round_gets_the_oldest_groups_of_what_is_ahead(closing):
    sampler, run = scripted(deterministic=True)
    closing(sampler)
    assert run.step(4, MODEL).prompts.draw.tolist() == [0, 1, 2, 3]
    assert run.cursor == 8
    assert sampler.sample(run.request(1)).prompts.draw.tolist() == [4]
    assert run.cursor == 9
    assert run.step(4, MODEL).prompts.draw.tolist() == [5, 6, 7, 8]
    assert len(sampler.sample(run.request(0))) == 0


def test_a_request_outside_of_training_waits_for_its_turn_and_leaves_the_order_alone(closing):
    sampler, run = scripted(deterministic=True)
    closing(sampler)
    run.step(2, MODEL)
    rollouts = sampler.sample(RolloutRequest.for_groups(prompts_at(50, 3), 2, Sampling(max_tokens=100), 0))
    assert rollouts.prompts.draw.tolist() == [50, 51, 52]
    assert len(rollouts) == 6
    assert run.step(2, MODEL).prompts.draw.tolist() == [2, 3]


# --- the loss --------------------------------------------------------------------------------------------------------


def test_behaviour_makes_the_sampler_the_old_policy(closing):
    sampler, run = scripted(correction="behaviour")
    closing(sampler)
    rollouts = run.step(2, MODEL)
    assert torch.equal(rollouts.logprobs["old"], rollouts.logprobs["sampler"])
    assert sampler.loss_correction is None


def test_a_run_that_takes_old_tokens_for_its_own_is_refused(tmp_path):
    policy = make_policy(tmp_path / "policy")

    def uncorrected(**options):
        module = make_module(policy, sampler=AsyncSampler(worker="thread", **options))
        module.terms = lambda: [PolicyTerm(Clip())]
        return module

    with pytest.raises(ValueError, match="loss term 'policy' of GRPO treats them as the current ones"):
        train(tmp_path, uncorrected())
    with pytest.raises(ValueError, match="old_logprobs='sampler'"):
        train(tmp_path, make_module(policy, sampler=AsyncSampler(worker="thread"), old_logprobs="sampler"))
    with pytest.raises(ValueError, match="never on-policy"):
        AsyncSampler(correction="none")
    sampler = AsyncSampler(worker="thread", max_weight=1.5)
    assert make_module(policy, sampler=sampler).correction.weight_high == 1.5


# --- state -----------------------------------------------------------------------------------------------------------


def test_a_checkpoint_holds_the_finished_batches(closing, tmp_path):
    sampler, run = scripted(staleness=2, deterministic=True)
    closing(sampler)
    for _ in range(2):
        run.step(2, MODEL)
    torch.save(sampler.state_dict(), tmp_path / "state.pt")
    expected = [run.step(2, MODEL) for _ in range(3)]
    other, again = scripted(staleness=2, deterministic=True)
    closing(other)
    again.cursor, again.version = 8, 2
    other.sync(MODEL, 2)
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert other.prompts_to_draw(1) == 1, "a small round does not shrink what is sampled ahead"
    for rollouts in expected:
        assert rollouts.diff(again.step(2, MODEL)) == {}


def test_an_interrupted_step_can_be_undone(closing):
    inner = Gated()
    sampler, run = scripted(inner)
    closing(sampler)
    inner.gate.release(2)
    run.step(2, MODEL)
    sampler.state_dict()  # the batch ahead is there
    boundary, cursor = sampler.boundary(), run.cursor
    sampler.sample(run.request(2))
    run.request(2)
    stopped = run.request(2)
    stopped.should_stop = lambda progress: True
    assert not sampler.sample(stopped).lengths.any(), "it does not wait for the worker"
    sampler.return_to(boundary)
    run.cursor = cursor
    inner.gate.release(20)
    draws = [run.step(2, MODEL).prompts.draw.tolist() for _ in range(3)]
    assert draws == [[2, 3], [4, 5], [6, 7]]


def test_a_rewind_forgets_what_is_ahead(closing):
    sampler, run = scripted()
    closing(sampler)
    run.step(2, MODEL)
    sampler.on_rewind(MODEL)
    run.cursor = 2
    assert [run.step(2, MODEL).prompts.draw.tolist() for _ in range(2)] == [[2, 3], [4, 5]]


def test_after_a_rewind_the_worker_does_not_finish_what_nobody_wants(closing):
    inner = Gated()
    sampler, run = scripted(inner, staleness=3)
    closing(sampler)
    inner.gate.release()
    run.step(1, MODEL)
    for _ in range(2):
        assert inner.begun.acquire(timeout=30)  # it is inside the second of four batches
    sampler.on_rewind(MODEL)
    inner.gate.release(20)
    run.step(1, MODEL)
    assert [int(r.prompts.draw) for r in inner.requests[:3]] == [0, 1, 4]


def test_a_deterministic_run_resumes_bit_for_bit(tmp_path):
    def module(folder):
        return make_module(folder, sampler=AsyncSampler(worker="thread", deterministic=True), max_rollouts=4)

    check_resume(tmp_path, module=module, at=2)


test_async_sampler_keeps_the_contract = contract(lambda: AsyncSampler(worker="thread", deterministic=True))


# --- a worker that fails ---------------------------------------------------------------------------------------------


class Failing(ScriptedSampler):
    def collect(self) -> Rollouts:
        raise ArithmeticError("no such number")


def test_an_error_in_the_worker_is_the_trainers(closing):
    sampler, run = scripted(Failing(length_of_draw))
    closing(sampler)
    with pytest.raises(RuntimeError, match="no such number"):
        run.step(2, MODEL)


def test_closing_does_not_wait_for_a_batch(tokenizer):
    model = tiny_model("Qwen2", vocab_size=len(tokenizer), max_position_embeddings=4096)
    sampler = AsyncSampler(worker="thread")
    sampler.setup(model, tokenizer)
    sampler.sync(model, 0)
    run = Steps(sampler, max_tokens=4000)
    request = run.request(64)
    sampler.submit(request)
    request.should_stop = lambda progress: True
    sampler.collect()
    began = time.monotonic()
    sampler.close()
    assert time.monotonic() - began < 20
    assert sampler.worker is None


class Deadly(HFSampler):
    """Kills its process when it samples a certain draw for the first time."""

    def __init__(self, draw: int, marker: str) -> None:
        super().__init__()
        self.draw, self.marker = draw, marker

    def collect(self) -> Rollouts:
        if self.draw in self._pending[0].prompts.draw and not os.path.exists(self.marker):
            open(self.marker, "w").close()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().collect()


def test_a_killed_worker_loses_nothing_and_counts_nothing_twice(tokenizer, tmp_path, caplog):
    """A worker process is killed in the middle of a run: every batch is what a thread that lives would have sampled,
    from the weights it was due, and the weights in the worker are the trainer's at each step."""
    runs = {}
    for kind in ("thread", "process"):
        marker = str(tmp_path / kind)
        if kind == "thread":
            open(marker, "w").close()
        model = tiny_model("Qwen2", vocab_size=len(tokenizer))
        sampler = AsyncSampler(
            Deadly(4, marker), worker=kind, staleness=2, deterministic=True, max_restarts=1, threads=1
        )
        sampler.setup(model, tokenizer)
        sampler.sync(model, 0)
        run, batches = Steps(sampler, group_size=2, max_tokens=12), []
        for step in range(5):
            batches.append(sampler.sample(run.request(2)))
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.mul_(1.0 - 0.02 * (step + 1))
            sampler.sync(model, step + 1)
        runs[kind] = Rollouts.cat(batches), sampler.restarts, sampler
    for kind in ("thread", "process"):
        assert runs[kind][0].prompts.draw.tolist() == list(range(10))
    assert (runs["thread"][1], runs["process"][1]) == (0, 1)
    alive, killed = runs["thread"][0], runs["process"][0]
    assert killed.completions() == alive.completions()
    assert torch.equal(killed.token["policy_version"], alive.token["policy_version"])
    torch.testing.assert_close(killed.logprobs["sampler"], alive.logprobs["sampler"], atol=1e-4, rtol=0)
    assert "exit status -9" in caplog.text
    process_sampler = runs["process"][2]
    os.kill(process_sampler.worker.process.pid, signal.SIGKILL)
    with pytest.raises(RuntimeError, match=r"died 2 times .* more than max_restarts=1.*exit status -9"):
        process_sampler.sample(run.request(4))
    for _, _, sampler in runs.values():
        sampler.close()


# --- training --------------------------------------------------------------------------------------------------------


def test_without_staleness_a_run_is_the_plain_run(tmp_path):
    """Waiting for each batch and weighting with 1: the weights agree with a synchronous run up to rounding."""
    policy = make_policy(tmp_path / "policy")
    plain = make_module(policy)
    ahead = make_module(policy, sampler=AsyncSampler(worker="thread", staleness=0, max_weight=1e9))
    train(tmp_path / "plain", plain)
    train(tmp_path / "async", ahead)
    for name, value in final_state(plain).items():
        torch.testing.assert_close(final_state(ahead)[name], value, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("correction", ["truncated", "behaviour"])
def test_a_policy_learns_from_asynchronous_rollouts(tmp_path, correction):
    rewards, ages = [], []

    class Watch(Callback):
        def on_train_batch_end(self, trainer, pl_module, *args) -> None:
            rewards.append(float(pl_module.last_rollouts.rewards.mean()))
            ages.append(float(trainer.callback_metrics["sampler/staleness_max"]))

    module = make_module(
        make_policy(tmp_path / "policy"),
        sampler=AsyncSampler(worker="thread", deterministic=True, correction=correction),
        prompts_per_step=16,
        max_rollouts=14,
    )
    train(tmp_path, module, [Watch()])
    assert ages == [0] + [1] * 13
    assert sum(rewards[-3:]) / 3 > sum(rewards[:3]) / 3 + 0.15


def test_a_process_and_a_thread_make_the_same_run(tmp_path):
    policy = make_policy(tmp_path / "policy")
    modules = [
        make_module(policy, sampler=AsyncSampler(worker=kind, deterministic=True, threads=1), max_rollouts=4)
        for kind in ("thread", "process")
    ]
    for i, module in enumerate(modules):
        train(tmp_path / str(i), module)
    assert_same_weights(*(final_state(m) for m in modules))


def test_impossible_settings_are_refused():
    for options in ({"staleness": -1}, {"worker": "fork"}, {"threads": 0}, {"max_restarts": -1}):
        with pytest.raises(ValueError, match=next(iter(options))):
            AsyncSampler(**options)
    with pytest.raises(ValueError, match="outermost"):
        AsyncSampler(AsyncSampler())
