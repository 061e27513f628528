# SPDX-License-Identifier: Apache-2.0
"""The parser's messages in plain words: what is wrong with a configuration, and what was probably meant."""

from __future__ import annotations

import inspect
import os
import re
from ast import literal_eval
from collections.abc import Iterable, Iterator, Sequence
from importlib import import_module
from typing import Any, NamedTuple, NoReturn, get_type_hints

from jsonargparse import ArgumentParser

from lit_rl.mistakes import TRACEBACK, causes
from lit_rl.spelling import closest, did_you_mean


class Complaint(NamedTuple):
    """One line of a parser's message that says something.

    Attributes:
        where: dotted key in the configuration.
        owner: class path whose arguments are concerned, or "".
        text: what is wrong, in the parser's words.
    """

    where: str
    owner: str
    text: str


_KEY = re.compile(r'Parser key "(?P<key>[^"]+)":\s*(?P<rest>.*)')
_CLASS = re.compile(r"Problem with given class_path '(?P<path>[^']+)':")
_CALLABLE = re.compile(r"Type .+ expects a function or a callable class: (?P<text>.*?)\. Got value: (?P<value>.*)")
_CALLABLE_KEY = re.compile(r'Type .+ expects a function or a callable class: (?P<text>Parser key "[^"]+":.*)')
_NOISE = re.compile(
    r"Does not validate against|Subtypes:|Errors:|Given value|Subclass types expect|a (class path|dict)\b"
    r"|Expected a path but|Expected a <class 'NoneType'>"
)
_UNKNOWN_OPTION = re.compile(
    r"(?:(?:Group '(?P<group>[\w.]+)'|Subcommand '\w+') does not accept option|Option) '(?P<name>[^']+)'"
)
_UNKNOWN_NAME = re.compile(r"module '(?P<module>[\w.]+)' has no attribute '(?P<name>\w+)'")
_CHOICES = re.compile(r"Expected a (?:typing\.Literal\[(?P<literal>.*)\]|member of <enum .*>: \{(?P<enum>.*)\})")
_TYPE = re.compile(r"Expected an? <class '(?P<type>[\w.]+)'>")
_VALUE = re.compile(r"\. Got value: (?P<value>.*)", re.DOTALL)
_NO_CLASS = re.compile(r"Not a valid subclass of (?P<base>\w+)")
_OTHER_CLASS = re.compile(r"Import path (?P<path>\S+) does not correspond to a subclass of (?P<base>\w+)")
_NO_PATH = re.compile(r"Expected a dot import path string: (?P<name>\S+)")
_GIVEN = re.compile(r"^\s*Given value: (?P<value>.*?)(?:\. Got value: .*)?$", re.MULTILINE)
_OWN_KEYS = ("class_path", "init_args", "dict_kwargs")  # of what names a class
_UNRECOGNIZED = re.compile(r"unrecognized arguments: (?P<arguments>.*)", re.DOTALL)
_TELLING = (_UNKNOWN_OPTION, _UNKNOWN_NAME, re.compile("No module named"))


def explain(message: str, options: Iterable[str] = ()) -> str:
    """The parser's message as a sentence; a message of unknown form comes back without its boilerplate.

    Args:
        message: what the parser wants to print.
        options: the parser's options, for suggestions.

    >>> explain("unrecognized arguments: --trainer.max_stepss=4", ["--trainer.max_steps"])
    'There is no option --trainer.max_stepss. Did you mean --trainer.max_steps?'
    """
    unrecognized = _UNRECOGNIZED.match(message)
    if unrecognized:
        names = [a.split("=")[0] for a in unrecognized["arguments"].split()]
        name = next((n for n in names if n.startswith("-")), names[0])
        hint = argument_of_the_method(name.lstrip("-"), "--") or did_you_mean(name, options)
        return f"There is no option {name}.{hint}"
    found = list(complaints(message))
    if not found:
        return " ".join(message.split())
    telling = [c for c in found if any(p.search(c.text) for p in _TELLING)]
    chosen = (telling or found)[0]
    if not telling and not chosen.where:
        return " ".join(message.split())
    given = [match["value"] for match in _GIVEN.finditer(message)]  # the innermost first
    return _beside_init_args(chosen, given) or _sentence(chosen, options, given)


