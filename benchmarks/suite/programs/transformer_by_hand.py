"""The training step of transformer.py as an expert writes it: one device's body of a `shard_map`.

`by_hand` turns axis rules into that body. Weights are gathered over the axes of the batch that
shard them, and autodiff makes that gather's transpose, a reduce-scatter of their gradients; other
gradients are summed once, at the end. Into and out of a sub-layer lead `enter` and `leave`, the
conjugate operators f and g of Megatron-LM (arXiv 1909.08053), or gather and reduce-scatter where
the residual stream is sharded (arXiv 2205.05198; GSPMD section 5.1).

Differentiated is what one device adds to the loss. So a sum whose result all devices use alike is
passed back as it is (`total`), and what all devices hold alike but use differently is summed on the
way back (`spread`); a bare `psum` would sum in both directions.

Shape suffixes as in transformer.py, here of one device's part.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P

from benchmarks.suite.programs.transformer import (
    ROPE_BASE,
    SAVED,
    Config,
    Rules,
    parameter_specs,
    rms_norm,
    update,
)
from models.transformer import attend, rotate


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def spread(x: jax.Array, axis: str) -> jax.Array:
    """Identity; the cotangents are summed over `axis`."""
    return x


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def total(x: jax.Array, axis: str) -> jax.Array:
    """Sum over `axis`; the cotangent is passed back as it is."""
    return lax.psum(x, axis)


spread.defvjp(lambda x, axis: (x, None), lambda axis, _, ct: (lax.psum(ct, axis),))
total.defvjp(lambda x, axis: (lax.psum(x, axis), None), lambda axis, _, ct: (ct,))


@dataclasses.dataclass(frozen=True)
class Hand:
    """What axis rules mean for the body.

    Attributes:
      batch: axes that divide the tokens of a step; gradients are summed over them.
      tensor: axis that divides heads, hidden units and vocabulary, or None.
      residual: dim of [batch, position, embed] that `tensor` divides between sub-layers, or None.
      keys: axis that divides positions inside of attention, or None.
    """

    batch: tuple[str, ...]
    tensor: str | None
    residual: int | None
    keys: str | None

    @classmethod
    def of(cls, rules: Rules) -> Hand:
        tensor, keys = rules.get("heads"), rules.get("inner_sequence")
        places = (rules.get("residual_sequence"), rules.get("residual_embed"))
        residual = 1 + places.index(tensor) if tensor and tensor in places else None
        return cls(tuple(a for a in (rules.get("batch"), keys) if a), tensor, residual, keys)

    def enter(self, x_BSD: jax.Array) -> jax.Array:
        """Into columns of weights: all of the residual stream's part."""
        if self.tensor is None:
            return x_BSD
        if self.residual is None:
            return spread(x_BSD, self.tensor)
        return lax.all_gather(x_BSD, self.tensor, axis=self.residual, tiled=True)

    def leave(self, y_BSD: jax.Array) -> jax.Array:
        """Out of rows of weights, where `y_BSD` is an addend."""
        if self.tensor is None:
            return y_BSD
        if self.residual is None:
            return total(y_BSD, self.tensor)
        dim = self.residual
        return lax.psum_scatter(y_BSD, self.tensor, scatter_dimension=dim, tiled=True)

    def norm(self, x_BSD: jax.Array, scale_D: jax.Array) -> jax.Array:
        return rms_norm(x_BSD, scale_D, self._mean if self.residual == 2 else None)

    def _mean(self, x_BSD: jax.Array) -> jax.Array:
        # every device divides other columns by this mean, so that it is summed both ways
        assert self.tensor is not None
        sums_BS1: Any = spread(total(x_BSD.sum(-1, keepdims=True), self.tensor), self.tensor)
        return sums_BS1 / (x_BSD.shape[-1] * lax.axis_size(self.tensor))

    def whole(self, weights: Any, specs: Any) -> Any:
        """Weights gathered over the axes of the batch, as one device computes with them."""

        def one(w: jax.Array, spec: P) -> jax.Array:
            # the leading dim of a layer's parameters is gone in the scan
            for dim, axis in enumerate(tuple(spec)[-w.ndim :]):
                if axis in self.batch:
                    w = lax.all_gather(w, axis, axis=dim, tiled=True)
            return w

        return jax.tree.map(one, weights, specs)

    def summed(self, grads: Any, specs: Any) -> Any:
        """Gradients over the axes on which every device saw other tokens."""

        def one(path: Any, grad: jax.Array, spec: P) -> jax.Array:
            axes = [axis for axis in self.batch if axis not in tuple(spec)]
            if self.tensor and self.residual == 1 and path[-1].key.endswith("norm"):
                axes.append(self.tensor)
            return lax.psum(grad, tuple(axes)) if axes else grad

        return jax.tree_util.tree_map_with_path(one, grads, specs)


def by_hand(config: Config, rules: Rules) -> Callable:
    """(params, state, batch) -> (params, state, loss), all of them one device's part."""
    hand, specs = Hand.of(rules), parameter_specs(rules)

    def step(params: Any, state: Any, batch: Mapping[str, jax.Array]) -> tuple[Any, Any, jax.Array]:
        addend = partial(_addend, hand, config, specs)
        loss, grads = jax.value_and_grad(addend)(params, batch)
        params, state = update(hand.summed(grads, specs), state, params)
        return params, state, lax.psum(loss, hand.batch)

    return step


