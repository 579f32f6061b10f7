"""Propagation on abstract meshes: both directions, through regions, deterministic, fast."""

import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh, AxisType

import spmd
from sharding import P, shard
from sharding.program import describe


def mesh(**axes: int) -> AbstractMesh:
    return AbstractMesh(tuple(axes.values()), tuple(axes), axis_types=(AxisType.Auto,) * len(axes))


MESH = mesh(data=2, tensor=4)
X = jax.ShapeDtypeStruct((8, 16), jnp.float32)
W = jax.ShapeDtypeStruct((16, 32), jnp.float32)


def propagate(fun: Callable, *args: Any, on: AbstractMesh = MESH, **options: Any) -> Any:
    return spmd.jit(fun, mesh=on, **options).trace(*args).propagate()


def specs(tree: Any) -> Any:
    return jax.tree.map(lambda s: s.spec, tree)


def test_forward_and_backward_through_a_matmul() -> None:
    found = propagate(lambda x, w: x @ w, X, W, in_shardings=(P("data"), P(None, "tensor")))
    assert found.out_shardings.spec == P("data", "tensor")
    found = propagate(lambda x, w: x @ w, X, W, out_shardings=P("data", "tensor"))
    assert specs(found.in_shardings) == (P("data"), P(None, "tensor"))


def test_a_contracted_dim_is_shared_by_both_operands() -> None:
    found = propagate(lambda x, w: x @ w, X, W, in_shardings=(P(None, "tensor"), None))
    assert specs(found.in_shardings) == (P(None, "tensor"), P("tensor"))
    assert found.out_shardings.spec == P()


def test_a_sharding_is_refined_and_never_replaced() -> None:
    found = propagate(
        lambda x, y: x + y, X, X, in_shardings=(P("data", P.UNCONSTRAINED), P(None, "tensor"))
    )
    assert specs(found.in_shardings) == (P("data", "tensor"), P(None, "tensor"))
    assert found.out_shardings.spec == P("data", "tensor")


def test_closed_dims_stay_closed() -> None:
    found = propagate(lambda x: shard(x * 2, None, "tensor") * 3, X, in_shardings=P("data"))
    assert found.out_shardings.spec == P(None, "tensor")
    reasons = {r.reason for r in found.result.rejections}
    assert "the dim is closed by an annotation" in reasons


def test_reshape_keeps_shards_where_they_are_contiguous() -> None:
    def f(x):
        return x.reshape(8, 4, 4)

    found = propagate(f, X, in_shardings=P("data", "tensor"))
    assert found.out_shardings.spec == P("data", "tensor")
    merged = propagate(lambda x: x.reshape(128), X, in_shardings=P("data"))
    assert merged.out_shardings.spec == P("data")
    minor = propagate(lambda x: x.reshape(128), X, in_shardings=P(None, "data"))
    assert minor.out_shardings.spec == P("data")  # of the major dim, after an all-to-all
    whole = propagate(lambda x: x[:1, :8].reshape(8), X, in_shardings=P(None, "data"))
    assert whole.out_shardings.spec == P("data")
    odd = propagate(lambda x: x[:3].reshape(48), X, in_shardings=P(None, "data"))
    assert odd.out_shardings.spec == P()


def test_an_axis_is_split_where_a_dim_is() -> None:
    """16 columns over 4 devices, seen as 2 x 8: the axis splits into 2 x 2."""
    found = propagate(lambda x: x.reshape(8, 2, 8), X, in_shardings=P(None, "tensor"))
    (value,) = found.traced.program.body.outputs
    assert str(found.result.of(value)) == "[?, tensor:(1)2?, tensor:(2)2?]"
    # A boundary has whole axes only.
    assert found.out_shardings.spec == P()


def carry_and_stack(x, w):
    def body(h, w):
        return jnp.tanh(h @ w), h.sum(0)

    return jax.lax.scan(body, x, w)


def test_through_scan_carries_and_stacked_values() -> None:
    w = jax.ShapeDtypeStruct((3, 16, 16), jnp.float32)
    found = propagate(carry_and_stack, X, w, in_shardings=(P("data"), None))
    assert specs(found.out_shardings) == (P("data"), P())
    found = propagate(carry_and_stack, X, w, out_shardings=(None, P(None, "tensor")))
    assert specs(found.in_shardings)[0] == P(None, "tensor")


def test_through_while_cond_remat_and_nested_jit() -> None:
    def f(x):
        x = jax.lax.while_loop(lambda c: c[0] < 3, lambda c: (c[0] + 1, c[1] * 2), (0, x))[1]
        x = jax.lax.cond(x.sum() > 0, lambda x: x + 1, lambda x: x - 1, x)
        return jax.jit(jax.checkpoint(jnp.sin))(x)

    assert propagate(f, X, in_shardings=P("data", "tensor")).out_shardings.spec == P(
        "data", "tensor"
    )
    assert propagate(f, X, out_shardings=P("data", "tensor")).in_shardings[0].spec == P(
        "data", "tensor"
    )


def test_a_broadcast_hears_of_its_result_before_its_result_hears_of_it() -> None:
    def f(x, bias):
        return x + bias

    bias = jax.ShapeDtypeStruct((16,), jnp.float32)
    found = propagate(f, X, bias, in_shardings=(P(None, "tensor"), None))
    assert specs(found.in_shardings)[1] == P("tensor")


