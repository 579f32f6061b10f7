"""Programs that are no networks, and steps around them: arguments are sharded, nothing inside is.

    python -m benchmarks.suite --target cpu --programs benchmarks.suite.everyday

Grids, particles, statistics, graphs, microbatches, reinforcement learning: one axis, `data`, over
the dim that a user would shard first; a second one where dims are made one. What they send shows
what propagation and rules make of code that nobody wrote for several devices.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec as P

from benchmarks.suite.case import Case, Program, Size, array, drawn, everywhere, ints

ROWS, COLUMNS = P("data"), P(None, "data")
WIDTH = 64


def program(
    name: str, text: str, fun: Callable, args: Sequence[Any], ins: Sequence[Any], outs: Any,
    below: int = 0, pairs: bool = False,
) -> Program:  # fmt: skip
    """A program with the same arguments at every size; integers are drawn `below` a bound.

    Args:
      pairs: the mesh has a second axis, `part`, of half of the devices.
    """

    def values(rng: np.random.Generator) -> tuple[Any, ...]:
        def one(leaf: Any, value: Any) -> Any:
            if not below or not jnp.issubdtype(leaf.dtype, jnp.integer):
                return value
            return rng.integers(0, below, leaf.shape, leaf.dtype)

        return jax.tree.map(one, tuple(args), drawn(rng, tuple(args)))

    def make(size: Size) -> Case:
        two = {"data": 2, "part": size.devices // 2}
        mesh = two if pairs else {"data": size.devices}
        return Case(fun, tuple(args), mesh, tuple(ins), outs, values=values)

    return Program(name, text, make)


# --- grids ---------------------------------------------------------------------------------------


def wave(u: Any, v: Any) -> Any:
    """A wave equation: the inside of a grid changes, its rim stays."""

    def step(carry: Any, _: Any) -> Any:
        u, v = carry
        around = u[:-2, 1:-1] + u[2:, 1:-1] + u[1:-1, :-2] + u[1:-1, 2:]
        v = v.at[1:-1, 1:-1].add(0.1 * (around - 4 * u[1:-1, 1:-1]))
        return (u + 0.1 * v, v), None

    return lax.scan(step, (u, v), None, length=10)[0]


def fdtd(e: Any, h: Any) -> Any:
    """Maxwell's equations in one dim, on two grids that are half a step apart."""

    def step(carry: Any, _: Any) -> Any:
        e, h = carry
        e = e.at[1:].add(0.5 * (h[1:] - h[:-1]))
        h = h.at[:-1].add(0.5 * (e[1:] - e[:-1]))
        return (e, h), None

    return lax.scan(step, (e, h), None, length=8)[0]


def burgers(u: Any) -> Any:
    """Burgers' equation by the Lax-Friedrichs scheme."""

    def step(u: Any, _: Any) -> Any:
        flux = 0.25 * (u[1:] ** 2 + u[:-1] ** 2) - 0.5 * (u[1:] - u[:-1])
        return u.at[1:-1].set(u[1:-1] - 0.1 * (flux[1:] - flux[:-1])), None

    return lax.scan(step, u, None, length=8)[0]


def jacobi(u: Any, b: Any) -> Any:
    """Poisson's equation by Jacobi's iteration, with zeros around."""

    def step(_: Any, u: Any) -> Any:
        v = jnp.pad(u, 1)
        return 0.25 * (v[:-2, 1:-1] + v[2:, 1:-1] + v[1:-1, :-2] + v[1:-1, 2:] + b)

    return lax.fori_loop(0, 8, step, u)


def life(x: Any) -> Any:
    """Conway's game on a torus."""
    near = [(a, b) for a in (-1, 0, 1) for b in (-1, 0, 1) if a or b]

    def step(_: Any, x: Any) -> Any:
        count = sum(jnp.roll(x, shift, (0, 1)) for shift in near)
        return ((count == 3) | ((x > 0) & (count == 2))).astype(x.dtype)

    return lax.fori_loop(0, 8, step, x)


# --- statistics and graphs -----------------------------------------------------------------------


