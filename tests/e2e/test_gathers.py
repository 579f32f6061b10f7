"""Nothing that is sharded is gathered in silence: the plan says it, and it can be refused."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import mlir

import sharding
import spmd
from sharding import shard
from sharding.errors import GatherError, VerificationError
from sharding.rule import Factor, Rule, register
from spmd.partition.plan import Diagnostic
from tests.oracle import P, check, kinds, make_mesh


def arr(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).normal(size=shape).astype(np.float32)


def gathers(fun: Callable, args: Any, mesh: Any, where: Any, out: Any = None) -> list[Diagnostic]:
    """What the plan says; it is what the program gathers, and what is refused when told to."""
    made = check(fun, args, mesh, where, out)
    found = [d for d in made.diagnostics if d.kind == "gather"]
    wire = {kind: wire for (kind, _), (_, wire) in kinds(made).items()}
    assert sum(d.bytes for d in found) == wire.get("all_gather", 0)
    strict = spmd.jit(fun, mesh=mesh, in_shardings=where, out_shardings=out, on_gather="error")
    if not found:
        strict(*args)
        return []
    with pytest.raises(GatherError) as error:
        strict(*args)
    for d in found:
        assert d.text in str(error.value) and d.remedy in str(error.value)
        assert d.source.startswith("e2e/test_gathers.py:")
    return found


def test_sorts_of_several_operands() -> None:
    both = gathers(lambda x, y: lax.sort((x, y)), (arr(12), arr(12) + 1), make_mesh(y=3),
                   (P("y"), P("y")), (P("y"), P("y")))  # fmt: skip
    assert [d.text for d in both] == [
        "sort gathers dim 0 (of 12) over y, 32 B per device: 3 exchanges of blocks that keep the "
        "order of equals would send 108 B"
    ] * 2
    # 3 rounds are more than the 2 other blocks, whatever the order of equals.
    unstable = lambda x: jnp.sort(x, stable=False)  # noqa: E731
    (one,) = gathers(unstable, (arr(12),), make_mesh(y=3), P("y"), P("y"))
    assert one.remedy == "keep it whole from the start, or accept this with on_gather='plan'"
    assert one.text.endswith(": 3 exchanges of blocks would send 48 B")
    whole = np.arange(64, dtype=np.int32) % 7
    assert not gathers(jnp.sort, (whole,), make_mesh(y=8), P("y"), P("y"))


def test_top_k_of_many() -> None:
    mesh, where = make_mesh(y=8), P(None, "y")
    (one,) = gathers(lambda x: lax.top_k(x, 40), (arr(2, 512),), mesh, where)
    assert one.remedy == "shard dim 0 (of 2) instead, along which it runs in parts"
    # Winners of every shard are gathered, not the dim.
    made = check(lambda x: lax.top_k(x, 8), (arr(2, 512),), mesh, where)
    assert not made.diagnostics


def test_a_loop_over_a_sharded_dim() -> None:
    def fun(x):
        return lax.scan(lambda c, row: (c + row, c.sum()), jnp.zeros(8), x)

    (one,) = gathers(fun, (arr(12, 8),), make_mesh(y=4), P("y"))
    assert one.text == "scan needs dim 0 (of 12) whole: gathered over y, 288 B per device"
    assert one.remedy == "shard dim 1 (of 8) instead, along which it runs in parts"
    columns = check(fun, (arr(12, 8),), make_mesh(y=4), P(None, "y"))
    assert not columns.diagnostics


def test_shards_that_padding_would_reach() -> None:
    total = sharding.rule("n -> ")(lambda x: jnp.exp(x).sum())
    (one,) = gathers(lambda x: total(shard(x * 2, "y")), (arr(9),), make_mesh(y=4), None)
    assert "needs dim 0 (of 9) whole: gathered over y, 36 B per device" in one.text
    even = check(lambda x: total(shard(x * 2, "y")), (arr(12),), make_mesh(y=4), None)
    assert not even.diagnostics


def test_a_rule_that_gathers_in_silence_is_found() -> None:
    """Of a `local` function that gathers an operand, and no `Rule.gathers` that says so."""
    silent_p = Primitive("silent")
    silent_p.def_abstract_eval(lambda x: x)
    mlir.register_lowering(silent_p, lambda ctx, x: [x])
    dims = ((("a",),),)

    def local(ctx, op, x):
        return [ctx.all_gather(x, ctx.axes("a"), 0)[: len(x)]]

    register(silent_p)(lambda op: Rule(dims, dims, {"a": Factor(8)}, local=local))
    function = spmd.jit(lambda x: silent_p.bind(x), mesh=make_mesh(y=4), in_shardings=P("y"))
    with pytest.raises(VerificationError, match="silent gathers dim 0 of x"):
        function(arr(8))


def test_rules_that_gather_are_one_for_all_that_are_alike() -> None:
    """They are kept as long as what was decided with them, and hold on to no equation."""

    def sort(scale: float) -> Any:
        jitted = spmd.jit(lambda x: jnp.sort(x * scale), mesh=make_mesh(y=4), in_shardings=P("y"))
        program = jitted.trace(arr(64)).program
        return next(op.rule for op in program.ops() if op.primitive.name == "sort")

    first, second = sort(1.0), sort(2.0)
    assert first is not second and first.canonical is second.canonical is not first
    assert first.canonical.local is None
