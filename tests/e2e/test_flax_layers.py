"""Layers and poolings of flax linen: values and gradients, sharded in each way that users shard.

All slow: `test_flax_models.py` has whole models in the default tier.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.e2e.follow import follow, value_and_gradients
from tests.oracle import P, make_mesh


def real(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng((seed, *shape)).normal(size=shape).astype(np.float32)


class Residual(nn.Module):
    @nn.compact
    def __call__(self, x: Any, _: Any) -> Any:
        return x + nn.Dense(16)(nn.gelu(nn.LayerNorm()(x))), None


class Scanned(nn.Module):
    @nn.compact
    def __call__(self, x: Any) -> Any:
        layers = nn.scan(
            nn.remat(Residual), variable_axes={"params": 0}, split_rngs={"params": True}, length=3
        )
        return layers()(x, None)[0]


class Mapped(nn.Module):
    @nn.compact
    def __call__(self, x: Any) -> Any:
        lifted = nn.vmap(
            nn.Dense, variable_axes={"params": 0}, split_rngs={"params": True}, in_axes=1,
            out_axes=1,
        )  # fmt: skip
        return lifted(8)(x)


class Attention(nn.Module):
    @nn.compact
    def __call__(self, x: Any) -> Any:
        mask = nn.make_attention_mask(x[..., 0] > -1, x[..., 0] > -1)
        return nn.MultiHeadDotProductAttention(4, use_bias=False)(x, mask=mask)


IMAGE, SEQUENCE, FILM = real(4, 8, 8, 8), real(4, 8, 16), real(4, 3, 8, 8, 4)
NAMES = "celu elu gelu glu hard_sigmoid hard_swish hard_tanh leaky_relu log_sigmoid log_softmax \
relu6 selu silu soft_sign softmax softplus standardize".split()
LAYERS: dict[str, tuple[Any, np.ndarray]] = {
    "activations": (lambda x: [getattr(nn, name)(x) for name in NAMES], SEQUENCE),
    "attention": (Attention(), SEQUENCE),
    "avg_pool": (lambda x: nn.avg_pool(x, (2, 2), (2, 2)), IMAGE),
    "avg_pool_same": (
        lambda x: nn.avg_pool(x, (3, 3), (2, 2), "SAME", count_include_pad=False), IMAGE
    ),
    "batch_norm": (nn.BatchNorm(use_running_average=False), IMAGE),
    "bidirectional": (
        nn.Bidirectional(nn.RNN(nn.LSTMCell(8)), nn.RNN(nn.GRUCell(8))), SEQUENCE
    ),
    "conv": (nn.Conv(8, (3, 3)), IMAGE),
    "conv_causal": (nn.Conv(8, (3,), padding="CAUSAL"), SEQUENCE),
    "conv_circular": (nn.Conv(8, (3, 3), padding="CIRCULAR"), IMAGE),
    "conv_depthwise": (nn.Conv(16, (3, 3), feature_group_count=8), IMAGE),
    "conv_dilated": (nn.Conv(8, (3, 3), kernel_dilation=2), IMAGE),
    "conv_grouped": (nn.Conv(8, (3, 3), feature_group_count=4), IMAGE),
    "conv_local": (nn.ConvLocal(8, (3,)), SEQUENCE),
    "conv_lstm": (nn.RNN(nn.ConvLSTMCell(4, (3, 3))), FILM),
    "conv_reflect": (nn.Conv(8, (3, 3), padding="REFLECT"), IMAGE),
    "conv_strided": (nn.Conv(8, (3, 3), strides=2), IMAGE),
    "conv_transpose": (nn.ConvTranspose(8, (3, 3), strides=(2, 2)), IMAGE),
    "dense": (nn.Dense(8), SEQUENCE),
    "dense_general": (nn.DenseGeneral((4, 8), axis=(-2, -1)), SEQUENCE),
    "einsum": (nn.Einsum((16, 4, 8), "bsd,dhk->bshk"), SEQUENCE),
    "group_norm": (nn.GroupNorm(4), IMAGE),
    "gru": (nn.RNN(nn.GRUCell(8)), SEQUENCE),
    "instance_norm": (nn.InstanceNorm(), IMAGE),
    "layer_norm": (nn.LayerNorm(), SEQUENCE),
    "lstm": (nn.RNN(nn.LSTMCell(8)), SEQUENCE),
    "max_pool": (lambda x: nn.max_pool(x, (3, 3), (2, 2), "SAME"), IMAGE),
    "mgu": (nn.RNN(nn.MGUCell(8)), SEQUENCE),
    "prelu": (nn.PReLU(), SEQUENCE),
    "rms_norm": (nn.RMSNorm(), SEQUENCE),
    "scan_of_remat": (Scanned(), SEQUENCE),
    "simple_rnn": (nn.RNN(nn.SimpleCell(8)), SEQUENCE),
    "vmap": (Mapped(), SEQUENCE),
    "weight_norm": (nn.WeightNorm(nn.Dense(8)), SEQUENCE),
}  # fmt: skip


def functional(layer: Any, x: np.ndarray) -> tuple[Callable, Any]:
    """A function of parameters and input, and parameters."""
    if not isinstance(layer, nn.Module):
        return lambda params, x: layer(x), {}
    shapes = jax.eval_shape(lambda: layer.init(jax.random.key(0), x))
    params = jax.tree.map(lambda s: 0.4 * real(*s.shape), shapes["params"])
    rest = {
        name: jax.tree.map(lambda s: abs(real(*s.shape)) + 0.5, tree)
        for name, tree in shapes.items() if name != "params"
    }  # fmt: skip
    return (
        lambda params, x: layer.apply({"params": params, **rest}, x, mutable=list(rest)),
        params,
    )


def by_columns(x: Any) -> P | None:
    """Parameters over `tensor` by their last dim that it divides."""
    dims = [d for d, n in enumerate(x.shape) if n % 4 == 0]
    if x.ndim < 2 or not dims:
        return None
    return P(*["tensor" if d == dims[-1] else None for d in range(x.ndim)])


@pytest.mark.slow
@pytest.mark.parametrize("place", ["batch", "spatial", "features", "parameters"])
@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_equals_the_unsharded_one(name: str, place: str) -> None:
    layer, x = LAYERS[name]
    fun, params = functional(layer, x)
    specs, where = None, P("data")
    if place == "spatial":
        where = P("data", None, "tensor") if name == "conv_lstm" else P("data", "tensor")
    elif place == "features":
        where = P("data", *[None] * (x.ndim - 2), "tensor")
    elif place == "parameters":
        specs = jax.tree.map(by_columns, params)

    def run(params: Any, x: Any) -> Any:
        return (value_and_gradients(fun, (params, x), ()),)

    args = (jax.tree.map(jnp.asarray, params), x)
    follow(run, (), args, make_mesh(data=2, tensor=4), (specs, where), tolerance=2e-5)
