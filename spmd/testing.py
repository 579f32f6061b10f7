"""Communication as a unit test: what a partitioned program sends and holds, asserted.

    from spmd.testing import assert_collectives, assert_wire_bytes

    assert_collectives(step, params, batch, all_reduce=2, all_gather=0)
    assert_wire_bytes(step, params, batch, axis="tensor", at_most=2e6)

By default the partitioned program is read, which is the same under every version of XLA; with
`source="hlo"` it is the module that XLA compiled. All take any stage, or a function of `spmd.jit`
with the arguments of a call (shapes will do, and no device is needed but for "hlo").
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from sharding.errors import ArgumentError, ArgumentTypeError, Problem, SpmdError, did_you_mean
from sharding.mesh import split_ref
from sharding.spec import Layout
from spmd import collectives
from spmd.boundary import partition_spec
from spmd.collectives import Collective
from spmd.compiled import Compiled, Lowered
from spmd.dispatch import Function
from spmd.golden import assert_same_text
from spmd.options import is_entry
from spmd.reporting.hlo import HloCollective, collectives_in_hlo
from spmd.stages import Partitioned, Propagated, Traced

__all__ = [
    "KINDS", "BudgetError", "assert_collectives", "assert_peak_memory", "assert_same_plan",
    "assert_sharding", "assert_wire_bytes", "collectives_of",
]  # fmt: skip

KINDS = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "permute")
# What XLA may combine: one instruction with several operands stands for as many collectives.
_COMBINED = ("all-reduce", "all-gather", "reduce-scatter")
_HLO_KINDS = {"collective-permute": "permute", "ragged-all-to-all": "all_to_all"}

Axes = str | Sequence[str] | None


class BudgetError(SpmdError, AssertionError):
    """A program sends, holds or shards something else than a test says."""


def assert_collectives(
    what: Any, *args: Any, axis: Axes = None, others: int | None = None,
    source: str = "program", kwargs: Mapping[str, Any] | None = None, **counts: int,
) -> None:  # fmt: skip
    """The program runs exactly this many collectives of each kind named, per call.

    Args:
      what: a stage, or a function of `spmd.jit` followed by the arguments of a call.
      axis: counts those that run over this mesh axis, alone or with others; a tuple: over exactly
        these.
      others: how many of all kinds that are not named; None: any.
      source: "program", or "hlo": what XLA compiled.
      kwargs: keyword arguments of the call.
      counts: all_reduce, all_gather, reduce_scatter, all_to_all, permute. Those in a loop count
        once per iteration; of a cond the branch that sends most counts.

    Raises:
      BudgetError: every kind whose number differs, with the source lines it comes from.
      ArgumentError: a kind or axis that does not exist.
    """
    _check_kinds(counts)
    partitioned, found = _found(what, args, kwargs, source, axis)
    wanted = {kind: (n, [c for c in found if c.kind == kind]) for kind, n in counts.items()}
    if others is not None:
        wanted["others"] = (others, [c for c in found if c.kind not in counts])
    problems = []
    for kind, (n, records) in wanted.items():
        count = sum(c.count for c in records)
        if count != n:
            problems.append(
                Problem(
                    f"{kind}{_over(axis)}: expected {n}, got {count}",
                    _lines(records, f"there is none; the program has {_summary(found)}"),
                    "annotate what lies between, or correct the number if the program is right",
                )
            )
    _raise(problems)


def assert_wire_bytes(
    what: Any, *args: Any, axis: Axes = None, kind: str | None = None,
    at_most: float | None = None, exactly: float | None = None, source: str = "program",
    kwargs: Mapping[str, Any] | None = None,
) -> None:  # fmt: skip
    """The bytes that every device sends per call, by the ring model, stay within a budget.

    Args:
      what, args, axis, source, kwargs: as in `assert_collectives`. A collective over several axes
        counts in full for each of them.
      kind: counts one kind alone.
      at_most, exactly: bytes; one of them.

    Raises:
      BudgetError: with the source lines that send, dearest first.
      ArgumentError: neither or both bounds, or a kind or axis that does not exist.
    """
    _check_kinds([kind] if kind else [])
    bound = _one_bound(at_most, exactly)
    _, found = _found(what, args, kwargs, source, axis)
    found = [c for c in found if kind in (None, c.kind)]
    sent = sum(c.bytes for c in found)
    over = sent > bound if exactly is None else abs(sent - bound) > 0.5
    if over:
        word = "at most" if exactly is None else "exactly"
        _raise([
            Problem(
                f"{kind or 'wire bytes'}{_over(axis)}: expected {word} {bound:,.0f} B, got "
                f"{sent:,.0f} B",
                _lines(found, "nothing is sent"),
                "annotate what lies between, or correct the budget if the program is right",
            )
        ])  # fmt: skip


def assert_peak_memory(
    what: Any, *args: Any, at_most: float, source: str = "program",
    kwargs: Mapping[str, Any] | None = None,
) -> None:  # fmt: skip
    """The peak memory per device stays within a budget of bytes, arguments and results included.

    Args:
      what, args, kwargs: as in `assert_collectives`.
      source: "program": predicted from the plan; "hlo": what XLA allocates for arguments, results
        and temporaries.

    Raises:
      BudgetError: with what is predicted or allocated.
    """
    _check_source(source)
    partitioned = _partitioned(what, args, kwargs)
    if source == "program":
        peak, parts = partitioned.peak_memory, "live arrays, arguments and results included"
    else:
        found = _compiled(what, partitioned).memory_analysis()
        sizes = {
            "arguments": found.argument_size_in_bytes, "results": found.output_size_in_bytes,
            "temporaries": found.temp_size_in_bytes, "donated": -found.alias_size_in_bytes,
        }  # fmt: skip
        peak = sum(sizes.values())
        parts = ", ".join(f"{name} {size:,} B" for name, size in sizes.items() if size)
    if peak > at_most:
        _raise([
            Problem(
                f"peak memory per device: expected at most {at_most:,.0f} B, got {peak:,} B",
                parts,
                "shard or rematerialise what is largest, or correct the budget",
            )
        ])  # fmt: skip


def assert_sharding(what: Any, spec: Any) -> None:
    """Arrays lie as `spec` says.

    Args:
      what: an array, a NamedSharding, a ShapeDtypeStruct with one, or a pytree of them; or a stage
        from `Propagated` on, whose results are meant.
      spec: PartitionSpec or NamedSharding, or a pytree prefix of them; None says nothing.

    Raises:
      BudgetError: every leaf that lies elsewhere.
    """
    if isinstance(what, (Propagated, Partitioned, Lowered, Compiled)):
        stage: Any = getattr(what, "partitioned", what)
        what = stage.out_shardings
    problems = []

    def compare(above: Any, entry: Any, below: Any) -> None:
        leaves = jax.tree_util.tree_leaves_with_path(below)
        for path, leaf in leaves if entry is not None else ():
            lies = leaf if isinstance(leaf, jax.sharding.Sharding) else leaf.sharding
            if not _same_sharding(lies, entry, leaf):
                here = lies.spec if isinstance(lies, NamedSharding) else lies
                want = entry.spec if isinstance(entry, NamedSharding) else entry
                name = jax.tree_util.keystr((*above, *path)) or "the array"
                problems.append(
                    Problem(
                        f"{name}: expected {_text(want)}, got {_text(here)}",
                        f"the mesh is {dict(lies.mesh.shape)}"
                        if isinstance(lies, NamedSharding)
                        else "it is on no mesh",
                        "say where it lies with in_shardings, out_shardings or shard(...)",
                    )
                )

    jax.tree_util.tree_map_with_path(compare, spec, what, is_leaf=is_entry)
    _raise(problems)


def assert_same_plan(
    what: Any, *args: Any, path: Any, update: bool | None = None,
    kwargs: Mapping[str, Any] | None = None,
) -> None:  # fmt: skip
    """The partitioned program is the one in a golden file: every operation, layout and collective.

    Source lines are left out of the file, so that edits of other lines do not change it; the
    difference shows them.

    Args:
      what, args, kwargs: as in `assert_collectives`.
      path: of the file; a relative one from the folder of the calling test.
      update: whether to write the file; by default with pytest's `--update-golden` (the plugin
        `spmd.pytest_plugin`), or where SPMD_UPDATE_GOLDEN is set.

    Raises:
      BudgetError: with the lines that differ.
    """
    partitioned = _partitioned(what, args, kwargs)
    problem = assert_same_text(str(partitioned), path, update)
    _raise([problem] if problem else [])


def collectives_of(
    what: Any, *args: Any, source: str = "program", kwargs: Mapping[str, Any] | None = None
) -> tuple[Collective, ...]:
    """What the assertions read: every collective by kind, axes and place, dearest first.

    With `source="hlo"` the place is JAX's name for the operation.
    """
    return tuple(_found(what, args, kwargs, source, None)[1])


def _found(
    what: Any, args: Sequence[Any], kwargs: Any, source: str, axis: Axes
) -> tuple[Partitioned, list[Collective]]:
    _check_source(source)
    partitioned = _partitioned(what, args, kwargs)
    if source == "program":
        records: Sequence[Collective] = partitioned.collectives
    else:
        module = collectives_in_hlo(_compiled(what, partitioned).as_text())
        records = _hlo_records(module, dict(partitioned.plan.mesh.axes))
    names = partitioned.options.mesh_shape.names
    wanted = (axis,) if isinstance(axis, str) else tuple(axis or ())
    unknown = [a for a in wanted if a not in names]
    if unknown:
        raise ArgumentError(
            Problem(
                f"axis {unknown[0]!r}",
                f"the mesh has the axes {', '.join(names)}{did_you_mean(unknown[0], names)}",
                "name one of them",
            )
        )
    kept = [c._replace(axes=_user_axes(c.axes)) for c in records]
    if isinstance(axis, str):
        kept = [c for c in kept if axis in c.axes]
    elif axis is not None:
        kept = [c for c in kept if set(c.axes) == set(wanted)]
    return partitioned, kept


def _hlo_records(
    found: Sequence[HloCollective], sizes: Mapping[str, int]
) -> tuple[Collective, ...]:
    records: dict[tuple, Collective] = {}
    for each in found:
        if each.group_size < 2:
            continue
        kind = _HLO_KINDS.get(each.kind, each.kind.replace("-", "_"))
        axes = each.mesh_axes(sizes) or ()
        count = each.count * (len(each.dtypes) if each.kind in _COMBINED else 1)
        before = records.get((kind, axes, each.op_name), Collective(kind, axes, 0, 0.0, ""))
        records[kind, axes, each.op_name] = Collective(
            kind, axes, before.count + count, before.bytes + each.wire_bytes, each.op_name
        )
    return tuple(sorted(records.values(), key=lambda c: (-c.bytes, c.kind, c.axes, c.source)))


def _partitioned(what: Any, args: Sequence[Any], kwargs: Any) -> Partitioned:
    if isinstance(what, Function):
        return what.trace(*args, **(kwargs or {})).propagate().partition()
    if args or kwargs:
        raise ArgumentError(
            Problem(
                f"arguments beside a {type(what).__name__}",
                "a stage was made for arguments already",
                "pass the function of spmd.jit with its arguments, or the stage alone",
            )
        )
    if isinstance(what, (Lowered, Compiled)):
        return what.partitioned
    if isinstance(what, Traced):
        what = what.propagate()
    if isinstance(what, Propagated):
        what = what.partition()
    if not isinstance(what, Partitioned):
        raise ArgumentTypeError(
            Problem(
                f"a {type(what).__name__}",
                "only a partitioned program has collectives of ours",
                "pass what spmd.jit returned with the arguments of a call, or one of its stages",
            )
        )
    return what


def _compiled(what: Any, partitioned: Partitioned) -> Any:
    if isinstance(what, Compiled):
        return what
    lowered = what if isinstance(what, Lowered) else partitioned.lower()
    return lowered.compile()


def _user_axes(axes: Sequence[str]) -> tuple[str, ...]:
    """Sub-axes by the name of the axis of which they are a part."""
    return tuple(dict.fromkeys(split_ref(a)[0] for a in axes))


def _same_sharding(lies: Any, want: Any, leaf: Any) -> bool:
    if not isinstance(lies, NamedSharding):
        return False
    if not isinstance(want, NamedSharding):
        want = NamedSharding(lies.mesh, want)
    shape = getattr(leaf, "shape", None)
    rank = max(len(lies.spec), len(want.spec)) if shape is None else len(shape)
    return len(want.spec) <= rank and lies.is_equivalent_to(want, rank)


def _text(spec: Any) -> str:
    if not isinstance(spec, PartitionSpec):
        return str(spec)
    dims = tuple(() if e is None else (e,) if isinstance(e, str) else tuple(e) for e in spec)
    return f"P{tuple(partition_spec(Layout(dims)))}"


def _lines(records: Sequence[Collective], none: str) -> str:
    rows = [f"{c.source or 'unknown source'} {_name(c)}" for c in records]
    return "\n       ".join(rows) or none


def _name(c: Collective) -> str:
    return f"{c.kind}({'+'.join(c.axes)}) x{c.count} {c.bytes:,.0f} B"


def _summary(records: Sequence[Collective]) -> str:
    return ", ".join(map(_name, collectives.summarize(tuple(records)))) or "no collective"


def _over(axis: Axes) -> str:
    if axis is None:
        return ""
    return f" over {axis if isinstance(axis, str) else '+'.join(axis)}"


def _check_kinds(kinds: Any) -> None:
    unknown = [kind for kind in kinds if kind not in KINDS]
    if unknown:
        raise ArgumentError(
            *(
                Problem(
                    f"{kind!r} is no kind of collective",
                    f"they are {', '.join(KINDS)}{did_you_mean(kind, KINDS)}",
                    "name one of them; keyword arguments of the function go into kwargs={...}",
                )
                for kind in unknown
            )
        )


def _check_source(source: str) -> None:
    if source not in ("program", "hlo"):
        raise ArgumentError(
            Problem(
                f"source={source!r}",
                "collectives are read from the partitioned program or from what XLA compiled",
                'use source="program" or source="hlo"',
            )
        )


def _one_bound(at_most: float | None, exactly: float | None) -> float:
    given = [bound for bound in (at_most, exactly) if bound is not None]
    if len(given) != 1:
        raise ArgumentError(
            Problem(
                "no budget" if not given else "at_most and exactly",
                "one bound is compared with the bytes",
                "give at_most= or exactly=",
            )
        )
    return given[0]


def _raise(problems: Sequence[Problem]) -> None:
    if problems:
        raise BudgetError(*problems)
