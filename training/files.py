"""Which files are read, and as what: text, or token ids."""

from __future__ import annotations

import fnmatch
import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from sharding.errors import Problem, did_you_mean
from training.config import DataConfig
from training.errors import DataError, quoted

__all__ = ["TOKEN_SUFFIXES", "Files", "find_files", "nearest"]

TOKEN_SUFFIXES = (".bin", ".npy")
# Folders of the standard library that hold other packages, or tests that not every build has.
_SKIPPED = frozenset({"site-packages", "dist-packages", "test", "tests", "__pycache__"})


class Files(NamedTuple):
    """The files of a run, in the order in which they are read.

    Attributes:
      root: the file or folder that was named.
      paths: sorted.
      tokens: whether they hold token ids; else text.
    """

    root: Path
    paths: list[Path]
    tokens: bool

    def name(self, path: Path) -> str:
        """How a file is called whatever folder the data lies in."""
        return path.relative_to(self.root).as_posix() if path != self.root else path.name


def find_files(config: DataConfig) -> Files:
    """The files that `config` names.

    Raises:
      DataError: there are none, or both text and token ids.
    """
    root = Path(config.data or sysconfig.get_path("stdlib"))
    given = f"--data {quoted(config.data or root)}"
    if not os.path.exists(root):  # False, too, for names that no file can have
        why = f"there is no such file or folder{nearest(root)}"
        fix = "name a file or folder of text, or of token ids (.bin, .npy)"
        raise DataError(Problem(given, why, fix))
    if root.is_file():
        return Files(root, [root], root.suffix in TOKEN_SUFFIXES)
    if not root.is_dir():
        why = "it is neither a file nor a folder"
        raise DataError(Problem(given, why, "name a file, or a folder of them"))
    paths = sorted(_matching(root, config, given))
    tokens = [path for path in paths if path.suffix in TOKEN_SUFFIXES]
    if tokens and len(tokens) < len(paths):
        other = next(path for path in paths if path.suffix not in TOKEN_SUFFIXES)
        why = f"--pattern {quoted(config.pattern)} matches token ids, {quoted(tokens[0].name)}, and"
        why += f" text, {quoted(other.name)}"
        fix = f"use a --pattern for one of them, such as *{tokens[0].suffix}"
        raise DataError(Problem(given, why, fix))
    return Files(root, paths, bool(tokens))


def nearest(path: Path) -> str:
    """` (did you mean 'x'?)` for the name beside `path` that is closest to it."""
    if "\0" in str(path) or not os.path.isdir(path.parent):
        return ""
    try:
        names = sorted(entry.name for entry in path.parent.iterdir())[:1000]
    except OSError:
        return ""
    return did_you_mean(path.name, names)


def _matching(root: Path, config: DataConfig, given: str) -> list[Path]:
    try:
        if config.data:
            paths = [path for path in root.rglob(config.pattern) if path.is_file()]
        else:
            paths = list(_library(root, config.pattern))
    except (OSError, ValueError, NotImplementedError, IndexError) as error:
        why = f"--pattern {quoted(config.pattern)} matches nothing: {quoted(error)}"
        raise DataError(Problem(given, why, "use a --pattern such as *.txt")) from None
    if not paths:
        why = f"the folder holds no file that matches --pattern {quoted(config.pattern)}"
        raise DataError(Problem(given, why + _suffixes(root), "give a --pattern that does"))
    return paths


def _library(root: Path, pattern: str) -> Iterator[Path]:
    """Files of the standard library. What is skipped is not entered: it may be far larger."""
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(set(folders) - _SKIPPED)
        yield from (Path(folder, name) for name in names if fnmatch.fnmatch(name, pattern))


def _suffixes(root: Path) -> str:
    """What the folder holds instead."""
    counts: dict[str, int] = {}
    try:
        names = os.listdir(root)[:1000]
    except OSError:
        return ", and it cannot be read"
    for suffix in filter(None, (Path(name).suffix for name in names)):
        counts[suffix] = counts.get(suffix, 0) + 1
    most = sorted(counts.items(), key=lambda item: -item[1])[:3]
    return f"; it holds {', '.join(f'{n} of *{quoted(s)}' for s, n in most)}" if most else ""
