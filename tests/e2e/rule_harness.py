"""One equation under every assignment of mesh axes to its factors, against the whole primitive.

Nothing but the rule decides here: neither propagation nor cost has a say. What padding holds is
poison, and operands that are carried partial are addends.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from sharding import _jax
from sharding.mesh import MeshShape
from sharding.program import Op, build
from sharding.rule import Kind, Rule
from sharding.spec import Layout
from spmd.partition.apply import apply, linear_index
from spmd.partition.local import LocalView
from spmd.partition.placed import legal, makes, needs
from spmd.partition.plan import Assignment, Compute, Key
from spmd.partition.reshard import plan
from spmd.partition.tensor import Tensor

MESH = MeshShape((("x", 2), ("y", 4)))
DRAWS = 10  # assignments per equation
# Compiling takes most of the time.
FAST = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


def assignments(rule: Rule, adds: bool) -> list[Assignment]:
    """Every factor over y; then a sample of all ways to give x and y to factors or carry x."""
    free = [
        name for name, factor in rule.factors.items()
        if factor.kind is not Kind.FIXED and rule.where[name]
    ]
    found = [Assignment(((name, ("y",)),)) for name in free]
    more = [Assignment(((a, ("x",)), (b, ("y",)))) for a in free for b in free if a != b]
    more += [Assignment(((name, axes),)) for name in free for axes in (("x", "y"), ("y", "x"))]
    carried = [Assignment((), ("x",)), *(Assignment(((n, ("y",)),), ("x",)) for n in free)]
    rng = random.Random(0)
    rng.shuffle(more)
    if rule.linear and adds:
        found += carried[:3]
    found, more = ([a for a in drawn if legal(rule, a.axes, MESH)] for drawn in (found, more))
    return found + more[: max(4, DRAWS - len(found))]


def ops_of(fun: Callable, args: Sequence[Any], names: set[str]) -> Iterator[tuple[Op, list, list]]:
    """The equations of `fun` with these names, with their operands and results."""
    program = build(_jax.trace(fun, *args))
    env = {v.id: a for v, a in zip(program.body.inputs, args, strict=True)}
    for value in program.body.consts:
        env[value.id] = value.const
    for op in program.body.ops:
        operands = [env.get(v.id, v.const) for v in op.inputs]
        operands = [
            x if jnp.issubdtype(v.dtype, jax.dtypes.extended) else jnp.asarray(x, v.dtype)
            for x, v in zip(operands, op.inputs, strict=True)
        ]
        with _jax.equation_context(op.eqn):
            out = op.primitive.bind(*operands, **op.params)
        results = list(out) if op.primitive.multiple_results else [out]
        env |= {v.id: r for v, r in zip(op.outputs, results, strict=True)}
        if op.primitive.name in names:
            yield op, operands, results


def laid_out(x: Any, layout: Layout, poison: Any) -> Any:
    """The local part of a whole array: addends of 3 times it where partial, poison in padding."""
    whole = Layout(((),) * x.ndim)
    out = apply(
        plan(whole, layout._replace(partial=()), x.shape, 4, MESH).steps, x, whole, x.shape, MESH
    )
    for axis, _ in layout.partial:
        out = out * (linear_index((axis,), MESH) + 1).astype(out.dtype)
    if jnp.issubdtype(x.dtype, jax.dtypes.extended):
        return out
    for d, axes in enumerate(layout.dims):
        at = lax.broadcasted_iota(jnp.int32, out.shape, d) + linear_index(axes, MESH) * out.shape[d]
        out = jnp.where(at < x.shape[d], out, jnp.resize(poison, out.shape))
    return out


def poison_of(dtype: Any, seed: int) -> Any:
    """What padding holds: NaN; integers in and out of bounds; flags that are set."""
    if jnp.issubdtype(dtype, jax.dtypes.extended):
        return None
    if jnp.issubdtype(dtype, jnp.inexact):
        return np.array([np.nan], dtype)
    if dtype == jnp.bool_:
        return np.array([True])
    drawn = np.random.default_rng(seed).integers(-3, 9, 37)
    return np.abs(drawn).astype(dtype) if jnp.issubdtype(dtype, np.unsignedinteger) else (
        drawn.astype(dtype)
    )


def run(op: Op, operands: Sequence[Any], drawn: Sequence[Assignment]) -> list[list[Any]]:
    """Whole results of the equation under every assignment."""
    mesh = jax.make_mesh((2, 4), ("x", "y"), axis_types=(AxisType.Auto,) * 2)

    def one(assignment: Assignment, xs: Sequence[Any]) -> list[Any]:
        carried = tuple((a, "add") for a in assignment.carried)
        group = op.rule.linear[0] if carried else ()
        tensors = [
            Tensor(v.shape, 4, (Layout(((),) * v.rank, carried if i in group else ()),))
            for i, v in enumerate(op.inputs)
        ]
        need = needs(op.rule, assignment, tensors, MESH)
        made = makes(op.rule, assignment, MESH)
        keys = tuple(Key(v, n) for v, n in zip(op.inputs, need, strict=True))
        outs = tuple(Key(v, m) for v, m in zip(op.outputs, made, strict=True))
        parts = [
            laid_out(x, layout, poison_of(x.dtype, i))
            for i, (x, layout) in enumerate(zip(xs, need, strict=True))
        ]
        with _jax.equation_context(op.eqn):
            results = LocalView(Compute(op, assignment, keys, outs), MESH).run(parts)
        whole = []
        for r, v, m in zip(results, op.outputs, made, strict=True):
            assert r.shape == m.local_shape(v.shape, MESH), (op.rule, assignment)
            assert r.dtype == v.dtype
            target = Layout(((),) * v.rank)
            whole.append(apply(plan(m, target, v.shape, 4, MESH).steps, r, m, v.shape, MESH))
        return whole

    def every(*xs: Any) -> list[list[Any]]:
        # Every device's copy comes back: they must agree.
        found = [one(assignment, xs) for assignment in drawn]
        return jax.tree.map(lambda x: jnp.expand_dims(x, 0), found)

    body = jax.shard_map(every, mesh=mesh, in_specs=P(), out_specs=P(("x", "y")), check_vma=False)
    return jax.jit(body, compiler_options=FAST)(*operands)


def check_rules(fun: Callable, *args: Any, names: str, exact: bool = True) -> None:
    """Checks the equations of `fun` whose primitive is among `names`, separated by spaces."""
    wanted = set(names.split())
    seen = set()
    for op, operands, results in ops_of(fun, args, wanted):
        seen.add(op.primitive.name)
        drawn = assignments(op.rule, adds=jnp.issubdtype(results[0].dtype, jnp.number))
        if not drawn:
            continue
        for assignment, found in zip(drawn, run(op, operands, drawn), strict=True):
            for got, want in zip(found, results, strict=True):
                if jnp.issubdtype(got.dtype, jax.dtypes.extended):
                    got, want = jax.random.key_data(got), jax.random.key_data(want)
                want = np.asarray(want) * (3 if assignment.carried else 1)
                for copy in np.asarray(got):
                    text = f"{op.primitive.name} {op.rule} under {assignment}"
                    if exact:
                        np.testing.assert_array_equal(copy, want, err_msg=text)
                    else:
                        np.testing.assert_allclose(copy, want, 2e-5, 1e-5, err_msg=text)
    assert seen == wanted, f"{wanted - seen} not in the program"
