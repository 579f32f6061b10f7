"""The language model under every parallelism and mesh against the unsharded model.

Loss and gradients within 1e-5 (relative, float32), curves of 20 steps, random shardings of all
arguments, and random numbers that do not depend on the mesh.
"""

import functools
import random
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import spmd
from models.loss import cross_entropy
from models.shardings import rules_for
from models.transformer import Transformer, TransformerConfig
from sharding import ShardingWarning
from tests.oracle import assert_close, draw_specs, make_mesh

# Small, but with every part: grouped queries, scan, remat, tied embeddings.
CONFIG = TransformerConfig(
    vocab_size=64, num_layers=2, embed_dim=32, mlp_dim=64, num_heads=8, num_kv_heads=4, head_dim=8
)
# 6 query heads on 3 key/value heads: 2 and 4 do not divide them.
ODD = TransformerConfig(
    vocab_size=61, num_layers=2, embed_dim=36, mlp_dim=50, num_heads=6, num_kv_heads=3,
    head_dim=6, tied_embeddings=False, remat="full",
)  # fmt: skip
BATCH, SEQ = 8, 16

PARALLELISMS = ["data", "fsdp", "tensor", "tensor_sequence", "2d", "fsdp+tensor"]
MESHES: list[dict[str, int]] = [
    {"data": 1},
    {"data": 8},
    {"fsdp": 4, "tensor": 2},
    {"tensor": 8},
    {"data": 2, "tensor": 4},
    {"data": 2, "fsdp": 2, "tensor": 2},
    {"data": 3, "tensor": 2},
]

ignore_boundary = pytest.mark.filterwarnings("ignore::sharding.ShardingWarning")


@functools.cache
def problem(config: TransformerConfig) -> tuple[Any, jax.Array, Any]:
    """(parameters in their flax boxes, tokens, unsharded loss and gradients)."""
    tokens = jax.random.randint(jax.random.key(1), (BATCH, SEQ + 1), 0, config.vocab_size)
    params = jax.jit(Transformer(config).init)(jax.random.key(0), tokens[:, :-1])["params"]
    want = jax.jit(jax.value_and_grad(functools.partial(loss_of, config)))(params, tokens)
    return params, tokens, want


def loss_of(config: TransformerConfig, params: Any, tokens: jax.Array) -> jax.Array:
    logits, _ = Transformer(config).apply({"params": params}, tokens[:, :-1])
    return cross_entropy(logits, tokens[:, 1:])


def assert_tree_close(got: Any, want: Any, tolerance: float = 1e-5) -> None:
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), strict=True
    ):
        assert_close(a, b, tolerance, jax.tree_util.keystr(path))


@ignore_boundary
@pytest.mark.parametrize("mesh", MESHES, ids=str)
@pytest.mark.parametrize("parallelism", PARALLELISMS)
def test_loss_and_gradients_are_the_unsharded_ones(parallelism: str, mesh: dict) -> None:
    config = ODD if mesh == {"data": 2, "tensor": 4} or mesh == {"data": 3, "tensor": 2} else CONFIG
    params, tokens, want = problem(config)
    step = spmd.jit(
        jax.value_and_grad(functools.partial(loss_of, config)), mesh=make_mesh(**mesh),
        axis_rules=rules_for(parallelism, mesh),
    )  # fmt: skip
    assert_tree_close(step(params, tokens), want)


@ignore_boundary
@pytest.mark.parametrize("parallelism", PARALLELISMS)
def test_twenty_steps_give_the_same_curve(parallelism: str) -> None:
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(3e-3))
    params, tokens, _ = problem(CONFIG)

    def step(state, key):
        params, opt_state = state
        batch = jax.random.permutation(key, tokens, axis=1)
        loss, grads = jax.value_and_grad(functools.partial(loss_of, CONFIG))(params, batch)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), loss

    mesh = {"data": 2, "fsdp": 2, "tensor": 2}
    ours = spmd.jit(
        step, mesh=make_mesh(**mesh), axis_rules=rules_for(parallelism, mesh), donate_argnums=0
    )
    oracle = jax.jit(step)
    state = want = (params, optimizer.init(params))
    state = jax.tree.map(jnp.copy, state)  # donated
    curve, expected = [], []
    for key in jax.random.split(jax.random.key(2), 20):
        state, loss = ours(state, key)
        want, reference = oracle(want, key)
        curve.append(float(loss))
        expected.append(float(reference))
    np.testing.assert_allclose(curve, expected, rtol=1e-5)
    assert ours._cache_size() == 1


