"""The manifest of a step: what its folder must hold, byte for byte, and what it belongs to.

`manifest.json` lists every file of the step with its size and SHA-256. It is its own last word: the
entry `digest` is the SHA-256 of the rest, so that a damaged manifest is not mistaken for another.
That rule holds for all formats, so that a newer one is told from a damaged one.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import stat
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from sharding.errors import Problem
from training.checkpoint import durable
from training.errors import CheckpointError

__all__ = ["FORMAT", "NAME", "BadStep", "Manifest", "read", "verify", "write"]

FORMAT = 2  # 1 had no manifest
NAME = "manifest.json"
_CHUNK = 1 << 20
_THREADS = 4
_PACKAGES = ("jax", "orbax-checkpoint", "flax", "optax")


class BadStep(Exception):
    """A step folder that is not what was written; its text is the file and what is wrong."""


class Manifest(NamedTuple):
    """A manifest that is intact.

    Attributes:
      step: of the folder it was written for.
      files: path below the step folder -> (size in bytes, SHA-256).
      run: `training.checkpoint.identity` of the run that wrote it.
      about: how it was laid out when it was written: mesh, devices, predictions.
      versions: of the packages that wrote it.
    """

    step: int
    files: dict[str, tuple[int, str]]
    run: dict[str, Any]
    about: dict[str, Any]
    versions: dict[str, str]

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(size for size, _ in self.files.values())


def write(folder: Path, step: int, run: dict[str, Any], about: dict[str, Any]) -> Manifest:
    """Digests all files of a step folder and writes its manifest; both are on the disk then."""
    durable.sync_tree(folder)
    names = sorted(
        path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()
    )
    versions = {name: importlib.metadata.version(name) for name in _PACKAGES}
    digests = _digests(folder, names)
    files = {name: (os.stat(folder / name).st_size, digests[name]) for name in names}
    manifest = Manifest(step, files, run, about, versions)
    durable.write(folder / NAME, _render({"format": FORMAT, **manifest._asdict()}))
    return manifest


def read(folder: Path) -> Manifest:
    """The manifest of a step folder, without a look at the files that it lists.

    Raises:
      BadStep: there is none, it is damaged, or it is of another step.
      CheckpointError: its format is newer than this program.
    """
    if folder.is_symlink():
        raise BadStep("it is a symbolic link, and what it points to is not of this run")
    try:
        data = (folder / NAME).read_bytes()
    except OSError as error:
        raise BadStep(f"{NAME}: {error.strerror or error}") from error
    try:
        entries = json.loads(data)
        damaged = _render({k: v for k, v in entries.items() if k != "digest"}) != data
    except (ValueError, AttributeError, RecursionError) as error:
        raise BadStep(f"{NAME}: it is not the JSON that was written") from error
    if damaged:
        raise BadStep(f"{NAME}: its content does not have the digest that it names")
    if entries["format"] > FORMAT:
        raise CheckpointError(
            Problem(
                f"{folder.parent}, step {folder.name}",
                f"its format is newer than this program: found v{entries['format']},"
                f" supports <= {FORMAT}",
                "use the version of this program that wrote it, or another --checkpoint-dir",
            )
        )
    files = {name: (size, digest) for name, (size, digest) in entries["files"].items()}
    manifest = Manifest(**{**{k: entries[k] for k in Manifest._fields}, "files": files})
    if str(manifest.step) != folder.name:
        raise BadStep(f"{NAME}: it is of step {manifest.step}, so the folder was renamed")
    return manifest


def verify(folder: Path, manifest: Manifest) -> None:
    """Compares every file of a step with its manifest: sizes first, then all bytes.

    Raises:
      BadStep: the first file that is not as it was written.
    """
    for name, (size, _) in manifest.files.items():
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts:
            raise BadStep(f"{NAME}: it lists {name!r}, which is not below the step")
        try:
            found = os.lstat(folder / name)
        except OSError as error:
            raise BadStep(f"{name}: {error.strerror}") from error
        if not stat.S_ISREG(found.st_mode):
            raise BadStep(f"{name}: it is no longer a plain file")
        if found.st_size != size:
            raise BadStep(f"{name}: it has {found.st_size} bytes, and {size} were written")
    digests = _digests(folder, manifest.files)
    for name, (_, digest) in manifest.files.items():
        if digests[name] != digest:
            raise BadStep(f"{name}: its bytes are not those that were written (SHA-256 differs)")


def _digests(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """SHA-256 by name; a file that cannot be read has an empty one."""
    names = list(names)
    with ThreadPoolExecutor(_THREADS) as pool:  # hashing does not hold the interpreter
        return dict(zip(names, pool.map(lambda name: _sha256(folder / name), names), strict=True))


def _sha256(path: Path) -> str:
    try:
        with path.open("rb", buffering=0) as file:
            digest = hashlib.sha256()
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
    except OSError:
        return ""
    return digest.hexdigest()


def _render(entries: dict[str, Any]) -> bytes:
    """The only text of a manifest with these entries."""
    body = json.dumps(entries, sort_keys=True, allow_nan=False)
    digest = hashlib.sha256(body.encode()).hexdigest()
    text = json.dumps({**entries, "digest": digest}, sort_keys=True, indent=1, allow_nan=False)
    return f"{text}\n".encode()
