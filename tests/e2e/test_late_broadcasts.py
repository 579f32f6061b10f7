"""What is cut from one shard stays with its owner until others need it: values and collectives.

`spmd.check` runs every instruction with poison in place of what the others hold.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import spmd
from sharding import P, shard
from sharding.errors import VerificationError
from sharding.spec import Layout
from spmd.partition.owners import owners_of
from spmd.partition.plan import Compute, Move, rewritten
from spmd.partition.verify import verify
from tests.oracle import check, kinds, make_mesh

RNG = np.random.default_rng(0)
X = RNG.standard_normal((8, 16, 4), np.float32)
W = RNG.standard_normal((4, 6), np.float32)


def last(x: Any, w: Any) -> Any:
    """A loss of the last of a sharded dim."""
    return jnp.square(jnp.tanh(x[-1] @ w) - 1).sum()


def test_a_loss_is_sent_and_not_what_it_is_of() -> None:
    args, places, outs = (X, W), (P("stage"), P()), (P(), (P("stage"), P()))
    loss = jax.value_and_grad(last, (0, 1))
    planned = check(loss, args, make_mesh(stage=4), places, outs)
    # 4 bytes of the loss, and the gradient of W; none of X, which goes back to its owner
    once = 2 * 3 / 4
    assert kinds(planned) == {("all_reduce", ("stage",)): (2, (4 + W.nbytes) * once)}
    off = ["late_broadcasts"]
    early = check(loss, args, make_mesh(stage=4), places, outs, disable_passes=off)
    assert kinds(early) == {("all_reduce", ("stage",)): (1, X[-1].nbytes * once)}


def scanned(x: Any, w: Any) -> Any:
    """A pipeline: what the last stage makes is stacked, and read after the loop."""

    def tick(states: Any, fresh: Any) -> Any:
        states = jnp.concatenate([fresh[None], states[:-1]])
        states = shard(jnp.tanh(jnp.einsum("srm,smn->srn", states, w)), "stage", None, None)
        return states, states[-1]

    _, y = lax.scan(tick, jnp.zeros((4, *x.shape[1:])), x)
    return jnp.square(y[3:] - 1).mean()


def test_a_pipeline_leaves_its_loss_with_the_last_stage() -> None:
    w = RNG.standard_normal((4, 4, 4), np.float32)
    args, places = (X, w), (P(), P("stage"))
    planned = check(
        jax.value_and_grad(scanned, 1), args, make_mesh(stage=4), places, (P(), P("stage"))
    )
    reduced = kinds(planned)["all_reduce", ("stage",)]
    assert reduced == (1, 4 * 2 * 3 / 4), planned  # the loss


PROGRAMS: dict[str, Callable[..., Any]] = {
    "two owners": lambda x, w: jnp.sin(x[0] @ w) * jnp.sin(x[-1] @ w),
    "two owners, one number": lambda x, w: (jnp.sin(x[0]) * jnp.sin(x[-1])).sum(),
    "two owners, one scaled": lambda x, w: (jnp.sin(x[0]) * (x[3] * 2.0)).sum(),
    "with a sum": lambda x, w: (jnp.sin(x[-1, :, :1]) * jnp.einsum("abc,c->b", x, w[:, 0])).sum(),
    "two of one owner": lambda x, w: (jnp.sin(x[6] @ w) * jnp.sin(x[7] @ w)).sum(),
    "with what is sharded": lambda x, w: (jnp.sin(x[2]) * x).sum((1, 2)),
    "back elsewhere": lambda x, w: jnp.pad(jnp.sin(x[7:]), ((1, 6), (0, 0), (0, 0))) + x,
    "back and read": lambda x, w: (
        jnp.pad(jnp.sin(x[7:]), ((7, 0), (0, 0), (0, 0))) + x, jnp.cos(x[7])
    ),
    "integers": lambda x, w: jnp.sum((x[3] * 9).astype(jnp.int32) // 2),
    "truth": lambda x, w: jnp.all((x > 0)[5] | (x[5] < -1)),
    "reduced before": lambda x, w: x.sum(1)[4] @ w,
    "chosen by it": lambda x, w: lax.cond(x[3, 0, 0] > 0, jnp.sin, jnp.cos, x[3]).sum(),
    "until it is small": lambda x, w: lax.while_loop(
        lambda y: jnp.abs(y).max() > 0.1, lambda y: y / 2, x[3]).sum(),
    "as often as it says": lambda x, w: lax.while_loop(
        lambda c: c < jnp.abs(x[3]).sum(), lambda c: 2 * c + 1, 1.0),
    "carried": lambda x, w: lax.scan(lambda c, _: (jnp.sin(c), c[0]), x[3], length=3)[1].sum(),
    "carried on": lambda x, w: lax.scan(
        lambda c, _: (jnp.sin((x * c)[3]), (x * c)[0].sum()), x[1], length=3)[1],
    "every step reads it": lambda x, w: lax.scan(
        lambda c, y: (c + (jnp.sin(y) @ w).sum(), (y * x[3]).sum(1)), 0.0, x[3] + x[:2] * 0),
    "computed again": lambda x, w: jax.grad(
        lambda x: jax.checkpoint(lambda y: jnp.sin(jnp.sin(y @ w)))(x[6]).sum())(x),
    "indices": lambda x, w: w[(x[2, :, 0] * 3).astype(jnp.int32) % 4].sum(),
    "one row": lambda x, w: jnp.where(x[4] > 0, jnp.log(jnp.abs(x[4])), 1.0).max(),
}  # fmt: skip


PLACES = [P("a"), P(("a", "b")), P("a", "b")]


def everything(x: Any, w: Any) -> Any:
    return {name: fun(x, w) for name, fun in PROGRAMS.items()}


@pytest.mark.parametrize("place", PLACES[1:], ids=str)
def test_values(place: Any) -> None:
    check(everything, (X, W), make_mesh(a=2, b=2), (place, P()), P())


@pytest.mark.parametrize("name", PROGRAMS)
def test_nothing_sends_more(name: str) -> None:
    for place in PLACES:
        late, early = (
            spmd.jit(
                PROGRAMS[name], mesh={"a": 2, "b": 2}, in_shardings=(place, P()),
                out_shardings=P(), disable_passes=off,
            ).trace(X, W).propagate().partition()
            for off in ((), ("late_broadcasts",))
        )  # fmt: skip
        assert late.wire_bytes <= early.wire_bytes, late


@pytest.mark.parametrize("fun", [last, PROGRAMS["two of one owner"]])
def test_what_others_hold_is_read_by_nobody(fun: Any) -> None:
    """Poison in place of it changes nothing."""
    places = (P(("a", "b")), P())
    assert spmd.check(fun, X, W, mesh=make_mesh(a=2, b=2), in_shardings=places, out_shardings=P())


def test_the_verifier_knows_who_has_it() -> None:
    found = spmd.jit(last, mesh={"a": 4}, in_shardings=(P("a"), P()), out_shardings=P())
    plan = found.trace(X, W).propagate().partition().plan
    verify(plan)

    def cut(one: Any, body: Any) -> Any:
        if isinstance(one, Compute) and one.op.primitive.name == "slice":
            (key,) = one.results
            assert owners_of(key.layout) == (("a", 3),)
            return replace(one, results=(key._replace(layout=Layout(key.layout.dims, OTHER)),))
        return one

    with pytest.raises(VerificationError) as raised:
        verify(rewritten(plan, cut))
    assert "partial{a:at 2} is made as [-, -, -] partial{a:add}" in str(raised.value)


def test_the_verifier_misses_no_step_that_leaves_the_owner_alone() -> None:
    found = spmd.jit(last, mesh={"a": 4}, in_shardings=(P("a"), P()), out_shardings=P())
    plan = found.trace(X, W).propagate().partition().plan

    def cut(one: Any, body: Any) -> Any:
        if isinstance(one, Move) and [step.kind for step in one.plan.steps][:1] == ["owner"]:
            return replace(one, plan=one.plan._replace(steps=one.plan.steps[1:]))
        return one

    with pytest.raises(VerificationError, match="is sent without its owner"):
        verify(rewritten(plan, cut))


OTHER = (("a", "at 2"),)
