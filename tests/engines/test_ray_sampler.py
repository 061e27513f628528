# SPDX-License-Identifier: Apache-2.0
"""Rollouts shared among Ray actors: the inner sampler's completions whoever makes them, and workers that fail."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from extras import needs

from lit_rl.cli import main
from lit_rl.policies import LoRA, Policy
from lit_rl.rollouts import StopReason
from lit_rl.samplers import (
    AsyncSampler,
    HFSampler,
    Interrupt,
    PartialSampler,
    RaySampler,
    RolloutRequest,
    RolloutSampler,
    Sampling,
)
from lit_rl.samplers.ray_workers import pack, unpack
from lit_rl.testing import (
    SamplerBench,
    StopAt,
    assert_same_weights,
    check_sampler,
    check_two_ranks,
    final_state,
    make_module,
    make_policy,
    train,
)
from tests.learning.lesson import check_that_it_teaches
from tests.toy_config import BASE

ray = needs("ray")
from ray import cloudpickle  # noqa: E402

CONFIGS = Path(__file__).parents[2] / "configs" / "samplers"
TWELVE = [0, 0, 0, 1, 1, 1, 1, 1, 2, 2, 3, 3]


class Fragile(HFSampler):
    """Does once what a file in a folder says when it begins with a draw: ``kill-3``, ``hang-3`` or ``fail-3``.

    ``kill-3-at-5`` is done at the fifth decode step of a watched unit.
    """

    def __init__(self, folder: str = "") -> None:
        super().__init__()
        self.folder = folder

    def submit(self, request: RolloutRequest) -> None:
        draws, stop = request.prompts.draw.tolist(), request.should_stop
        for draw in draws:
            self.obey(f"{draw}")

        def watch(progress: Any) -> bool:
            for draw in draws:
                self.obey(f"{draw}-at-{progress.step}")
            return bool(stop(progress))

        super().submit(replace(request, should_stop=watch))

    def obey(self, when: str) -> None:
        for what in ("kill", "hang", "fail"):
            order = Path(self.folder, f"{what}-{when}")
            if order.exists():
                order.unlink()
                if what == "kill":
                    os.kill(os.getpid(), signal.SIGKILL)
                if what == "fail":
                    raise ArithmeticError("no such number")
                Path(self.folder, f"pid-{os.getpid()}").touch()
                time.sleep(3600)


def run_from_file(folder: Path, file: Path) -> None:
    """Two steps of the toy task by the command line."""
    (folder / "base.yaml").write_text(BASE)
    settings = {"model.init_args.policy.path": make_policy(folder / "policy"), "trainer.default_root_dir": folder}
    files = ["--config", str(folder / "base.yaml"), "--config", str(file)]
    main(["fit", *files, *(f"--{k}={v}" for k, v in settings.items())])


# --- a Ray of its own ------------------------------------------------------------------------------------------------


def test_a_run_starts_ray_ends_it_and_keeps_its_signals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the configuration alone. Ray would take over SIGTERM, on which a run writes a checkpoint."""
    monkeypatch.setattr("sys.argv", ["lit-rl"])
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    found: dict[str, Any] = {}
    connect = RaySampler.setup

    def setup(self: RaySampler, *args: Any) -> None:
        before = signal.getsignal(signal.SIGTERM)
        connect(self, *args)
        found.update(sampler=self, up=ray.is_initialized(), kept=signal.getsignal(signal.SIGTERM) is before)

    monkeypatch.setattr(RaySampler, "setup", setup)
    run_from_file(tmp_path, CONFIGS / "ray.yaml")
    assert (tmp_path / "checkpoints" / "clock00000002.ckpt").exists()
    assert found["up"]
    assert found["kept"]
    assert found["sampler"].placement.workers == 2
    assert not ray.is_initialized()


def ray_module(policy: Path | str) -> Any:
    return make_module(policy, sampler=RaySampler(workers=1), max_rollouts=2)


def test_two_ranks_share_a_ray_and_each_has_its_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    check_two_ranks(tmp_path, module=ray_module)
    assert not ray.is_initialized()


# --- a Ray that is there ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def local_ray() -> Iterator[None]:
    os.environ.setdefault("RAY_worker_niceness", "0")
    ray.init(address="local", num_cpus=8, include_dashboard=False, logging_level=logging.WARNING, log_to_driver=False)
    cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers do not find test files
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def orders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("orders")


@pytest.fixture(scope="module")
def bench(local_ray: None, orders: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SamplerBench]:
    """Two workers, for all tests that do not need others; each unit is a quarter of a request."""
    folder = tmp_path_factory.mktemp("bench")
    with SamplerBench(lambda: RaySampler(Fragile(str(orders)), workers=2, max_restarts=100), folder) as bench:
        yield bench