def test_contested_dims_wait_for_their_neighbours() -> None:
    """The product could take `tensor` on either dim; its reader settles which."""
    def f(x, w, v):
        return (x @ w) * v

    found = propagate(
        f, X, W, jax.ShapeDtypeStruct((8, 32), jnp.float32),
        in_shardings=(P("tensor"), P(None, "tensor"), P(None, "tensor")),
    )  # fmt: skip
    assert found.out_shardings.spec == P(None, "tensor")


def attention(q: Any, k: Any, v: Any) -> Any:
    """q [batch, positions, heads, group, dim]; k, v [batch, positions, heads, dim]."""
    weights = jax.nn.softmax(jnp.einsum("bskge,btke->bkgst", q, k))
    return q + jnp.einsum("bkgst,btke->bskge", weights, v)


@pytest.mark.parametrize("group", [4, 2])
@pytest.mark.parametrize("remat", [False, True])
def test_attention_with_positions_sharded_gathers_the_smaller_side(group: int, remat: bool) -> None:
    """What the gradients of keys want must not take the scores' dims before queries have a say:
    forwards and backwards, keys and values are gathered, never queries. (Unless heads are sharded
    instead, see `e2e/test_moved_axes.py`.)"""
    attend = jax.checkpoint(attention) if remat else attention

    def loss(*qkv):
        return (attend(*qkv) ** 2).sum()

    q, kv = (2, 64, 4, group, 8), jax.ShapeDtypeStruct((2, 64, 4, 8), jnp.float32)
    specs = (P(None, "tensor"),) * 3
    found = propagate(
        jax.grad(loss, argnums=(0, 1, 2)), jax.ShapeDtypeStruct(q, jnp.float32), kv, kv,
        in_shardings=specs, out_shardings=specs, disable_passes=["moved_axes"],
    )  # fmt: skip
    one = 2 * 64 * 4 * 8 * 4 / 4 * (4 - 1)  # bytes to gather or scatter keys once
    sent = {}
    for record in found.partition().collectives:
        sent[record.kind] = sent.get(record.kind, 0) + record.bytes / one
    assert sent == {"all_gather": 4 if remat else 2, "reduce_scatter": 2}


def test_the_history_leads_from_every_sharding_to_an_annotation() -> None:
    found = propagate(carry_and_stack, X, jax.ShapeDtypeStruct((3, 16, 16), jnp.float32),
                      in_shardings=(P("data"), None)).result
    known: set[tuple[int, str]] = set()
    for event in found.events:
        for axis in event.axes:
            assert event.link == -1 or (event.source, axis) in known, event
            known.add((event.value, axis))
    sharded = {
        (v.id, a) for v in found.program.values for d in found.of(v).dims for a in d.axes
    }
    assert sharded == known
    assert any(describe(found.program.values[e.value]) == "x" for e in found.events)


def test_the_order_of_a_dict_does_not_matter() -> None:
    def f(p):
        return p["a"] @ p["b"]

    forwards = {"a": X, "b": W}
    backwards = {"b": W, "a": X}
    spec = {"a": P("data", "tensor"), "b": P("tensor", None)}
    texts = {str(propagate(f, args, in_shardings=(spec,)).partition()) for args in
             (forwards, backwards)}
    assert len(texts) == 1


def unrolled(layers: int) -> tuple[Callable, Any, Any]:
    """A training step of an unrolled transformer: (step, state, tokens), as shapes."""
    import dataclasses

    from training.config import RunConfig
    from training.state import init_state, train_step

    run = RunConfig()
    model = dataclasses.replace(
        run.model, num_layers=layers, scan_layers=False, remat="full", dtype="bfloat16",
        embed_dim=2048, mlp_dim=5632, num_heads=32, num_kv_heads=16, head_dim=64,
    )  # fmt: skip
    run = dataclasses.replace(run, model=model)
    state = jax.eval_shape(lambda: init_state(run, jnp.int32(0)))
    return lambda s, b: train_step(run, s, b), state, jax.ShapeDtypeStruct((256, 513), jnp.int32)


@pytest.mark.parametrize(("layers", "seconds"), [
    (4, 10),
    pytest.param(32, 10, marks=pytest.mark.slow),
    pytest.param(170, 30, marks=pytest.mark.slow),  # 116,000 equations
])  # fmt: skip
def test_time_does_not_grow_with_the_devices(layers: int, seconds: float) -> None:
    """Propagating and partitioning, on 2,048 devices as on 8."""
    from models.shardings import rules_for

    step, state, batch = unrolled(layers)
    spent = {}
    collectives = {}
    for sizes in ({"data": 2, "fsdp": 2, "tensor": 2}, {"data": 8, "fsdp": 16, "tensor": 16}):
        on = mesh(**sizes)
        traced = spmd.jit(step, mesh=on, axis_rules=rules_for("fsdp+tensor", sizes)).trace(
            state, batch
        )
        start = time.process_time()  # other work on the machine does not count
        partitioned = traced.propagate().partition()
        spent[on.size] = time.process_time() - start
        collectives[on.size] = sum(c.count for c in partitioned.collectives)
    assert spent[2048] < seconds
    assert spent[2048] < 3 * spent[8] + 0.5
    assert collectives[8] <= collectives[2048] * 1.5
