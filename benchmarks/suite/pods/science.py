"""Weather on a mesh, atoms with forces, and the pairs of residues of a protein."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec as P

from benchmarks.suite.case import Case, array, ints
from benchmarks.suite.pods.common import (
    Weight,
    bfloat16,
    program,
    stacked,
    standardized,
    trained,
    weight,
)
from sharding import shard

# --- GraphCast ------------------------------------------------------------------------------------

GRID, MESH_NODES = 65_160, 10_242
GRID_EDGES, MESH_EDGES = 163_840, 81_920
VARIABLES, WIDTH = 227, 512


def two_layers(into: int, out: int = WIDTH) -> list[Weight]:
    """Matrices of `feed`."""
    return [weight((into, WIDTH)), weight((WIDTH, out))]


def message_weights() -> dict[str, Any]:
    """Of `messages`."""
    return {"edges": two_layers(3 * WIDTH), "nodes": two_layers(2 * WIDTH)}


def graphcast_weights() -> dict[str, Any]:
    """Small enough to be whole on every device, as those of all programs here."""
    return {
        "grid": two_layers(VARIABLES),
        "mesh": two_layers(8),
        "edges": two_layers(8),
        "encoder": message_weights(),
        "processor": stacked(8, message_weights()),
        "decoder": message_weights(),
        "output": two_layers(WIDTH, VARIABLES),
    }


def feed(x: Any, weights: Any) -> Any:
    """Two layers without biases: x [..., width]."""
    first, second = bfloat16(weights)
    return jax.nn.silu(x @ first) @ second


def messages(
    source: Any, target: Any, edges: Any, graph: tuple[Any, Any], weights: Any
) -> tuple[Any, Any]:
    """Nodes of `target` read along their edges from nodes of `source`.

    Args:
      source, target, edges: features, [batch, nodes or edges, width].
      graph: senders and receivers, the nodes of each edge, [edges].

    Returns:
      New features of `target` and of edges.
    """
    senders, receivers = graph
    ends = jnp.concatenate([edges, source[:, senders], target[:, receivers]], axis=-1)
    sent = standardized(feed(ends, weights["edges"]))

    def total(sent: Any) -> Any:
        return jax.ops.segment_sum(sent, receivers, target.shape[1])

    read = jnp.concatenate([target, jax.vmap(total)(sent)], axis=-1)
    return target + standardized(feed(read, weights["nodes"])), edges + sent


def graphcast_loss(
    params: Any, now: Any, later: Any, mesh_features: Any, edge_features: Any, graphs: Any
) -> Any:
    """Squared error of the weather on a grid, [batch, grid, variables].

    Args:
      mesh_features: [mesh nodes, 8].
      edge_features, graphs: of edges into the mesh, within it and out of it: [edges, 8], and
        pairs of senders and receivers.
    """

    def repeated(x: Any) -> Any:
        return jnp.broadcast_to(x, (now.shape[0], *x.shape))

    into, within, out = (repeated(feed(x, params["edges"])) for x in edge_features)
    grid = feed(now.astype(jnp.bfloat16), params["grid"])
    mesh = repeated(feed(mesh_features, params["mesh"]))
    mesh, _ = messages(grid, mesh, into, graphs[0], params["encoder"])

    @jax.checkpoint
    def process(carry: Any, weights: Any) -> tuple[Any, None]:
        mesh, edges = carry
        return messages(mesh, mesh, edges, graphs[1], weights), None

    (mesh, _), _ = lax.scan(process, (mesh, within), params["processor"])
    grid, _ = messages(mesh, grid, out, graphs[2], params["decoder"])
    found = feed(grid, params["output"]).astype(jnp.float32)
    return jnp.square(found - later).mean()


def graphcast() -> Case:
    """A training step of GraphCast on a grid of one degree."""
    counts = (GRID_EDGES, MESH_EDGES, GRID_EDGES)
    weather, place = array(8, GRID, VARIABLES), P("data", "model")
    edges = tuple(array(count, 8, dtype=jnp.bfloat16) for count in counts)
    graphs = tuple((ints(count), ints(count)) for count in counts)
    inputs = (weather, weather, array(MESH_NODES, 8, dtype=jnp.bfloat16), edges, graphs)
    along = P("model")
    specs = (place, place, P(), (along,) * 3, ((along, along),) * 3)
    return trained(
        graphcast_loss, graphcast_weights(), inputs, specs, {"data": 4, "model": 8}
    )


# --- NequIP ---------------------------------------------------------------------------------------

SPECIES, CHANNELS, RADIAL, CUTOFF = 100, 64, 8, 5.0
ATOMS, BONDS, MOLECULES = 32_768, 1_048_576, 512


def nequip_weights() -> dict[str, Any]:
    """Four rounds of messages; features are 64 scalars and 64 vectors of each atom."""

    def layer() -> dict[str, Weight]:
        square = weight((CHANNELS, CHANNELS))
        return {
            "radial_in": weight((RADIAL, 64)),
            "radial_out": weight((64, 3 * CHANNELS)),
            "scalars": square,
            "vectors": square,
            "gate": square,
            "species": weight((SPECIES, CHANNELS, CHANNELS)),
        }

    return {
        "embedding": weight((SPECIES, CHANNELS)),
        "layers": [layer() for _ in range(4)],
        "output": [weight((CHANNELS, 16)), weight((16, 1))],
    }


def radial_basis(length: Any) -> Any:
    """Bessel functions of distances [bonds] that vanish at the cutoff: [bonds, RADIAL]."""
    waves = jnp.sin(jnp.arange(1, RADIAL + 1) * np.pi / CUTOFF * length[:, None])
    envelope = 1 - jnp.clip(length / CUTOFF, 0, 1) ** 6
    return waves / length[:, None] * envelope[:, None]


def energies(params: Any, positions: Any, species: Any, senders: Any, receivers: Any) -> Any:
    """Of each atom, [atoms]; features are scalars and vectors, equivariant under rotations."""
    apart = positions[receivers] - positions[senders]
    length = jnp.sqrt((apart * apart).sum(axis=-1) + 1e-9)
    direction, basis = apart / length[:, None], radial_basis(length)
    atoms = positions.shape[0]
    scalars = params["embedding"][species]
    vectors = jnp.zeros((atoms, 3, CHANNELS))
    for w in params["layers"]:
        radial = jax.nn.silu(basis @ w["radial_in"]) @ w["radial_out"]
        radial = radial.reshape(-1, 3, CHANNELS)
        along = jnp.einsum("ei,eic->ec", direction, vectors[senders])
        to_scalars = radial[:, 0] * scalars[senders] + radial[:, 1] * along
        to_vectors = radial[:, 2, None] * scalars[senders][:, None] * direction[..., None]
        own = jnp.einsum("nc,ncd->nd", scalars, w["species"][species])
        total = jax.ops.segment_sum(to_scalars, receivers, atoms)
        scalars = jax.nn.silu(total @ w["scalars"] + own)
        vectors = vectors + jax.ops.segment_sum(to_vectors, receivers, atoms)
        vectors = vectors @ w["vectors"] * jax.nn.sigmoid(scalars @ w["gate"])[:, None]
    return (jax.nn.silu(scalars @ params["output"][0]) @ params["output"][1])[:, 0]


def nequip_loss(
    params: Any, positions: Any, species: Any, senders: Any, receivers: Any, molecules: Any,
    energy: Any, forces: Any,
) -> Any:  # fmt: skip
    """Squared errors of energies of molecules and of forces, which are the energy's gradient."""

    def total(positions: Any) -> Any:
        found = energies(params, positions, species, senders, receivers)
        return found.sum(), found

    (_, found), slope = jax.value_and_grad(total, has_aux=True)(positions)
    of_molecules = jax.ops.segment_sum(found, molecules, MOLECULES)
    errors = jnp.square(of_molecules - energy).mean()
    return errors + 10 * jnp.square(-slope - forces).mean()


