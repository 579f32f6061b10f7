"""One decoder-only transformer's training step, sharded in the ways that people train with.

`PROGRAMS` pairs one model with tables of what its dim names mean on the mesh: parameters and a few
activations carry names, as in models/. Data flows `train_step` -> `loss_of` -> `layer` under a scan
over stacked parameters; `make` puts a way and a size together to a case. What an expert writes
instead is in transformer_by_hand.py.

Shape suffixes (logical dims, never the sharding):
  B batch   S query position   T key position   D embed   V vocab   L layer
  K key/value head   G query head of one key/value head   E head dim   F feed-forward hidden
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P

from benchmarks.suite.case import Case, Program, Size, array, normal
from models.loss import cross_entropy
from models.transformer import attend, rotate
from sharding import shard

ROPE_BASE = 10_000.0
OPTIMIZER = optax.adamw(1e-3)

# What the backward pass finds saved: results of matmuls, the summed ones after the sum. It computes
# norms, rotations, softmax and gates again, as most do who train models of this size.
SAVED = jax.checkpoint_policies.save_only_these_names(
    "query", "key", "value", "attended", "gate", "up"
)


class Config(NamedTuple):
    """Sizes of the model, and of what it reads in a step."""

    vocab: int
    layers: int
    embed: int
    mlp: int
    kv_heads: int
    groups: int  # query heads of one key/value head
    head_dim: int
    batch: int
    sequence: int


def config_of(size: Size, **changes: Any) -> Config:
    """A layer as of a 1 to 3 billion parameter model, or one in which everything is a 16th."""
    small = Config(2048, 4, 128, 512, 4, 2, 16, 16, 64)
    return size.pick(small, Config(32_000, 4, 2048, 8192, 4, 4, 128, 32, 2048))._replace(**changes)


# Names of the parameters' dims. Heads and head dim are one dim, as in most checkpoints.
LAYER_DIMS: Mapping[str, tuple[str, ...]] = {
    "attention_norm": ("layers", "norm"),
    "query": ("layers", "embed", "heads"),
    "key": ("layers", "embed", "heads"),
    "value": ("layers", "embed", "heads"),
    "attention_out": ("layers", "heads", "embed"),
    "mlp_norm": ("layers", "norm"),
    "gate": ("layers", "embed", "mlp"),
    "up": ("layers", "embed", "mlp"),
    "down": ("layers", "mlp", "embed"),
}
DIMS: Mapping[str, Any] = {
    "embedding": ("vocab", "embed"),
    "layers": LAYER_DIMS,
    "final_norm": ("norm",),
    "output": ("embed", "vocab"),
}
ACTIVATIONS = (
    "batch",
    # of the residual stream, between the sub-layers
    "residual_sequence",
    "residual_embed",
    # of what a sub-layer reads
    "inner_sequence",
    "inner_embed",
)
NAMES = ("layers", "vocab", "embed", "norm", "heads", "mlp", *ACTIVATIONS)
Rules = Mapping[str, str]

_TENSOR: Rules = {"vocab": "tensor", "heads": "tensor", "mlp": "tensor"}
_WEIGHTS: Rules = {"embed": "fsdp", "norm": "fsdp", "batch": "fsdp"}
MEGATRON: Rules = {"batch": "data", **_TENSOR}
MEGATRON_SEQUENCE: Rules = {**MEGATRON, "residual_sequence": "tensor"}
FSDP: Rules = _WEIGHTS
FSDP_TENSOR: Rules = {**_WEIGHTS, **_TENSOR}
# GSPMD (arXiv 2105.04663), section 5.1, in the finalised form: weights on both axes, activations
# with the batch on the first and the model dim on the second.
SHARDING_2D: Rules = {**MEGATRON, "embed": "data", "norm": "tensor"}
SHARDING_2D |= {"residual_embed": "tensor", "inner_embed": "tensor"}


def parameters(config: Config, dtype: Any) -> dict[str, Any]:
    """Shapes of the parameters: a dict of arrays, with those of all layers stacked."""
    c = config
    sizes = {"layers": c.layers, "vocab": c.vocab, "embed": c.embed, "norm": c.embed, "mlp": c.mlp}
    heads = {"query": c.kv_heads * c.groups * c.head_dim, "key": c.kv_heads * c.head_dim}
    heads |= {"value": heads["key"], "attention_out": heads["query"]}

    def one(name: str, dims: tuple[str, ...]) -> jax.ShapeDtypeStruct:
        return array(*(heads[name] if d == "heads" else sizes[d] for d in dims), dtype=dtype)

    return _each(one, DIMS)


def parameter_specs(rules: Rules) -> dict[str, Any]:
    """Shaped like `parameters`."""
    return _each(lambda _, dims: P(*map(rules.get, dims)), DIMS)


def _each(make: Callable[[str, Any], Any], dims: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: _each(make, of) if isinstance(of, Mapping) else make(name, of)
        for name, of in dims.items()
    }


def train_step(
    config: Config, params: Any, state: Any, batch: Mapping[str, jax.Array]
) -> tuple[Any, Any, jax.Array]:
    """One update.

    Args:
      state: of `OPTIMIZER`.
      batch: "inputs" and "targets", int32[batch, sequence].

    Returns:
      Parameters and state after it, and the loss before it in nats per token.
    """
    loss, grads = jax.value_and_grad(partial(loss_of, config))(params, batch)
    return *update(grads, state, params), loss


def update(grads: Any, state: Any, params: Any) -> tuple[Any, Any]:
    """Parameters and state after a step of the optimiser."""
    updates, state = OPTIMIZER.update(grads, state, params)
    return optax.apply_updates(params, updates), state


def loss_of(config: Config, params: Any, batch: Mapping[str, jax.Array]) -> jax.Array:
    """Mean negative log likelihood of the targets in nats, a float32 scalar."""
    positions_S = jnp.arange(config.sequence)
    mask_ST = positions_S[:, None] >= positions_S

    def attention(q_BSKGE: Any, k_BTKE: Any, v_BTKE: Any) -> tuple[Any, None]:
        return attend(q_BSKGE, k_BTKE, v_BTKE, mask_ST), None

    def body(x_BSD: Any, w: Any) -> tuple[Any, None]:
        return layer(config, x_BSD, w, positions_S, attention)

    x_BSD = residual(params["embedding"][batch["inputs"]])
    body = jax.checkpoint(body, policy=SAVED, prevent_cse=False)
    x_BSD, _ = lax.scan(body, x_BSD, params["layers"])
    return cross_entropy(logits_of(x_BSD, params), batch["targets"])


def layer(
    config: Config, x_BSD: jax.Array, w: Any, positions_S: jax.Array, attention: Callable
) -> tuple[jax.Array, Any]:
    """Attention and feed-forward, each normalised before and added to the residual stream.

    Args:
      w: parameters of this layer.
      attention: (q_BSKGE, k_BSKE, v_BSKE) -> (out_BSKGE, anything).

    Returns:
      The residual stream after this layer, and what `attention` returned beside.
    """
    c = config
    h_BSD = normed(x_BSD, w["attention_norm"])
    q, k, v = (checkpoint_name(h_BSD @ w[name], name) for name in ("query", "key", "value"))
    q_BSKGE = q.reshape(*q.shape[:2], c.kv_heads, c.groups, c.head_dim)
    k_BSKE = k.reshape(*k.shape[:2], c.kv_heads, c.head_dim)
    v_BSKE = v.reshape(k_BSKE.shape)
    q_BSKGE = shard(q_BSKGE, "batch", "inner_sequence", "heads", None, None)
    q_BSKGE, k_BSKE = (rotate(a, positions_S, ROPE_BASE) for a in (q_BSKGE, k_BSKE))
    out_BSKGE, beside = attention(q_BSKGE, k_BSKE, v_BSKE)
    y_BSD = residual(out_BSKGE.reshape(q.shape) @ w["attention_out"])
    x_BSD = x_BSD + checkpoint_name(y_BSD, "attended")
    h_BSD = normed(x_BSD, w["mlp_norm"])
    gate_BSF, up_BSF = (checkpoint_name(h_BSD @ w[name], name) for name in ("gate", "up"))
    hidden_BSF = shard(jax.nn.silu(gate_BSF) * up_BSF, "batch", "inner_sequence", "mlp")
    return x_BSD + residual(hidden_BSF @ w["down"]), beside


def residual(x_BSD: jax.Array) -> jax.Array:
    return shard(x_BSD, "batch", "residual_sequence", "residual_embed")


def normed(x_BSD: jax.Array, scale_D: jax.Array) -> jax.Array:
    return shard(rms_norm(x_BSD, scale_D), "batch", "inner_sequence", "inner_embed")


def logits_of(x_BSD: jax.Array, params: Any) -> jax.Array:
    """[batch, sequence, vocab], in the parameters' dtype."""
    logits_BSV = normed(x_BSD, params["final_norm"]) @ params["output"]
    return shard(logits_BSV, "batch", "inner_sequence", "vocab")


