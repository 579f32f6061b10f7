"""Recurrences: a gated linear one as a scan over a sharded sequence, and an LSTM.

    recurrence  x [batch, sequence, width] -> short convolution -> gates a, b of h = a h + b
                -> associative scan over the sequence -> residual -> classes of positions
    lstm        x [batch, time, width] -> loop over time: gates from x and the state -> classes

The recurrence (RG-LRU, as in Griffin) has its sequence over devices: what one part ends with is
what the next begins with. The LSTM has its hidden state over `tensor`, which each step wants whole.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.sharding import PartitionSpec as P

from benchmarks.suite.case import Case, Program, Size, array, everywhere, normal
from benchmarks.suite.programs.experts import leave
from benchmarks.suite.programs.optimizers import cross_entropy, rms_norm, shaped, training_case
from sharding import shard

WINDOW = 4  # positions that the short convolution sees


def combine(left: tuple[Any, Any], right: tuple[Any, Any]) -> tuple[Any, Any]:
    """h -> a h + b of the left, then that of the right."""
    return left[0] * right[0], left[1] * right[0] + right[1]


def recurrence_loss(params: Any, x: Any, labels: Any) -> Any:
    """Cross entropy of positions: x [batch, sequence, width], labels [batch, sequence]."""

    def block(x: Any, layer: Any) -> tuple[Any, None]:
        u, gate = _inputs(layer, x)
        past = jnp.pad(u, ((0, 0), (WINDOW - 1, 0), (0, 0)))
        a, b = _gates(layer, past, x.shape[1])
        _, h = lax.associative_scan(combine, (a, b), axis=1)
        return shard(_outputs(layer, x, h, gate), "data", "sequence", None), None

    x, _ = lax.scan(block, x, params["layers"])
    return cross_entropy(x @ params["head"], labels)


def _inputs(layer: Any, x: Any) -> tuple[Any, Any]:
    normal = rms_norm(x, layer["norm"])
    return normal @ layer["in"], jax.nn.gelu(normal @ layer["gate"])


def _gates(layer: Any, past: Any, length: int) -> tuple[Any, Any]:
    """What a position keeps and adds: past [batch, WINDOW - 1 + length, hidden]."""
    taps = [past[:, i : i + length] * layer["conv"][i] for i in range(WINDOW)]
    u = sum(taps[1:], taps[0])
    keep = jax.nn.sigmoid((u @ layer["keep"]).astype(jnp.float32))
    log_a = -8.0 * keep * jax.nn.softplus(layer["rate"].astype(jnp.float32))
    taken = jax.nn.sigmoid(u @ layer["take"]) * u
    return jnp.exp(log_a), jnp.sqrt(-jnp.expm1(2 * log_a)) * taken


def _outputs(layer: Any, x: Any, h: Any, gate: Any) -> Any:
    return x + (h.astype(x.dtype) * gate) @ layer["out"]


def recurrence_by_hand(params: Any, x: Any, labels: Any) -> tuple[Any, Any]:
    """Loss and gradients on one device: its examples, and its part of the sequence.

    Each device scans its own part; what it did as a whole, one position, goes to all.
    """

    parts, here = lax.axis_size("sequence"), lax.axis_index("sequence")
    onward = [(i, i + 1) for i in range(parts - 1)]

    def block(x: Any, layer: Any) -> tuple[Any, None]:
        u, gate = _inputs(layer, x)
        before = lax.ppermute(u[:, 1 - WINDOW :], "sequence", onward)
        a, b = _gates(layer, jnp.concatenate([before, u], axis=1), x.shape[1])
        a, b = lax.associative_scan(combine, (a, b), axis=1)
        ends_a, ends_b = lax.all_gather((a[:, -1], b[:, -1]), "sequence")
        start = jnp.zeros_like(ends_b[0])
        for i in range(parts - 1):
            start = jnp.where(i < here, ends_a[i] * start + ends_b[i], start)
        return _outputs(layer, x, a * start[:, None] + b, gate), None

    def part_of_loss(params: Any) -> Any:
        y, _ = lax.scan(block, x, params["layers"])
        return cross_entropy(y @ params["head"], labels) / lax.axis_size(("data", "sequence"))

    return lax.psum(jax.value_and_grad(part_of_loss)(params), ("data", "sequence"))


def _recurrence(size: Size) -> Case:
    mesh = size.pick({"data": 2, "sequence": 4}, {"data": 2, "sequence": 8})
    layers, width, hidden, classes = size.pick((2, 32, 64, 16), (4, 2048, 2048, 1024))
    batch, length = size.pick((4, 256), (32, 4096))
    layer = {
        "norm": (width,), "in": (width, hidden), "gate": (width, hidden),
        "conv": (WINDOW, hidden), "keep": (hidden, hidden), "take": (hidden, hidden),
        "rate": (hidden,), "out": (hidden, width),
    }  # fmt: skip
    stacked = {name: (layers, *shape) for name, shape in layer.items()}
    shapes = {"layers": stacked, "head": (width, classes)}
    params = shaped(shapes, size.dtype)
    return training_case(
        recurrence_loss, optax.adamw(1e-3), params, everywhere(params),
        *_sequences(size, P("data", "sequence"), (batch, length, width)), mesh=mesh,
        batch_values=_values(size, (batch, length, width), classes),
        grads_by_hand=recurrence_by_hand,
    )  # fmt: skip


# --- LSTM -----------------------------------------------------------------------------------------


def lstm_loss(params: Any, x: Any, labels: Any) -> Any:
    """Cross entropy of positions: x [batch, time, width], labels [batch, time]."""
    y = x
    for layer in params["layers"]:
        inputs = jnp.einsum("btm,mgh->tbgh", y, layer["from_x"]) + layer["bias"]

        def cell(state: Any, z: Any, weights: Any = layer["from_h"]) -> Any:
            h, c = state
            h, c = _cell(z + jnp.einsum("bk,kgh->bgh", h, weights), c)
            return (shard(h, "data", "tensor"), c), h

        start = jnp.zeros((x.shape[0], layer["from_h"].shape[0]), x.dtype)
        y = lax.scan(cell, (start, start), inputs)[1].swapaxes(0, 1)
    return cross_entropy(y @ params["head"], labels)


def _cell(z: Any, c: Any) -> tuple[Any, Any]:
    """New state from the gates z [batch, 4, hidden] and the old cells."""
    take, keep, show, new = (z[:, i] for i in range(4))
    c = jax.nn.sigmoid(keep + 1) * c + jax.nn.sigmoid(take) * jnp.tanh(new)
    return jax.nn.sigmoid(show) * jnp.tanh(c), c


def lstm_by_hand(params: Any, x: Any, labels: Any) -> tuple[Any, Any]:
    """Loss and gradients on one device: its examples, and its part of the hidden state.

    A step gathers its new state, once for the next step, the next layer and the way back.
    """

    def part_of_loss(params: Any) -> Any:
        whole, own = x, x
        for layer in params["layers"]:
            inputs = jnp.einsum("btm,mgh->tbgh", whole, layer["from_x"]) + layer["bias"]

            def cell(state: Any, z: Any, weights: Any = layer["from_h"]) -> Any:
                before, c = state
                h, c = _cell(z + jnp.einsum("bk,kgh->bgh", before, weights), c)
                after = lax.all_gather(h, "tensor", axis=1, tiled=True)
                return (after, c), (after, h)

            hidden, part = layer["from_h"].shape[0], layer["bias"].shape[1]
            start = jnp.zeros((x.shape[0], hidden), x.dtype)
            _, states = lax.scan(cell, (start, start[:, :part]), inputs)
            whole, own = (y.swapaxes(0, 1) for y in states)
        logits = leave(own @ params["head"], "tensor")
        return cross_entropy(logits, labels) / lax.axis_size("data")

    return lax.psum(jax.value_and_grad(part_of_loss)(params), "data")


def _lstm(size: Size) -> Case:
    mesh = size.pick({"data": 2, "tensor": 4}, {"data": 4, "tensor": 4})
    layers, width, hidden, classes = size.pick((2, 32, 64, 16), (2, 1024, 2048, 1024))
    batch, length = size.pick((16, 16), (512, 256))
    tensor = P(None, None, "tensor")
    shapes, specs = [], []
    for i in range(layers):
        inside = width if i == 0 else hidden
        shapes.append({"from_x": (inside, 4, hidden), "from_h": (hidden, 4, hidden),
                       "bias": (4, hidden)})  # fmt: skip
        specs.append({"from_x": tensor, "from_h": tensor, "bias": P(None, "tensor")})
    params = shaped({"layers": shapes, "head": (hidden, classes)}, size.dtype)
    return training_case(
        lstm_loss, optax.adamw(1e-3), params, {"layers": specs, "head": P("tensor")},
        *_sequences(size, P("data"), (batch, length, width)), mesh=mesh,
        batch_values=_values(size, (batch, length, width), classes), grads_by_hand=lstm_by_hand,
    )  # fmt: skip


def _sequences(size: Size, spec: P, shape: tuple[int, int, int]) -> tuple[Any, Any]:
    """Shapes and specs of inputs [batch, length, width] and labels [batch, length]."""
    arrays = (array(*shape, dtype=size.dtype), array(*shape[:2], dtype=jnp.int32))
    return arrays, (spec, spec)


def _values(size: Size, shape: tuple[int, int, int], classes: int) -> Any:
    def values(rng: np.random.Generator) -> tuple[Any, ...]:
        x = normal(rng, shape, size.dtype)
        return x, rng.integers(0, classes, shape[:2], dtype=np.int32)

    return values


PROGRAMS = (
    Program("recurrence", "gated linear recurrence; its sequence over devices", _recurrence),
    Program("lstm", "two layers of LSTM; batch over data, hidden over tensor", _lstm),
)