def kmeans(x: Any, centres: Any) -> Any:
    def step(centres: Any, _: Any) -> Any:
        apart = ((x[:, None] - centres[None]) ** 2).sum(-1)
        mine = jax.nn.one_hot(jnp.argmin(apart, 1), centres.shape[0])
        return (mine.T @ x) / (mine.sum(0)[:, None] + 1e-6), None

    return lax.scan(step, centres, None, length=5)[0]


def pagerank(source: Any, target: Any, degree: Any) -> Any:
    count = degree.shape[0]

    def step(rank: Any, _: Any) -> Any:
        sent = (rank / (1 + jnp.abs(degree)))[source]
        return 0.15 / count + 0.85 * jax.ops.segment_sum(sent, target, count), None

    return lax.scan(step, jnp.ones(count) / count, None, length=8)[0]


def percentiles(x: Any) -> Any:
    return jnp.percentile(x, jnp.array([5.0, 50.0, 95.0]), axis=0)


def autocorrelation(x: Any) -> Any:
    return jnp.fft.irfft(jnp.abs(jnp.fft.rfft(x)) ** 2)


def particles(x: Any, seen: Any) -> Any:
    """A particle filter: particles move, are weighed, and drawn again."""

    def step(x: Any, given: Any) -> Any:
        y, key = given
        x = x + 0.1 * jax.random.normal(key, x.shape)
        chosen = jax.random.categorical(key, -((x - y) ** 2).sum(-1), shape=(x.shape[0],))
        return x[chosen], x.mean(0)

    return lax.scan(step, x, (seen, jax.random.split(jax.random.key(0), seen.shape[0])))[1]


# --- around networks -----------------------------------------------------------------------------


def network(*widths: int) -> list[Any]:
    return [(array(a, b), array(b)) for a, b in zip(widths, widths[1:], strict=False)]


def fsdp(tree: Any) -> Any:
    """The larger dim of each weight over `data`; biases too."""
    return jax.tree.map(lambda s: COLUMNS if s.shape[-1] >= s.shape[0] < s.size else ROWS, tree)


def apply(layers: Any, x: Any) -> Any:
    for weights, bias in layers[:-1]:
        x = jax.nn.relu(x @ weights + bias)
    return x @ layers[-1][0] + layers[-1][1]


def descend(loss: Callable[[Any], Any], layers: Any) -> Any:
    return jax.tree.map(lambda p, g: p - 1e-3 * g, layers, jax.grad(loss)(layers))


def contrast(towers: Any, left: Any, right: Any) -> Any:
    """Pairs of a batch against each other, as CLIP is trained."""

    def loss(towers: Any) -> Any:
        pairs = (apply(tower, x) for tower, x in zip(towers, (left, right), strict=True))
        u, v = (x / jnp.linalg.norm(x, axis=-1, keepdims=True) for x in pairs)
        scores = 10 * u @ v.T
        both = jax.nn.log_softmax(scores) + jax.nn.log_softmax(scores.T)
        return -jnp.mean(jnp.diagonal(both))

    return descend(loss, towers)


def accumulate(layers: Any, x: Any, y: Any) -> Any:
    """Gradients of four microbatches, added up in a loop."""

    def micro(total: Any, pair: Any) -> Any:
        gradient = jax.grad(lambda p: jnp.mean((apply(p, pair[0]) - pair[1]) ** 2))(layers)
        return jax.tree.map(jnp.add, total, gradient), None

    split = tuple(v.reshape(4, -1, WIDTH) for v in (x, y))
    total, _ = lax.scan(micro, jax.tree.map(jnp.zeros_like, layers), split)
    return jax.tree.map(lambda p, g: p - 1e-3 * g, layers, total)


def ode(layers: Any, x: Any, y: Any) -> Any:
    """A neural ODE: eight steps of Runge and Kutta, and the gradient through them."""

    def loss(layers: Any) -> Any:
        def step(x: Any, _: Any) -> Any:
            slope = lambda x: jnp.tanh(apply(layers, x))  # noqa: E731
            a = slope(x)
            b = slope(x + 0.05 * a)
            c = slope(x + 0.05 * b)
            return x + 0.1 / 6 * (a + 2 * b + 2 * c + slope(x + 0.1 * c)), None

        return jnp.mean((lax.scan(step, x, None, length=8)[0] - y) ** 2)

    return descend(loss, layers)