@pytest.fixture(scope="module")
def inner(bench: SamplerBench) -> HFSampler:
    """What the workers are to do, in this process."""
    sampler = HFSampler()
    sampler.setup(bench.model, bench.tokenizer)
    return sampler


def test_the_contract_is_kept(local_ray: None, tmp_path: Path) -> None:
    check_sampler(lambda: RaySampler(workers=2), tmp_path)


def test_completions_do_not_hang_on_the_number_of_workers(bench: SamplerBench, inner: HFSampler) -> None:
    """Two, and one or three with other units; a request as a whole, and one that stops at a step."""
    inner.sync(bench.model, 0)
    other = RaySampler(workers=3, units_per_worker=3)
    other.setup(bench.model, bench.tokenizer)
    other.sync(bench.model, 0)
    skip = ["logprobs.sampler", "entropy", "policy_version"]
    try:
        for workers in (3, 1):
            assert other.pool is not None
            other.placement.workers = workers
            other.pool.workers = other.pool.workers[:workers]  # the others are idle, and end with the test
            for request in (bench.request(TWELVE), bench.request(TWELVE, should_stop=lambda p: p.step >= 6)):
                expected = inner.sample(request)
                for sampler in (bench.sampler, other):
                    found = sampler.sample(request)
                    assert found.diff(expected, skip=skip) == {}
                    bench.assert_same(expected, found)
                    assert found.prompts is request.prompts
    finally:
        other.close()


def training_request(bench: SamplerBench, seed: int = 1) -> RolloutRequest:
    return RolloutRequest.for_groups(bench.prompts(), 3, Sampling(max_tokens=bench.max_tokens), seed, wanted=4)


@pytest.mark.parametrize("how", ["SIGKILL", "ray.kill"])
def test_a_killed_worker_loses_nothing_and_counts_nothing_twice(
    bench: SamplerBench, inner: HFSampler, orders: Path, how: str
) -> None:
    """In the middle of a request; the worker in its place has the weights of the last update."""
    with torch.no_grad():
        for parameter in bench.model.parameters():
            parameter.mul_(1.02)
    bench.version += 1
    for sampler in (inner, bench.sampler):
        sampler.sync(bench.model, bench.version)
    restarts, request = bench.sampler.restarts, training_request(bench)
    bench.sampler.metrics(request)  # begins to count anew
    if how == "SIGKILL":
        (orders / "kill-2").touch()
        found = bench.sampler.sample(request)
    else:
        (orders / "hang-2").touch()
        killer = threading.Thread(target=kill_whoever_hangs, args=(bench.sampler, orders))
        killer.start()
        found = bench.sampler.sample(request)
        killer.join()
    assert not list(orders.iterdir()), "no worker was to fail"
    expected = inner.sample(request)
    bench.assert_same(expected, found)
    assert torch.equal(found.token["policy_version"], expected.token["policy_version"])
    assert len(found) == 12
    assert bench.sampler.restarts == restarts + 1
    numbers = bench.sampler.metrics(found)
    assert numbers["units"] == 4
    assert numbers["worker_restarts"] == restarts + 1
    assert 0 <= numbers["idle_ratio"] < 1
    bench.assert_same(expected, bench.sampler.sample(request))
    assert bench.sampler.restarts == restarts + 1


def kill_whoever_hangs(sampler: RaySampler, orders: Path) -> None:
    """`ray.kill` the worker that is inside a unit which never ends."""
    while not (found := list(orders.glob("pid-*"))):
        time.sleep(0.05)
    assert sampler.pool is not None
    (worker,) = [w for w in sampler.pool.workers if w.pid() == int(found[0].name[4:])]
    found[0].unlink()
    ray.kill(worker.actor)


def test_a_worker_that_hangs_is_replaced(bench: SamplerBench, inner: HFSampler, orders: Path) -> None:
    restarts, request = bench.sampler.restarts, training_request(bench, seed=2)
    (orders / "hang-1").touch()
    bench.sampler.timeout = 3.0
    try:
        found = bench.sampler.sample(request)
    finally:
        bench.sampler.timeout = None
    next(orders.glob("pid-*")).unlink()
    inner.sync(bench.model, bench.version)
    bench.assert_same(inner.sample(request), found)
    assert bench.sampler.restarts == restarts + 1


def test_after_too_many_failures_the_run_ends_and_says_why(bench: SamplerBench, orders: Path) -> None:
    (orders / "kill-0").touch()
    allowed, bench.sampler.max_restarts = bench.sampler.max_restarts, bench.sampler.restarts
    try:
        with pytest.raises(RuntimeError, match=r"more than max_restarts=\d+; at last worker \d: The actor died"):
            bench.sample()
    finally:
        bench.sampler.max_restarts = allowed
    assert len(bench.sample()) == 12, "the next request gets a new worker"


