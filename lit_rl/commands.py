# SPDX-License-Identifier: Apache-2.0
"""Commands beside LightningCLI's. Their signatures are their command lines."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any


def export(
    run: str,
    output: str,
    checkpoint: str = "last",
    merge: bool = False,
    force: bool = False,
    overwrite: bool = False,
) -> None:
    """Write the policy of a run as a folder in hub format, ready for ``from_pretrained``, vLLM or another run.

    Args:
        run: the run's directory (it holds ``config.yaml`` and ``checkpoints``).
        output: the folder to write.
        checkpoint: a checkpoint file, ``last`` (the newest intact one of the run) or ``best``.
        merge: merge a LoRA adapter into its base weights instead of writing the adapter alone.
        force: merge even into a 4-bit base, which rounds the weights.
        overwrite: write into a folder that holds something already.
    """
    from lit_rl.policies import export as write

    if Path(output).exists() and not overwrite and (not Path(output).is_dir() or any(Path(output).iterdir())):
        raise FileExistsError(f"{output} is there already: name another folder, or pass --overwrite true.")
    model, tokenizer = load_trained(run, checkpoint)
    write(model, tokenizer, output, merge=merge, force=force)
    print(f"Wrote {output}")


def replay(run: str, clock: int | None = None, tolerance: float = 1e-6) -> None:
    """Recompute the loss terms of a logged step from its stored batch, and compare.

    The weights are those of the checkpoint just before the step; if it is gone, the run is trained forward to the step
    from an earlier one, and this is said. Exits with status 1 if a term differs.

    Args:
        run: the run's directory.
        clock: which step, the x-axis of its logs; without it the steps that can be replayed are listed.
        tolerance: largest difference of a term, relative to its logged value where that is larger than 1.
    """
    from lit_rl.analysis.replay import available
    from lit_rl.analysis.replay import replay as recompute

    if clock is None:
        print(available(Path(run)))
        return
    result = recompute(run, clock)
    print(result)
    if not result.error <= tolerance:
        print(f"The largest difference {result.error:.3g} exceeds the tolerance of {tolerance:g}.")
        sys.exit(1)


def serve(
    model: str,
    host: str = "127.0.0.1",
    port: int = 8000,
    api_key: str | None = None,
    arguments: list[str] | None = None,
    dry_run: bool = False,
) -> None:
    """Start a vLLM server that a run can sample from (`VLLMServerSampler`).

    Args:
        model: folder in hub format or hub id, the same as the run's policy.
        host: address to listen at. Whoever reaches it can change the weights: keep it out of open networks.
        port: port to listen at.
        api_key: key that the run must give; default: the variable VLLM_API_KEY, or none.
        arguments: further arguments of ``vllm serve``, such as ``["--tensor-parallel-size", "2"]``.
        dry_run: print the command and the variables, and start nothing.
    """
    import os
    import shlex

    from lit_rl.samplers.vllm_engine import require_vllm
    from lit_rl.samplers.vllm_worker import serve_command, serve_environment

    command, variables = serve_command(model, host, port, arguments or []), serve_environment(api_key)
    shown = {name: "***" if name == "VLLM_API_KEY" else value for name, value in variables.items()}
    print(" ".join([*(f"{name}={value}" for name, value in shown.items()), shlex.join(command)]), flush=True)
    if not dry_run:
        require_vllm("lit-rl serve")
        os.execvpe(command[0], command, os.environ | variables)


def load_trained(run: str | Path, checkpoint: str = "last") -> tuple[Any, Any]:
    """The policy of a run with the weights of one of its checkpoints.

    Args:
        run: the run's directory.
        checkpoint: a checkpoint file, ``last`` or ``best``.

    Returns:
        Model and tokenizer.

    Raises:
        FileNotFoundError: if the run has no configuration or no intact checkpoint.
    """
    import torch

    from lit_rl.lightning_cli import require_checkpoint, resolve_checkpoint

    run = Path(run)
    if not run.is_dir():
        raise FileNotFoundError(f"There is no run {run}: name its directory, which holds config.yaml and checkpoints.")
    path: str | None = checkpoint
    if checkpoint in ("last", "best"):
        path = resolve_checkpoint(run, checkpoint, required=True, option="--checkpoint")
    else:
        require_checkpoint(checkpoint, run, option="--checkpoint")
    assert path is not None  # it is required
    model, tokenizer = configured_policy(run).load()
    state = torch.load(path, map_location="cpu", weights_only=True)["state_dict"]
    weights = {k.removeprefix("model."): v for k, v in state.items() if k.startswith("model.")}
    missing, unexpected = model.load_state_dict(weights, strict=False)
    trained_missing = set(missing) & {n for n, p in model.named_parameters() if p.requires_grad}
    if unexpected or trained_missing:
        raise ValueError(
            f"{path} does not fit the policy in {run}/config.yaml: missing {sorted(trained_missing)[:3]}, "
            f"unexpected {list(unexpected)[:3]}."
        )
    return model, tokenizer


def configured_policy(run: Path) -> Any:
    """The `Policy` that a run's saved configuration describes."""
    import yaml
    from jsonargparse import ArgumentParser

    from lit_rl.policies import Policy

    file = run / "config.yaml"
    if not file.exists():
        raise FileNotFoundError(f"{file} is missing: it says which policy the checkpoints of this run belong to.")
    policy = yaml.safe_load(file.read_text())["model"]["init_args"]["policy"]
    parser = ArgumentParser()
    parser.add_class_arguments(Policy, "policy")
    config = parser.parse_object({"policy": policy.get("init_args", policy)})
    return parser.instantiate_classes(config).policy


def new_policy(
    output: str,
    architecture: str = "qwen2",
    tokenizer: str | None = None,
    vocabulary_size: int = 64,
    hidden_size: int = 128,
    intermediate_size: int = 352,
    num_layers: int = 3,
    num_heads: int = 4,
    num_kv_heads: int = 2,
    initializer_range: float = 0.08,
    max_position_embeddings: int = 512,
    seed: int = 0,
) -> None:
    """Make a small, randomly initialised policy in hub format: for tests, claims and the quickstart.

    Args:
        output: the folder to write.
        architecture: a Transformers model type that is known to the policies (``qwen2``, ``qwen3``, ``llama``, …).
        tokenizer: folder or hub id of a tokenizer; default: a character tokenizer.
        vocabulary_size: entries of that character tokenizer: 64 hold digits, signs and small letters, 99 all of ASCII.
        hidden_size: width of the residual stream.
        intermediate_size: width of the feed-forward layers.
        num_layers: number of layers.
        num_heads: number of attention heads.
        num_kv_heads: number of key and value heads.
        initializer_range: standard deviation of the initial weights (Transformers' 0.02 is too small at this width).
        max_position_embeddings: longest sequence in tokens.
        seed: seed of the initial weights.
    """
    import torch
    from transformers import AutoTokenizer

    from lit_rl.policies import build_small_model, export
    from lit_rl.tokenizers import build_character_tokenizer

    torch.manual_seed(seed)
    vocabulary = AutoTokenizer.from_pretrained(tokenizer) if tokenizer else build_character_tokenizer(vocabulary_size)
    model = build_small_model(
        architecture,
        vocab_size=len(vocabulary),
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        initializer_range=initializer_range,
        max_position_embeddings=max_position_embeddings,
        eos_token_id=vocabulary.eos_token_id,
        pad_token_id=vocabulary.pad_token_id,
    )
    export(model, vocabulary, output)
    print(f"Wrote {output}: {sum(p.numel() for p in model.parameters()):,} parameters")
