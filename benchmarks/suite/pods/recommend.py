"""Recommendation: tables of embeddings that no device holds whole."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import PartitionSpec as P

from benchmarks.suite.case import Case, array, ints
from benchmarks.suite.pods.common import Axis, Weight, program, trained, unit, weight

BATCH: Axis = ("data", "model")
MESH = {"data": 4, "model": 8}


# --- DLRM -----------------------------------------------------------------------------------------

TABLES, ROWS, WIDTH, DENSE = 26, 1 << 20, 128, 13


def layers(*widths: int) -> list[Weight]:
    """Matrices from each width to the next."""
    return [weight(pair) for pair in zip(widths[:-1], widths[1:], strict=True)]


def hidden_layers(x: Any, weights: Any) -> Any:
    """x [batch, width] through matrices, each before a ReLU."""
    for matrix in weights:
        x = jax.nn.relu(x @ matrix)
    return x


def dlrm_loss(params: Any, dense: Any, rows: Any, clicked: Any) -> Any:
    """Products of all pairs of features: dense [batch, 13], rows [batch, tables] or, where each
    feature is a sum, [batch, tables, bag]."""
    x = hidden_layers(dense, params["bottom"])
    found = jax.vmap(lambda table, rows: table[rows], (0, 1), 1)(params["tables"], rows)
    if rows.ndim == 3:
        found = found.sum(axis=2)
    features = jnp.concatenate([x[:, None], found], axis=1)
    products = jnp.einsum("bid,bjd->bij", features, features)
    left, right = np.tril_indices(TABLES + 1, -1)
    x = jnp.concatenate([x, products[:, left, right]], axis=1)
    logits = hidden_layers(x, params["top"][:-1]) @ params["top"][-1]
    return optax.sigmoid_binary_cross_entropy(logits[:, 0], clicked).mean()


def dlrm(tables: P, bag: int | None = None) -> Case:
    """Click prediction with Adagrad.

    Args:
      tables: how [tables, rows, width] lie.
      bag: rows that a feature sums.
    """
    batch = 65_536
    pairs = (TABLES + 1) * TABLES // 2
    weights = {
        "tables": Weight((TABLES, ROWS, WIDTH), tables),
        "bottom": layers(DENSE, 512, 256, WIDTH),
        "top": layers(WIDTH + pairs, 1024, 1024, 512, 1),
    }
    rows = ints(batch, TABLES, *((bag,) if bag else ()))
    return trained(
        dlrm_loss, weights, (array(batch, DENSE), rows, array(batch)), (P(BATCH),) * 3, MESH,
        optax.adagrad(0.01),
    )  # fmt: skip


def dlrm_rows() -> Case:
    """One row of each table for an example; each device has a range of rows."""
    return dlrm(P(None, "model"))


def dlrm_columns() -> Case:
    """Sums of four rows of each table; each device has a range of columns."""
    return dlrm(P(None, None, "model"), bag=4)


# --- two towers -----------------------------------------------------------------------------------


def tower(x: Any, weights: Any) -> Any:
    """Two layers: x [batch, width] -> vectors of length 1."""
    return unit(jax.nn.relu(x @ weights[0]) @ weights[1])


def two_tower_loss(params: Any, users: Any, history: Any, items: Any, frequency: Any) -> Any:
    """Which item of the batch a user took: a softmax over all, corrected by how frequent they are.

    Args:
      users, items: [batch]. history: items, [batch, length]; 0 is none.
      frequency: logarithms, [batch].
    """
    seen = (history > 0).astype(jnp.float32)[..., None]
    total = (jnp.take(params["items"], history, axis=0) * seen).sum(axis=1)
    mean = total / jnp.maximum(seen.sum(axis=1), 1)
    user = jnp.concatenate([params["users"][users], mean], axis=-1)
    user = tower(user, params["user_tower"])
    item = tower(params["items"][items], params["item_tower"])
    logits = user @ item.T / 0.05 - frequency
    same = (items[:, None] == items) & ~jnp.eye(items.shape[0], dtype=bool)
    logits = jnp.where(same, -1e9, logits)
    return -jnp.diagonal(jax.nn.log_softmax(logits, axis=-1)).mean()


def two_tower() -> Case:
    """A training step of a retrieval model with Adagrad."""
    batch, width = 16_384, 128
    weights = {
        "users": weight((1 << 22, width), "model"),
        "items": weight((1 << 21, width), "model"),
        "user_tower": layers(2 * width, 512, width),
        "item_tower": layers(width, 512, width),
    }
    inputs = (ints(batch), ints(batch, 50), ints(batch), array(batch))
    return trained(
        two_tower_loss, weights, inputs, (P(BATCH),) * 4, MESH, optax.adagrad(0.01)
    )


PROGRAMS = (
    program("dlrm_rows", "DLRM; rows of tables on an axis, the batch on both", dlrm_rows),
    program("dlrm_columns", "DLRM, sums of rows; columns of tables on an axis", dlrm_columns),
    program("two_tower_rows", "two towers, softmax over the batch; rows on an axis", two_tower),
)
