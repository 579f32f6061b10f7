"""DLRM: large tables of embeddings, their products with each other, and two small networks.

    dense [batch, features]   -> bottom network -> one vector   \\
    indices [batch, tables]   -> rows of tables -> more vectors -> products of pairs -> top network

Rows of the tables lie over all devices, and so does the batch. The gradient of a table is a
scatter-add of the rows that were used; tables are updated by SGD, so that they have no state.
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
from benchmarks.suite.programs.optimizers import shaped, training_case
from sharding import shard


def loss(params: Any, dense: Any, indices: Any, clicked: Any) -> Any:
    """Binary cross entropy: dense [batch, features], indices [batch, tables], clicked [batch]."""
    rows = [table[indices[:, i]] for i, table in enumerate(params["tables"])]
    vectors = shard(jnp.stack(rows, axis=1), "data", None, None)
    return jnp.mean(_losses(params, dense, vectors, clicked))


def _losses(params: Any, dense: Any, vectors: Any, clicked: Any) -> Any:
    """Loss of each example, from the vectors [batch, tables, width] that were looked up."""
    bottom = _network(params["bottom"], dense)
    vectors = jnp.concatenate([bottom[:, None], vectors], axis=1)
    products = jnp.einsum("bid,bjd->bij", vectors, vectors)
    i, j = np.tril_indices(vectors.shape[1], -1)
    joined = jnp.concatenate([bottom, products[:, i, j]], axis=-1)
    logits = _network(params["top"], joined)[:, 0].astype(jnp.float32)
    return optax.losses.sigmoid_binary_cross_entropy(logits, clicked)


def _network(layers: Any, x: Any) -> Any:
    for i, layer in enumerate(layers):
        x = x @ layer["weights"] + layer["bias"]
        x = jax.nn.silu(x) if i + 1 < len(layers) else x
    return x


def by_hand(params: Any, dense: Any, indices: Any, clicked: Any) -> tuple[Any, Any]:
    """Loss and gradients on one device: its rows of the tables, and its part of the batch.

    Indices are small, so all devices get all of them. Each looks up what it has, and the sums of
    that are scattered over the batch. The way back is the transpose of that.
    """

    def part_of_loss(params: Any) -> Any:
        vectors = jnp.stack(
            [_own_rows(table, all_indices[:, i]) for i, table in enumerate(params["tables"])],
            axis=1,
        )
        vectors = lax.psum_scatter(vectors, "data", tiled=True)
        losses = _losses(params, dense, vectors, clicked)
        return jnp.mean(losses) / lax.axis_size("data")

    all_indices = lax.all_gather(indices, "data", tiled=True)
    value, grads = jax.value_and_grad(part_of_loss)(params)
    whole = {name: grads[name] for name in ("bottom", "top")}
    value, whole = lax.psum((value, whole), "data")
    return value, grads | whole


def _own_rows(table: Any, indices: Any) -> Any:
    """Rows of a shard of a table; 0 for rows of other devices."""
    local = indices - lax.axis_index("data") * table.shape[0]
    own = (local >= 0) & (local < table.shape[0])
    return jnp.where(own[:, None], table[jnp.where(own, local, 0)], 0)


def _dlrm(size: Size) -> Case:
    batch, features, width = size.pick((512, 13, 16), (65536, 13, 128))
    rows = size.pick(
        (4096, 2048, 1024, 1024, 512, 64), (1 << 22,) * 2 + (1 << 20,) * 4 + (4096,) * 2
    )
    bottom = size.pick((64, 32, width), (512, 256, width))
    top = size.pick((64, 32, 1), (1024, 1024, 512, 1))
    pairs = len(rows) * (len(rows) + 1) // 2

    def network(inside: int, layers: tuple[int, ...]) -> list[Any]:
        ends = zip((inside, *layers), layers, strict=False)
        return [{"weights": (a, b), "bias": (b,)} for a, b in ends]

    shapes = {
        "tables": [(count, width) for count in rows],
        "bottom": network(features, bottom), "top": network(width + pairs, top),
    }  # fmt: skip
    params = shaped(shapes, size.dtype)
    specs = everywhere(params) | {"tables": [P("data")] * len(rows)}
    optimizer = optax.partition(
        {"tables": optax.sgd(0.1), "networks": optax.adamw(1e-3)},
        {"tables": "tables", "bottom": "networks", "top": "networks"},
    )

    def values(rng: np.random.Generator) -> tuple[Any, ...]:
        dense = normal(rng, (batch, features), size.dtype)
        indices = np.stack([rng.integers(0, count, batch, dtype=np.int32) for count in rows], 1)
        return dense, indices, rng.integers(0, 2, batch).astype(np.float32)

    shapes = (array(batch, features, dtype=size.dtype), array(batch, len(rows), dtype=jnp.int32))
    return training_case(
        loss, optimizer, params, specs, (*shapes, array(batch)), (P("data"),) * 3,
        mesh={"data": size.devices}, batch_values=values, grads_by_hand=by_hand,
    )  # fmt: skip


PROGRAMS = (Program("dlrm", "recommender; rows of tables and batch over all devices", _dlrm),)
