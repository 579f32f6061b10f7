"""A graph network: messages along edges, summed at the nodes that they come to.

    nodes, edges -> encoders -> rounds: [both ends of an edge -> message -> sum at its receiver
      -> update of the node] -> classes of nodes

Edges lie over all devices, in any order; so do nodes. An edge wants the states of its two ends,
which may be anywhere.
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
from benchmarks.suite.programs.optimizers import cross_entropy, rms_norm, shaped, training_case
from sharding import shard


def loss(params: Any, graph: Any, labels: Any) -> Any:
    """Cross entropy of the nodes' classes.

    Args:
      graph: nodes [nodes, features], edges [edges, features], senders and receivers [edges].
      labels: [nodes].
    """
    h = graph["nodes"] @ params["encode_nodes"]
    e = graph["edges"] @ params["encode_edges"]
    for layer in params["rounds"]:
        messages = _message(layer, h[graph["senders"]], h[graph["receivers"]], e)
        total = jax.ops.segment_sum(messages, graph["receivers"], h.shape[0])
        h = _update(layer, h, shard(total, "data", None))
        e = shard(e + messages, "data", None)
    return cross_entropy(h @ params["head"], labels)


def _message(layer: Any, sender: Any, receiver: Any, edge: Any) -> Any:
    """From what is at both ends and on the edge, [edges, width] each."""
    joined = jnp.concatenate([sender, receiver, edge], axis=-1)
    return jax.nn.silu(joined @ layer["message_in"]) @ layer["message_out"]


def _update(layer: Any, h: Any, total: Any) -> Any:
    joined = jnp.concatenate([rms_norm(h, layer["norm"]), total], axis=-1)
    return h + jax.nn.silu(joined @ layer["update_in"]) @ layer["update_out"]


def by_hand(params: Any, graph: Any, labels: Any) -> tuple[Any, Any]:
    """Loss and gradients on one device: its nodes, and its edges.

    Each round gathers the states of all nodes once, for both ends, and scatters the sums.
    """

    def part_of_loss(params: Any) -> Any:
        h = graph["nodes"] @ params["encode_nodes"]
        e = graph["edges"] @ params["encode_edges"]
        for layer in params["rounds"]:
            every = lax.all_gather(h, "data", tiled=True)
            messages = _message(layer, every[graph["senders"]], every[graph["receivers"]], e)
            total = jax.ops.segment_sum(messages, graph["receivers"], every.shape[0])
            h = _update(layer, h, lax.psum_scatter(total, "data", tiled=True))
            e = e + messages
        return cross_entropy(h @ params["head"], labels) / lax.axis_size("data")

    return lax.psum(jax.value_and_grad(part_of_loss)(params), "data")


def _graph(size: Size) -> Case:
    nodes, edges, width = size.pick((512, 4096, 32), (1 << 17, 1 << 20, 256))
    rounds, features, classes = size.pick((2, 16, 8), (4, 128, 64))
    layer = {
        "message_in": (3 * width, width), "message_out": (width, width),
        "norm": (width,), "update_in": (2 * width, width), "update_out": (width, width),
    }  # fmt: skip
    shapes = {
        "encode_nodes": (features, width), "encode_edges": (features, width),
        "rounds": [layer] * rounds, "head": (width, classes),
    }  # fmt: skip
    params = shaped(shapes, size.dtype)
    graph = {
        "nodes": array(nodes, features, dtype=size.dtype),
        "edges": array(edges, features, dtype=size.dtype),
        "senders": array(edges, dtype=jnp.int32), "receivers": array(edges, dtype=jnp.int32),
    }  # fmt: skip

    def values(rng: np.random.Generator) -> tuple[Any, ...]:
        drawn_graph = {
            name: rng.integers(0, nodes, leaf.shape, dtype=np.int32)
            if leaf.dtype == jnp.int32
            else normal(rng, leaf.shape, leaf.dtype)
            for name, leaf in graph.items()
        }
        return drawn_graph, rng.integers(0, classes, nodes, dtype=np.int32)

    return training_case(
        loss, optax.adamw(1e-3), params, everywhere(params),
        (graph, array(nodes, dtype=jnp.int32)),
        (dict.fromkeys(graph, P("data")), P("data")), mesh={"data": size.devices},
        batch_values=values, grads_by_hand=by_hand,
    )  # fmt: skip


PROGRAMS = (Program("graph", "graph network; edges and nodes over all devices", _graph),)
