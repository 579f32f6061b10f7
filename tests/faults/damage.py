"""Damage to a step folder, each kind as a disk, an operator or a killed copy would do it."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

__all__ = ["KINDS", "damage"]


def damage(step: Path, kind: str, generator: random.Random) -> str:
    """Damages the folder of a step.

    Returns:
      What the message about it must name: a file below the folder, or a part of the reason.
    """
    return KINDS[kind](step, generator)


def _file(step: Path, generator: random.Random) -> Path:
    """Any file of the step that has bytes, the manifest as likely as any other."""
    files = sorted(path for path in step.rglob("*") if path.is_file())
    return generator.choice([path for path in files if path.stat().st_size])


def _flip(step: Path, generator: random.Random) -> str:
    path = _file(step, generator)
    data = bytearray(path.read_bytes())
    bit = generator.randrange(8 * len(data))
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)
    return path.relative_to(step).as_posix()


def _truncate(step: Path, generator: random.Random) -> str:
    path = _file(step, generator)
    data, name = path.read_bytes(), path.relative_to(step).as_posix()
    left = generator.randrange(len(data))
    path.write_bytes(data[:left])
    sizes = f": it has {left} bytes, and {len(data)} were written"
    return name if name == "manifest.json" else name + sizes


def _extend(step: Path, generator: random.Random) -> str:
    path = _file(step, generator)
    path.write_bytes(path.read_bytes() + generator.randbytes(1 + generator.randrange(100)))
    return path.relative_to(step).as_posix()


def _zeros(step: Path, generator: random.Random) -> str:
    """A block that was never written: what a power cut leaves."""
    path = next(p for p in iter(lambda: _file(step, generator), None) if any(p.read_bytes()))
    path.write_bytes(bytes(path.stat().st_size))
    return path.relative_to(step).as_posix()


def _empty(step: Path, generator: random.Random) -> str:
    path = _file(step, generator)
    path.write_bytes(b"")
    return path.relative_to(step).as_posix()


def _delete(step: Path, generator: random.Random) -> str:
    path = _file(step, generator)
    path.unlink()
    return path.relative_to(step).as_posix()


def _swap(step: Path, generator: random.Random) -> str:
    """The halves of a file exchanged: the same bytes in another order."""
    for path in iter(lambda: _file(step, generator), None):
        data = path.read_bytes()
        middle = len(data) // 2
        if (swapped := data[middle:] + data[:middle]) != data:
            path.write_bytes(swapped)
            return path.relative_to(step).as_posix()
    raise AssertionError("every file is made of equal halves")


def _link(step: Path, generator: random.Random) -> str:
    path = _file(step, generator)
    moved = step.parent / "elsewhere"
    shutil.move(path, moved)
    path.symlink_to(moved)
    name = path.relative_to(step).as_posix()
    return _flip(step, generator) if name == "manifest.json" else f"{name}: it is no longer a plain"


def _empty_folder(step: Path, generator: random.Random) -> str:
    shutil.rmtree(step)
    step.mkdir()
    return "manifest.json"


def _partial_copy(step: Path, generator: random.Random) -> str:
    """The first files of the step, as a copy that was killed leaves them."""
    files = sorted((path for path in step.rglob("*") if path.is_file()), reverse=True)
    kept = generator.randrange(1, len(files))
    for path in files[kept:]:
        path.unlink()
    return ""


def _foreign(step: Path, generator: random.Random) -> str:
    shutil.rmtree(step)
    (step / "checkpoint").mkdir(parents=True)
    (step / "checkpoint" / "model.safetensors").write_bytes(generator.randbytes(100))
    return "manifest.json"


def _linked_step(step: Path, generator: random.Random) -> str:
    moved = step.parent / "elsewhere"
    step.rename(moved)
    step.symlink_to(moved, target_is_directory=True)
    return "symbolic link"


def _older_step_renamed(step: Path, generator: random.Random) -> str:
    older = step.parent / str(int(step.name) - 1)
    shutil.rmtree(step)
    shutil.copytree(older, step)
    return f"it is of step {older.name}"


def _forged(step: Path, generator: random.Random) -> str:
    """A manifest that was edited by hand to accept a changed file."""
    path = step / "manifest.json"
    entries = json.loads(path.read_text())
    name = generator.choice(sorted(entries["files"]))
    entries["files"][name][1] = "0" * 64
    path.write_text(json.dumps(entries, sort_keys=True, indent=1) + "\n")
    return "manifest.json"


KINDS: dict[str, Callable[[Path, random.Random], str]] = {
    "bit flip": _flip,
    "truncated": _truncate,
    "extended": _extend,
    "zeros": _zeros,
    "emptied": _empty,
    "deleted": _delete,
    "halves swapped": _swap,
    "link instead of a file": _link,
    "empty folder": _empty_folder,
    "partial copy": _partial_copy,
    "foreign folder": _foreign,
    "link instead of a folder": _linked_step,
    "older step renamed": _older_step_renamed,
    "edited manifest": _forged,
}
