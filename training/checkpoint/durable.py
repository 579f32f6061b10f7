"""Files and folders that are on the disk when a function returns, or not there at all."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

__all__ = ["free_bytes", "move", "remove", "remove_empty", "sync", "sync_tree", "write"]


def write(path: Path, data: bytes) -> None:
    """Writes a file that is there whole or not at all, whenever the process or machine ends."""
    temporary = path.with_name(f"{path.name}.tmp")
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.rename(temporary, path)
    sync(path.parent)


def move(source: Path, target: Path) -> None:
    """Renames within one file system: it is there under one of the two names at any time."""
    os.rename(source, target)
    sync(target.parent)
    if source.parent != target.parent:
        sync(source.parent)


def sync(path: Path) -> None:
    """Waits until a file's content, or a folder's list of names, is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_tree(folder: Path) -> None:
    """Waits until a folder and all below it are on the disk."""
    for parent, _, names in os.walk(folder, topdown=False):
        for name in names:
            sync(Path(parent, name))
        sync(Path(parent))


def remove(folder: Path) -> None:
    """Deletes a folder and all below it; what cannot be deleted stays."""
    shutil.rmtree(folder, ignore_errors=True)


def remove_empty(folder: Path) -> None:
    """Deletes a folder if it is there and holds nothing."""
    try:
        folder.rmdir()
    except OSError:
        pass


def free_bytes(folder: Path) -> int:
    """Bytes that can still be written to the file system of a folder."""
    return shutil.disk_usage(folder).free
