"""From command line and TOML file to a `RunConfig`, with every offender found at once.

The command line wins over the file, the file over the defaults.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import re
import tomllib
import typing
from pathlib import Path
from typing import Any

from sharding.errors import Problem, did_you_mean
from training.config import RunConfig, owners
from training.errors import quoted

__all__ = ["parse"]

_MAX_FILE_BYTES = 1_000_000
_MAX_UNKNOWN = 20  # options, and keys of a file, that are told apart
# Strings and comments of TOML, whole or without an end, and a key of more than 16 parts in what
# is left: tomllib takes minutes for keys of many parts.
_TEXTS = re.compile(
    r"""\"{3}(?:\\.|[^\\])*?(?:\"{3}|\Z)|'{3}.*?(?:'{3}|\Z)"""
    r"""|"(?:\\.|[^"\\\n])*+"?|'[^'\n]*+'?|\#[^\n]*""",
    re.DOTALL,
)
_DEEP_KEY = re.compile(r"(?<![\w-])(?:[\w-]+[ \t]*\.[ \t]*){16}")
_NEEDED = {int: "a whole number", float: "a finite number", bool: "true or false", str: "a text"}


def parse(argv: list[str]) -> tuple[RunConfig, list[Problem]]:
    """The configuration that `argv` (without the program's name) asks for.

    Returns:
      The configuration, with defaults in place of what is wrong, and all that is wrong. So a
      caller can add what only the machine can tell, and report everything together.

    Raises:
      SystemExit: for --help.
    """
    defaults = RunConfig()
    known = owners(defaults)
    arguments, problems = _command_line(argv, defaults)
    values: dict[str, Any] = {}
    if path := arguments.pop("config", None):
        entries, lines, file_problems = _read_file(path)
        problems += file_problems + _unknown_keys(entries, lines, known, path)
        for key, value in entries.items():
            if (name := key.replace("-", "_")) in known:
                what = f"{key} = {_as_toml(value)} in {quoted(path)}{lines.get(key, '')}"
                if name in values:
                    why = "the key is given twice, with - and with _"
                    problems.append(Problem(what, why, "keep one of them"))
                _accept(values, problems, known[name], name, value, what)
    for key, text in arguments.items():
        what = f"--{_flag(key)} {quoted(text)}"
        _accept(values, problems, known[key], key, text, what, from_text=True)
    return _build(defaults, values), problems


def _command_line(argv: list[str], defaults: RunConfig) -> tuple[dict[str, str], list[Problem]]:
    parser = _parser(defaults)
    try:
        arguments, unknown = parser.parse_known_args(argv)
    except argparse.ArgumentError as error:
        flag = error.argument_name or "the command line"
        problem = Problem(flag, quoted(error.message), f"see {parser.prog} --help")
        return {}, [problem]
    flags = [flag for action in parser._actions for flag in action.option_strings]
    problems = []
    for word in unknown[:_MAX_UNKNOWN]:
        if word.startswith("-"):
            name = word.split("=")[0]
            why = f"there is no such option{did_you_mean(name, flags)}"
            problems.append(Problem(quoted(name), why, f"{parser.prog} --help lists the options"))
        elif not problems:
            why = "options begin with --, and each takes one value"
            problems.append(Problem(quoted(word), why, f"{parser.prog} --help lists the options"))
    return vars(arguments), problems


def _parser(defaults: RunConfig) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="train.py",
        description="Trains a small language model on text, over all devices of this machine.",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
        exit_on_error=False,
    )
    parser.add_argument("--config", metavar="FILE", help="a TOML file with the same keys")
    groups: dict[str, Any] = {}
    for name, (component, field) in owners(defaults).items():
        group = groups.setdefault(component, parser.add_argument_group(component))
        default = getattr(getattr(defaults, component), name)
        choices = field.metadata["choices"]
        text = field.metadata["help"] + (f" ({', '.join(choices)})" if choices else "")
        text = text.replace("%", "%%") + (f" [{default}]" if default != "" else "")
        if isinstance(default, bool):
            group.add_argument(f"--{_flag(name)}", dest=name, nargs="?", const="true", help=text)
            group.add_argument(
                f"--no-{_flag(name)}", dest=name, action="store_const", const="false", help="off"
            )
        else:
            group.add_argument(f"--{_flag(name)}", dest=name, metavar="X", help=text)
    return parser