def rms_norm(
    x_BSD: jax.Array, scale_D: jax.Array, mean: Callable[[jax.Array], jax.Array] | None = None
) -> jax.Array:
    """Divides by the root mean square over the last dim, in float32, and scales.

    Args:
      mean: of a [..., D] array over the last dim, which it keeps; of a shard of it by hand.
    """
    wide_BSD = x_BSD.astype(jnp.float32)
    mean_BS1 = (mean or partial(jnp.mean, axis=-1, keepdims=True))(jnp.square(wide_BSD))
    return (wide_BSD * lax.rsqrt(mean_BS1 + 1e-6)).astype(x_BSD.dtype) * scale_D


# --- cases ----------------------------------------------------------------------------------------


def training_case(
    config: Config, rules: Rules, mesh: Mapping[str, int], dtype: Any, by_hand: Callable | None
) -> Case:
    """The training step under axis rules.

    Args:
      by_hand: (config, rules) -> the per-device body.
    """
    params, specs = parameters(config, dtype), parameter_specs(rules)
    state = jax.eval_shape(OPTIMIZER.init, params)
    state_specs = (state[0]._replace(count=P(), mu=specs, nu=specs), *state[1:])
    tokens = array(config.batch, config.sequence, dtype=jnp.int32)
    # the residual stream's positions are divided on an axis of their own where tokens are, too
    place = P(rules.get("batch"), rules.get("inner_sequence"))
    return Case(
        fun=partial(train_step, config),
        args=(params, state, dict.fromkeys(("inputs", "targets"), tokens)),
        mesh=mesh,
        in_specs=(specs, state_specs, dict.fromkeys(("inputs", "targets"), place)),
        out_specs=(specs, state_specs, P()),
        donate=(0, 1),
        values=lambda rng: (
            drawn_parameters(rng, params),
            _drawn_state(state),
            {name: drawn_tokens(rng, config, tokens.shape) for name in ("inputs", "targets")},
        ),
        by_hand=by_hand(config, rules) if by_hand else None,
        axis_rules=axis_rules(rules),
    )


