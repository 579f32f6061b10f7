"""Pieces of programs: what one line, or a few, make of sharded arguments.

    python -m benchmarks.suite --target cpu --programs benchmarks.suite.fragments

Loops over examples, sorts, lookups, layers of FSDP with few examples: each alone sends little, but
is part of many a script.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P

from benchmarks.suite.case import array, ints
from benchmarks.suite.everyday import (
    BOTH,
    PARTS,
    ROWS,
    apply,
    descend,
    fsdp,
    network,
    program,
)
from sharding import shard


def rows(x: Any) -> Any:
    return lax.map(lambda row: jnp.tanh(row) * 2, x)


def examples(weights: Any, x: Any, y: Any) -> Any:
    """Ridge regression by gradient descent, one example after the other."""

    def loss(w: Any) -> Any:
        return lax.map(lambda pair: jnp.sum((pair[0] @ w - pair[1]) ** 2), (x, y)).mean()

    return descend(loss, weights)


def chunks(q: Any, k: Any, v: Any) -> Any:
    """Attention by chunks of 32 queries, and its gradient."""

    def attend(q: Any, k: Any, v: Any) -> Any:
        made = lax.map(lambda c: jax.nn.softmax(c @ k.T) @ v, q.reshape(-1, 32, q.shape[-1]))
        return (made.reshape(q.shape) ** 2).sum()

    return jax.grad(attend, (0, 1, 2))(q, k, v)


def medians(x: Any) -> Any:
    return jnp.median(x, axis=-1), jnp.quantile(x, 0.9, axis=-1)


def ranks(keys: Any) -> Any:
    return jnp.argsort(jnp.argsort(keys))


def shuffle(x: Any) -> Any:
    return jax.random.permutation(jax.random.key(0), x)


def views(x: Any, y: Any) -> Any:
    """Two views of a batch, joined as contrastive losses do."""
    return jnp.concatenate([x, y])


def power(a: Any, v: Any) -> Any:
    """Ten steps of a power iteration."""

    def step(v: Any, _: Any) -> tuple[Any, None]:
        v = a @ v
        return v / jnp.linalg.norm(v), None

    return lax.scan(step, v, None, length=10)[0]


def factors(users: Any, items: Any, who: Any, what: Any, rating: Any) -> Any:
    """A step of matrix factorisation; both tables and all ratings are sharded."""

    def loss(tables: Any) -> Any:
        left, right = tables[0][who], tables[1][what]
        return ((left * right).sum(-1) - rating).mean() ** 2

    return descend(loss, (users, items))


def autoencoder(layers: Any, x: Any) -> Any:
    """A variational one."""

    def loss(layers: Any) -> Any:
        mean, spread = jnp.split(apply(layers[0], x), 2, -1)
        noise = jax.random.normal(jax.random.key(0), mean.shape)
        made = apply(layers[1], mean + jnp.exp(spread / 2) * noise)
        return jnp.mean((made - x) ** 2) + jnp.mean(mean**2 + jnp.exp(spread) - spread)

    return descend(loss, layers)


def flat(x: Any, w: Any) -> Any:
    """A layer of the tokens of all examples, its columns over the axis of their positions."""
    return (x.reshape(-1, x.shape[-1]) @ w).reshape(*x.shape[:2], -1)


def unrolled(weights: Any, x: Any) -> Any:
    """A GRU over the positions of x [batch, positions, width], and its gradient."""

    def cell(h: Any, z: Any) -> Any:
        keep = jax.nn.sigmoid(z @ weights["zk"] + h @ weights["hk"])
        h = keep * h + (1 - keep) * jnp.tanh(z @ weights["zn"] + h @ weights["hn"])
        return h, h

    def loss(x: Any) -> Any:
        _, states = lax.scan(cell, jnp.zeros_like(x[:, 0]), x.swapaxes(0, 1))
        return (states**2).mean()

    return jax.grad(loss)(x)


def states(q: Any, k: Any, v: Any) -> Any:
    """Linear attention by chunks [batch, heads, chunks, positions, width], and its gradient."""

    def attend(q: Any, k: Any, v: Any) -> Any:
        made = jnp.moveaxis(k.swapaxes(-1, -2) @ v, 2, 0)
        _, before = lax.scan(lambda s, z: (s * 0.9 + z, s), jnp.zeros_like(made[0]), made)
        within = jnp.tril(q @ k.swapaxes(-1, -2)) @ v
        return ((within + q @ jnp.moveaxis(before, 0, 2)) ** 2).mean()

    return jax.grad(attend, (0, 1, 2))(q, k, v)


def smoothed(x: Any) -> Any:
    """Rows taken one by one, and written to a result."""

    def step(i: Any, state: Any) -> Any:
        level, made = state
        level = level * 0.9 + x[i] * 0.1
        return level, made.at[i].set(level)

    return lax.fori_loop(0, len(x), step, (x[0], jnp.zeros_like(x)))[1]


def selective(weights: Any, x: Any) -> Any:
    """A selective state space over positions, as Mamba has it, x [batch, positions, width]."""

    def loss(w: Any) -> Any:
        def step(h: Any, row: Any) -> Any:
            u, dt, b, c = row
            h = jnp.exp(-dt[..., None] * w["decay"] ** 2) * h + (dt * u)[..., None] * b[:, None]
            return h, (h * c[:, None]).sum(-1)

        rows = x @ w["in"], jax.nn.softplus(x @ w["step"]), x @ w["b"], x @ w["c"]
        start = jnp.zeros((len(x), *w["decay"].shape))
        _, y = lax.scan(step, start, tuple(row.swapaxes(0, 1) for row in rows))
        return ((y.swapaxes(0, 1) @ w["out"] - x) ** 2).mean()

    return descend(loss, weights)


def head(weights: Any, x: Any) -> Any:
    """A layer and a head of one column, FSDP and tensor parallel."""

    def loss(w: Any) -> Any:
        return ((jnp.tanh(x @ w["layer"]) @ w["head"]) ** 2).mean()

    return descend(loss, weights)


def orthogonal(x: Any) -> Any:
    """Four steps of Newton and Schulz, as Muon has them."""
    x = x / jnp.linalg.norm(x)
    for _ in range(4):
        x = 1.5 * x - 0.5 * (x @ x.T) @ x
    return x


def levels(table: Any, x: Any) -> Any:
    """Corners of a grid at four levels, looked up in a table by hashes, and its gradient."""

    def loss(table: Any) -> Any:
        found = []
        for level in range(4):
            place = jnp.abs(x) * 8 * 2**level
            corner, part = jnp.floor(place).astype(jnp.uint32), place - jnp.floor(place)
            for side in (0, 1):
                a, b, c = (corner + jnp.uint32(side)).T
                at = (a ^ b * jnp.uint32(2654435761) ^ c * jnp.uint32(805459861)) % table.shape[1]
                weight = jnp.abs(1 - side - part).prod(-1)
                found.append(weight[:, None] * table[level, at])
        return (jnp.concatenate(found, -1) ** 2).mean()

    return descend(loss, table)


def grouped(weights: Any, x: Any) -> Any:
    """Attention of 16 heads, of which 4 share a head of keys: fewer than there are devices."""

    def by_heads(x: Any) -> Any:
        return shard(x, None, None, "data", None)

    def loss(weights: Any) -> Any:
        q, k, v = (by_heads(jnp.einsum("bsm,mhd->bshd", x, weights[n])) for n in "qkv")
        q = q.reshape(*q.shape[:2], k.shape[2], -1, q.shape[3])
        scores = jax.nn.softmax(jnp.einsum("bskgd,btkd->bkgst", q, k), -1)
        found = jnp.einsum("bkgst,btkd->bskgd", scores, v).reshape(*q.shape[:2], -1, q.shape[4])
        return (jnp.einsum("bshd,hdm->bsm", by_heads(found), weights["o"]) ** 2).mean()

    return descend(loss, weights)


GRU = {name: array(64, 64) for name in ("zk", "hk", "zn", "hn")}
CHUNKS = array(4, 8, 16, 16, 16)
CODERS = [network(256, 512, 64), network(32, 512, 256)]
QUERIES, TABLE = array(1024, 64), array(4096, 16)
STATE = {
    **{name: array(64, 64) for name in ("in", "step", "out")},
    **{name: array(64, 8) for name in ("b", "c", "decay")},
}
NARROW = {"layer": array(64, 2048), "head": array(2048, 1)}
NARROW_PLACES = {"layer": P("data", "part"), "head": P("data")}
FEW_KEYS = {
    "q": array(64, 16, 8), "k": array(64, 4, 8), "v": array(64, 4, 8), "o": array(16, 8, 64),
}  # fmt: skip
BY_HEADS = {"q": P(None, "data"), "k": P(), "v": P(), "o": P("data")}

PROGRAMS = (
    program("rows", "`jax.lax.map` over rows", rows, (array(64, 4096),), (ROWS,), ROWS),
    program("examples", "a gradient, one example after the other", examples,
            (array(64, 16), array(512, 64), array(512, 16)), (P(), *BOTH), P()),
    program("chunks", "attention by chunks, positions sharded", chunks, (QUERIES,) * 3,
            (ROWS,) * 3, (ROWS,) * 3),
    program("medians", "of rows, both dims sharded", medians, (array(64, 4096),), (PARTS,), ROWS,
            pairs=True),
    program("ranks", "`argsort` of `argsort`", ranks, (ints(8192),), (ROWS,), ROWS, below=10**6),
    program("shuffle", "rows in another order", shuffle, (array(8192, 16),), (ROWS,), ROWS),
    program("views", "two batches joined", views, (array(8192, 16),) * 2, BOTH, ROWS),
    program("power", "a power iteration, two axes", power, (array(1024, 1024), array(1024)),
            (PARTS, ROWS), ROWS, pairs=True),
    program("factors", "matrix factorisation", factors,
            (TABLE, TABLE, ints(16384), ints(16384), array(16384)), (ROWS,) * 5, BOTH, below=4096),
    program("autoencoder", "a variational one, FSDP, few examples", autoencoder,
            (CODERS, array(128, 256)), (fsdp(CODERS), ROWS), fsdp(CODERS)),
    program("flat", "a layer of flat tokens, by columns", flat,
            (array(16, 64, 64), array(64, 256)), (PARTS, P(None, "part")),
            P("data", None, "part"), pairs=True),
    program("unrolled", "a GRU, positions sharded", unrolled, (GRU, array(16, 128, 64)),
            ({name: P() for name in GRU}, P(None, "data")), P(None, "data")),
    program("states", "linear attention by chunks, positions sharded", states, (CHUNKS,) * 3,
            (P("data", None, "part"),) * 3, (P("data", None, "part"),) * 3, pairs=True),
    program("smoothed", "rows of a sharded dim in a loop", smoothed, (array(512, 64),), (ROWS,),
            ROWS),
    program("selective", "a selective state space, batch and positions sharded", selective,
            (STATE, array(8, 128, 64)), ({name: P() for name in STATE}, PARTS),
            {name: P() for name in STATE}, pairs=True),
    program("head", "a layer and a head of one column, FSDP and tensor parallel", head,
            (NARROW, array(2048, 64)), (NARROW_PLACES, ROWS), NARROW_PLACES, pairs=True),
    program("orthogonal", "Newton and Schulz, both dims sharded", orthogonal, (array(256, 512),),
            (PARTS,), PARTS, pairs=True),
    program("levels", "corners of grids in a sharded table", levels,
            (array(4, 2048, 4), array(1024, 3)), (P(None, "data"), ROWS), P(None, "data")),
    program("grouped", "attention by heads, with fewer heads of keys than devices", grouped,
            (FEW_KEYS, array(4, 128, 64)), (BY_HEADS, P()), BY_HEADS),
)  # fmt: skip
