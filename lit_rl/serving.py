# SPDX-License-Identifier: Apache-2.0
"""Talking to a server of models over HTTP, with errors that say what to do."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Coroutine
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Any, TypeVar

ResultT = TypeVar("ResultT")


class ServerGone(RuntimeError):
    """The server does not answer, or answers with an error of its own."""


def run(work: Coroutine[Any, Any, ResultT]) -> ResultT:
    """Run a coroutine to its end, also from inside of a running event loop (a notebook)."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(asyncio.run, work).result()


class Client:
    """A vLLM server.

    Args:
        url: such as ``http://127.0.0.1:8000``.
        api_key: the server's key, if it has one.
        timeout: seconds after which a single answer, or the next piece of a streamed one, is given up.
    """

    def __init__(self, url: str, api_key: str | None, timeout: float) -> None:
        self.url, self.timeout = url.rstrip("/"), timeout
        self.headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}

    @asynccontextmanager
    async def session(self) -> AsyncIterator[Any]:
        """Connections to the server."""
        import aiohttp

        limits = aiohttp.ClientTimeout(total=None, connect=self.timeout, sock_read=self.timeout)
        connector = aiohttp.TCPConnector(limit=0)  # bounded by the sampler
        async with aiohttp.ClientSession(headers=self.headers, timeout=limits, connector=connector) as session:
            yield session

    async def post(self, session: Any, path: str, body: Any = None) -> Any:
        """Post JSON and return the JSON that comes back (None for an empty answer).

        Raises:
            ValueError: the request is wrong (status 4xx).
            ServerGone: no answer, or status 5xx.
        """
        async with self._answer(session, path, body) as response:
            text = await response.text()
        return json.loads(text) if text else None

    async def get(self, session: Any, path: str) -> Any:
        """Get JSON; raises as `post`."""
        async with self._answer(session, path, None, method="get") as response:
            return await response.json()

    async def stream(self, session: Any, path: str, body: Any) -> AsyncIterator[Any]:
        """Post JSON and yield the events of the answer."""
        async with self._answer(session, path, body) as response:
            async for line in response.content:
                event = line.decode().removeprefix("data:").strip()
                if event == "[DONE]":
                    return
                if event:
                    found = json.loads(event)
                    if "error" in found:
                        raise ServerGone(f"{self.url}{path} answers {event}")
                    yield found

    @asynccontextmanager
    async def _answer(self, session: Any, path: str, body: Any, method: str = "post") -> AsyncIterator[Any]:
        import aiohttp

        try:
            async with session.request(method, f"{self.url}{path}", json=body) as response:
                if response.status >= 500:
                    raise ServerGone(f"{self.url}{path} answers {response.status}: {(await response.text())[:500]}")
                if response.status >= 400:
                    raise ValueError(_refusal(f"{self.url}{path}", response.status, (await response.text())[:500]))
                yield response
        except (TimeoutError, aiohttp.ClientError, json.JSONDecodeError) as error:
            raise ServerGone(f"{self.url}{path}: {type(error).__name__}: {error}") from error

    async def alive(self, session: Any) -> bool:
        """Whether the server is up."""
        import aiohttp

        try:
            async with session.get(f"{self.url}/health", timeout=aiohttp.ClientTimeout(total=5)) as response:
                return bool(response.status == 200)
        except (TimeoutError, aiohttp.ClientError):
            return False

    async def ask_workers(self, session: Any, method: str, *arguments: str) -> str:
        """Call a method of the workers (`lit_rl.samplers.vllm_worker`) and return the first one's answer."""
        answer = await self.post(session, "/collective_rpc", {"method": method, "args": list(arguments)})
        return str(answer["results"][0])


def _refusal(where: str, status: int, text: str) -> str:
    if status == 401:
        return f"{where} wants an API key: set api_key, or the variable VLLM_API_KEY."
    if status == 404:
        return (
            f"{where} does not exist: start the server with `lit-rl serve`, which adds the worker extension and the "
            "mode that weights are exchanged through."
        )
    return f"{where} refuses a request with status {status}: {text}"
