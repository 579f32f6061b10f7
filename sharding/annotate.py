"""Annotations: `shard(x, ...)`, axis rules, and every other way JAX users say where data lies.

A spec is kept as written (names, UNCONSTRAINED, priorities) until `resolve` meets the axis rules
and the mesh; so one annotated model serves every mesh.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from sharding import _jax
from sharding._jax import calls
from sharding.errors import Problem, SpecError
from sharding.mesh import MeshShape
from sharding.rule import Local, OpInfo, Rule, identity_rule, register, register_apart
from sharding.spec import DimSharding, Sharding, unknown_axis

P = PartitionSpec
AxisRules = tuple[tuple[str, tuple[str, ...]], ...]


@dataclass(frozen=True)
class DimSpec:
    """What the user wrote for one dim: names (mesh axes or logical), or open for propagation."""

    names: tuple[str, ...] = ()
    open: bool = False
    priority: int = 0


@dataclass(frozen=True)
class Spec:
    """A whole annotation, as written: one `DimSpec` per dim given; further dims are unsharded.

    Attributes:
      dims: entries.
      lenient: names without an axis rule mean "unsharded", as flax reads its own metadata.
      rest_open: dims without an entry are open instead of unsharded.
    """

    dims: tuple[DimSpec, ...]
    lenient: bool = False
    rest_open: bool = False

    def __str__(self) -> str:
        return "P(" + ", ".join(map(_dim_text, self.dims)) + ")"

    @property
    def all_open(self) -> bool:
        """Whether it says nothing: the annotation of a cotangent, which no user wrote."""
        return self.rest_open and all(dim.open for dim in self.dims)


@dataclass(frozen=True)
class Priority:
    """An entry of a spec with a priority: `shard(x, Priority("data", 1))`; 0 propagates first."""

    entry: Any
    priority: int


def shard(x: Any, *spec: Any) -> Any:
    """Annotates an intermediate value: `shard(x, "data", None, "model")` or `shard(x, P(...))`.

    The identity function on values; it works inside grad, vmap, jvp, remat, scan and cond, and
    outside of `spmd.jit` does nothing (inside `constrain_with` it is a sharding constraint).

    Args:
      x: array, or pytree of arrays of one rank.
      *spec: one entry per dim: a mesh axis or logical name, a tuple of them, None for unsharded,
        `P.UNCONSTRAINED` for open to propagation, `Priority(entry, n)`. Or one `PartitionSpec`.

    Raises:
      SpecError: the spec is longer than the rank, or an entry is none of the above.
    """
    parsed = parse_spec(spec[0] if len(spec) == 1 and _is_whole_spec(spec[0]) else spec)
    context = _CONSTRAIN.get()

    def annotate(leaf: Any) -> Any:
        check_rank(parsed, jax.numpy.ndim(leaf), "shard(x, ...)", jax.numpy.shape(leaf))
        if context is not None:
            return _constrain(leaf, parsed, *context)
        return shard_p.bind(leaf, spec=parsed)

    return jax.tree.map(annotate, x)


@contextmanager
def constrain_with(mesh: Any, axis_rules: Any = ()) -> Iterator[None]:
    """Inside, `shard` is `jax.lax.with_sharding_constraint`: the same program for `jax.jit`."""
    token = _CONSTRAIN.set((mesh, normalise_rules(axis_rules)))
    try:
        yield
    finally:
        _CONSTRAIN.reset(token)


def parse_spec(spec: Any) -> Spec:
    """A `Spec` from a PartitionSpec or a sequence of entries.

    Raises:
      SpecError: naming every entry that is not a name, a tuple of names, None or UNCONSTRAINED.
    """
    problems: list[Problem] = []
    dims = tuple(_parse_entry(entry, i, problems) for i, entry in enumerate(spec))
    if problems:
        raise SpecError(*problems)
    return Spec(dims)


def normalise_rules(axis_rules: Any) -> AxisRules:
    """Axis rules as ((logical name, mesh axes), ...); a dict is taken in its order.

    Raises:
      SpecError: an entry is not a (name, axes) pair.
    """
    pairs = axis_rules.items() if hasattr(axis_rules, "items") else axis_rules or ()
    result, problems = [], []
    for i, pair in enumerate(pairs):
        if not (isinstance(pair, Sequence) and len(pair) == 2 and isinstance(pair[0], str)):
            problems.append(
                Problem(
                    f"axis_rules[{i}] is {pair!r}",
                    "a rule maps one logical name to mesh axes",
                    "write ('name', 'axis'), ('name', ('axis', 'axis')) or ('name', None)",
                )
            )
            continue
        result.append((pair[0], _axes(pair[1])))
    if problems:
        raise SpecError(*problems)
    return tuple(result)


def resolve(
    spec: Spec, rank: int, mesh: MeshShape, rules: AxisRules, what: str
) -> tuple[Sharding, list[Problem]]:
    """The `Sharding` that a spec means on a mesh, with every problem it has.

    Rules are tried in their order: one gives its axes to a dim of its name when no other dim of
    the value has them yet (the semantics of flax's logical axis rules); a name whose rules all
    clash is left unsharded. Mesh axes are taken as they are.
    """
    problems: list[Problem] = []
    logical = {name for name, _ in rules}
    # (dim, place in the dim) -> mesh axes
    found: dict[tuple[int, int], tuple[str, ...]] = {}
    slots = [(d, i, n) for d, dim in enumerate(spec.dims) for i, n in enumerate(dim.names)]
    for d, i, name in slots:
        if name in logical:
            continue
        if name not in mesh.names and spec.lenient:
            found[d, i] = ()
            continue
        if name not in mesh.names:
            named = tuple(dict.fromkeys(rule_name for rule_name, _ in rules))
            problems.append(unknown_axis(name, mesh, what, named))
        elif any((name,) == axes for axes in found.values()):
            problems.append(_twice(name, spec, what))
        found[d, i] = (name,)
    taken = {a for axes in found.values() for a in axes}
    for rule_name, axes in rules:
        for d, i, name in slots:
            if name == rule_name and (d, i) not in found and taken.isdisjoint(axes):
                unknown = [a for a in axes if a not in mesh.names]
                where = f"{what}, by the rule for {name!r},"
                problems += [unknown_axis(a, mesh, where) for a in unknown]
                found[d, i] = axes
                taken.update(axes)
    axes_of = [
        tuple(a for i in range(len(dim.names)) for a in found.get((d, i), ()))
        for d, dim in enumerate(spec.dims)
    ]
    if problems:
        return Sharding.open(rank), problems
    dims = [
        DimSharding(a, d.open, d.priority) for a, d in zip(axes_of, spec.dims, strict=True)
    ]
    dims += [DimSharding(open=spec.rest_open)] * (rank - len(dims))
    return Sharding(tuple(dims)), []


def spec_of(annotation: Any, rank: int) -> Spec | None:
    """The spec inside anything that users pass as a sharding; None where it leaves all open.

    Takes PartitionSpec, NamedSharding, Spec, a plain tuple of entries.

    Raises:
      SpecError: it is none of these.
    """
    if annotation is None:
        return None
    if isinstance(annotation, Spec):
        return annotation
    if isinstance(annotation, NamedSharding):
        return parse_spec(annotation.spec)
    if isinstance(annotation, (PartitionSpec, tuple, list)):
        return parse_spec(annotation)
    if getattr(annotation, "is_fully_replicated", False):
        return Spec((DimSpec(),) * rank)
    raise SpecError(
        Problem(
            f"sharding {annotation!r} is a {type(annotation).__name__}",
            "a sharding says which mesh axes each dim lies on",
            "pass PartitionSpec, NamedSharding or None",
        )
    )


def metadata_spec(leaf: Any) -> Spec | None:
    """The spec in a flax partitioning box (`with_partitioning`, `with_logical_partitioning`), or
    in the metadata of an nnx variable."""
    if hasattr(leaf, "get_partition_spec"):
        names = getattr(leaf, "names", None)
    elif hasattr(leaf, "get_metadata") and hasattr(leaf, "set_metadata"):
        names = _variable_names(leaf)
    else:
        return None
    return None if names is None else Spec(parse_spec(tuple(names)).dims, lenient=True)


def _variable_names(variable: Any) -> tuple[Any, ...] | None:
    """Of an nnx variable. Optimiser state inherits metadata whatever its shape (factored moments,
    counters), so only what fits is heeded."""
    names = variable.get_metadata().get("out_sharding")
    names = names.spec if isinstance(names, NamedSharding) else names
    shape = getattr(variable.get_value(), "shape", ())
    if names is None or len(names) > len(shape):
        return None
    return tuple(name if n > 1 else None for name, n in zip(names, shape, strict=False))


def check_rank(spec: Spec, rank: int, what: str, shape: tuple[int, ...]) -> None:
    """Raises SpecError when the spec has more entries than the value has dims."""
    problem = rank_problem(spec, rank, what, shape)
    if problem is not None:
        raise SpecError(problem)


def rank_problem(spec: Spec, rank: int, what: str, shape: tuple[int, ...]) -> Problem | None:
    if len(spec.dims) <= rank:
        return None
    return Problem(
        f"{what} has spec {spec} for an array of shape {tuple(shape)}",
        f"the spec has {len(spec.dims)} entries, the array {rank} dims",
        f"give at most {rank} entries",
    )


_CONSTRAIN: ContextVar[tuple[Any, AxisRules] | None] = ContextVar("constrain", default=None)

def _of_cotangent(params: dict) -> dict:
    """A cotangent starts where its primal lies, but is free to lie elsewhere: closing its dims
    would force reductions to a whole value that the next operation slices again."""
    dims = tuple(DimSpec(d.names, True, d.priority) for d in params["spec"].dims)
    return {"spec": Spec(dims, params["spec"].lenient, rest_open=True)}


shard_p = calls.identity_primitive("shard", lambda x, **params: x, _of_cotangent)


def _insert_dim(params: dict, dim: int, spmd_axis_name: Any) -> dict:
    """vmap adds a dim: open, or on the axes that `spmd_axis_name` gives."""
    dims = list(params["spec"].dims)
    dims += [DimSpec(open=params["spec"].rest_open)] * max(0, dim - len(dims))
    new = DimSpec(_axes(spmd_axis_name)) if spmd_axis_name is not None else DimSpec(open=True)
    dims.insert(dim, new)
    return {"spec": replace(params["spec"], dims=tuple(dims))}


calls.register_batcher(shard_p, _insert_dim)


@register(shard_p)
def _shard_rule(op: OpInfo) -> Rule:
    shape = op.in_avals[0].shape
    return identity_rule(shape, op.params["spec"])


@register(_jax.sharding_constraint_p)
def _constraint_rule(op: OpInfo) -> Rule:
    """`jax.lax.with_sharding_constraint`; dims it leaves unconstrained stay open."""
    shape = op.in_avals[0].shape
    sharding, unconstrained = op.params["sharding"], op.params["unconstrained_dims"]
    spec = spec_of(sharding, len(shape)) or Spec(())
    dims = list(spec.dims) + [DimSpec()] * (len(shape) - len(spec.dims))
    dims = [DimSpec(open=True) if i in unconstrained else d for i, d in enumerate(dims)]
    return identity_rule(shape, Spec(tuple(dims)))


def _put_one(params: Any, i: int) -> Any:
    return {name: (given[i],) for name, given in params.items()}


register_apart(_jax.primitives.device_put_p, _put_one)


@register(_jax.primitives.device_put_p)
def _device_put_rule(op: OpInfo) -> Rule:
    """`jax.device_put` inside a program: a NamedSharding is an annotation, and a kind of memory is
    kept. Which devices hold what is the partitioner's choice otherwise."""
    shape, target = op.in_avals[0].shape, op.params["devices"][0]
    spec = spec_of(target, len(shape)) if isinstance(target, NamedSharding) else None
    rule = identity_rule(shape, spec)
    if op.in_avals[0].memory_space == op.out_avals[0].memory_space:
        return rule
    return replace(rule, identity=False, local=_local_device_put, always=True)


def _local_device_put(ctx: Local, op: OpInfo, x: Any) -> Sequence[Any]:
    return ctx.bind(x, devices=(op.out_avals[0].memory_space,))


@register(_jax.reshard_p)
def _reshard_rule(op: OpInfo) -> Rule:
    """`jax.sharding.reshard`, which JAX also inserts on its own between meshes of Auto axes."""
    shape = op.in_avals[0].shape
    spec = spec_of(op.params["dst_sharding"], len(shape)) or Spec(())
    sharded = any(dim.names for dim in spec.dims)
    return identity_rule(shape, spec if sharded else None)


def _constrain(x: Any, spec: Spec, mesh: Any, rules: AxisRules) -> Any:
    shape = MeshShape.of(mesh)
    sharding, problems = resolve(spec, jax.numpy.ndim(x), shape, rules, "shard(x, ...)")
    if problems:
        raise SpecError(*problems)
    entries = [P.UNCONSTRAINED if d.open and not d.axes else d.axes or None for d in sharding.dims]
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, P(*entries)))


