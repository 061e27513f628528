# SPDX-License-Identifier: Apache-2.0
"""The command line: ``lit-rl fit|validate|test|predict`` (LightningCLI) and a few commands of our own.

Lightning is imported only by the commands that train or evaluate.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

# Two torch threads that spin next to a busy neighbour are several times slower than one: give the core up sooner.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from lit_rl import __version__
from lit_rl.complaints import PlainMessages
from lit_rl.mistakes import plain_errors
from lit_rl.spelling import did_you_mean

LIGHTNING_COMMANDS = {
    "fit": "train a policy",
    "validate": "measure a policy on the evaluation sets",
    "test": "the same, logged as test/…",
    "predict": "write completions of the evaluation sets with their scores to jsonl",
}


def own_commands() -> dict[str, Callable[..., Any]]:
    """Commands beside LightningCLI's: name -> function whose signature is its command line."""
    from lit_rl.commands import export, new_policy, replay, serve

    return {"export": export, "new-policy": new_policy, "replay": replay, "serve": serve}


def overview() -> str:
    """What ``lit-rl --help`` prints."""
    own = {name: (function.__doc__ or "").splitlines()[0].replace("`", "") for name, function in own_commands().items()}
    lines = [
        f"  {name:<12}{text[0].lower()}{text[1:].rstrip('.')}" for name, text in (LIGHTNING_COMMANDS | own).items()
    ]
    return "\n".join(
        [
            f"lit-rl {__version__}: reinforcement-learning post-training of language models on PyTorch Lightning",
            "",
            "usage: lit-rl <command> [options]     lit-rl <command> --help lists the options",
            "",
            *lines,
            "",
            "Configurations compose: lit-rl fit --config configs/quickstart.yaml --config configs/methods/dapo.yaml",
        ]
    )


def main(args: Sequence[str] | None = None) -> None:
    """Entry point of ``lit-rl``.

    Raises:
        SystemExit: with 2 and a sentence for a mistake of the user, 130 or 143 after a signal.
    """
    argv = list(sys.argv[1:] if args is None else args)
    if not argv or argv[0] in ("-h", "--help"):
        print(overview())
        return
    if argv[0] == "--version":
        print(f"lit-rl {__version__}")
        return
    make_own_code_importable()
    with plain_errors(f"lit-rl {argv[0]}"):
        dispatch(argv)


def make_own_code_importable() -> None:
    """Find modules in the present folder, as ``python -m`` does: a class path may name what lies beside the YAML."""
    if not {"", os.getcwd()} & set(sys.path):
        sys.path.insert(0, os.getcwd())


def dispatch(argv: list[str]) -> None:
    """Run the command that the first word names."""
    from jsonargparse import auto_cli, set_parsing_settings

    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    keep_comments_as_text()
    command, commands = argv[0], own_commands()
    if command in LIGHTNING_COMMANDS:
        from lit_rl.lightning_cli import run

        run(argv)
    elif command in commands:
        function = commands[command]
        auto_cli(function, args=argv[1:], as_positional=True, parser_class=PlainMessages, prog=f"lit-rl {command}")
    else:
        known = [*LIGHTNING_COMMANDS, *commands]
        raise ValueError(f"there is no such command.{did_you_mean(command, known)} There are: {', '.join(known)}.")


def keep_comments_as_text() -> None:
    """Read a value such as ``"#"`` or ``"# Title"`` as text wherever text is allowed.

    The parser loads values as YAML once more; there a text that starts with ``#`` is an empty comment, and an argument
    that may be None would silently become None.
    """
    import yaml
    from jsonargparse import get_loader, set_loader

    load = get_loader("yaml")
    if getattr(load, "keeps_comments", False):
        return

    def load_yaml(text: str) -> Any:
        value = load(text)
        return text if value is None and text.startswith("#") else value

    load_yaml.keeps_comments = True  # type: ignore[attr-defined]
    set_loader("yaml", load_yaml, exceptions=(yaml.YAMLError,))


if __name__ == "__main__":
    main()
