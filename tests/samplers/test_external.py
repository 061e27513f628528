# SPDX-License-Identifier: Apache-2.0
"""Rows that an outside engine fills, the comparison with the policy, and what a server's answers become."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from sampler_models import character_tokenizer, connected, request, tiny_model

from lit_rl.cli import main
from lit_rl.rollouts import StopReason
from lit_rl.samplers import Interrupt, RolloutRequest, VLLMServerSampler
from lit_rl.samplers.agreement import Agreement, DisagreementError
from lit_rl.samplers.external import Ends, ExternalRows
from lit_rl.samplers.stopping import Stopping
from lit_rl.samplers.vllm_requests import completion_body, drawn_tokens
from lit_rl.samplers.vllm_worker import EXTENSION, serve_command
from lit_rl.serving import Client, ServerGone, run

EOS, STOP = 1, 7


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model("Qwen2")


def rows_of(model: Any, **changes: Any) -> ExternalRows:
    asked = request(**changes)
    return ExternalRows(asked, ends_of(model, asked), max_positions=64)


def ends_of(model: Any, asked: RolloutRequest) -> Ends:
    return Ends(Stopping(model, character_tokenizer(), asked.sampling, vocab_size=48, device="cpu"))


def test_rows_end_for_the_right_reason_and_take_nothing_after_it(model: Any):
    rows = rows_of(model, group_size=1, max_tokens=3, stop_token_ids=[STOP])
    assert rows.add(0, [5, EOS, 9], [-1.0, -2.0, -3.0])
    assert rows.add(1, [STOP], [-1.0])
    assert not rows.add(2, [5, 6], [-1.0, -1.0])
    assert rows.add(2, [8, 9], [-1.0, -1.0])
    out = rows.rollouts(version=4)
    assert out.row["stop_reason"].tolist() == [StopReason.END, StopReason.STOP, StopReason.LENGTH]
    assert out.completions() == [[5, EOS], [STOP], [5, 6, 8]]
    assert out.logprobs["sampler"][0].tolist() == [-1.0, -2.0, 0.0]
    assert out.token["policy_version"][2].tolist() == [4, 4, 4]


def test_a_stop_string_ends_with_the_token_that_completes_it(model: Any):
    tokenizer = character_tokenizer()
    ids = tokenizer("abca")["input_ids"]
    rows = rows_of(model, group_size=1, stop=["bc"])
    assert rows.add(0, ids, [-1.0] * len(ids))
    assert rows.rollouts(0).completions()[0] == ids[:3]
    assert rows.reasons[0] is StopReason.STOP


def test_orders_are_for_rows_that_go_on_and_seeds_depend_on_nothing_else(model: Any):
    rows = rows_of(model, group_size=2, budgets=torch.tensor([0, 4, 4, 4, 4, 4]))
    orders = list(rows.orders())
    assert [o.row for o in orders] == [1, 2, 3, 4, 5]
    assert len({o.seed for o in orders}) == 5
    assert rows.rollouts(0).row["stop_reason"].tolist() == [StopReason.LENGTH] + [StopReason.ABORTED] * 5
    alone = request(group_size=2)
    alone = replace(alone, group=alone.group[[3]], sample=alone.sample[[3]])
    (order,) = ExternalRows(alone, ends_of(model, alone)).orders()
    assert (order.seed, order.context) == (orders[2].seed, orders[2].context)


def test_a_prefix_is_context_keeps_its_marks_and_counts_in_the_budget(model: Any):
    first = rows_of(model, group_size=1, max_tokens=4)
    first.add(0, [5, 6], [-1.0, -2.0])
    first.add(1, [5, EOS], [-1.0, -2.0])
    prefix = first.rollouts(version=1)
    prefix.completion_mask[0, 0] = False
    rows = rows_of(model, group_size=1, max_tokens=4, prefix=prefix)
    orders = {o.row: o for o in rows.orders()}
    assert sorted(orders) == [0, 2]
    assert orders[0].context[-2:] == [5, 6]
    assert (orders[0].budget, orders[2].budget) == (2, 4)
    rows.add(0, [8], [-3.0])
    rows.forget()
    rows.add(0, [9, 10], [-4.0, -5.0])
    out = rows.rollouts(version=2)
    assert out.completions(kept=True)[0] == [5, 6, 9, 10]
    assert out.token["policy_version"][0].tolist() == [1, 1, 2, 2]
    assert out.completion_mask[0].tolist() == [False, True, True, True]
    assert out.row["stop_reason"][1] == StopReason.END


def test_progress_is_shown_to_who_looks_at_it(model: Any):
    seen = []
    rows = rows_of(model, group_size=1, should_stop=lambda p: seen.append((p.step, p.lengths.tolist())) or p.step == 2)
    rows.add(0, [5], [-1.0])
    assert not rows.interrupted()
    rows.add(0, [EOS], [-1.0])
    assert rows.interrupted()
    assert seen == [(1, [1, 0, 0]), (2, [2, 0, 0])]
    assert rows_of(model, should_stop=Interrupt(lambda: True)).interrupted()
    assert not rows_of(model).interrupted()


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"max_tokens": 60}, "need 65 positions, but the engine has only 64"),
        ({"noise": "gumbel"}, "needs control over every draw"),
        ({"texts": ([5], [], [6])}, "has no tokens"),
    ],
)
def test_what_an_engine_cannot_do_is_refused(model: Any, changes: dict[str, Any], sentence: str):
    with pytest.raises(ValueError, match=sentence):
        rows_of(model, **changes)


def test_agreement_notices_other_weights_when_it_is_due(model: Any):
    asked = request(temperature=0.7)
    out = connected(model).sample(asked)
    agreement = Agreement(every=2, tolerance=None)
    other = tiny_model("Qwen2", initializer_range=0.25)
    agreement.check(other, out, asked.sampling, 0, "X")  # no weights were brought: not due
    agreement.synced()
    agreement.check(model, out, asked.sampling, 0, "X")
    assert agreement.gap is not None
    assert agreement.gap < 1e-5
    agreement.synced()
    agreement.check(other, out, asked.sampling, 0, "X")  # the second: not due
    agreement.synced()
    with pytest.raises(DisagreementError, match=r"of X differ from the policy's own by .* nats a token"):
        agreement.check(other, out, asked.sampling, 0, "X")
    never = Agreement(every=0, tolerance=None)
    never.synced()
    never.check(other, out, asked.sampling, 0, "X")
    assert never.gap is None


# The server's side ---------------------------------------------------------------------------------------------------


def test_answers_become_tokens_and_old_servers_are_refused():
    choice = {"token_ids": [4, 5], "logprobs": {"token_logprobs": [-0.5, -1.0]}}
    assert drawn_tokens(choice) == ([4, 5], [-0.5, -1.0])
    assert drawn_tokens({"token_ids": [], "logprobs": None}) == ([], [])
    with pytest.raises(ValueError, match="knows return_token_ids"):
        drawn_tokens({"logprobs": {"token_logprobs": [-0.5]}})


def test_a_request_asks_for_token_ids_of_one_completion(model: Any):
    rows = rows_of(model, group_size=1, temperature=0.5, top_p=0.9, stop=["ab", ""])
    order = next(iter(rows.orders()))
    body = completion_body("name", order, rows.request.sampling, rows.ends.token_ids, stream=False)
    assert body["prompt"] == order.context
    assert body["return_token_ids"]
    assert (body["temperature"], body["top_p"], body["stop"], body["stop_token_ids"]) == (0.5, 0.9, ["ab"], [EOS])
    assert (body["seed"], body["max_tokens"], body["logprobs"]) == (order.seed, 12, 0)


@pytest.mark.parametrize(
    ("status", "error", "sentence"),
    [
        (401, ValueError, "wants an API key"),
        (404, ValueError, "start the server with `lit-rl serve`"),
        (400, ValueError, "refuses a request with status 400: no"),
        (503, ServerGone, "answers 503: no"),
    ],
)
def test_errors_of_a_server_are_explained(status: int, error: type[Exception], sentence: str):
    from aiohttp import web

    async def talk() -> None:
        async def refuse(_: Any) -> web.Response:
            return web.Response(status=status, text="no")

        app = web.Application()
        app.router.add_post("/v1/completions", refuse)
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        try:
            client = Client(f"http://127.0.0.1:{runner.addresses[0][1]}/", "key", timeout=5)
            async with client.session() as session:
                await client.post(session, "/v1/completions", {})
        finally:
            await runner.cleanup()

    with pytest.raises(error, match=sentence):
        run(talk())


def test_a_server_that_is_not_there_is_waited_for_and_named(model: Any):
    sampler = VLLMServerSampler("http://127.0.0.1:9", patience=0.3)
    sampler.setup(model, character_tokenizer())
    with pytest.raises(RuntimeError, match=r"127\.0\.0\.1:9 does not answer\. Start it with `lit-rl serve MODEL`"):
        sampler.sync(model, 0)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"concurrency": 0}, "concurrency must be positive"),
        ({"timeout": -1.0}, "timeout must be positive"),
        ({"max_restarts": -1}, "max_restarts must not be negative"),
        ({"arguments": ["--x"]}, "set start=True"),
    ],
)
def test_wrong_arguments_are_refused(arguments: dict[str, Any], sentence: str):
    with pytest.raises(ValueError, match=sentence):
        VLLMServerSampler(**arguments)


def test_the_command_line_of_a_server_can_be_looked_at(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    words = ["serve", str(tmp_path), "--port", "8123", "--api_key", "hidden", "--dry_run", "true"]
    main([*words, "--arguments", '["--max-model-len", "64"]'])
    shown = capsys.readouterr().out
    assert "VLLM_SERVER_DEV_MODE=1" in shown
    assert "hidden" not in shown
    assert f"--model {tmp_path} --host 127.0.0.1 --port 8123" in shown
    assert f"--worker-extension-cls {EXTENSION}" in shown
    assert shown.rstrip().endswith("--max-model-len 64")
    assert serve_command("m")[-1] == "--enable-prefix-caching"
