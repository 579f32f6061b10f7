"""The transformer's mathematics, on one device."""

import dataclasses
import functools
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import models.transformer
from models.loss import cross_entropy
from models.shardings import DIMS, PARALLELISMS, default_mesh, dim_sizes, rules_for, shards
from models.transformer import Transformer, TransformerConfig, init_cache, rotate
from sharding import P
from training.validate import AXES

TINY = TransformerConfig(
    vocab_size=32,
    num_layers=2,
    embed_dim=16,
    mlp_dim=24,
    num_heads=4,
    num_kv_heads=2,
    head_dim=4,
    remat="none",
)
BATCH, SEQUENCE = 2, 8


def tokens(seed=0):
    return jax.random.randint(jax.random.key(seed), (BATCH, SEQUENCE), 0, TINY.vocab_size)


def init(config):
    """Random parameters, drawn by numpy: compiling the real init takes longer than the tests."""
    shapes = jax.eval_shape(Transformer(config).init, jax.random.key(0), tokens())
    generator = np.random.default_rng(0)

    def draw(leaf):
        return jnp.asarray(generator.normal(size=leaf.shape, scale=0.25), leaf.dtype)

    return jax.tree.map(draw, nn.unbox(shapes)["params"])


@functools.partial(jax.jit, static_argnums=(0, 4))
def apply(config, params, tokens_BS, cache=None, train=False, rngs=None):
    return Transformer(config).apply({"params": params}, tokens_BS, cache, train, rngs=rngs)


def logits(config, params, tokens_BS):
    return apply(config, params, tokens_BS)[0]


def assert_close(actual, expected, tolerance=2e-5):
    np.testing.assert_allclose(actual, expected, rtol=tolerance, atol=tolerance)


def test_a_position_sees_no_later_token():
    params, tokens_BS = init(TINY), tokens()
    changed_BS = tokens_BS.at[:, 5].set((tokens_BS[:, 5] + 1) % TINY.vocab_size)
    before, after = logits(TINY, params, tokens_BS), logits(TINY, params, changed_BS)
    np.testing.assert_array_equal(before[:, :5], after[:, :5])
    assert (np.abs(before[:, 5:] - after[:, 5:]).max(axis=-1) > 1e-4).all()


def test_rotated_products_depend_on_the_distance_only():
    q, k = jax.random.normal(jax.random.key(0), (2, 1, 1, 1, 16))

    def product(q_position, k_position):
        rotated_q = rotate(q, jnp.array([q_position]), 100.0)
        return jnp.sum(rotated_q * rotate(k, jnp.array([k_position]), 100.0))

    assert_close(product(3, 1), product(40, 38))
    assert abs(product(3, 1) - product(3, 2)) > 1e-2
    assert_close(jnp.linalg.norm(rotate(q, jnp.array([7]), 100.0)), jnp.linalg.norm(q))


def test_position_zero_is_not_rotated():
    x = jax.random.normal(jax.random.key(0), (1, 1, 2, 2, 8))
    np.testing.assert_array_equal(rotate(x, jnp.array([0]), 10_000.0), x)


def test_grouped_queries_equal_repeated_key_value_heads():
    grouped = init(TINY)
    full = dataclasses.replace(TINY, num_kv_heads=4)
    attention = grouped["layers"]["attention"]
    repeated = {
        "query": attention["query"].reshape(2, 16, 4, 1, 4),
        "key": jnp.repeat(attention["key"], 2, axis=2),
        "value": jnp.repeat(attention["value"], 2, axis=2),
        "output": attention["output"].reshape(2, 4, 1, 4, 16),
    }
    params = {**grouped, "layers": {**grouped["layers"], "attention": repeated}}
    assert_close(logits(full, params, tokens()), logits(TINY, grouped, tokens()))


@pytest.mark.parametrize("remat", ["none", "dots", "full"])
def test_scanned_layers_equal_unrolled_ones(remat):
    params = init(TINY)
    unrolled = {key: value for key, value in params.items() if key != "layers"}
    for i in range(TINY.num_layers):
        unrolled[f"layer_{i}"] = jax.tree.map(lambda leaf, i=i: leaf[i], params["layers"])

    def loss(config, params):
        return cross_entropy(logits(config, params, tokens()), tokens(1))

    scanned = dataclasses.replace(TINY, remat=remat)
    flat = dataclasses.replace(TINY, remat=remat, scan_layers=False)
    both = jax.jit(jax.value_and_grad(loss, argnums=1), static_argnums=0)
    scanned_loss, scanned_grad = both(scanned, params)
    flat_loss, flat_grad = both(flat, unrolled)
    assert_close(scanned_loss, flat_loss)
    assert_close(scanned_grad["embedding"], flat_grad["embedding"])
    assert_close(scanned_grad["layers"]["mlp"]["gate"][1], flat_grad["layer_1"]["mlp"]["gate"])


