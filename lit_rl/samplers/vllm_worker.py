# SPDX-License-Identifier: Apache-2.0
"""What a vLLM server needs in its workers to take the policy's weights, and how it is started with it."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from lit_rl.samplers.vllm_weights import load_weights

EXTENSION = f"{__name__}.TakesWeights"


class TakesWeights:
    """Mixed into vLLM's worker. The methods are called by name over HTTP, with strings as arguments."""

    lit_rl_version: str | None = None  # what the weights are called; None: those that the server began with

    def lit_rl_load(self, path: str, version: str) -> str:
        """Take the weights of a safetensors file, and call them ``version``."""
        from safetensors.torch import load_file

        load_weights(self, load_file(path).items())
        self.lit_rl_version = version
        return version

    def lit_rl_which(self) -> str:
        """What the current weights are called."""
        return str(self.lit_rl_version)


def serve_command(
    model: str,
    host: str = "127.0.0.1",
    port: int = 8000,
    extra: Sequence[str] = (),
) -> list[str]:
    """The command line of a vLLM server that `VLLMServerSampler` can use.

    Args:
        model: folder in hub format or hub id.
        host: address to listen at. The endpoints that take weights are for the trainer alone: leave it at the loopback
            address, or put the server into a network that nobody else reaches.
        port: port to listen at.
        extra: further arguments of ``vllm serve``.
    """
    # `vllm serve` itself fails in the CPU build, whose package has another name than it looks for.
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model]
    command += ["--host", host, "--port", str(port)]
    command += ["--logprobs-mode", "processed_logprobs", "--worker-extension-cls", EXTENSION]
    return [*command, "--enable-prefix-caching", *extra]


def serve_environment(api_key: str | None) -> dict[str, str]:
    """Variables that the server needs: its endpoints for weights are only there in what vLLM calls development mode.

    On a CPU its cache gets 4 GiB and its threads any core, unless the environment says otherwise.
    """
    defaults = {"VLLM_CPU_KVCACHE_SPACE": "4", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    own = {name: value for name, value in defaults.items() if name not in os.environ}
    return own | {"VLLM_SERVER_DEV_MODE": "1"} | ({"VLLM_API_KEY": api_key} if api_key else {})