def complaints(message: str) -> Iterator[Complaint]:
    """The lines of a nested message that are not boilerplate, each with the key and class that it is about."""
    stack: list[tuple[int, str, str]] = []  # indentation, "key" or "class", name
    for line in message.splitlines():
        text = line.lstrip(" -")
        if not text:
            continue
        indent = len(line) - len(line.lstrip(" "))
        while stack and stack[-1][0] >= indent:
            stack.pop()
        inside = _CALLABLE_KEY.match(text)  # an argument of a callable class
        text = inside["text"] if inside else text
        key, given_class, callable_ = _KEY.match(text), _CLASS.match(text), _CALLABLE.match(text)
        if key:
            stack.append((indent, "key", key["key"]))
            text = key["rest"]
        elif given_class:
            stack.append((indent, "class", given_class["path"]))
            continue
        where = ".".join(name for _, kind, name in stack if kind == "key")
        owner = next((name for _, kind, name in reversed(stack) if kind == "class"), "")
        if callable_:
            path = re.search(r"class_path='([^']+)'", callable_["value"])
            yield Complaint(where, path[1] if path else "", callable_["text"])
        elif text and not _NOISE.match(text):
            yield Complaint(where, owner, text)


def _sentence(complaint: Complaint, options: Iterable[str], given: Sequence[str] = ()) -> str:
    where, owner, text = complaint
    prefix = f"{where}: " if where else ""
    option, choices, expected = _UNKNOWN_OPTION.search(text), _CHOICES.search(text), _TYPE.search(text)
    no_class, value = _NO_CLASS.search(text), _VALUE.search(text)
    got = f", got {value['value']!r}" if value else ""
    if (option and owner.startswith("lightning")) or no_class:
        base = no_class["base"] if no_class else owner.rpartition(".")[2]
        return f"{prefix}class_path is missing: it names the {base} that the init_args belong to."
    if option:
        return _unknown_key(complaint, option["group"] or "", option["name"], options)
    if choices:
        names = choices["literal"] or choices["enum"]
        different = {n.strip(" '").lower(): None for n in names.split(",")}  # an enumeration may list a name twice
        return f"{prefix}must be one of {', '.join(different)}{got}."
    if expected:
        plain = [v for v in given[:1] if not re.match(r"[\[({]|\w+\(", v)]  # what is short enough to be repeated
        got = got or "".join(f", got {v!r}" for v in plain)
        return f"{prefix}must be {expected['type'].rpartition('.')[2]}{got}."
    return _about_a_class(prefix, text) or f"{prefix}{text}" + ("" if text.endswith(".") else ".")


def _unknown_key(complaint: Complaint, group: str, name: str, options: Iterable[str]) -> str:
    """A key that nothing in the configuration, or no argument of a class, is called."""
    where, owner, _ = complaint
    prefix = f"{where}: " if where else ""
    if owner and group:
        hint = did_you_mean(name, arguments_of(argument_type(owner, group)))
        return f"{prefix}{group} of {owner} has no key {name!r}.{hint}"
    if owner:
        known, first = arguments_of(owner), name.partition(".")[0]
        name = name if first in known else first  # "samplng.temperature" is a misspelt "sampling"
        return f"{prefix}{owner} has no argument {name!r}.{did_you_mean(name, known)}"
    name = ".".join(filter(None, (group, name)))
    known = {o.lstrip("-") for o in options}
    tops, top = {o.partition(".")[0] for o in known}, name.partition(".")[0]
    if top not in tops:
        hint = argument_of_the_method(top) or did_you_mean(top, tops)
        return f"There is no key {top}.{hint or did_you_mean(name, known)}"
    return f"There is no key {name}.{did_you_mean(name, known)}"


def _about_a_class(prefix: str, text: str) -> str:
    """What is wrong with a class path; "" if the text is about something else."""
    unknown, other, no_path = _UNKNOWN_NAME.search(text), _OTHER_CLASS.search(text), _NO_PATH.search(text)
    if unknown:
        known = set(dir(import_module(unknown["module"])))
        hint = did_you_mean(unknown["name"], known, prefix=f"{unknown['module']}.")
        return f"{prefix}there is no {unknown['module']}.{unknown['name']}.{hint}"
    if other:
        path, base = other["path"], other["base"]
        kind = "a function, not a class" if any(map(inspect.isfunction, _callables(path))) else f"no {base}"
        advice = f"class_path must name a subclass of {base}"
        if base == "Reward" and kind.startswith("a function"):
            advice = f"write class_path: lit_rl.rewards.FunctionReward with init_args: {{function: {path}}}"
        return f"{prefix}{path} is {kind}: {advice}."
    if no_path:
        known_paths = {path.rpartition(".")[2]: path for path in shipped_classes()}
        meant = closest(no_path["name"], known_paths)
        hint = f" Did you mean {known_paths[meant]}?" if meant else " One looks like package.module.Class."
        return f"{prefix}{no_path['name']!r} is no class path.{hint}"
    if "is abstract" in text:
        return f"{prefix}names an abstract class; choose one of its subclasses."
    if text.startswith(("cannot import", "No module named")):
        return f"{prefix}{text} ({TRACEBACK}=1 shows where)."
    return ""


