"""Why a collective is there: the two shardings that it reconciles, and what would remove it."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from sharding.errors import ArgumentError, Problem
from sharding.explain import same_line
from sharding.mesh import MeshShape
from sharding.monoid import owner
from sharding.op import Op, Value
from sharding.program import describe
from sharding.rule import Kind
from sharding.spec import Layout
from spmd import cost
from spmd.collectives import Collective
from spmd.explaining.explanation import Reconciled, Why
from spmd.explaining.inspector import Inspector, reader_text
from spmd.explaining.remedy import find_remedy
from spmd.hardware import Machine
from spmd.partition.plan import Compute, Move

# A question about a source line may mean many collectives: remedies are looked for the dearest.
REMEDIES = 3
_KIND = re.compile(r"^(?P<kind>[a-z_]+)(?:\((?P<axes>[^)]*)\))?$")
_KINDS = ("all_gather", "all_reduce", "all_to_all", "permute", "reduce_scatter")

Moves = list[tuple[Move, int]]


# Seconds of a collective: of its kind, axes, and wire bytes.
Clock = Callable[[str, Sequence[str], float], float]


def clock(mesh: MeshShape, machine: Machine | str | None) -> Clock:
    """Times by the links of a machine; None: of one nominal link, and of a network where axes
    cross one.

    Raises:
      MeshError: there is no such machine, or the mesh does not fit it.
    """
    if machine is None:
        return lambda kind, axes, wire: cost.priced(kind, axes, wire, mesh) / cost.LINK_BYTES_PER_S
    found = Machine.parse(machine) if isinstance(machine, str) else machine
    return found.lay(mesh).wire_time


def why(inspector: Inspector, asked: Any, machine: Machine | str | None = None) -> Why:
    """Why collectives are there.

    Args:
      machine: see `clock`.
      asked: a record of `Partitioned.collectives`; a kind, alone or with its axes
        (`all_reduce(tensor)`); a value that is moved; or a source line that needs or makes it.

    Raises:
      ArgumentError: there is no such collective.
      MeshError: there is no such machine, or the mesh does not fit it.
    """
    times = clock(inspector.partitioned.plan.mesh, machine)
    found = _asked_moves(inspector, asked)
    found.sort(key=lambda pair: -pair[1] * pair[0].plan.bytes)
    rows = [_reconciled(inspector, m, n, times, i < REMEDIES) for i, (m, n) in enumerate(found)]
    rows += _inside(inspector, asked, times)
    if not rows:
        raise ArgumentError(_no_collective(inspector, asked))
    return Why(_text(asked), tuple(sorted(rows, key=lambda row: -row.bytes)))


def _asked_moves(inspector: Inspector, asked: Any) -> Moves:
    """The moves that a record, a kind, a value or a source line means."""
    moves = [(m, n) for m, n in inspector.moves if m.plan.bytes]
    if isinstance(asked, Collective):
        alike = [(m, n) for m, n in moves if _emits(m, asked.kind, asked.axes)]
        return [(m, n) for m, n in alike if _emitted_at(m) == asked.source] or [
            (m, n) for m, n in alike if not _emitted_at(m)
        ]
    kind = _kind(asked)
    if kind is not None:
        return [(m, n) for m, n in moves if _emits(m, *kind)]
    ids = {v.id for v in inspector.history.find(asked)}
    return [
        (m, n) for m, n in moves
        if m.value.id in ids
        or (m.reason is not None and isinstance(asked, str) and _at_line(asked, m.reason.source))
    ]


def _kind(asked: Any) -> tuple[str, tuple[str, ...] | None] | None:
    """(kind, axes) of `all_reduce(tensor)`; axes None: any."""
    match = _KIND.match(asked) if isinstance(asked, str) else None
    if match is None or match["kind"] not in _KINDS:
        return None
    axes = match["axes"]
    return match["kind"], None if axes is None else tuple(re.split(r"[+,]\s*", axes))


def _reconciled(
    inspector: Inspector, move: Move, trips: int, times: Clock, search: bool
) -> Reconciled:
    wire = trips * move.plan.bytes
    remedy, tried = None, "no annotation was tried: ask for this one by its value"
    if search:
        remedy, tried = find_remedy(
            inspector.stage, inspector.partitioned, inspector.history, move
        )
    op = move.reason or move.value.op
    seconds = trips * sum(times(s.kind, s.axes, s.bytes) for s in move.plan.steps if s.bytes)
    return Reconciled(
        describe(move.value),
        tuple((f"{s.kind}({'+'.join(s.axes)})", trips * s.bytes) for s in move.plan.steps),
        trips, wire, seconds, str(move.src), str(move.dst),
        tuple(_made(inspector, move.value, move.src)), tuple(_needed(inspector, move)),
        reader_text(move), op.source if op is not None else "", remedy, tried,
    )  # fmt: skip


def _made(inspector: Inspector, value: Value, layout: Layout) -> Iterator[str]:
    """Why a value lies as it was made."""
    yield from inspector.origins(value, layout)
    op = value.op
    if op is None or op.control is not None:
        return
    for axis, monoid in layout.partial:
        if (place := owner(monoid)) is not None:
            yield f"only {axis}={place} has it"
            continue
        for compute, _ in inspector.computes.get(op.index, ()):
            for name, axes in compute.assignment.factors:
                if axis in axes and op.rule.factors[name].kind is Kind.REDUCE:
                    yield f"partial over {axis}: {op.primitive.name} reduces {name} by {monoid}"
                    t, d = op.rule.where[name][0]
                    yield from inspector.origin(op.inputs[t], d, axis)
            if axis in compute.assignment.carried:
                yield f"partial over {axis}: {op.primitive.name} keeps its operands' addends"


def _needed(inspector: Inspector, move: Move) -> Iterator[str]:
    """Why a value is needed in the layout that it is brought to."""
    op, value = move.reason, move.value
    if op is None or op.control is not None:
        inner = value if op is None else _inner(op, value)
        dims = move.dst.dims[len(move.dst.dims) - inner.rank :]
        yield from inspector.origins(inner, Layout(dims))
        return
    used = next(
        compute.assignment.axes for compute, _ in reversed(inspector.computes[op.index])
        if any(key.value is value and key.layout == move.dst for key in compute.operands)
    )  # fmt: skip
    for d, names in enumerate(op.rule.operands[op.inputs.index(value)]):
        axes = move.dst.dims[d]
        if axes:
            yield f"dim {d} on {'+'.join(axes)}: {op.primitive.name} has {' '.join(names)} there"
            yield from _result_origins(inspector, op, names)
        elif move.src.dims[d]:
            yield f"dim {d} whole: " + _whole(op, names, move.src.dims[d], used)


def _result_origins(inspector: Inspector, op: Op, names: Sequence[str]) -> Iterator[str]:
    """Where the results have the axes of named dims from."""
    for t, d in (place for name in names for place in op.rule.where[name]):
        if t >= len(op.inputs):
            result = op.outputs[t - len(op.inputs)]
            for axis in inspector.stage.result.of(result).dims[d].axes:
                yield from inspector.origin(result, d, axis)
            return


def _inner(op: Op, value: Value) -> Value:
    """What a value is called inside of a region."""
    port = next((p for p in op.in_ports if op.inputs[p.outer] is value), None)
    return value if port is None else op.regions[port.region].inputs[port.inner]


def _whole(
    op: Op, names: Sequence[str], axes: Sequence[str], used: Mapping[str, tuple[str, ...]]
) -> str:
    """Why an operation needs a dim whole that lies on axes."""
    name = op.primitive.name
    if any(op.rule.factors[f].kind is Kind.FIXED for f in names):
        return f"{name} has no form along {' '.join(names)} that is divided"
    other = [f for f, given in used.items() if set(given) & set(axes) and f not in names]
    if other:
        return f"{'+'.join(axes)} divides {', '.join(other)} in {name}"
    return f"{name} has {' '.join(names)} on no axis: cheapest"


def _inside(inspector: Inspector, asked: Any, times: Clock) -> Iterator[Reconciled]:
    """Collectives that operations emit by themselves, such as halo exchanges."""
    planned: dict[tuple[str, tuple[str, ...], str], float] = {}
    for move, trips in inspector.moves:
        for s in move.plan.steps:
            key = (s.kind, s.axes, _emitted_at(move))
            planned[key] = planned.get(key, 0.0) + trips * s.bytes
    if not isinstance(asked, str | Collective) or asked in inspector.history.names:
        return
    for record in inspector.partitioned.collectives:
        wire = record.bytes - planned.get((record.kind, record.axes, record.source), 0.0)
        if wire < 0.5 or not _is_asked(asked, record):
            continue
        found = _communicates(inspector, record)
        if found is not None:
            compute, names = found
            op, axes = compute.op, "+".join(record.axes)
            layout = str(compute.operands[0].layout) if compute.operands else ""
            seconds = record.count * times(record.kind, record.axes, wire / record.count)
            yield Reconciled(
                describe((*op.outputs, *op.inputs)[0]), ((f"{record.kind}({axes})", wire),),
                record.count, wire, seconds, layout, layout, (),
                (f"{op.rule}: {', '.join(names)} on {axes}",), op.primitive.name, record.source,
                None, "no annotation was tried: the operation's own rule emits it",
            )  # fmt: skip


def _communicates(
    inspector: Inspector, record: Collective
) -> tuple[Compute, list[str]] | None:
    """The operation whose own collective a record is, and its dims on these axes."""
    for computes in inspector.computes.values():
        compute = computes[0][0]
        op = compute.op
        if op.control is None and op.rule.local and op.source == record.source:
            factors = compute.assignment.factors
            names = [n for n, axes in factors if set(axes) & set(record.axes)]
            if names:
                return compute, names
    return None


def _is_asked(asked: str | Collective, record: Collective) -> bool:
    if isinstance(asked, Collective):
        return asked == record
    kind = _kind(asked)
    if kind is not None:
        return record.kind == kind[0] and kind[1] in (None, record.axes)
    return _at_line(asked, record.source)


def _emits(move: Move, kind: str, axes: tuple[str, ...] | None) -> bool:
    """JAX has no collective for products: they are reduced by gathering them."""
    return any(
        (s.kind == kind or (s.kind == "all_reduce" and s.monoid == "mul" and kind == "all_gather"))
        and axes in (None, s.axes)
        for s in move.plan.steps
    )


def _emitted_at(move: Move) -> str:
    """The source line that a move's collectives carry; '' for those of an argument."""
    op = move.reason or move.value.op
    return op.source if op is not None else ""


def _at_line(asked: str, source: str) -> bool:
    return bool(source) and same_line(asked, source)


def _text(asked: Any) -> str:
    if isinstance(asked, Collective):
        return f"{asked.kind}({'+'.join(asked.axes)}) at {asked.source or 'unknown source'}"
    return str(asked)


def _no_collective(inspector: Inspector, asked: Any) -> Problem:
    steps = [s for m, _ in inspector.moves for s in m.plan.steps if s.bytes]
    have = sorted({f"{s.kind}({'+'.join(s.axes)})" for s in steps})
    return Problem(
        f"no collective for {_text(asked)}",
        f"the program has {', '.join(have) or 'none'}",
        "ask for a record of .collectives, a kind such as all_reduce(tensor), a value that is "
        "moved, or a source line",
    )