def nequip() -> Case:
    """A training step of NequIP."""
    atoms, bonds, vectors = ints(ATOMS), ints(BONDS), array(ATOMS, 3)
    inputs = (vectors, atoms, bonds, bonds, atoms, array(MOLECULES), vectors)
    specs = (*(P("data"),) * 5, P(), P("data"))
    return trained(nequip_loss, nequip_weights(), inputs, specs, {"data": 32})


# --- Evoformer ------------------------------------------------------------------------------------

ALIGNED, PAIR = 256, 128  # widths of features of aligned sequences, and of pairs
TRIANGLES = ("bikc,bjkc->bijc", "bkic,bkjc->bijc")  # outgoing and incoming edges


def evoformer_weights() -> dict[str, Any]:
    """Four blocks of the Evoformer of AlphaFold 2."""
    block = {
        "row_qkv": weight((ALIGNED, 3, 8, 32)),
        "row_bias": weight((PAIR, 8)),
        "row_out": weight((8, 32, ALIGNED)),
        "aligned_up": weight((ALIGNED, 4 * ALIGNED)),
        "aligned_down": weight((4 * ALIGNED, ALIGNED)),
        "outer_left": weight((ALIGNED, 32)),
        "outer_right": weight((ALIGNED, 32)),
        "outer": weight((32, 32, PAIR)),
        "left": weight((2, PAIR, 2 * PAIR)),
        "right": weight((2, PAIR, 2 * PAIR)),
        "gate": weight((2, PAIR, PAIR)),
        "triangle_out": weight((2, PAIR, PAIR)),
        "pair_qkv": weight((2, PAIR, 3, 4, 32)),
        "pair_bias": weight((2, PAIR, 4)),
        "pair_out": weight((2, 4, 32, PAIR)),
        "pair_up": weight((PAIR, 4 * PAIR)),
        "pair_down": weight((4 * PAIR, PAIR)),
    }
    return stacked(4, block)