@pytest.mark.parametrize("scan_layers", [True, False])
@pytest.mark.parametrize("prompt", [1, 3, SEQUENCE])
def test_decoding_with_a_cache_equals_the_full_pass(scan_layers, prompt):
    config = dataclasses.replace(TINY, scan_layers=scan_layers)
    params, tokens_BS = init(config), tokens()
    cache = init_cache(config, BATCH, SEQUENCE + 2)
    part, cache = apply(config, params, tokens_BS[:, :prompt], cache)
    parts = [part]
    for i in range(prompt, SEQUENCE):
        part, cache = apply(config, params, tokens_BS[:, i : i + 1], cache)
        parts.append(part)
    assert int(cache.position) == SEQUENCE
    assert_close(jnp.concatenate(parts, axis=1), logits(config, params, tokens_BS))


def test_dropout_is_a_function_of_its_key_and_of_training():
    config = dataclasses.replace(TINY, dropout=0.5)
    params = init(config)

    def dropped(seed):
        rngs = {"dropout": jax.random.key(seed)}
        return apply(config, params, tokens(), train=True, rngs=rngs)[0]

    np.testing.assert_array_equal(dropped(1), dropped(1))
    assert np.abs(dropped(1) - dropped(2)).max() > 1e-3
    plain = logits(TINY, params, tokens())
    np.testing.assert_array_equal(logits(config, params, tokens()), plain)


def test_untied_embeddings_have_a_table_of_their_own():
    config = dataclasses.replace(TINY, tied_embeddings=False)
    params = init(config)
    assert params["output"].shape == params["embedding"].shape
    assert "output" not in init(TINY)
    zeroed = {**params, "output": jnp.zeros_like(params["output"])}
    np.testing.assert_array_equal(logits(config, zeroed, tokens()), 0)


def test_bfloat16_computes_near_float32_on_float32_parameters():
    params = init(TINY)
    half = logits(dataclasses.replace(TINY, dtype="bfloat16"), params, tokens())
    assert half.dtype == jnp.float32
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(params))
    assert_close(half, logits(TINY, params, tokens()), tolerance=0.1)


def test_cross_entropy_is_the_mean_of_the_negative_log_softmax():
    logits_BSV = jax.random.normal(jax.random.key(0), (2, 3, 5)) * 10
    targets_BS = jnp.array([[0, 4, 2], [1, 1, 3]])
    log_softmax = jax.nn.log_softmax(logits_BSV)
    expected = -jnp.take_along_axis(log_softmax, targets_BS[..., None], axis=-1).mean()
    assert_close(cross_entropy(logits_BSV, targets_BS), expected)


def test_cross_entropy_of_equal_logits_is_the_log_of_the_vocabulary():
    assert_close(cross_entropy(jnp.full((2, 3, 32), 7.0), jnp.zeros((2, 3), int)), np.log(32))


def test_every_table_names_dims_of_the_model_only():
    sizes = dim_sizes(TINY, BATCH, SEQUENCE)
    for name, rules in PARALLELISMS.items():
        assert {dim for dim, _ in rules} <= set(sizes), name


@pytest.mark.parametrize("parallelism", [*PARALLELISMS, "fsdp+tensor", "fsdp+tensor_sequence"])
@pytest.mark.parametrize("devices", [1, 2, 8])
def test_the_default_mesh_uses_all_devices_and_divides_every_dim(parallelism, devices):
    config = TransformerConfig()
    mesh = default_mesh(parallelism, devices, config)
    assert np.prod(list(mesh.values())) == devices
    sizes = dim_sizes(config, 16, 128)
    for dim, axes in rules_for(parallelism, mesh):
        assert sizes.get(dim, 1) % shards(axes, mesh) == 0, dim


def test_rules_leave_out_the_axes_that_a_mesh_lacks():
    def sharded(parallelism, axes):
        return {dim: axis for dim, axis in rules_for(parallelism, axes) if axis}

    expected = {"batch": "fsdp", "embed": "fsdp", "norm": "fsdp"}
    assert sharded("fsdp+tensor", ["fsdp"]) == expected
    assert sharded("data", ["data", "fsdp"]) == {"batch": ("data", "fsdp")}


def test_every_dim_name_of_the_model_has_a_rule():
    shapes = jax.eval_shape(Transformer(TINY).init, jax.random.key(0), tokens())
    specs = jax.tree.leaves(nn.get_partition_spec(shapes), is_leaf=lambda leaf: isinstance(leaf, P))
    assert {name for spec in specs for name in spec if name} <= set(DIMS)


def test_no_mesh_axis_is_named_in_the_model():
    source = Path(models.transformer.__file__).read_text()
    # "sequence" is an axis and, here, a dim: the tables say which dims it divides.
    assert not [axis for axis in AXES if axis != "sequence" and f'"{axis}"' in source]
