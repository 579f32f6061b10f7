"""Programs on which the cost model is checked: families of the same work, sharded in several ways.

Sizes are those of real runs on a small slice, so that arrays are larger than what a core keeps on
the chip, as they are on a pod.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.sharding import PartitionSpec as P

from models.shardings import rules_for
from models.transformer import TransformerConfig

BF16 = jnp.bfloat16


@dataclasses.dataclass(frozen=True)
class Program:
    """One way to shard a program on one machine.

    Attributes:
      family: programs of one family do the same work: they are alternatives.
      name: of the way to shard it.
      topology: as in `spmd.hardware.Machine.parse`.
      mesh: axis name -> size.
      make: () -> (function, abstract arguments, options of `spmd.jit`).
    """

    family: str
    name: str
    topology: str
    mesh: Mapping[str, int]
    make: Callable[[], tuple[Callable, tuple[Any, ...], dict[str, Any]]]

    @property
    def key(self) -> str:
        return f"{self.family}/{self.name}"


class Sizes(tuple[int, ...]):
    """Dims of a program's arrays, and their dtype."""

    dtype: Any

    def __new__(cls, *dims: int, dtype: Any = BF16) -> Sizes:
        made = super().__new__(cls, dims)
        made.dtype = dtype
        return made

    def array(self, *dims: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(dims, self.dtype)


# --- a transformer's training step ----------------------------------------------------------------


def _transformer(config: TransformerConfig, batch: int, parallelism: str, mesh: Any) -> Any:

    from models.loss import cross_entropy
    from models.transformer import Transformer
    from sharding import shard

    optimizer = optax.adamw(1e-3)
    sequence = 2048

    def step(params: Any, state: Any, tokens: Any) -> Any:
        tokens = shard(tokens, "batch", None)

        def loss_of(params: Any) -> Any:
            logits, _ = Transformer(config).apply({"params": params}, tokens[:, :-1])
            return cross_entropy(logits, tokens[:, 1:])

        loss, grads = jax.value_and_grad(loss_of)(params)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    init = partial(Transformer(config).init, jax.random.key(0))
    boxed = jax.eval_shape(lambda: init(jnp.zeros((1, 8), jnp.int32))["params"])
    state = jax.eval_shape(optimizer.init, boxed)
    tokens = jax.ShapeDtypeStruct((batch, sequence + 1), jnp.int32)
    options = {"axis_rules": rules_for(parallelism, mesh), "donate_argnums": (0, 1)}
    return step, (boxed, state, tokens), options


SMALL = TransformerConfig(
    vocab_size=32_000, num_layers=8, embed_dim=2048, mlp_dim=8192, num_heads=16, num_kv_heads=16,
    head_dim=128, dtype="bfloat16", remat="dots",
)  # fmt: skip
REMAT = dataclasses.replace(SMALL, remat="full", num_kv_heads=4)


def _transformers(
    family: str, config: TransformerConfig, batch: int, topology: str,
    ways: Mapping[str, Mapping[str, int]],
) -> list[Program]:  # fmt: skip
    return [
        Program(family, f"{parallelism} {'x'.join(map(str, mesh.values()))}", topology, mesh,
                partial(_transformer, config, batch, parallelism, mesh))
        for parallelism, mesh in ways.items()
    ]  # fmt: skip


# --- feed-forward layers --------------------------------------------------------------------------


def _mlp(sizes: Sizes, x_spec: P, up: P, down: P) -> Any:
    tokens, width, hidden, layers = sizes

    def step(params: Any, x: Any) -> Any:
        def loss_of(params: Any) -> Any:
            y, _ = lax.scan(lambda y, w: (y + jax.nn.gelu(y @ w[0]) @ w[1], None), x, params)
            return jnp.mean(jnp.square(y.astype(jnp.float32)))

        grads = jax.grad(loss_of)(params)
        return jax.tree.map(lambda p, g: p - 0.1 * g, params, grads)

    params = (sizes.array(layers, width, hidden), sizes.array(layers, hidden, width))
    specs = ((P(None, *up), P(None, *down)), x_spec)
    return step, (params, sizes.array(tokens, width)), {
        "in_shardings": specs, "out_shardings": specs[0], "donate_argnums": 0,
    }  # fmt: skip


MLP = {
    "data": ({"data": 16}, P("data"), P(), P()),
    "zero3": ({"data": 16}, P("data"), P("data"), P("data")),
    "tensor": ({"tensor": 16}, P(), P(None, "tensor"), P("tensor")),
    "data+tensor": ({"data": 4, "tensor": 4}, P("data"), P(None, "tensor"), P("tensor")),
    "2d": ({"data": 4, "tensor": 4}, P("data", "tensor"), P("data", "tensor"), P("tensor", "data")),
}  # fmt: skip


# --- attention over a cache, one position at a time -----------------------------------------------


def _decode(sizes: Sizes, q_spec: P, cache_spec: P) -> Any:
    batch, heads, groups, length, width = sizes

    def step(q: Any, keys: Any, values: Any) -> Any:
        scores = jnp.einsum("bhgd,bhtd->bhgt", q, keys).astype(jnp.float32)
        weights = jax.nn.softmax(scores).astype(q.dtype)
        return jnp.einsum("bhgt,bhtd->bhgd", weights, values)

    cache = sizes.array(batch, heads, length, width)
    specs = (q_spec, cache_spec, cache_spec)
    queries = sizes.array(batch, heads, groups, width)
    return step, (queries, cache, cache), {"in_shardings": specs}


DECODE = {
    "batch": ({"x": 8}, P("x"), P("x")),
    "heads": ({"x": 8}, P(None, "x"), P(None, "x")),
    "sequence": ({"x": 8}, P(), P(None, None, "x")),
}


# --- convolutions ---------------------------------------------------------------------------------


def _convolutions(sizes: Sizes, x_spec: P) -> Any:
    batch, channels, side, layers = sizes

    def step(kernels: Any, x: Any) -> Any:
        def loss_of(kernels: Any) -> Any:
            y = x
            for kernel in kernels:
                dims = ("NHWC", "HWIO", "NHWC")
                z = lax.conv_general_dilated(y, kernel, (1, 1), "SAME", dimension_numbers=dims)
                y = y + jax.nn.relu(z)
            return jnp.mean(jnp.square(y.astype(jnp.float32)))

        grads = jax.grad(loss_of)(kernels)
        return jax.tree.map(lambda p, g: p - 0.1 * g, kernels, grads)

    kernels = [sizes.array(3, 3, channels, channels)] * layers
    return step, (kernels, sizes.array(batch, side, side, channels)), {
        "in_shardings": (None, x_spec), "donate_argnums": 0,
    }  # fmt: skip


CONVOLUTIONS = {
    "batch": ({"x": 8}, P("x")),
    "rows": ({"x": 8}, P(None, "x")),
    "batch+rows": ({"x": 2, "y": 4}, P("x", "y")),
}


# --- mixture of experts ---------------------------------------------------------------------------


def _experts(sizes: Sizes, x_spec: P, w_spec: P) -> Any:
    groups, tokens, width, hidden, experts = sizes
    capacity = 2 * tokens // experts

    def step(gate: Any, up: Any, down: Any, x: Any) -> Any:
        def loss_of(weights: Any) -> Any:
            gate, up, down = weights
            share = jax.nn.softmax((x @ gate).astype(jnp.float32))
            best, chosen = lax.top_k(share, 2)
            mask = jax.nn.one_hot(chosen, experts).sum(-2)
            place = jnp.cumsum(mask, 1) - 1
            send = (mask[..., None] * jax.nn.one_hot(place, capacity)).astype(x.dtype)
            inside = jnp.einsum("gsec,gsm->egcm", send, x)
            inside = jax.nn.gelu(jnp.einsum("egcm,emh->egch", inside, up))
            outside = jnp.einsum("egch,ehm->egcm", inside, down)
            back = send * (share * mask / best.sum(-1, keepdims=True))[..., None].astype(x.dtype)
            y = jnp.einsum("gsec,egcm->gsm", back, outside)
            return jnp.mean(jnp.square(y.astype(jnp.float32)))

        weights = (gate, up, down)
        return jax.tree.map(lambda p, g: p - 0.1 * g, weights, jax.grad(loss_of)(weights))

    shapes = ((width, experts), (experts, width, hidden), (experts, hidden, width))
    args = [sizes.array(*shape) for shape in (*shapes, (groups, tokens, width))]
    return step, args, {
        "in_shardings": (None, w_spec, w_spec, x_spec), "donate_argnums": (0, 1, 2),
    }  # fmt: skip


EXPERTS = {
    "experts": ({"x": 16}, P("x"), P("x")),
    "data": ({"x": 16}, P("x"), P()),
    "data+experts": ({"x": 4, "y": 4}, P(("x", "y")), P("y")),
}


def _family(
    family: str, topology: str, ways: Mapping[str, Any], make: Callable, sizes: Sizes
) -> list[Program]:
    return [
        Program(family, name, topology, mesh, partial(make, sizes, *specs))
        for name, (mesh, *specs) in ways.items()
    ]


def _eighths(ways: Mapping[str, Any]) -> dict[str, Any]:
    """The same ways on 8 devices: axes of 16 become 8, and 4x4 becomes 2x4."""
    smaller = {(16,): (8,), (4, 4): (2, 4)}
    return {
        name: (dict(zip(mesh, smaller.get(tuple(mesh.values()), tuple(mesh.values())),
                        strict=True)), *specs)
        for name, (mesh, *specs) in ways.items()
    }  # fmt: skip


# --- programs of the suite ------------------------------------------------------------------------


def _suite(name: str) -> Any:
    from benchmarks.suite.case import LARGE
    from benchmarks.suite.registry import programs

    case = next(p for p in programs() if p.name == name).make(LARGE)
    return case.fun, case.args, {
        "in_shardings": case.in_specs, "out_shardings": case.out_specs,
        "axis_rules": case.axis_rules, "donate_argnums": case.donate,
    }  # fmt: skip


def _of_suite(name: str, topology: str, mesh: Mapping[str, int]) -> Program:
    return Program(f"suite {topology.partition(':')[0]}", name, topology, mesh,
                   partial(_suite, name))  # fmt: skip


PROGRAMS = [
    *_transformers("transformer v5p", SMALL, 32, "v5p:2x2x4", {
        "fsdp": {"fsdp": 16}, "tensor": {"data": 4, "tensor": 4},
        "tensor_sequence": {"data": 4, "tensor": 4}, "2d": {"data": 4, "tensor": 4},
        "fsdp+tensor": {"fsdp": 4, "tensor": 4},
    }),
    *_transformers("remat v5e", REMAT, 32, "v5e:4x4", {
        "fsdp": {"fsdp": 16}, "tensor_sequence": {"data": 4, "tensor": 4},
        "2d": {"data": 4, "tensor": 4}, "fsdp+tensor": {"fsdp": 4, "tensor": 4},
    }),
    *_family("mlp v4", "v4:2x2x4", MLP, _mlp, Sizes(16384, 4096, 16384, 6)),
    *_family("decode v6e", "v6e:2x4", DECODE, _decode, Sizes(128, 8, 4, 8192, 128)),
    *_family("convolutions v3", "v3:2x2", CONVOLUTIONS, _convolutions, Sizes(16, 256, 256, 4)),
    *_family("experts v5p", "v5p:2x2x4", EXPERTS, _experts, Sizes(16, 2048, 2048, 8192, 16)),
]

# Measured later. They showed what the model lacked: that temporaries of newer chips lie in the
# core's own memory, what leaves a product and what is computed inside of one, that what a loop
# stacks has a place of its own, and that few features are padded.
LATER = [
    *_family("convolutions v5e", "v5e:2x4", {
        name: CONVOLUTIONS[name] for name in ("batch", "rows")
    }, _convolutions, Sizes(64, 128, 128, 6)),
    *_family("experts v6e", "v6e:2x4", _eighths({
        name: EXPERTS[name] for name in ("experts", "data")
    }), _experts, Sizes(32, 1024, 1024, 4096, 8)),
    _of_suite("lstm", "v5e:4x4", {"data": 4, "tensor": 4}),
    _of_suite("dlrm", "v5p:2x2x4", {"data": 16}),
    _of_suite("unet_2d", "v3:2x4", {"x": 4, "y": 4}),
    _of_suite("cnn", "v3:2x4", {"data": 16}),
    _of_suite("graph", "v4:2x2x4", {"data": 16}),
    _of_suite("muon", "v5p:2x2x4", {"data": 16}),
    _of_suite("unet_3d", "v5e:4x4", {"data": 4, "space": 4}),
]
# Measured last, and predicted before: nothing in the model comes from these.
UNSEEN = [
    _of_suite("lstm", "v6e:2x4", {"data": 2, "tensor": 4}),
    _of_suite("gaussian_process", "v5e:4x4", {"data": 16}),
    _of_suite("spectral", "v5p:2x2x4", {"data": 4, "tensor": 4}),
    _of_suite("decode", "v5p:2x2x4", {"data": 4, "tensor": 4}),
    _of_suite("recurrence", "v6e:4x4", {"data": 2, "sequence": 8}),
    _of_suite("long_context", "v5p:2x2x4", {"data": 2, "sequence": 8}),
    _of_suite("uneven_heads", "v4:2x2x4", {"data": 4, "tensor": 4}),
]

# Simulated devices share the cores and the memory of one machine: what differs there is how much
# work is done twice. Each family has a way that shards little, and one that shards nothing.
PART = {"x": 2, "y": 4}
F32 = jnp.float32
ON_CPU = [
    *_family("mlp", "cpu:8", {
        **_eighths(MLP), "data of 2": (PART, P("x"), P(), P()), "none": (PART, P(), P(), P()),
    }, _mlp, Sizes(2048, 512, 2048, 4, dtype=F32)),
    *_family("decode", "cpu:8", {
        **DECODE, "batch of 2": (PART, P("x"), P("x")), "none": (PART, P(), P()),
    }, _decode, Sizes(32, 8, 4, 2048, 64, dtype=F32)),
    *_family("convolutions", "cpu:8", {
        "batch+rows": CONVOLUTIONS["batch+rows"], "batch of 2": (PART, P("x")),
        "none": (PART, P()),
    }, _convolutions, Sizes(8, 16, 64, 3, dtype=F32)),
    *_family("experts", "cpu:8", {
        **_eighths(EXPERTS), "data of 2": (PART, P("x"), P()), "none": (PART, P(), P()),
    }, _experts, Sizes(8, 256, 256, 512, 8, dtype=F32)),
]  # fmt: skip
