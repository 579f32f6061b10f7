"""The arrays of a state: copied before they are written, compared before they are read."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from sharding.errors import Problem
from spmd.runtime import processes
from training.errors import CheckpointError

__all__ = ["mismatches", "reason", "restore", "small_copy"]

_SHOWN = 5
_SYSTEM = re.compile(r"([A-Z][^:\[\]]*) \[os_error_code=")
_FILE = re.compile(r'Failed writing: "([^"]+)"')
_SMALL_BYTES = 64 * 2**20  # of one device


def small_copy(state: Any) -> Any:
    """A copy of a state on its devices, or None where it is not small, there is no room for it, or
    several processes have parts of it.

    What Orbax does for every array while training waits takes longer than a small array's copy. Of
    a large one it is little, and there may be no room for a second; several processes have to meet
    while they save, and their steps do too.
    """
    if processes.count() > 1:
        return None
    leaves: list[jax.Array] = jax.tree.leaves(state)
    held = sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves)
    if held > _SMALL_BYTES:
        return None
    shardings = jax.tree.map(lambda x: x.sharding, state)
    try:
        return jax.device_put(state, shardings, may_alias=False)
    except jax.errors.JaxRuntimeError:
        return None


def mismatches(checkpointer: ocp.AsyncCheckpointer, folder: Path, abstract: Any) -> list[Problem]:
    """How the arrays of a folder differ from `abstract` in name, shape and dtype.

    Reads the description of the arrays alone: opening arrays of a wrong size can end the process,
    and those of another dtype would be converted without a word.
    """
    try:
        metadata: Any = checkpointer.metadata(folder).item_metadata
        stored = metadata.tree
    except Exception as error:  # Orbax raises whatever its storage raised
        what = f"{folder.parent.parent}, step {folder.parent.name}"
        why = f"the description of its arrays cannot be read: {reason(error)}"
        fix = "use the version of Orbax that wrote it; its manifest names that"
        return [Problem(what, why, fix)]
    found, needed = _described(stored), _described(abstract)
    names = [name for name in (*needed, *found) if found.get(name) != needed.get(name)]
    problems = [
        Problem(
            f"{folder.parent.parent}, step {folder.parent.name}: {name} is"
            f" {found.get(name, 'not there')}",
            f"this run needs {needed.get(name, 'no such array')}, and nothing is converted",
            "give this run the options of the run that wrote it, or another --checkpoint-dir",
        )
        for name in dict.fromkeys(names)
    ]
    if len(problems) > _SHOWN:
        last = problems[_SHOWN - 1]
        more = f"{last.what} (and {len(problems) - _SHOWN} more arrays differ)"
        problems = [*problems[: _SHOWN - 1], last._replace(what=more)]
    return problems


def restore(checkpointer: ocp.AsyncCheckpointer, folder: Path, abstract: Any) -> Any:
    """The arrays of a folder, with the shardings of `abstract`, whatever mesh they came from.

    Raises:
      CheckpointError: they cannot be read.
    """
    try:
        return checkpointer.restore(folder, args=ocp.args.StandardRestore(abstract))
    except Exception as error:  # Orbax raises whatever its storage raised
        problem = Problem(
            f"{folder.parent.parent}, step {folder.parent.name}",
            f"its bytes are those that were written, but cannot be read: {reason(error)}",
            "use the versions that wrote it; its manifest names them",
        )
        raise CheckpointError(problem) from error


def reason(error: BaseException) -> str:
    """The first line of what a library says, cut where it grows long; what the system said to
    Orbax's storage, which tells it last, comes first."""
    text = str(error)
    if match := _SYSTEM.search(text):
        file = _FILE.search(text)
        text = f"{match[1]}: {file[1]}" if file else match[1]
    return next(iter(text.splitlines()), type(error).__name__)[:200]


def _described(tree: Any) -> dict[str, str]:
    return {
        ".".join(_key(key) for key in path): f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]"
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def _key(key: Any) -> str:
    """Stored trees have lists and dicts where a state has tuples and classes."""
    names = ("key", "name", "idx")
    return next((str(getattr(key, name)) for name in names if hasattr(key, name)), str(key))