def _read_file(path: str) -> tuple[dict[str, Any], dict[str, str], list[Problem]]:
    """The entries of a TOML file, `, line N` for each, and what is wrong with the file."""
    given, fix = f"--config {quoted(path)}", "name a TOML file with lines such as: steps = 100"
    try:
        if not Path(path).is_file() and Path(path).exists():
            return {}, {}, [Problem(given, "it is no file", fix)]
        with Path(path).open("rb") as file:
            # One more than is allowed is enough to know.
            written = file.read(_MAX_FILE_BYTES + 1)
        if len(written) > _MAX_FILE_BYTES:
            why = f"it has {Path(path).stat().st_size} bytes; a configuration has at most"
            return {}, {}, [Problem(given, f"{why} {_MAX_FILE_BYTES}", fix)]
        text = written.decode("utf-8")
        if _DEEP_KEY.search(_TEXTS.sub("s", text)):
            raise RecursionError
        entries = tomllib.loads(text)
    except (OSError, ValueError, RecursionError) as error:
        return {}, {}, [Problem(given, _unreadable(error), fix)]
    if not entries:
        return {}, {}, [Problem(given, f"it sets nothing; it has {len(written)} bytes", fix)]
    return entries, _lines(text), []


def _unreadable(error: Exception) -> str:
    if isinstance(error, OSError):
        return f"it cannot be read: {error.strerror}"
    if isinstance(error, tomllib.TOMLDecodeError | UnicodeDecodeError):
        return f"it is not TOML: {quoted(error)}"
    if isinstance(error, RecursionError):
        return "it is nested too deeply, and a configuration not at all"
    return f"it cannot be read: {quoted(error)}"  # a NUL in the path, a number of 5,000 digits


def _lines(text: str) -> dict[str, str]:
    """Key -> `, line N`, for keys that begin a line."""
    lines: dict[str, str] = {}
    for number, line in enumerate(text.splitlines(), 1):
        if match := re.match(r"""\s*\[{0,2}\s*["']?([\w-]{1,100})["']?\s*[\].=]""", line):
            lines.setdefault(match[1], f", line {number}")
    return lines


def _unknown_keys(
    entries: dict[str, Any],
    lines: dict[str, str],
    known: dict[str, tuple[str, dataclasses.Field]],
    path: str,
) -> list[Problem]:
    unknown = [key for key in entries if key.replace("-", "_") not in known]
    problems = []
    for key in unknown[:_MAX_UNKNOWN]:
        what = f"{quoted(key)} = {_as_toml(entries[key])} in {quoted(path)}{lines.get(key, '')}"
        # The keys are written as attributes here, and may be written as flags too.
        why = f"there is no such key{did_you_mean(key.replace('-', '_'), known)}"
        if isinstance(entries[key], dict):
            why += "; keys stand at the top, without tables"
        problems.append(Problem(what, why, "train.py --help lists the keys"))
    if len(unknown) > _MAX_UNKNOWN:
        what = f"{len(unknown) - _MAX_UNKNOWN} more keys in {quoted(path)}"
        problems.append(Problem(what, "there are no such keys", "train.py --help lists the keys"))
    return problems


def _as_toml(value: Any) -> str:
    """A value as a message shows it; what is nested is not told in full."""
    if isinstance(value, dict):
        return "{...}"
    if isinstance(value, list):
        return "[...]"
    if isinstance(value, bool):
        return str(value).lower()
    return quoted(repr(value) if isinstance(value, str) else value)


def _accept(
    values: dict[str, Any],
    problems: list[Problem],
    owner: tuple[str, dataclasses.Field],
    key: str,
    value: Any,
    what: str,
    from_text: bool = False,
) -> None:
    """Puts one converted entry into `values`, or says in `problems` why it cannot be."""
    component, field = owner
    kind = typing.get_type_hints(type(getattr(RunConfig(), component)))[key]
    choices = field.metadata["choices"]
    converted = _from_text(kind, value) if from_text else _from_toml(kind, value)
    fix = f"for instance {_example(key, getattr(getattr(RunConfig(), component), key), from_text)}"
    if converted is None:
        problems.append(Problem(what, f"{_NEEDED[kind]} is needed", fix))
    elif choices and converted not in choices:
        why = f"the choices are {', '.join(choices)}{did_you_mean(converted, choices)}"
        problems.append(Problem(what, why, fix))
    else:
        values[key] = converted


def _from_text(kind: type, text: str) -> Any:
    if kind is bool:
        return {"true": True, "false": False}.get((text or "true").lower())
    try:
        value = kind(text)
    except ValueError:
        return None
    return None if kind is float and not math.isfinite(value) else value


def _from_toml(kind: type, value: Any) -> Any:
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind or (kind is float and not math.isfinite(value)):
        return None
    return value


def _build(defaults: RunConfig, values: dict[str, Any]) -> RunConfig:
    by_component: dict[str, dict[str, Any]] = {}
    for key, (component, _) in owners(defaults).items():
        if key in values:
            by_component.setdefault(component, {})[key] = values[key]
    replaced = {
        component: dataclasses.replace(getattr(defaults, component), **entries)
        for component, entries in by_component.items()
    }
    return dataclasses.replace(defaults, **replaced)


def _flag(key: str) -> str:
    return key.replace("_", "-")


def _example(key: str, default: Any, as_flag: bool) -> str:
    text = str(default).lower() if isinstance(default, bool) else default
    return f"--{_flag(key)} {text}" if as_flag else f"{key} = {_as_toml(default)}"