def _beside_init_args(complaint: Complaint, given: Sequence[str]) -> str:
    """A sentence, if the parser took a mapping for something else because an argument stands outside its init_args."""
    text = complaint.text
    if not (_NO_CLASS.search(text) or "is abstract" in text or "Option 'class_path'" in text):
        return ""
    for value in given:
        try:
            found = next(_misplaced(literal_eval(value)), None)
        except (ValueError, SyntaxError):  # it holds objects
            continue
        if found is not None:
            class_path, name = found
            if hint := did_you_mean(name, _OWN_KEYS):
                return f"{complaint.where}: there is no key {name!r} beside class_path.{hint}"
            return f"{complaint.where}: {name} must stand inside init_args of {class_path}, not beside class_path."
    return ""


def _misplaced(value: Any) -> Iterator[tuple[str, str]]:
    """Class path and key of each argument that stands beside a class path, in nested lists and mappings."""
    if isinstance(value, dict):
        yield from ((value["class_path"], key) for key in value if "class_path" in value and key not in _OWN_KEYS)
    if isinstance(value, (dict, list)):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _misplaced(inner)


def argument_of_the_method(name: str, prefix: str = "") -> str:
    """`` Did you mean model.init_args.…?`` for an argument of a method that was written without its place."""
    known = name.partition(".")[0] in arguments_of("lit_rl.GRPO")
    return f" Did you mean {prefix}model.init_args.{name}?" if known else ""


def shipped_classes() -> list[str]:
    """Class paths that a configuration may name: ours, and those of torch and Lightning that are used most."""
    ours = ("", ".callbacks", ".datamodules", ".environments", ".objectives", ".policies", ".rewards", ".samplers")
    modules = [*(f"lit_rl{m}" for m in ours), "lit_rl.schedules", "torch.optim", "lightning.pytorch.callbacks"]
    names = {module: getattr(found := import_module(module), "__all__", dir(found)) for module in modules}
    return [f"{module}.{name}" for module, listed in names.items() for name in listed if name[:1].isupper()]


def arguments_of(class_path: str) -> set[str]:
    """Names of the arguments that a class and its bases take; empty if it cannot be imported."""
    parameters = [inspect.signature(c).parameters for c in _callables(class_path)]
    return {name for p in parameters for name in p} - {"self", "args", "kwargs"}


def argument_type(class_path: str, name: str) -> str:
    """Class path of what a class expects for an argument; "" if that is not a plain class."""
    for found in _callables(class_path):
        hints = get_type_hints(found.__init__ if inspect.isclass(found) else found)
        if inspect.isclass(hints.get(name)):
            return f"{hints[name].__module__}.{hints[name].__qualname__}"
    return ""


def _callables(class_path: str) -> list[Any]:
    """A class and its bases (those with a constructor of their own), or a function."""
    module, _, name = class_path.rpartition(".")
    try:
        found: Any = getattr(import_module(module), name)
    except (ImportError, AttributeError, ValueError):
        return []
    return [c for c in inspect.getmro(found) if "__init__" in vars(c)] if inspect.isclass(found) else [found]


class PlainMessages(ArgumentParser):
    """A parser that complains in one sentence, without its usage of sixty lines."""

    _file: str | None = None  # the one that is being read

    def parse_path(self, path: Any, *rest: Any, **options: Any) -> Any:
        """Remember which file is read: the loader of YAML does not know it."""
        outer, self._file = self._file, os.fspath(path)
        try:
            return super().parse_path(path, *rest, **options)
        finally:
            self._file = outer

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Exit with status 2 and a sentence; nested parsers raise, as jsonargparse expects of them."""
        if not self.exit_on_error or os.environ.get(TRACEBACK):
            super().error(message, ex)
        commands: dict[str, ArgumentParser] = {}
        for action in self._actions:
            commands |= action.choices if isinstance(action.choices, dict) else {}
        options = [o for p in (self, *commands.values()) for action in p._actions for o in action.option_strings]
        name = " ".join([self.prog, *(commands if len(commands) == 1 else ())]).replace(" [options]", "")
        told = not_yaml(ex, self._file) if self._file else None
        self.exit(2, f"{name}: {told or explain(message, options)}\n")


def not_yaml(error: BaseException | None, file: str) -> str | None:
    """Where a file stops being YAML, if that is what an error was raised from."""
    for cause in causes(error):
        mark, problem = getattr(cause, "problem_mark", None), getattr(cause, "problem", None)
        if mark is not None:
            context = " ".join(filter(None, (problem, getattr(cause, "context", None))))
            return f"{file} is not valid YAML in line {mark.line + 1}, column {mark.column + 1}: {context}."
    return None
