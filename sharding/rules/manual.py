"""`jax.shard_map` and explicit collectives inside of a program.

Operands are brought to exactly the manual axes that `in_specs` name; what is left of the mesh is
the partitioner's, inside of the body too. The body is a region at shapes that are local in the
manual axes, and its collectives run as they are, since the whole program is manual by then.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jax import lax

from sharding import _jax
from sharding._jax import calls
from sharding.mesh import MeshShape
from sharding.region import Control, Manual, Port
from sharding.rule import (
    Dims,
    Factor,
    Local,
    OpInfo,
    Rule,
    identity_rule,
    names,
    register,
    register_control,
)

p = _jax.primitives
Params = Mapping[str, Any]

enter_p = calls.identity_primitive("enter_shard_map", lambda x: x, lambda params: params)


@register(enter_p)
def _enter(op: OpInfo) -> Rule:
    return identity_rule(op.in_avals[0].shape)


def _manual(params: Params) -> Manual:
    return Manual(MeshShape.of(params["mesh"]), frozenset(params["newly_manual_axes"]))


def _ports(specs: Sequence[Any], values: Sequence[Any]) -> list[Port]:
    """A port per operand or result; a dim of size 1 is whole whatever its spec says."""
    ports = []
    for i, (spec, value) in enumerate(zip(specs, values, strict=True)):
        entries = [*spec, *(None,) * (len(value.shape) - len(spec))]
        lead = tuple(
            () if n == 1 or axes is None else (axes,) if isinstance(axes, str) else tuple(axes)
            for axes, n in zip(entries, value.shape, strict=True)
        )
        ports.append(Port(i, 0, i, lead=lead))
    return ports


register_control(
    _jax.shard_map_p,
    Control(
        bodies=lambda params: [_jax.closed(params["jaxpr"])],
        inputs=lambda op: _ports(op.params["in_specs"], op.inputs),
        outputs=lambda op: _ports(op.params["out_specs"], op.outputs),
        build=lambda params, bodies, args: bodies[0](*args),
        manual=_manual,
        enter=enter_p,
    ),
)


def _collective(
    op: OpInfo, left: set[int], right: set[int], linear: bool, local: Callable | None = None
) -> Rule:
    """Dims outside of `left` (of the operand) and `right` (of the result) pass, in their order;
    those inside are exchanged between manual shards, and FIXED: they have no factor."""
    x, y = op.in_avals[0].shape, op.out_avals[0].shape
    dims = names("d", len(x))
    passing = [d for i, d in enumerate(dims) if i not in left]
    factors = {d: Factor(n) for d, n in zip(dims, x, strict=True) if d in passing and n != 1}
    operand: Dims = tuple((d,) if d in factors else () for d in dims)
    rest = iter(passing)
    result: Dims = tuple(
        (d,) if d in factors else ()
        for d in ("" if i in right else next(rest) for i in range(len(y)))
    )
    return Rule(
        (operand, *((),) * (len(op.in_avals) - 1)), (result,), factors,
        linear=((0,),) if linear else (), local=local, always=local is not None,
    )  # fmt: skip


def _own_dims(op: OpInfo) -> set[int]:
    """Dims of the operand that a reduction names besides axes: what vmap made of its own name."""
    return {a for a in op.params.get("axes", ()) if isinstance(a, int)}


@register(p.pmax_p, p.pmin_p, *_jax.available("pbroadcast_dynamic_p"))
def _pointwise(op: OpInfo) -> Rule:
    """Every dim passes that is not reduced."""
    return _collective(op, _own_dims(op), set(), linear=False)


@register(p.psum_p, p.ppermute_p, *_jax.available("pbroadcast_p"))
def _linear(op: OpInfo) -> Rule:
    """Every dim passes that is not reduced, and so do sums over other axes that are still to be
    made."""
    return _collective(op, _own_dims(op), set(), linear=True)


@register(*_jax.available("pvary_p", "reduced_vary_cast_p", "vary_unreduced_cast_p", "preduced_p"))
def _cast(op: OpInfo) -> Rule:
    """A change of type alone: which manual axes a value varies over."""
    return identity_rule(op.in_avals[0].shape)


@register(p.axis_index_p)
def _axis_index(op: OpInfo) -> Rule:
    return Rule((), ((),), {}, local=_local_axis_index, always=True)


def _local_axis_index(ctx: Local, op: OpInfo) -> Sequence[Any]:
    return [lax.axis_index(ctx.named(op.params["axis_name"]))]


# What JAX binds where it tracks what varies over manual axes is bound as a plain collective: the
# per-device program tracks nothing.


@register(*_jax.available("psum_invariant_p", "unreduced_psum_p"))
def _summed(op: OpInfo) -> Rule:
    return _collective(op, set(), set(), True, _plain_sum)


def _plain_sum(ctx: Local, op: OpInfo, x: Any) -> Sequence[Any]:
    return [lax.psum(x, ctx.named(op.params["axes"]))]


def _gathered(op: OpInfo, local: Callable | None = None) -> Rule:
    """The dim that grows, or is new, is whole; the others pass."""
    d, tiled = op.params["all_gather_dimension"], op.params["tiled"]
    return _collective(op, {d} if tiled else set(), {d}, True, local)


def _scattered(op: OpInfo, local: Callable | None = None) -> Rule:
    """The dim that is scattered is whole; the others pass."""
    d, tiled = op.params["scatter_dimension"], op.params["tiled"]
    return _collective(op, {d}, {d} if tiled else set(), True, local)


def _plain_gather(ctx: Local, op: OpInfo, x: Any) -> Sequence[Any]:
    axes, d = ctx.named(op.params["axis_name"]), op.params["all_gather_dimension"]
    return [lax.all_gather(x, axes, axis=d, tiled=op.params["tiled"])]


def _plain_scatter(ctx: Local, op: OpInfo, x: Any) -> Sequence[Any]:
    axes, d = ctx.named(op.params["axis_name"]), op.params["scatter_dimension"]
    return [lax.psum_scatter(x, axes, scatter_dimension=d, tiled=op.params["tiled"])]


register(p.all_gather_p)(_gathered)
register(_jax.reduce_scatter_p)(_scattered)
register(*_jax.available("all_gather_invariant_p", "all_gather_reduced_p"))(
    lambda op: _gathered(op, _plain_gather)
)
register(*_jax.available("unreduced_reduce_scatter_p"))(lambda op: _scattered(op, _plain_scatter))


@register(p.all_to_all_p)
def _all_to_all(op: OpInfo) -> Rule:
    """The two dims that trade places are whole; the others pass."""
    cut = {op.params["split_axis"], op.params["concat_axis"]}
    return _collective(op, cut, cut, linear=True)


@register(*_jax.available("ragged_all_to_all_p"))
def _ragged(op: OpInfo) -> Rule:
    """Rows are exchanged, and whole; the dims of a row pass. Offsets and sizes are whole."""
    shape = op.in_avals[0].shape[1:]
    dims = names("d", len(shape))
    factors = {d: Factor(n) for d, n in zip(dims, shape, strict=True) if n != 1}
    rows: Dims = ((), *((d,) if d in factors else () for d in dims))
    whole: list[Dims] = [((),) * len(aval.shape) for aval in op.in_avals[2:]]
    return Rule((rows, rows, *whole), (rows,), factors)