def _addend(
    hand: Hand, config: Config, specs: Any, params: Any, batch: Mapping[str, jax.Array]
) -> jax.Array:
    """What this device's tokens add to the loss, a float32 scalar."""
    inputs_BS, targets_BS = batch["inputs"], batch["targets"]
    start = lax.axis_index(hand.keys) * inputs_BS.shape[1] if hand.keys else 0
    positions_S = start + jnp.arange(inputs_BS.shape[1])
    mask_ST = positions_S[:, None] >= jnp.arange(config.sequence)

    def attention(q_BSKGE: Any, k_BSKE: Any, v_BSKE: Any) -> tuple[Any, None]:
        if hand.keys:
            k_BSKE = lax.all_gather(k_BSKE, hand.keys, axis=1, tiled=True)
            v_BSKE = lax.all_gather(v_BSKE, hand.keys, axis=1, tiled=True)
        return attend(q_BSKGE, k_BSKE, v_BSKE, mask_ST), None

    def body(x_BSD: Any, w: Any) -> tuple[Any, None]:
        # inside of the loop and of what is computed again: whole weights of one layer at a time
        return layer(hand, config, x_BSD, hand.whole(w, specs["layers"]), positions_S, attention)

    ends = {name: hand.whole(params[name], specs[name]) for name in ("final_norm", "output")}
    rows_BSD = _rows(hand, params["embedding"], specs["embedding"], inputs_BS)
    x_BSD = hand.leave(rows_BSD)
    body = jax.checkpoint(body, policy=SAVED, prevent_cse=False)
    x_BSD, _ = lax.scan(body, x_BSD, params["layers"])
    logits_BSV = hand.enter(hand.norm(x_BSD, ends["final_norm"])) @ ends["output"]
    tokens = config.batch * config.sequence
    return jnp.sum(_nats(logits_BSV.astype(jnp.float32), targets_BS, hand.tensor)) / tokens


def _rows(hand: Hand, table_VD: jax.Array, spec: P, tokens_BS: jax.Array) -> jax.Array:
    """Embeddings, or addends of them, of this device's tokens."""
    axis = tuple(spec)[1]
    if axis is None or table_VD.shape[0] <= tokens_BS.size:
        return looked_up(hand.whole(table_VD, spec), tokens_BS, hand.tensor)
    # Of few tokens the columns of all devices are fewer than the rows of the whole table.
    tokens_BS = lax.all_gather(tokens_BS, axis, tiled=True)
    columns_BSD = looked_up(table_VD, tokens_BS, hand.tensor)
    return lax.all_to_all(columns_BSD, axis, split_axis=0, concat_axis=2, tiled=True)


def layer(
    hand: Hand, config: Config, x_BSD: Any, w: Any, positions_S: Any, attention: Callable
) -> tuple[jax.Array, Any]:
    """As in transformer.py, with this device's heads and hidden units."""
    h_BSD = hand.enter(hand.norm(x_BSD, w["attention_norm"]))
    q, k, v = (checkpoint_name(h_BSD @ w[name], name) for name in ("query", "key", "value"))
    q_BSKGE = q.reshape(*q.shape[:2], -1, config.groups, config.head_dim)
    k_BSKE, v_BSKE = (a.reshape(*a.shape[:2], -1, config.head_dim) for a in (k, v))
    q_BSKGE, k_BSKE = (rotate(a, positions_S, ROPE_BASE) for a in (q_BSKGE, k_BSKE))
    out_BSKGE, beside = attention(q_BSKGE, k_BSKE, v_BSKE)
    y_BSD = hand.leave(out_BSKGE.reshape(q.shape) @ w["attention_out"])
    x_BSD = x_BSD + checkpoint_name(y_BSD, "attended")
    h_BSD = hand.enter(hand.norm(x_BSD, w["mlp_norm"]))
    gate_BSF, up_BSF = (checkpoint_name(h_BSD @ w[name], name) for name in ("gate", "up"))
    return x_BSD + hand.leave((jax.nn.silu(gate_BSF) * up_BSF) @ w["down"]), beside


def looked_up(table_VD: jax.Array, tokens_BS: jax.Array, tensor: str | None) -> jax.Array:
    """Rows of the table; with `tensor` zeros for tokens whose rows other devices have."""
    if tensor is None:
        return table_VD[tokens_BS]
    place_BS = tokens_BS - lax.axis_index(tensor) * table_VD.shape[0]
    here_BS = (place_BS >= 0) & (place_BS < table_VD.shape[0])
    return jnp.where(here_BS[..., None], table_VD[jnp.where(here_BS, place_BS, 0)], 0)


def _nats(logits_BSV: jax.Array, targets_BS: jax.Array, tensor: str | None) -> jax.Array:
    """Negative log likelihood of each target, with the vocabulary divided over `tensor`."""
    top_BS = lax.stop_gradient(logits_BSV.max(-1))
    vocab_V = jnp.arange(logits_BSV.shape[-1])
    if tensor:
        top_BS = lax.pmax(top_BS, tensor)
        vocab_V += lax.axis_index(tensor) * vocab_V.size
    chosen_BS = jnp.where(targets_BS[..., None] == vocab_V, logits_BSV, 0.0).sum(-1)
    sums: Any = jnp.stack([jnp.exp(logits_BSV - top_BS[..., None]).sum(-1), chosen_BS])
    if tensor:
        sums = total(sums, tensor)
    weight_BS, chosen_BS = jnp.asarray(sums)
    return jnp.log(weight_BS) + top_BS - chosen_BS