def test_what_the_inner_sampler_refuses_is_the_run_s_error(bench: SamplerBench, orders: Path) -> None:
    restarts = bench.sampler.restarts
    (orders / "fail-2").touch()
    with pytest.raises(ArithmeticError, match="no such number"):
        bench.sample()
    assert bench.sampler.restarts == restarts
    request = bench.request()
    request.prompts.ids[3] = torch.zeros(0, dtype=torch.long)
    with pytest.raises(ValueError, match="uid 1003 has no tokens"):
        bench.sample(request)
    assert len(bench.sample()) == 12


def test_an_interrupt_does_not_wait_for_the_workers(bench: SamplerBench, orders: Path) -> None:
    """What they have begun they drop; the next request finds them free."""
    (orders / "hang-0").touch()
    out = bench.sample(bench.request(should_stop=Interrupt(lambda: bool(list(orders.glob("pid-*"))))))
    assert bool((out.row["stop_reason"] == StopReason.ABORTED).all())
    assert not out.lengths.any()
    kill_whoever_hangs(bench.sampler, orders)
    assert len(bench.sample()) == 12


# --- with other samplers ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["", "kill-4-at-3"])
def test_partial_rollouts_are_those_of_one_process(
    bench: SamplerBench, inner: HFSampler, orders: Path, order: str
) -> None:
    """All rows run at once on a common clock, also when a worker is killed in the middle."""
    if order:
        (orders / order).touch()
    runs = []
    for engine in (inner, bench.sampler):
        engine.sync(bench.model, 0)
        sampler, cursor, batches = PartialSampler(engine, oversampling=2), 0, []
        for _ in range(4):
            drawn = sampler.prompts_to_draw(2)
            prompts = bench.prompts(cursor, drawn)
            sampling = Sampling(max_tokens=bench.max_tokens, stop_token_ids=bench.ends)
            batches.append(sampler.sample(RolloutRequest.for_groups(prompts, 3, sampling, 2, wanted=2)))
            cursor += drawn
        runs.append((batches, sampler.metrics(batches[-1])["partial_completions"]))
    assert not list(orders.iterdir()), "no worker was to fail"
    for expected, found in zip(runs[0][0], runs[1][0], strict=True):
        assert torch.equal(expected.prompts.draw, found.prompts.draw)
        bench.assert_same(expected, found)
    assert runs[0][1] == runs[1][1]


@pytest.mark.parametrize("kind", ["adapters", "tied"])
def test_only_what_is_trained_travels(bench: SamplerBench, tmp_path: Path, kind: str) -> None:
    """Adapters without their base; tied embeddings once. The worker then has the trainer's weights."""
    if kind == "adapters":
        pytest.importorskip("peft")
    path = make_policy(tmp_path / "policy", initializer_range=0.25, tie_word_embeddings=kind == "tied")
    model, tokenizer = Policy(str(path), lora=LoRA(r=2) if kind == "adapters" else None).load()
    sampler, inner = RaySampler(workers=1), HFSampler()
    for engine in (sampler, inner):
        engine.setup(model, tokenizer)
        engine.sync(model, 0)
    assert sampler.pool is not None
    before = sampler.sample(training_request(bench))
    trained = [p for p in model.parameters() if p.requires_grad]
    with torch.no_grad():
        for parameter in trained:
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)), alpha=0.1)
    for engine in (sampler, inner):
        engine.sync(model, 1)
    sent = ray.get(sampler.pool.weights)
    assert sum(len(a) for a in sent.arrays) == 4 * sum(p.numel() for p in trained)
    found = sampler.sample(training_request(bench))
    assert found.completions() != before.completions()
    bench.assert_same(inner.sample(training_request(bench)), found)
    sampler.close()


def test_packed_tensors_come_back_the_same_and_shared_ones_shared(local_ray: None) -> None:
    tied = torch.nn.Parameter(torch.randn(3, 2))
    value = {
        "tied": [tied, tied],
        "half": torch.randn(4).to(torch.bfloat16)[::2],
        "none": torch.zeros(0, 3, dtype=torch.long),
        "scalar": torch.tensor(True),
        "frozen": torch.nn.Parameter(torch.ones(2), requires_grad=False),
        "text": "as it is",
    }
    packed = pack(value)
    assert len(packed.arrays) == 5
    for copy in (True, False):
        out = unpack(ray.get(ray.put(packed)), copy)
        assert out["tied"][0] is out["tied"][1]
        assert (out["tied"][0].requires_grad, out["frozen"].requires_grad, out["text"]) == (True, False, "as it is")
        for name in ("half", "none", "scalar", "frozen"):
            assert torch.equal(out[name], value[name])
            assert out[name].dtype == value[name].dtype
            assert type(out[name]) is type(value[name])
        assert torch.equal(out["tied"][0], tied)


