# SPDX-License-Identifier: Apache-2.0
"""Sampling with a vLLM server, elsewhere or started by the run: `VLLMServerSampler`."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import tempfile
import time
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lit_rl import distributed as ranks
from lit_rl.rollouts import StopReason
from lit_rl.samplers.base import Interrupt, RolloutRequest
from lit_rl.samplers.external import ExternalRows, ExternalSampler, Order
from lit_rl.samplers.vllm_engine import require_vllm
from lit_rl.samplers.vllm_requests import completion_body, drawn_tokens
from lit_rl.samplers.vllm_weights import merged_weights
from lit_rl.samplers.vllm_worker import serve_command, serve_environment
from lit_rl.serving import Client, ServerGone, run

if TYPE_CHECKING:
    from lit_rl.methods.module import RLModule


class VLLMServerSampler(ExternalSampler):
    """Decodes with a vLLM server over HTTP: other devices, or another machine.

    Start the server with ``lit-rl serve MODEL`` (the policy's own folder or hub id), or let the run do it (``start``).
    After each update the weights, LoRA adapters merged, go through a file in ``weights_dir`` that trainer and server
    both see. Before and after a batch the server is asked which weights it has: one that was restarted in between has
    those that it began with, gets the current ones, and the batch is sampled again.

    As with `VLLMSampler`, log-probabilities are never taken for the trainer's own, and the loss weighs each token with
    the bounded ratio of the two.

    Args:
        url: of the server.
        api_key: its key; None: the variable ``VLLM_API_KEY``.
        start: start a server on this machine, at ``url``, and end it with the run.
        arguments: further arguments of ``vllm serve``, with ``start``.
        weights_dir: folder for the weights; None: a temporary folder of this machine.
        concurrency: completions that are under way at once on one rank.
        timeout: seconds until a single answer is given up.
        patience: seconds that the server may take to come up, or back.
        max_weight: bound of the ratio in the loss.
        check_every: compare log-probabilities with the policy's after the first and every so many updates; 0: never.
        tolerance: largest mean difference in nats a token; None: 1e-3 for a policy in float32, else 0.1.
        max_restarts: how often in a run the server may fail.

    Raises:
        ImportError: ``start`` without vLLM installed here.
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        url: str = "http://127.0.0.1:8000",
        api_key: str | None = None,
        start: bool = False,
        arguments: Sequence[str] = (),
        weights_dir: str | None = None,
        concurrency: int = 256,
        timeout: float = 600.0,
        patience: float = 600.0,
        max_weight: float = 2.0,
        check_every: int = 50,
        tolerance: float | None = None,
        max_restarts: int = 3,
    ) -> None:
        for name, value in (("concurrency", concurrency), ("timeout", timeout), ("patience", patience)):
            if not value > 0:
                raise ValueError(f"{name} must be positive, got {value}.")
        super().__init__(max_weight, check_every, tolerance, max_restarts)
        if arguments and not start:
            raise ValueError(
                "arguments are for a server that the run starts: set start=True, or give them to lit-rl serve."
            )
        if start:
            require_vllm(f"{type(self).__name__}(start=True)")
        self.client = Client(url, api_key or os.environ.get("VLLM_API_KEY"), timeout)
        self.api_key, self.start, self.arguments = api_key or os.environ.get("VLLM_API_KEY"), start, list(arguments)
        self.weights_dir, self.concurrency, self.patience = weights_dir, concurrency, patience
        self._process: subprocess.Popen[bytes] | None = None
        self._folder: Path | None = None
        self._run = uuid.uuid4().hex[:8]  # versions of other runs are not ours
        self._stamp = ""
        self._name = ""  # of the model, at the server
        self._positions: int | None = None

    def check_setup(self, module: RLModule) -> None:
        """Ranks share a server, which none of them can start for all."""
        if self.start and module.trainer.world_size > 1:
            raise ValueError(
                "VLLMServerSampler(start=True) starts a server for one training process. With several ranks start "
                "it with `lit-rl serve`, and set start=false."
            )

    # Weights -------------------------------------------------------------------------------------------------------

    def sync(self, model: torch.nn.Module, version: int) -> None:
        """Bring the policy's weights to the server. Every rank calls it; rank 0 does it.

        Raises:
            RuntimeError: the server does not come up.
            ValueError: it is no server of ``lit-rl serve``.
        """
        super().sync(model, version)
        self._stamp = f"{self._run}-{version}"
        if ranks.rank() == 0:
            began = time.perf_counter()
            self._come_up()
            self._load()
            self.sync_seconds = time.perf_counter() - began
        self._run, self._stamp = ranks.broadcast_object((self._run, self._stamp))  # type: ignore[misc]
        self._learn_name()
        self.agreement.synced()

    def _load(self) -> None:
        """Write the weights, and let the server take them."""
        from safetensors.torch import save_file

        folder = self._weights_folder()
        file = folder / f"{self._run}-{ranks.rank()}.safetensors"
        with torch.no_grad():
            weights = {name: w.to("cpu", copy=True).contiguous() for name, w in merged_weights(self.model)}
        save_file(weights, file)

        async def bring() -> None:
            async with self.client.session() as session:
                await self.client.ask_workers(session, "lit_rl_load", str(file), self._stamp)
                await self.client.post(session, "/reset_prefix_cache")

        run(bring())

    def _weights_folder(self) -> Path:
        if self._folder is None:
            self._folder = Path(tempfile.mkdtemp(prefix="lit-rl-weights-", dir=self.weights_dir))
        return self._folder

    async def _has_weights(self, session: Any) -> bool:
        return await self.client.ask_workers(session, "lit_rl_which") == self._stamp

    def _learn_name(self) -> None:
        """What the server calls the model, and how many positions it has."""

        async def ask() -> Any:
            async with self.client.session() as session:
                return await self.client.get(session, "/v1/models")

        if not self._name:
            found = run(ask())["data"][0]
            self._name, self._positions = found["id"], found.get("max_model_len")

    # The server ----------------------------------------------------------------------------------------------------

    def _come_up(self) -> None:
        """Return when the server answers; start it if that is ours to do."""

        async def wait() -> bool:
            """Whether the server answers before the deadline; False at once if it is ours and has ended."""
            async with self.client.session() as session:
                while not await self.client.alive(session):
                    if time.monotonic() > deadline or (self.start and not self._is_running()):
                        return False
                    await asyncio.sleep(0.2)
            return True

        deadline = time.monotonic() + self.patience
        up = run(wait())
        if self.start and not up and not self._is_running():  # not there yet, or it has just died
            self._launch()
            up = run(wait())
        if not up:
            status = "does not answer" if self._process is None else f"has the exit status {self._process.poll()}"
            what_next = self._last_words() if self.start else "Start it with `lit-rl serve MODEL`."
            raise RuntimeError(f"The vLLM server at {self.client.url} {status}. {what_next}")

    def _is_running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def _log_file(self) -> Path:
        return self._weights_folder() / "server.log"

    def _last_words(self, lines: int = 20) -> str:
        """The end of the log of our own server."""
        text = self._log_file().read_text(errors="replace").splitlines()[-lines:]
        return "\n".join(["The end of its log:", *text])

    def _launch(self) -> None:
        """Start a server on the policy's architecture; its weights come with the first `sync`."""
        from urllib.parse import urlsplit

        unwrap = getattr(self.model, "get_base_model", None)
        base: Any = unwrap() if callable(unwrap) else self.model
        folder = self._weights_folder() / "policy"
        base.config.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        at = urlsplit(self.client.url)
        dtype = str(next(base.parameters()).dtype).removeprefix("torch.")
        extra = ["--load-format", "dummy", "--dtype", dtype, *self.arguments]
        command = serve_command(str(folder), at.hostname or "127.0.0.1", at.port or 8000, extra)
        with open(self._log_file(), "ab") as log:
            environment = os.environ | serve_environment(self.api_key)
            self._process = subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)

    # Completions ---------------------------------------------------------------------------------------------------

    def generate(self, request: RolloutRequest) -> ExternalRows:
        """The rows of a request; all of them again if the server failed or forgot the weights meanwhile."""
        while True:
            rows = self.rows_of(request, self._positions)
            try:
                run(self._generate(rows))
                return rows
            except ServerGone as error:
                hint = "" if not self.start or self._is_running() else self._last_words()
                self.count_failure(error, f"The vLLM server at {self.client.url}", hint)
                self._come_up()
                self._load()

    async def _generate(self, rows: ExternalRows) -> None:
        """Every completion of the request; `ServerGone` if any may come from other weights."""
        async with self.client.session() as session:
            await self._expect_weights(session)
            bound = asyncio.Semaphore(self.concurrency)
            stop = asyncio.Event()
            jobs = {asyncio.create_task(self._complete(session, rows, order, bound, stop)) for order in rows.orders()}
            watch = asyncio.create_task(_poll(rows, stop))
            try:
                while jobs and not stop.is_set():
                    done, jobs = await asyncio.wait(jobs, timeout=0.05, return_when=asyncio.FIRST_COMPLETED)
                    for job in done:
                        job.result()
            finally:
                for task in (watch, *jobs):  # closing its connection ends a completion at the server
                    task.cancel()
                await asyncio.gather(watch, *jobs, return_exceptions=True)
            await self._expect_weights(session)

    async def _expect_weights(self, session: Any) -> None:
        if not await self._has_weights(session):
            raise ServerGone("it was restarted and has lost the policy's weights")

    async def _complete(
        self, session: Any, rows: ExternalRows, order: Order, bound: asyncio.Semaphore, stop: asyncio.Event
    ) -> None:
        """One completion. Token by token if somebody looks at the progress, else in one piece."""
        request = rows.request
        stream = request.should_stop is not None and not isinstance(request.should_stop, Interrupt)
        body = completion_body(self._name, order, request.sampling, rows.ends.token_ids, stream)
        async with bound:
            if not stream:
                choice = (await self.client.post(session, "/v1/completions", body))["choices"][0]
                rows.add(order.row, *drawn_tokens(choice))
                self._close(rows, order.row, choice)
                return
            async for event in self.client.stream(session, "/v1/completions", body):
                if stop.is_set():  # the progress that somebody stopped at is what there is
                    return
                for choice in event["choices"]:
                    rows.add(order.row, *drawn_tokens(choice))
                    self._close(rows, order.row, choice)
                if _steps(rows, order.row):
                    stop.set()

    @staticmethod
    def _close(rows: ExternalRows, row: int, choice: Any) -> None:
        """Where the server sees a stop string that lit-rl does not, the server is right: it has stopped."""
        if choice.get("finish_reason") == "stop" and rows.reasons[row] is None:
            rows.reasons[row] = StopReason.STOP

    # Life ----------------------------------------------------------------------------------------------------------

    def describe(self) -> str:
        """One line for the run header."""
        return f"VLLMServerSampler({self.client.url}{', started by the run' if self.start else ''})"

    def close(self) -> None:
        """End the server if it is ours, and remove the weights."""
        if self._process is not None:
            self._process.terminate()
            try:
                self._process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            self._process = None
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None


def _steps(rows: ExternalRows, row: int) -> bool:
    """Count a step whenever the most advanced completion has gained a token; whether generation is to end."""
    while rows.step < len(rows.ids[row]) - len(rows.prefix[row][0]):
        if rows.interrupted():
            return True
    return False


async def _poll(rows: ExternalRows, stop: asyncio.Event) -> None:
    """Ask an `Interrupt` now and then."""
    if isinstance(rows.request.should_stop, Interrupt):
        while not rows.request.should_stop.requested():
            await asyncio.sleep(0.1)
        stop.set()