def policy(layers: Any, start: Any) -> Any:
    """A policy that is played for 16 steps in many environments, and trained on what came of it."""

    def step(state: Any, key: Any) -> Any:
        action = jnp.tanh(apply(layers, state)) + 0.1 * jax.random.normal(key, state.shape)
        return 0.9 * state + 0.1 * action, (state, action, -(state**2).sum(-1))

    keys = jax.random.split(jax.random.key(0), 16)
    _, (states, actions, rewards) = lax.scan(step, start, keys)
    returns = lax.associative_scan(jnp.add, rewards, reverse=True)
    worth = (returns - returns.mean()) / (returns.std() + 1e-6)

    def loss(layers: Any) -> Any:
        return jnp.mean(worth[..., None] * (jnp.tanh(apply(layers, states)) - actions) ** 2)

    return descend(loss, layers)


def minibatches(layers: Any, x: Any, y: Any) -> Any:
    """One epoch inside of the step: eight minibatches of a dataset, in order."""

    def step(layers: Any, pair: Any) -> Any:
        return descend(lambda p: jnp.mean((apply(p, pair[0]) - pair[1]) ** 2), layers), None

    return lax.scan(step, layers, tuple(v.reshape(8, -1, WIDTH) for v in (x, y)))[0]


def shuffled(layers: Any, x: Any, y: Any) -> Any:
    """The same, its rows drawn anew."""

    def step(layers: Any, rows: Any) -> Any:
        return descend(lambda p: jnp.mean((apply(p, x[rows]) - y[rows]) ** 2), layers), None

    order = jax.random.permutation(jax.random.key(0), len(x)).reshape(8, -1)
    return lax.scan(step, layers, order)[0]


# --- two axes, and dims made one -----------------------------------------------------------------


def tokens(head: Any, features: Any, ids: Any) -> Any:
    """The loss of a vocabulary of 1,024, of tokens without regard to where they come from."""

    def loss(head: Any) -> Any:
        logits = (features @ head).reshape(-1, head.shape[1])
        picked = jnp.take_along_axis(jax.nn.log_softmax(logits), ids.reshape(-1, 1), 1)
        return -picked.mean()

    return descend(loss, head)


def heads(x: Any) -> Any:
    """Attention over examples and heads as one dim."""
    batch, length, number, width = x.shape
    h = x.transpose(0, 2, 1, 3).reshape(batch * number, length, width)
    h = jax.nn.softmax(h @ h.swapaxes(1, 2)) @ h
    return h.reshape(batch, number, length, width).transpose(0, 2, 1, 3)