def rows(x: Any) -> Any:
    """Annotates features [batch, rows, columns, width]: rows lie over an axis."""
    return shard(x, "data", "rows", None, None)


def row_attention(x: Any, pairs: Any, qkv: Any, bias: Any, out: Any) -> Any:
    """Each row of x [batch, rows, columns, width] on its own, with biases of pairs of columns."""
    query, key, value = jnp.moveaxis(jnp.einsum("bgrc,cthd->bgrthd", x, qkv), 3, 0)
    logits = jnp.einsum("bgrhd,bgshd->bghrs", query, key).astype(jnp.float32)
    biases = jnp.moveaxis(pairs @ bias, -1, 1)[:, None]
    weights = jax.nn.softmax(logits * query.shape[-1] ** -0.5 + biases, axis=-1)
    return jnp.einsum("bghrs,bgshd,hdc->bgrc", weights.astype(x.dtype), value, out)


def gated(x: Any, weights: Any) -> Any:
    """A gated linear unit: x [..., width]."""
    left, right = jnp.split(x @ weights, 2, axis=-1)
    return left * jax.nn.sigmoid(right)


def aligned_update(aligned: Any, pairs: Any, w: Any) -> Any:
    """aligned [batch, sequences, residues, width]; pairs [batch, residues, residues, width]."""
    aligned = rows(aligned)
    h, biases = standardized(aligned), standardized(pairs)
    aligned = aligned + row_attention(h, biases, w["row_qkv"], w["row_bias"], w["row_out"])
    hidden = jax.nn.relu(standardized(aligned) @ w["aligned_up"])
    return rows(aligned + hidden @ w["aligned_down"])


def pair_update(aligned: Any, pairs: Any, w: Any) -> Any:
    """Outer products, triangles by products, triangles by attention, and a feed-forward layer."""
    h = standardized(aligned)
    left, right = h @ w["outer_left"], h @ w["outer_right"]
    outer = jnp.einsum("bsic,bsjd,cde->bije", left, right, w["outer"])
    pairs = rows(pairs + outer / aligned.shape[1])
    for way, triangle in enumerate(TRIANGLES):
        h = standardized(pairs)
        edges = jnp.einsum(triangle, gated(h, w["left"][way]), gated(h, w["right"][way]))
        closed = standardized(edges) @ w["triangle_out"][way]
        pairs = rows(pairs + jax.nn.sigmoid(h @ w["gate"][way]) * closed)
    for way in range(2):
        h = standardized(pairs)
        attended = row_attention(
            h, h, w["pair_qkv"][way], w["pair_bias"][way], w["pair_out"][way]
        )
        # the second turn sees columns as rows, and turns pairs back
        pairs = rows((pairs + attended).swapaxes(1, 2))
    hidden = jax.nn.relu(standardized(pairs) @ w["pair_up"])
    return rows(pairs + hidden @ w["pair_down"])


def evoformer_loss(params: Any, aligned: Any, pairs: Any) -> Any:
    """Mean squares in place of the heads of the model, which are small."""

    @jax.checkpoint
    def block(carry: Any, weights: Any) -> tuple[Any, None]:
        aligned, pairs = carry
        w = bfloat16(weights)
        aligned = aligned_update(aligned, pairs, w)
        return (aligned, pair_update(aligned, pairs, w)), None

    found, _ = lax.scan(block, (aligned, pairs), params)
    return sum(jnp.square(x.astype(jnp.float32)).mean() for x in found)


def evoformer() -> Case:
    """A training step of the Evoformer."""
    batch, sequences, residues = 16, 128, 256
    aligned = array(batch, sequences, residues, ALIGNED, dtype=jnp.bfloat16)
    pairs = array(batch, residues, residues, PAIR, dtype=jnp.bfloat16)
    place = P("data", "rows")
    return trained(
        evoformer_loss, evoformer_weights(), (aligned, pairs), (place, place),
        {"data": 4, "rows": 8},
    )  # fmt: skip


PROGRAMS = (
    program("graphcast", "GraphCast; grid points and edges on an axis", graphcast),
    program("nequip", "NequIP, forces by gradients; atoms and bonds on one axis", nequip),
    program("evoformer", "Evoformer; rows on an axis, turned to attend in columns", evoformer),
)