def test_batches_can_be_made_ahead_by_many_workers(bench: SamplerBench) -> None:
    sampler = AsyncSampler(RaySampler(workers=1), worker="thread", deterministic=True)
    sampler.setup(bench.model, bench.tokenizer)
    sampler.sync(bench.model, 0)
    inner = HFSampler()
    inner.setup(bench.model, bench.tokenizer)
    inner.sync(bench.model, 0)
    try:
        for cursor in (0, 4):
            drawn = bench.prompts(cursor * 2, sampler.prompts_to_draw(4))
            sampling = Sampling(max_tokens=bench.max_tokens)
            found = sampler.sample(RolloutRequest.for_groups(drawn, 3, sampling, 1, wanted=4))
            expected = inner.sample(RolloutRequest.for_groups(bench.prompts(cursor, 4), 3, sampling, 1))
            bench.assert_same(expected, found)
    finally:
        sampler.close()


# --- runs ------------------------------------------------------------------------------------------------------------


def test_a_run_resumes_bit_for_bit_and_is_the_run_of_one_process(local_ray: None, tmp_path: Path) -> None:
    policy = make_policy(tmp_path / "policy")

    def module(sampler: RolloutSampler) -> Any:
        return make_module(policy, sampler=sampler, old_logprobs="recompute", max_rollouts=4)

    alone, resumed = module(HFSampler()), module(RaySampler(workers=1, units_per_worker=4))
    train(tmp_path / "alone", alone)
    train(tmp_path / "run", module(RaySampler(workers=2)), [StopAt(2)])
    train(tmp_path / "run", resumed, checkpoint=tmp_path / "run" / "checkpoints" / "clock00000002.ckpt")
    assert (resumed.clock, resumed.cursor) == (alone.clock, alone.cursor)
    assert_same_weights(final_state(alone), final_state(resumed))
    known = resumed.sampler.estimate.state_dict()["uid"]
    assert len(known) > 2 * 4, "lengths of the steps before the checkpoint are known too"


def test_closing_ends_the_workers_and_leaves_a_ray_that_was_there(local_ray: None, tmp_path: Path) -> None:
    with SamplerBench(lambda: RaySampler(workers=1), tmp_path) as own:
        (worker,) = own.sampler.pool.workers
        pid = worker.pid()
        assert Path(f"/proc/{pid}").exists()
    assert own.sampler.pool is None
    assert ray.is_initialized()
    deadline = time.monotonic() + 10
    while Path(f"/proc/{pid}").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not Path(f"/proc/{pid}").exists()
    own.sampler.close()  # twice does no harm


# --- what cannot work ------------------------------------------------------------------------------------------------


def test_arguments_that_cannot_work_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for wrong in (
        {"workers": 0},
        {"units_per_worker": 0},
        {"num_cpus": 0},
        {"num_gpus": -1},
        {"timeout": 0},
        {"start_timeout": 0},
        {"max_restarts": -1},
        {"strategy": "SCATTER"},
    ):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            RaySampler(**wrong)
    with pytest.raises(ValueError, match="make PartialSampler the outermost"):
        RaySampler(PartialSampler())
    monkeypatch.setattr("lit_rl.samplers.ray_sampler.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'lit-rl\[ray\]'"):
        RaySampler()


def test_sharded_weights_are_refused() -> None:
    model = torch.nn.Linear(1, 1)
    model.weight.full_tensor = lambda: None
    with pytest.raises(ValueError, match="sharded"):
        RaySampler().setup(model, None)


def test_a_cluster_without_room_is_named_with_what_it_has(local_ray: None, tmp_path: Path) -> None:
    sampler = RaySampler(workers=3, num_cpus=4, start_timeout=0.5)
    with pytest.raises(RuntimeError, match=r"no room for 3 workers of \{'CPU': 4\}.*cluster has \{'CPU': 8"):
        SamplerBench(lambda: sampler, tmp_path)
    sampler.close()
    with pytest.raises(RuntimeError, match=r"call setup\(model, tokenizer\)"):
        sampler.sync(torch.nn.Linear(1, 1), 0)


def test_a_policy_learns_as_with_the_built_in_sampler(tmp_path: Path) -> None:
    check_that_it_teaches(RaySampler(HFSampler(), workers=2), tmp_path)
