"""Training steps of flax models, as the examples write them, sharded against unsharded.

linen: a `TrainState`, mutable batch statistics, dropout. nnx is in `test_nnx_models.py`.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.training.train_state import TrainState

from tests.e2e.follow import classes, elbo, follow, next_tokens
from tests.oracle import P, make_mesh


def real(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng((seed, *shape)).normal(size=shape).astype(np.float32)


def ids(*shape: int, n: int) -> np.ndarray:
    return np.random.default_rng((n, *shape)).integers(0, n, shape).astype(np.int32)


class MLP(nn.Module):
    @nn.compact
    def __call__(self, x: Any, train: bool) -> Any:
        x = nn.Dropout(0.3, deterministic=not train)(nn.gelu(nn.Dense(16)(x)))
        return nn.Dense(4)(nn.LayerNorm()(x))


class CNN(nn.Module):
    @nn.compact
    def __call__(self, x: Any, train: bool) -> Any:
        for features in (8, 16):
            x = nn.Conv(features, (3, 3), use_bias=False)(x)
            x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.9)(x))
            x = (nn.max_pool if features == 8 else nn.avg_pool)(x, (2, 2), strides=(2, 2))
        return nn.Dense(4)(x.mean((1, 2)))


class LSTM(nn.Module):
    @nn.compact
    def __call__(self, x: Any, train: bool) -> Any:
        x = nn.Embed(16, 8)(x)
        x = nn.RNN(nn.OptimizedLSTMCell(16))(x)
        return nn.Dense(4)(nn.RNN(nn.GRUCell(8), reverse=True, keep_order=True)(x)[:, 0])


class Block(nn.Module):
    @nn.compact
    def __call__(self, x: Any, mask: Any, train: bool) -> Any:
        y = nn.LayerNorm()(x)
        x = x + nn.MultiHeadDotProductAttention(
            4, dropout_rate=0.2, deterministic=not train, use_bias=False
        )(y, mask=mask)  # fmt: skip
        return x + nn.Dense(8)(nn.relu(nn.Dense(32)(nn.RMSNorm()(x))))


class Transformer(nn.Module):
    @nn.compact
    def __call__(self, tokens: Any, train: bool) -> Any:
        embed = nn.Embed(16, 8)
        x = embed(tokens) + self.param("place", nn.initializers.normal(), (1, 6, 8))
        x = nn.remat(Block, static_argnums=3)()(x, nn.make_causal_mask(tokens), train)
        return embed.attend(nn.LayerNorm()(x))


class VAE(nn.Module):
    @nn.compact
    def __call__(self, x: Any, train: bool) -> Any:
        hidden = nn.relu(nn.Dense(16)(x))
        mean, logvar = nn.Dense(4, name="mean")(hidden), nn.Dense(4, name="logvar")(hidden)
        z = mean + jnp.exp(0.5 * logvar) * jax.random.normal(self.make_rng("noise"), mean.shape)
        return nn.Dense(12)(nn.relu(nn.Dense(16)(z))), mean, logvar


class State(TrainState):
    stats: Any
    key: Any


def make_step(criterion: Callable) -> Callable:
    def step(state: State, batch: Any) -> Any:
        key = jax.random.fold_in(state.key, state.step)
        dropout, noise = jax.random.split(key)

        def loss(params: Any) -> Any:
            variables = {"params": params, "batch_stats": state.stats}
            outputs, changed = state.apply_fn(
                variables, batch["x"], train=True, mutable=["batch_stats"],
                rngs={"dropout": dropout, "noise": noise},
            )  # fmt: skip
            return criterion(outputs, batch), (changed, outputs)

        (value, (changed, _)), grads = jax.value_and_grad(loss, has_aux=True)(state.params)
        state = state.apply_gradients(grads=grads, stats=changed.get("batch_stats", {}))
        return state, {"loss": value, "norm": optax.tree.norm(grads)}

    return step


def by_columns(path: Any, x: Any) -> P | None:
    """Kernels and embeddings over `tensor` by their last dim that it divides."""
    dims = [d for d, n in enumerate(x.shape) if n % 4 == 0]
    if x.ndim < 2 or not dims:
        return None
    return P(*["tensor" if d == dims[-1] else None for d in range(x.ndim)])


def by_rows(path: Any, x: Any) -> P | None:
    """Every parameter over `data` by its first dim that it divides."""
    dims = [d for d, n in enumerate(x.shape) if n % 2 == 0]
    return P(*["data" if d == dims[0] else None for d in range(x.ndim)]) if dims else None


LABELS = ids(4, n=4)
CASES: dict[str, tuple[nn.Module, Callable, dict[str, Any], Any, Any]] = {
    "mlp-tensor": (MLP(), classes, {"x": real(4, 12), "labels": LABELS}, P("data"), by_columns),
    "mlp-fsdp": (MLP(), classes, {"x": real(4, 12), "labels": LABELS}, P("data"), by_rows),
    "cnn-batch": (CNN(), classes, {"x": real(4, 8, 8, 3), "labels": LABELS}, P("data"), by_rows),
    "cnn-spatial": (
        CNN(), classes, {"x": real(4, 8, 8, 3), "labels": LABELS},
        {"x": P("data", "tensor"), "labels": P("data")}, None,
    ),
    "lstm-batch": (LSTM(), classes, {"x": ids(4, 5, n=16), "labels": LABELS}, P("data"), by_rows),
    "lstm-tensor": (
        LSTM(), classes, {"x": ids(4, 5, n=16), "labels": LABELS}, P("data"), by_columns
    ),
    "transformer-tensor": (
        Transformer(), next_tokens, {"x": ids(4, 6, n=16)}, P("data"), by_columns
    ),
    "transformer-fsdp": (Transformer(), next_tokens, {"x": ids(4, 6, n=16)}, P("data"), by_rows),
    "vae-tensor": (VAE(), elbo, {"x": (real(4, 12) > 0).astype("f4")}, P("data"), by_columns),
}  # fmt: skip


SLOW = {"mlp-fsdp", "lstm-tensor", "transformer-fsdp"}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in CASES]
)
def test_linen_training_equals_the_unsharded_one(name: str) -> None:
    model, criterion, batch, where, layout = CASES[name]
    keys = {"params": jax.random.key(0), "noise": jax.random.key(1)}
    shapes = jax.eval_shape(lambda: model.init(keys, batch["x"], train=False))
    # Drawn by numpy: compiling the real init takes longer than the rest.
    params = jax.tree.map(lambda x: 0.4 * real(*x.shape), shapes["params"])
    stats = jax.tree.map(lambda x: 0.5 + np.abs(real(*x.shape)), shapes.get("batch_stats", {}))
    # Gradients of some biases are nothing but rounding errors: `eps` keeps them small.
    state = State.create(
        apply_fn=model.apply, params=params, tx=optax.adam(0.1, eps=0.1), stats=stats,
        key=jax.random.key(2),
    )  # fmt: skip
    specs: Any = None
    if layout is not None:
        params = jax.tree_util.tree_map_with_path(layout, state.params)
        specs = state.replace(step=None, params=params, opt_state=None, stats=None, key=None)
    mesh = make_mesh(data=2, tensor=4)
    follow(make_step(criterion), (state,), (batch,), mesh, (specs, where), steps=2)
