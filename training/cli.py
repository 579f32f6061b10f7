"""From command line and TOML file to a `RunConfig`, with every offender found at once.

The command line wins over the file, the file over the defaults.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import tomllib
import typing
from pathlib import Path
from typing import Any

from sharding.errors import Problem, did_you_mean
from training.config import RunConfig, owners

__all__ = ["parse"]

_MAX_FILE_BYTES = 1_000_000
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
        entries, file_problems = _read_file(path)
        problems += file_problems
        for key, value in entries.items():
            _accept(values, problems, known, key, value, f"{key} = {value!r} in {path}")
    for key, text in arguments.items():
        shown = f"--{_flag(key)} {text}"
        _accept(values, problems, known, key, text, shown, from_text=True)
    return _build(defaults, values), problems


def _command_line(argv: list[str], defaults: RunConfig) -> tuple[dict[str, str], list[Problem]]:
    parser = _parser(defaults)
    try:
        arguments, unknown = parser.parse_known_args(argv)
    except argparse.ArgumentError as error:
        flag = error.argument_name or "the command line"
        problem = Problem(flag, f"{error.message}", f"see {parser.prog} --help")
        return {}, [problem]
    flags = [flag for action in parser._actions for flag in action.option_strings]
    problems = []
    for word in unknown:
        if word.startswith("-"):
            name = word.split("=")[0]
            why = f"there is no such option{did_you_mean(name, flags)}"
            problems.append(Problem(name, why, f"{parser.prog} --help lists the options"))
        elif not problems:
            why = "options begin with --, and each takes one value"
            problems.append(Problem(word, why, f"{parser.prog} --help lists the options"))
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


def _read_file(path: str) -> tuple[dict[str, Any], list[Problem]]:
    shown = f"--config {path}"
    try:
        if (size := Path(path).stat().st_size) > _MAX_FILE_BYTES:
            why = f"it has {size} bytes; a configuration has fewer than {_MAX_FILE_BYTES}"
            return {}, [Problem(shown, why, "name a TOML file such as: steps = 100")]
        return tomllib.loads(Path(path).read_text(encoding="utf-8")), []
    except OSError as error:
        return {}, [Problem(shown, f"it cannot be read: {error.strerror}", "name a TOML file")]
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        return {}, [Problem(shown, f"it is not TOML: {error}", "write lines such as: steps = 100")]


def _accept(
    values: dict[str, Any],
    problems: list[Problem],
    known: dict[str, tuple[str, dataclasses.Field]],
    key: str,
    value: Any,
    shown: str,
    from_text: bool = False,
) -> None:
    """Puts one converted entry into `values`, or says in `problems` why it cannot be."""
    key = key.replace("-", "_")
    if key not in known:
        why = f"there is no such key{did_you_mean(key, known)}"
        problems.append(Problem(shown, why, "train.py --help lists the keys"))
        return
    component, field = known[key]
    kind = typing.get_type_hints(type(getattr(RunConfig(), component)))[key]
    choices = field.metadata["choices"]
    converted = _from_text(kind, value) if from_text else _from_toml(kind, value)
    default = getattr(getattr(RunConfig(), component), key)
    if converted is None:
        why = f"{_NEEDED[kind]} is needed"
        problems.append(Problem(shown, why, f"for instance {_example(key, default)}"))
    elif choices and converted not in choices:
        why = f"the choices are {', '.join(choices)}{did_you_mean(converted, choices)}"
        problems.append(Problem(shown, why, f"for instance {_example(key, default)}"))
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


def _example(key: str, default: Any) -> str:
    shown = str(default).lower() if isinstance(default, bool) else default
    return f"--{_flag(key)} {shown}"
