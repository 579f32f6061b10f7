"""Counts the collectives of a per-device program: kinds, mesh axes, bytes, source lines.

Read from the per-device jaxpr itself, so that what a rule's `local` function emits is counted like
what a reshard emits. Loops count as often as they run; of a cond the dearest branch counts.
"""

from collections.abc import Iterator, Mapping
from math import prod
from typing import Any, NamedTuple

from sharding import _jax
from sharding.mesh import MeshShape
from sharding.rule import REGISTRY
from spmd import cost

p = _jax.primitives


class Collective(NamedTuple):
    """Collectives of one kind over the same axes from one source line.

    Attributes:
      kind: all_reduce, all_gather, reduce_scatter, all_to_all, permute.
      axes: mesh axes, major to minor.
      count: how often it runs per call of the program.
      bytes: wire bytes per device by the ring model, all runs together.
      source: `file.py:line (function)`.
    """

    kind: str
    axes: tuple[str, ...]
    count: int
    bytes: float
    source: str


def _in(eqn: Any) -> float:
    return sum(prod(v.aval.shape) * v.aval.dtype.itemsize for v in eqn.invars)


def _out(eqn: Any) -> float:
    return sum(prod(v.aval.shape) * v.aval.dtype.itemsize for v in eqn.outvars)


# Collective primitives: kind, and wire bytes from the equation and the group size.
KINDS: Mapping[Any, tuple[str, Any]] = {
    p.psum_p: ("all_reduce", lambda e, k: cost.all_reduce(_out(e), k)),
    _jax.psum_invariant_p: ("all_reduce", lambda e, k: cost.all_reduce(_out(e), k)),
    p.pmax_p: ("all_reduce", lambda e, k: cost.all_reduce(_out(e), k)),
    p.pmin_p: ("all_reduce", lambda e, k: cost.all_reduce(_out(e), k)),
    p.all_gather_p: ("all_gather", lambda e, k: cost.all_gather(_out(e), k)),
    _jax.all_gather_invariant_p: ("all_gather", lambda e, k: cost.all_gather(_out(e), k)),
    _jax.reduce_scatter_p: ("reduce_scatter", lambda e, k: cost.reduce_scatter(_in(e), k)),
    p.all_to_all_p: ("all_to_all", lambda e, k: cost.all_to_all(_in(e), k)),
    p.ppermute_p: ("permute", lambda e, k: _in(e)),
}


def count(jaxpr: Any, sizes: Mapping[str, int]) -> tuple[Collective, ...]:
    """Collectives in a per-device jaxpr, merged by kind, axes and source, dearest first.

    Args:
      jaxpr: a jaxpr with collectives; shard_map bodies are entered.
      sizes: mesh axis name -> size.
    """
    merged: dict[tuple, tuple[int, float]] = {}
    for found in _walk(jaxpr, sizes, 1):
        key = (found.kind, found.axes, found.source)
        n, wire = merged.get(key, (0, 0.0))
        merged[key] = (n + found.count, wire + found.bytes)
    records = [Collective(k, a, n, b, s) for (k, a, s), (n, b) in merged.items()]
    return tuple(sorted(records, key=lambda c: (-c.bytes, c.kind, c.axes, c.source)))


def summarize(records: tuple[Collective, ...]) -> tuple[Collective, ...]:
    """The same by kind and axes alone."""
    merged: dict[tuple, tuple[int, float]] = {}
    for record in records:
        n, wire = merged.get((record.kind, record.axes), (0, 0.0))
        merged[record.kind, record.axes] = (n + record.count, wire + record.bytes)
    found = [Collective(k, a, n, b, "") for (k, a), (n, b) in merged.items()]
    return tuple(sorted(found, key=lambda c: (-c.bytes, c.kind, c.axes)))


def _walk(jaxpr: Any, sizes: Mapping[str, int], trips: int) -> Iterator[Collective]:
    for eqn in jaxpr.eqns:
        if eqn.primitive in KINDS:
            kind, wire = KINDS[eqn.primitive]
            axes = _axes(eqn.params)
            groups = eqn.params.get("axis_index_groups")
            shards = len(groups[0]) if groups else prod(sizes[a] for a in axes)
            if shards > 1:
                source = _jax.source_of(eqn)
                yield Collective(kind, axes, trips, trips * wire(eqn, shards), source)
            continue
        control = REGISTRY.controls.get(eqn.primitive)
        bodies = [
            [*_walk(body, sizes, trips * _trips(control, eqn))] for body in _jax.subjaxprs(eqn)
        ]
        if control is not None and control.exclusive:
            bodies = [max(bodies, key=lambda b: sum(c.bytes for c in b))]
        for body in bodies:
            yield from body


def _trips(control: Any, eqn: Any) -> int:
    return control.trips(eqn) if control is not None else 1


def _axes(params: Mapping[str, Any]) -> tuple[str, ...]:
    axes = params.get("axes", params.get("axis_name", ()))
    axes = axes if isinstance(axes, (tuple, list)) else (axes,)
    return tuple(a for a in axes if not isinstance(a, int))  # a number is a dim of the operand


def texts(found: tuple[Collective, ...], mesh: MeshShape) -> list[str]:
    """A line for every kind and axes, with what of it goes over the network."""
    lines = []
    for c in summarize(found):
        far = cost.network_bytes(c.kind, c.axes, c.bytes, mesh)
        network = f", {far:,.0f} B of it over dcn" if far else ""
        lines.append(f"  {c.kind}({'+'.join(c.axes)}) x{c.count} {c.bytes:,.0f} B{network}")
    return lines
