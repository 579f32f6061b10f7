"""What every command asks about the program: a function, its arguments, a mesh, and options."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any, NamedTuple

from sharding.errors import Problem
from spmd.cli.load import UsageError, call, load, read_arguments

# Options of the library's functions that a command line says in its own way.
_SAID = frozenset(("mesh", "topology", "kwargs", "model_flops", "progress"))


class Program(NamedTuple):
    """A function as the command line names it, and what it is called with."""

    function: Callable
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    options: dict[str, Any]

    def traced(self, mesh: Any) -> Any:
        """Its first stage."""
        import spmd

        return spmd.jit(self.function, mesh=mesh, **self.options).trace(*self.args, **self.kwargs)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("function", metavar="MODULE:FUNCTION", help="written as for one device")
    parser.add_argument(
        "--args", required=True, metavar="MODULE:FUNCTION",
        help="returns the abstract arguments: a tuple, or (args, kwargs)",
    )  # fmt: skip
    parser.add_argument(
        "--mesh", required=True, metavar="AXES",
        help="data=2,tensor=4; data=2@dcn puts data between slices or nodes",
    )  # fmt: skip
    parser.add_argument(
        "--options", metavar="MODULE:FUNCTION",
        help="returns a dict of options of spmd.jit: in_shardings, axis_rules, donate_argnums ...",
    )  # fmt: skip


def read(given: argparse.Namespace) -> Program:
    """The program that `add_arguments` asked for.

    Raises:
      UsageError: something that is named does not exist, or is of another kind.
    """
    function = load("", given.function)
    if not callable(function):
        why = f"it is a {type(function).__name__}"
        raise UsageError(Problem(given.function, why, "name a function"))
    args, kwargs = read_arguments("--args", given.args)
    return Program(function, args, kwargs, _options(given.options) if given.options else {})


def _options(text: str) -> dict[str, Any]:
    found = call("--options", text)
    if not isinstance(found, dict) or _SAID & set(found):
        why = (
            f"it returns {', '.join(sorted(_SAID & set(found)))}, which is not given there"
            if isinstance(found, dict)
            else f"it returns a {type(found).__name__}"
        )
        fix = "return a dict of options of spmd.jit, such as in_shardings, without the mesh"
        raise UsageError(Problem(f"--options {text}", why, fix))
    return found
