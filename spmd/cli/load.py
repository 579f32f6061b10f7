"""What command lines name: objects of modules, arguments, meshes."""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
import sys
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any

from sharding.errors import MeshError, Problem, SpmdError, did_you_mean, printable
from sharding.mesh import MeshShape
from spmd.hardware import Machine, wrong_slices
from spmd.mesh_text import parse_mesh, read_across

__all__ = ["UsageError", "call", "check_fit", "load", "read_arguments", "read_mesh"]


class UsageError(SpmdError):
    """Something on the command line is wrong."""


def load(option: str, text: str) -> Any:
    """The object that `text`, MODULE:NAME, names; modules of the working directory come first.

    Args:
      option: how the text was given, for errors: "--args".

    Raises:
      UsageError: there is no such module or name, or importing it fails.
    """
    shown = f"{option} {text}".strip()
    module_name, colon, name = text.partition(":")
    if not (module_name and colon and name):
        why = "an object is named by its module, a colon, and its name in it"
        raise UsageError(Problem(shown, why, "write it like package.module:function"))
    folder = str(Path.cwd())
    if folder not in sys.path:
        sys.path.insert(0, folder)
    found = _module(shown, module_name)
    for part in name.split("."):
        if not hasattr(found, part):
            public = [n for n in vars(found) if not n.startswith("_")]
            why = f"{module_name} has no {name!r}{did_you_mean(part, public)}"
            raise UsageError(Problem(shown, why, f"name something that {module_name} defines"))
        found = getattr(found, part)
    return found


def _module(shown: str, name: str) -> Any:
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError):
        spec = None
    if spec is None:
        near = did_you_mean(name, _modules(name))
        why = f"there is no module {name!r}{near}"
        fix = "name one that `import` finds from here; files of the working directory are found"
        raise UsageError(Problem(shown, why, fix))
    try:
        return importlib.import_module(name)
    except Exception as error:
        why = f"importing {name} fails: {type(error).__name__}: {error}"
        raise UsageError(Problem(shown, why, f"`python -c 'import {name}'` shows where")) from None


def _modules(name: str) -> list[str]:
    """Modules beside the one that was asked for."""
    package, _, _ = name.rpartition(".")
    paths = None
    if package:
        try:
            paths = importlib.import_module(package).__path__
        except Exception:
            package = ""
    prefix = f"{package}." if package else ""
    return [f"{prefix}{found.name}" for found in pkgutil.iter_modules(paths)]


def call(option: str, text: str) -> Any:
    """The result of the function, without arguments, that `text` names.

    Raises:
      UsageError: it is no function, or it fails.
    """
    function: Callable = load(option, text)
    shown = f"{option} {text}".strip()
    if not callable(function):
        why = f"it is a {type(function).__name__}, and a function without arguments is needed"
        raise UsageError(Problem(shown, why, "name a function"))
    try:
        return function()
    except SpmdError:
        raise
    except Exception as error:
        why = f"calling it fails: {type(error).__name__}: {error}"
        fix = "name a function that can be called without arguments"
        raise UsageError(Problem(shown, why, fix)) from None


def read_arguments(option: str, text: str) -> tuple[tuple, dict[str, Any]]:
    """(args, kwargs) from a function that returns a tuple of arguments, or (args, kwargs): a tuple
    and a dict with names as keys."""
    found = call(option, text)
    if not isinstance(found, tuple):
        why = f"it returns a {type(found).__name__}"
        fix = "return a tuple of arguments, (x,) for one, or (args, kwargs)"
        raise UsageError(Problem(f"{option} {text}", why, fix))
    if len(found) == 2 and isinstance(found[0], tuple) and isinstance(found[1], dict):
        if all(isinstance(key, str) for key in found[1]):
            return found[0], found[1]
    return found, {}


def read_mesh(text: str) -> MeshShape:
    """`data=16,tensor=4`; `data=2@dcn,tensor=4` has `data` between slices or nodes.

    Raises:
      UsageError: all that is wrong with it.
    """
    mesh, problems = parse_mesh(text, f"--mesh {printable(text)}")
    if problems:
        raise UsageError(*problems)
    return MeshShape(tuple(mesh.items()), across=tuple(read_across(text, mesh).items()))


def check_fit(mesh: MeshShape, machine: Machine) -> None:
    """Raises MeshError where the mesh cannot lie on the machine, before anything is imported."""
    machine.lay(mesh)
    if mesh.across and prod(size for _, size in mesh.across) != machine.slices:
        raise MeshError(wrong_slices(machine, mesh))
