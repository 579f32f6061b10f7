"""Floating-point operations of a compiled module: those of matmuls and convolutions.

Counted is what one device executes in one run: an operation in a loop as often as the loop runs,
inside of fusions too, and of the branches of a conditional the one that has most. A multiply and
an add are two. Of a convolution only positions count where the window meets an element that is
neither padding nor a hole of a dilation, as in XLA's own count: TPU compilers write a batched
matmul as a convolution whose window meets one element at a time.

GPU compilers call libraries; their matmuls (`__cublas$...`) and convolutions (`__cudnn$conv...`)
count as well. Not counted is elementwise work, and what other libraries do (LAPACK, FFT).
"""

from __future__ import annotations

import functools
import math
import re
from typing import NamedTuple

import numpy as np

from spmd.reporting.hlo_loops import trip_count
from spmd.reporting.hlo_text import BRANCHES, CALLED, Computation, Instruction, Module

_DIMS = re.compile(r"[a-z]\w*\[([^\]]*)\]")
_WINDOW = re.compile(r"\bwindow=\{([^}]*)\}")
_LABELS = re.compile(r"\bdim_labels=([\w?]+)_([\w?]+)->([\w?]+)")
_TARGET = re.compile(r'custom_call_target="([^"]+)"')
_GEMM = re.compile(r'"lhs_contracting_dimensions":\[([^\]]*)\]')
_CALLS = ("fusion", "call", "call-start", "async-start", "custom-call")


class Flops(NamedTuple):
    """Attributes:
    count: of one run, on one device.
    exact: False when a loop has an unknown number of iterations and was counted once.
    """

    count: float
    exact: bool

    def plus(self, other: Flops) -> Flops:
        return Flops(self.count + other.count, self.exact and other.exact)


_NONE = Flops(0.0, True)


def flops(module: Module) -> Flops:
    """Operations of one run of a module, on one device."""
    return _Counter(module).of(module.computations[module.entry])


class _Counter:
    """Counts computations, each once."""

    def __init__(self, module: Module) -> None:
        self._module = module
        self._done: dict[str, Flops] = {}

    def of(self, computation: Computation) -> Flops:
        if computation.name not in self._done:
            total = _NONE
            for each in computation.instructions.values():
                total = total.plus(self._of_instruction(computation, each))
            self._done[computation.name] = total
        return self._done[computation.name]

    def _of_instruction(self, computation: Computation, each: Instruction) -> Flops:
        if each.opcode == "dot":
            return Flops(_dot(computation, each), True)
        if each.opcode == "convolution":
            lhs, rhs = map(_dims, computation.operand_types(each))
            return Flops(_convolution(each.attributes, lhs, rhs, _dims(each.type)), True)
        if each.opcode == "while":
            trips = trip_count(self._module, computation, each)
            body = self._called(each, ("body",))
            times = 1 if trips is None else trips
            return Flops(times * body.count, body.exact and trips is not None)
        if each.opcode == "conditional":
            names = [name for key in BRANCHES for name in each.attribute_list(key)]
            branches = [self.of(self._module.computations[name]) for name in names]
            return max(branches, default=_NONE)
        if each.opcode in _CALLS:
            own = _library(computation, each) if each.opcode == "custom-call" else 0.0
            return self._called(each, CALLED).plus(Flops(own, True))
        return _NONE

    def _called(self, each: Instruction, keys: tuple[str, ...]) -> Flops:
        total = _NONE
        for key in keys:
            for name in each.attribute_list(key):
                if name in self._module.computations:
                    total = total.plus(self.of(self._module.computations[name]))
        return total


def _dims(hlo_type: str) -> tuple[int, ...]:
    """Sizes of the first array in a type."""
    found = _DIMS.search(hlo_type)
    text = found.group(1) if found else ""
    return tuple(int(size.strip().removeprefix("<=")) for size in text.split(",") if size.strip())


def _dot(computation: Computation, each: Instruction) -> float:
    lhs = _dims(computation.operand_types(each)[0])
    contracted = (n for n in each.attribute_list("lhs_contracting_dims") if n)
    return 2.0 * math.prod(_dims(each.type)) * math.prod(lhs[int(n)] for n in contracted)


def _library(computation: Computation, each: Instruction) -> float:
    """Of a call to a library for GPUs."""
    found = _TARGET.search(each.attributes)
    target = found.group(1) if found else ""
    types = [_dims(t) for t in computation.operand_types(each)]
    out = _dims(each.type)
    if target.startswith("__cublas$") and (gemm := _GEMM.search(each.attributes)):
        contracted = re.findall(r"\d+", gemm.group(1))
        return 2.0 * math.prod(out) * math.prod(types[0][int(n)] for n in contracted)
    if target == "__cudnn$convBackwardInput":
        return _convolution(each.attributes, out, types[1], types[0])
    if target == "__cudnn$convBackwardFilter":
        return _convolution(each.attributes, types[0], out, types[1])
    if target.startswith("__cudnn$conv"):
        return _convolution(each.attributes, types[0], types[1], out)
    return 0.0


def _convolution(
    attributes: str, lhs: tuple[int, ...], rhs: tuple[int, ...], out: tuple[int, ...]
) -> float:
    """Of a convolution of `lhs` with the kernel `rhs`, all as sizes of dims."""
    labels = _LABELS.search(attributes)
    assert labels is not None, f"a convolution without dim_labels: {attributes[:200]}"
    image, kernel, result = labels.groups()
    found = _WINDOW.search(attributes)
    window = dict(part.split("=") for part in (found.group(1) if found else "").split())
    rank = sum(label.isdigit() for label in result)
    pads = [int(p.split("_")[0]) for p in window["pad"].split("x")] if "pad" in window else []
    fields = {key: _sizes(window, key, rank) for key in ("stride", "lhs_dilate", "rhs_dilate")}
    met = 1
    for dim in range(rank):
        met *= _positions(
            lhs[image.index(str(dim))], rhs[kernel.index(str(dim))], out[result.index(str(dim))],
            pads[dim] if pads else 0, *(values[dim] for values in fields.values()),
        )  # fmt: skip
    groups = re.search(r"\bbatch_group_count=(\d+)", attributes)
    batch = lhs[image.index("b")] // (int(groups.group(1)) if groups else 1)
    return 2.0 * met * batch * rhs[kernel.index("i")] * rhs[kernel.index("o")]


def _sizes(window: dict[str, str], key: str, rank: int) -> list[int]:
    return [int(n) for n in window[key].split("x")] if key in window else [1] * rank


@functools.lru_cache(maxsize=4096)
def _positions(
    size: int, window: int, out: int, pad: int, stride: int, spread: int, reach: int
) -> int:
    """Pairs (element of the result, element of the window) that meet an element of the input.

    Args:
      size, window, out: of the dim in input, kernel, and result.
      pad: before the first element.
      spread: distance of elements of the input (lhs_dilate).
      reach: distance of elements of the window (rhs_dilate).
    """
    starts = np.arange(out, dtype=np.int64) * stride - pad
    met = 0
    for element in range(window):
        at = starts + element * reach
        met += int(np.sum((at >= 0) & (at <= (size - 1) * spread) & (at % spread == 0)))
    return met
