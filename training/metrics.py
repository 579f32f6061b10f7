"""What a run writes down while it goes on: JSON lines always, TensorBoard where it is asked for.

`metrics.jsonl` has one line for each step that was logged, validated or skipped, in the order of
the steps. Values that are not finite are null: JSON has no others.
"""

from __future__ import annotations

import errno
import importlib.util
import json
import math
import os
import resource
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax

from sharding.errors import Problem
from training.errors import CheckpointError, ConfigError

__all__ = ["FILE", "NO_TENSORBOARD", "Metrics", "has_tensorboard", "memory", "read_metrics"]

FILE = "metrics.jsonl"
_EVENTS = "tensorboard"

NO_TENSORBOARD = Problem(
    "--tensorboard",
    "the package tensorboardX, which writes its files, is not installed",
    f'pip install -e ".[tensorboard]", or leave it out; {FILE} has the same numbers',
)


class Metrics:
    """The lines of one run, each on the disk when `add` returns.

    A run that is continued goes on after the lines of the steps before. Lines of steps that it
    does again, and a last line that was torn, are dropped first.

    Attributes:
      last: the last line of the steps before; empty for a new run.

    Args:
      folder: of the run; it exists.
      start: the step that it continues from; 0 for a new run.
      tensorboard: whether to write event files too, into a folder `tensorboard` in it.
      primary: whether this process writes; the others do nothing.

    Raises:
      ConfigError: TensorBoard is asked for, and tensorboardX is not installed.
      CheckpointError: the file cannot be read or written.
    """

    def __init__(
        self, folder: Path, start: int = 0, tensorboard: bool = False, primary: bool = True
    ):
        self.path = folder / FILE
        self.last: Mapping[str, Any] = {}
        self._next: dict[str, Any] = {"resumed": start} if start else {}
        self._line: dict[str, Any] = {}
        self._events, self._file, self._failed = None, -1, False
        if not primary:
            return
        if tensorboard:
            self._events = _writer()(str(folder / _EVENTS), purge_step=start + 1)
        try:
            kept = _keep(self.path, start)
            self._file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            what, fix = f"{self.path} cannot be written", "make room, or the file writable"
            raise CheckpointError(Problem(what, str(error.strerror), fix)) from error
        self._begin = self._end = os.lseek(self._file, 0, os.SEEK_END)
        if kept:
            self.last = kept[-1]
        if self.last.get("step") == start:
            self._line, self._begin = dict(self.last), self._end - len(_encoded(self.last))

    def add(self, step: int, values: Mapping[str, Any]) -> Problem | None:
        """Writes values of a step; those that it has already stay in its line.

        Args:
          step: not smaller than that of the call before.
          values: numbers by name, and groups of numbers.

        Returns:
          The problem when the line cannot be written, once; the run goes on without.
        """
        if self._file < 0:
            return None
        if self._line.get("step") != step:
            self._begin = self._end
            self._line = {"step": step, "time": time.time(), **self._next}
            self._next = {}
        self._line |= {name: _finite(value) for name, value in values.items()}
        data = _encoded(self._line)
        try:
            if os.pwrite(self._file, data, self._begin) < len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self._end = self._begin + len(data)
            os.ftruncate(self._file, self._end)
            self._write_events(step, values)
        except OSError as error:
            return self._failure(error)
        self._failed = False
        return None

    def close(self) -> None:
        """Releases the files."""
        if self._events is not None:
            self._events.close()
            self._events = None
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def _write_events(self, step: int, values: Mapping[str, Any]) -> None:
        if self._events is None:
            return
        for name, value in _flat("", values):
            self._events.add_scalar(name, value, step)
        self._events.flush()

    def _failure(self, error: OSError) -> Problem | None:
        if self._failed:
            return None
        self._failed = True
        why = f"{error.strerror}; training goes on"
        return Problem(f"{self.path} cannot be written", why, "make room on the disk")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a file, without a last one that was torn; none where there is no file."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return []
    found = []
    for line in data.split(b"\n")[:-1]:
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if isinstance(entry, dict) and isinstance(entry.get("step"), int):
            found.append(entry)
    return found


def memory() -> dict[str, float]:
    """Bytes in use: `process` resident, `process_peak`; `device` and `device_peak` of the fullest
    local device, where devices tell."""
    found = {}
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        found["process"] = float(pages * os.sysconf("SC_PAGE_SIZE"))
    except (OSError, ValueError, IndexError):
        pass
    found["process_peak"] = float(_peak_resident())
    told = [device.memory_stats() or {} for device in jax.local_devices()]
    for name, key in (("device", "bytes_in_use"), ("device_peak", "peak_bytes_in_use")):
        sizes = [one[key] for one in told if key in one]
        if sizes:
            found[name] = float(max(sizes))
    return found


def has_tensorboard() -> bool:
    """Whether event files can be written."""
    try:
        return importlib.util.find_spec("tensorboardX") is not None
    except ValueError:  # it is there, and is no module
        return False


def _writer() -> Any:
    try:
        return importlib.import_module("tensorboardX").SummaryWriter
    except ImportError as error:
        raise ConfigError(NO_TENSORBOARD) from error


def _keep(path: Path, start: int) -> list[dict[str, Any]]:
    """Leaves in the file one line for each step up to `start`, and gives them."""
    lines = {entry["step"]: entry for entry in read_metrics(path) if entry["step"] <= start}
    kept = [lines[step] for step in sorted(lines)]
    data = b"".join(map(_encoded, kept))
    if path.exists() and path.read_bytes() != data:
        new = path.with_suffix(".new")
        with new.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(new, path)
    return kept


def _encoded(line: Mapping[str, Any]) -> bytes:
    return (json.dumps(line, allow_nan=False) + "\n").encode()


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _finite(one) for name, one in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _flat(prefix: str, values: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(f"{prefix}{name}/", value)
        elif isinstance(value, int | float):
            yield prefix + name, float(value)


def _peak_resident() -> int:
    # Kilobytes but for macOS, where it is bytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1 if sys.platform == "darwin" else 1024
    )
