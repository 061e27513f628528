# SPDX-License-Identifier: Apache-2.0
"""A teacher in a server scores what one in this process scores, fails aloud, and is refused where it is not enough."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from lit_rl.methods import GOPD, OPD
from lit_rl.policies import Checkpoint, Policy, Served
from lit_rl.samplers import Sampling
from lit_rl.testing import final_state, make_module, make_policy, train


@contextmanager
def server(path: Path, failures: int = 0, shift: int = 0) -> Iterator[str]:
    """What vLLM answers to a request for ``prompt_logprobs``, computed here; the first requests fail.

    A tokenizer whose ids are shifted is another one.
    """
    from aiohttp import web

    model, tokenizer = Policy(str(path)).load()
    left = [failures]

    async def complete(request: web.Request) -> web.Response:
        if left[0]:
            left[0] -= 1
            return web.Response(status=503, text="busy")
        body = await request.json()
        ids = torch.tensor(body["prompt"])
        with torch.no_grad():
            scores = model(ids[None]).logits[0].log_softmax(-1)
        entries = [{str(int(t)): {"logprob": float(scores[i, t])}} for i, t in enumerate(ids[1:])]
        return web.json_response({"choices": [{"prompt_logprobs": [None, *entries]}]})

    async def tokenize(request: web.Request) -> web.Response:
        ids = tokenizer((await request.json())["prompt"], add_special_tokens=False)["input_ids"]
        return web.json_response({"tokens": [shift + i for i in ids]})

    async def models(_: web.Request) -> web.Response:
        return web.json_response({"data": [{"id": "teacher"}]})

    loop, ready, address = asyncio.new_event_loop(), threading.Event(), [""]

    def work() -> None:
        asyncio.set_event_loop(loop)
        app = web.Application()
        app.router.add_post("/v1/completions", complete)
        app.router.add_post("/tokenize", tokenize)
        app.router.add_get("/v1/models", models)
        runner = web.AppRunner(app)
        loop.run_until_complete(runner.setup())
        loop.run_until_complete(web.TCPSite(runner, "127.0.0.1", 0).start())
        address[0] = f"http://127.0.0.1:{runner.addresses[0][1]}"
        ready.set()
        loop.run_forever()
        loop.run_until_complete(runner.cleanup())

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    ready.wait()
    try:
        yield address[0]
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()


@pytest.mark.parametrize("method", [OPD, GOPD])
def test_it_trains_as_the_same_teacher_in_this_process(method: Any, tmp_path: Path):
    policy, teacher = make_policy(tmp_path / "policy"), make_policy(tmp_path / "teacher", seed=1)
    options: dict[str, Any] = {"max_rollouts": 2, "rewards": []}
    options |= {"loss": "policy_gradient"} if method is OPD else {"reward_scale": 1.0}
    here = make_module(policy, method, teacher=Checkpoint(str(teacher)), **options)
    train(tmp_path / "here", here)
    with server(teacher, failures=1) as url:
        there = make_module(policy, method, teacher=Served(url), **options)
        train(tmp_path / "there", there)
    for name, value in final_state(here).items():
        torch.testing.assert_close(final_state(there)[name], value, msg=name)


def test_methods_that_compare_distributions_refuse_it_at_set_up(tmp_path: Path):
    module = make_module(make_policy(tmp_path / "policy"), OPD, teacher=Served("http://127.0.0.1:9"), max_rollouts=1)
    with pytest.raises(ValueError, match="gives log-probabilities of tokens only"):
        train(tmp_path, module)


def test_another_tokenizer_is_refused(tmp_path: Path):
    policy = make_policy(tmp_path / "policy")
    with server(policy, shift=1) as url:
        module = make_module(policy, OPD, teacher=Served(url), loss="policy_gradient", max_rollouts=1)
        with pytest.raises(ValueError, match="has another tokenizer than the policy"):
            train(tmp_path, module)


def test_another_temperature_than_the_servers_is_refused(tmp_path: Path):
    options: dict[str, Any] = {"max_rollouts": 1, "sampling": Sampling(temperature=0.7, max_tokens=4)}
    policy = make_policy(tmp_path / "policy")
    with server(policy) as url:
        module = make_module(policy, OPD, teacher=Served(url), loss="policy_gradient", **options)
        with pytest.raises(ValueError, match=r"scores at temperature 1, but the policy samples at 0\.7"):
            train(tmp_path, module)


def test_a_server_that_does_not_answer_ends_the_run(tmp_path: Path):
    policy = make_policy(tmp_path / "policy")
    with server(policy, failures=10**6) as url:
        module = make_module(policy, OPD, teacher=Served(url, attempts=1), loss="policy_gradient", max_rollouts=1)
        with pytest.raises(RuntimeError, match=r"did not score a completion: .* answers 503: busy"):
            train(tmp_path, module)


@pytest.mark.parametrize("name", ["concurrency", "timeout", "attempts"])
def test_wrong_arguments_are_refused(name: str):
    with pytest.raises(ValueError, match=f"{name} must be positive"):
        Served("http://127.0.0.1:9", **{name: 0})