def _is_whole_spec(entry: Any) -> bool:
    return isinstance(entry, (PartitionSpec, Spec))


def _parse_entry(entry: Any, position: int, problems: list[Problem]) -> DimSpec:
    if isinstance(entry, DimSpec):
        return entry
    if isinstance(entry, Priority):
        inner = _parse_entry(entry.entry, position, problems)
        return DimSpec(inner.names, inner.open, entry.priority)
    if entry is PartitionSpec.UNCONSTRAINED:
        return DimSpec(open=True)
    if entry is None:
        return DimSpec()
    names = (entry,) if isinstance(entry, str) else entry
    if isinstance(names, (tuple, list)) and all(isinstance(n, str) and n for n in names):
        return DimSpec(tuple(names))
    problems.append(
        Problem(
            f"entry {position} of the spec is {entry!r}",
            "a dim is sharded over named axes",
            "write an axis name, a tuple of names, None, P.UNCONSTRAINED or Priority(...)",
        )
    )
    return DimSpec()


def _axes(entry: Any) -> tuple[str, ...]:
    if entry is None:
        return ()
    return (entry,) if isinstance(entry, str) else tuple(entry)


def _twice(name: str, spec: Spec, what: str) -> Problem:
    return Problem(
        f"{what} has spec {spec}, which uses axis {name!r} twice",
        "the devices along one axis can hold the parts of one dim only",
        f"keep {name!r} in one dim and remove it from the others",
    )


def _dim_text(dim: DimSpec) -> str:
    if not dim.names:
        text = "UNCONSTRAINED" if dim.open else "None"
    elif len(dim.names) == 1:
        text = repr(dim.names[0])
    else:
        text = repr(dim.names)
    return f"Priority({text}, {dim.priority})" if dim.priority else text
