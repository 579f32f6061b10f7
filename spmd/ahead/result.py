"""What the TPU compiler says about a program, as one frozen value."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Any

from spmd.ahead.buffers import Buffer, gigabytes
from spmd.ahead.schedule import Schedule, Transfer

__all__ = ["Ahead"]


_SMALL = 1e-4  # of the memory that is needed: smaller buffers are not printed


@dataclass(frozen=True)
class Ahead:
    """A program compiled for a TPU that nobody has to have.

    Attributes:
      topology: e.g. "v5p:4x4x4".
      mesh: e.g. "data=16, tensor=4".
      devices: their number.
      fits: whether the program fits into the memory of a device.
      needed_bytes: memory that it takes per device, at its peak; when it does not fit, what XLA's
        error says, or where that counts temporaries only, all allocations together.
      available_bytes: what XLA has to give.
      buffers: the largest, on disjoint bytes, largest first.
      schedule: times; None when it does not fit, since nothing was scheduled to the end.
      model_flops: of one call, on all devices together, recomputation not counted.
      peak_flops: FLOP/s of one device in bfloat16.
      phases: (name, seconds) of what was done to find out.
      versions: of jax and libtpu.
    """

    topology: str
    mesh: str
    devices: int
    fits: bool
    needed_bytes: float
    available_bytes: float
    buffers: tuple[Buffer, ...]
    schedule: Schedule | None
    model_flops: float
    peak_flops: float
    phases: tuple[tuple[str, float], ...]
    versions: str

    @property
    def step_seconds(self) -> float | None:
        """Predicted seconds of one call: computation, and communication that nothing hides."""
        return self.schedule.seconds if self.schedule else None

    @property
    def utilisation(self) -> float | None:
        """`model_flops` over what all devices could do in `step_seconds`."""
        if not self.schedule or not self.schedule.seconds:
            return None
        return self.model_flops / (self.schedule.seconds * self.peak_flops * self.devices)

    @property
    def transfers(self) -> tuple[Transfer, ...]:
        """The collectives as scheduled; those that hold the program up longest first."""
        return self.schedule.transfers if self.schedule else ()

    def to_json(self) -> dict[str, Any]:
        """Plain values, with the derived ones."""
        found = dataclasses.asdict(self)
        found["phases"] = dict(self.phases)
        found["step_seconds"], found["utilisation"] = self.step_seconds, self.utilisation
        if self.schedule:
            found["schedule"]["exposed"] = self.schedule.exposed
        return found

    def write(self, path: str) -> None:
        """Writes `to_json()` to a file."""
        with open(path, "w", encoding="utf-8") as file:
            json.dump(self.to_json(), file, indent=1)

    def __str__(self) -> str:
        return "\n".join([*self._memory(), *self._time()])

    def _memory(self) -> list[str]:
        needed, available = gigabytes(self.needed_bytes), gigabytes(self.available_bytes)
        verdict = "fits" if self.fits else "does not fit"
        lines = [
            f"{self.mesh} on {self.topology}, {self.devices:,} devices ({self.versions})",
            f"{verdict}: {needed} of {available} per device",
            "largest buffers",
        ]
        shown = [b for b in self.buffers[:8] if b.bytes >= _SMALL * self.needed_bytes]
        return lines + [f"  {buffer}" for buffer in shown]

    def _time(self) -> list[str]:
        if self.schedule is None:
            return []
        found = self.schedule
        lines = [
            f"predicted time {_time(found.seconds)}: {_time(found.compute)} of computation and "
            f"memory ({found.cycles:,.0f} cycles), {_time(found.exposed)} of exposed communication"
        ]
        if self.utilisation is not None:
            lines.append(
                f"utilisation {self.utilisation:.1%}: {self.model_flops:.4g} model FLOPs"
            )
        if not found.exact:
            lines.append("a loop has an unknown number of iterations and was counted once")
        total = sum(t.seconds for t in found.transfers)
        lines.append(f"collectives: {_time(total)}, of that exposed {_time(found.exposed)}")
        return lines + [f"  {_transfer(t)}" for t in found.transfers[:12]]


def _transfer(found: Transfer) -> str:
    how = "asynchronous" if found.asynchronous else "synchronous"
    axes = "+".join(found.axes) or "groups that are no whole axes"
    where = f" at {found.source}" if found.source else ""
    return (
        f"{found.kind}({axes}) x{found.count}, {gigabytes(found.bytes)}: {how},"
        f" {_time(found.seconds)}, exposed {_time(found.exposed)}{where}"
    )


def _time(seconds: float) -> str:
    for unit, scale in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= scale:
            return f"{seconds / scale:.3g} {unit}"
    return f"{seconds / 1e-6:.3g} us"