def windows(weights: Any, x: Any) -> Any:
    """Attention inside of windows of 4 x 4 of images, as Swin transformers have it."""
    batch, rows, columns, width = x.shape
    h = x.reshape(batch, rows // 4, 4, columns // 4, 4, width).transpose(0, 1, 3, 2, 4, 5)
    q, k, v = jnp.split(h.reshape(-1, 16, width) @ weights, 3, -1)
    h = jax.nn.softmax(q @ k.swapaxes(1, 2) / width**0.5) @ v
    h = h.reshape(batch, rows // 4, columns // 4, 4, 4, width)
    return h.transpose(0, 1, 3, 2, 4, 5).reshape(x.shape)


# --- positions -----------------------------------------------------------------------------------


def positions(weights: Any, x: Any, y: Any) -> Any:
    """Four layers of causal attention with eight heads, positions sharded."""

    def layer(x: Any, w: Any) -> tuple[Any, None]:
        q, k, v = (jnp.einsum("btc,chd->bthd", x, w[name]) for name in "qkv")
        made = jax.nn.dot_product_attention(q, k, v, is_causal=True)
        return x + jnp.einsum("bthd,hdc->btc", made, w["o"]), None

    return descend(lambda w: jnp.mean((lax.scan(layer, x, w)[0] - y) ** 2), weights)


def mixer(layers: Any, x: Any, y: Any) -> Any:
    """Layers along positions, which are sharded, between those along features."""

    def loss(layers: Any) -> Any:
        mixed = x + apply(layers[0], x.swapaxes(1, 2)).swapaxes(1, 2)
        return jnp.mean((mixed + apply(layers[1], mixed) - y) ** 2)

    return descend(loss, layers)


GRID, LINE = array(512, 512), array(4096, 16)
LAYERS = network(WIDTH, 4 * WIDTH, 4 * WIDTH, WIDTH)
TOWERS = [network(WIDTH, 4 * WIDTH, WIDTH)] * 2
BATCH, DATASET = array(512, WIDTH), array(32768, WIDTH)
SMALL = network(WIDTH, WIDTH, WIDTH)

HEADS_8 = {**{n: array(4, 256, 8, 32) for n in "qkv"}, "o": array(4, 8, 32, 256)}
MIXERS = [network(512, 1024, 512), network(128, 256, 128)]

BOTH = (ROWS, ROWS)
PARTS, HEADS = P("data", "part"), P("data", None, "part")

PROGRAMS = (
    program("wave", "a wave equation, rows of a grid", wave, (GRID, GRID), BOTH, BOTH),
    program("fdtd", "Maxwell's equations in one dim", fdtd, (LINE, LINE), BOTH, BOTH),
    program("burgers", "Burgers' equation", burgers, (array(4096),), (ROWS,), ROWS),
    program("jacobi", "Poisson's equation, rows of a grid", jacobi, (GRID, GRID), BOTH, ROWS),
    program("life", "Conway's game, rows of a torus", life, (GRID,), (ROWS,), ROWS),
    program("kmeans", "k-means, points", kmeans, (LINE, array(32, 16)), (ROWS, P()), P()),
    program("pagerank", "ranks of pages, edges and nodes", pagerank,
             (ints(16384), ints(16384), array(2048)), (*BOTH, ROWS), ROWS, below=2048),
    program("percentiles", "of columns, rows sharded", percentiles, (array(4096, 64),), (ROWS,),
             P()),
    program("autocorrelation", "of many series, by FFT", autocorrelation, (array(64, 4096),),
             (ROWS,), ROWS),
    program("particles", "a particle filter", particles, (array(1024, 4), array(8, 4)),
             (ROWS, P()), P()),
    program("contrast", "contrastive towers, FSDP", contrast, (TOWERS, BATCH, BATCH),
             (fsdp(TOWERS), *BOTH), fsdp(TOWERS)),
    program("accumulate", "microbatches, FSDP", accumulate, (LAYERS, BATCH, BATCH),
             (fsdp(LAYERS), *BOTH), fsdp(LAYERS)),
    program("ode", "a neural ODE, the batch sharded", ode, (LAYERS, BATCH, BATCH),
             (everywhere(LAYERS), *BOTH), everywhere(LAYERS)),
    program("ode_fsdp", "the same, FSDP", ode, (LAYERS, BATCH, BATCH),
             (fsdp(LAYERS), *BOTH), fsdp(LAYERS)),
    program("policy", "reinforcement learning, FSDP", policy, (LAYERS, BATCH),
             (fsdp(LAYERS), ROWS), fsdp(LAYERS)),
    program("minibatches", "of a dataset on the devices, in order", minibatches,
             (SMALL, DATASET, DATASET), (everywhere(SMALL), *BOTH), everywhere(SMALL)),
    program("shuffled", "the same, drawn anew", shuffled, (SMALL, DATASET, DATASET),
             (everywhere(SMALL), *BOTH), everywhere(SMALL)),
    program("tokens", "a loss of flat tokens, batch and sequence sharded", tokens,
             (array(WIDTH, 1024), array(16, 64, WIDTH), ints(16, 64)), (P(), PARTS, PARTS), P(),
             below=1024, pairs=True),
    program("heads", "examples and heads as one dim, both sharded", heads, (array(16, 64, 8, 16),),
             (HEADS,), HEADS, pairs=True),
    program("windows", "windows of images, batch and rows sharded", windows,
             (array(32, 96), array(16, 32, 16, 32)), (P(), PARTS), PARTS, pairs=True),
    program("positions", "attention, positions sharded", positions,
             (HEADS_8, array(2, 512, 256), array(2, 512, 256)),
             (everywhere(HEADS_8), COLUMNS, COLUMNS), everywhere(HEADS_8)),
    program("mixer", "layers along positions, which are sharded", mixer,
             (MIXERS, array(16, 512, 128), array(16, 512, 128)),
             (everywhere(MIXERS), COLUMNS, COLUMNS), everywhere(MIXERS)),
)  # fmt: skip