@ignore_boundary
@pytest.mark.parametrize("seed", range(6))
def test_any_sharding_of_the_arguments_gives_the_same_numbers(seed: int) -> None:
    rng = random.Random(seed)
    config = rng.choice([CONFIG, ODD])
    params, tokens, want = problem(config)
    bare = jax.tree.unflatten(jax.tree.structure(params), jax.tree.leaves(params))
    mesh = make_mesh(**rng.choice(MESHES[2:]))
    specs = draw_specs(rng, mesh.axis_names, (bare, tokens))
    step = spmd.jit(
        jax.value_and_grad(functools.partial(loss_of, config)), mesh=mesh,
        axis_rules=rules_for(rng.choice(PARALLELISMS), mesh.axis_names), in_shardings=specs,
    )  # fmt: skip
    assert_tree_close(step(params, tokens), want)


def test_dropout_and_initialisation_do_not_depend_on_the_mesh() -> None:
    def draw(key):
        k1, k2, k3 = jax.random.split(key, 3)
        return (
            jax.random.bernoulli(k1, 0.9, (8, 12)),
            jax.random.normal(k2, (16, 6), jnp.float32),
            jax.random.truncated_normal(k3, -2, 2, (24,), jnp.float32),
            jax.random.randint(k1, (8, 3), 0, 1000),
        )

    want = jax.jit(draw)(jax.random.key(7))
    for devices in (1, 2, 4, 8):
        mesh = make_mesh(data=devices)
        for spec in (spmd.jit(draw, mesh=mesh), _sharded(draw, mesh)):
            for got, expected in zip(spec(jax.random.key(7)), want, strict=True):
                np.testing.assert_array_equal(got, expected, err_msg=f"{devices} devices")
    partitioned = _sharded(draw, make_mesh(data=8)).trace(jax.random.key(7)).propagate()
    assert partitioned.partition().collectives == ()


@ignore_boundary
def test_dropout_in_the_model_gives_the_same_loss_bits_on_every_mesh() -> None:
    import dataclasses

    config = dataclasses.replace(CONFIG, dropout=0.3)
    params, tokens, _ = problem(CONFIG)

    def loss(params, tokens, key):
        logits, _ = Transformer(config).apply(
            {"params": params}, tokens[:, :-1], train=True, rngs={"dropout": key}
        )
        return cross_entropy(logits, tokens[:, 1:])

    want = jax.jit(loss)(params, tokens, jax.random.key(3))
    plain = problem(CONFIG)[2][0]
    assert abs(want - plain) > 1e-4
    for mesh in ({"data": 8}, {"fsdp": 4, "tensor": 2}):
        rules = rules_for("fsdp+tensor", mesh)
        got = spmd.jit(loss, mesh=make_mesh(**mesh), axis_rules=rules)(
            params, tokens, jax.random.key(3)
        )
        assert_close(got, want, 1e-6, str(mesh))


def _sharded(fun: Any, mesh: Any) -> Any:
    from sharding import P

    return spmd.jit(fun, mesh=mesh, out_shardings=(P("data"), P("data"), P("data"), P("data")))


def test_uneven_parameters_warn_at_the_boundary() -> None:
    params, tokens, _ = problem(ODD)
    mesh = {"data": 2, "tensor": 4}
    step = spmd.jit(
        functools.partial(loss_of, ODD), mesh=make_mesh(**mesh),
        axis_rules=rules_for("tensor", mesh),
    )  # fmt: skip
    with pytest.warns(ShardingWarning, match="does not divide into 4 shards over tensor"):
        step(params, tokens)