def axis_rules(rules: Rules) -> tuple[tuple[str, str | None], ...]:
    """As `spmd.jit` takes them: names without a rule are not sharded."""
    return tuple((name, rules.get(name)) for name in NAMES)


def drawn_parameters(rng: np.random.Generator, shapes: Any) -> Any:
    """Numbers that keep activations near unit variance."""

    def one(path: Any, leaf: jax.ShapeDtypeStruct) -> Any:
        name = path[-1].key
        if name.endswith("norm"):
            return normal(rng, leaf.shape, leaf.dtype, 0.1, mean=1.0)
        fan_in = 1 if name == "embedding" else leaf.shape[-2]
        return normal(rng, leaf.shape, leaf.dtype, fan_in**-0.5)

    return jax.tree_util.tree_map_with_path(one, shapes)


def drawn_tokens(rng: np.random.Generator, config: Config, shape: tuple[int, ...]) -> np.ndarray:
    return rng.integers(0, config.vocab, shape, np.int32)


def _drawn_state(shapes: Any) -> Any:
    # A second moment of 0 makes the first update the sign of the gradient, in which rounding shows
    # as much as an error would.
    def filled(value: float) -> Callable:
        return lambda leaf: np.full(leaf.shape, value, leaf.dtype)

    adam, *rest = shapes
    mu, nu = jax.tree.map(filled(0.0), adam.mu), jax.tree.map(filled(1e-6), adam.nu)
    return (adam._replace(count=np.int32(1), mu=mu, nu=nu), *rest)


@dataclasses.dataclass(frozen=True)
class _Way:
    rules: Rules
    axes: tuple[str, ...]
    by_hand: bool = True
    kv_heads: tuple[int, int] | None = None  # small, large; one query head for each

    def make(self, size: Size) -> Case:
        from benchmarks.suite.programs.transformer_by_hand import by_hand

        if self.axes == ("fsdp",):
            shape = (size.devices,)
        else:
            shape = (size.devices // 4, 4)
        config = config_of(size)
        if self.kv_heads:
            config = config._replace(kv_heads=size.pick(*self.kv_heads), groups=1)
        mesh = dict(zip(self.axes, shape, strict=True))
        hand = by_hand if self.by_hand else None
        return training_case(config, self.rules, mesh, size.dtype, hand)


_DT, _FT = ("data", "tensor"), ("fsdp", "tensor")
PROGRAMS: tuple[Program, ...] = (
    Program("megatron", "columns and rows of weights on tensor", _Way(MEGATRON, _DT).make),
    Program(
        "megatron_sequence",
        "megatron, with the residual stream's positions on tensor between sub-layers",
        _Way(MEGATRON_SEQUENCE, _DT).make,
    ),
    Program("fsdp", "parameters, their state and batch on one axis", _Way(FSDP, ("fsdp",)).make),
    Program("fsdp_tensor", "fsdp on one axis, megatron on the other", _Way(FSDP_TENSOR, _FT).make),
    Program(
        "sharding_2d",
        "weights on both axes, activations' batch on one and model dim on the other",
        _Way(SHARDING_2D, _DT).make,
    ),
    Program(
        "uneven_heads",
        "megatron with heads that tensor does not divide",
        _Way(MEGATRON, _DT, by_hand=False, kv_heads=(6, 14)).make,
    ),
)
