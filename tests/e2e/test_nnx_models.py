"""Training steps of flax nnx models, sharded against unsharded.

Modules are split and merged around the step, or passed as they are: they are pytrees.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import spmd
from tests.e2e.follow import assert_same, classes, elbo, follow, next_tokens, quick
from tests.oracle import P, make_mesh


def real(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng((seed, *shape)).normal(size=shape).astype(np.float32)


def ids(*shape: int, n: int) -> np.ndarray:
    return np.random.default_rng((n, *shape)).integers(0, n, shape).astype(np.int32)


class MLP(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.up = nnx.Linear(12, 16, use_bias=False, rngs=rngs)
        self.norm = nnx.BatchNorm(16, momentum=0.9, rngs=rngs)
        self.dropout = nnx.Dropout(0.3, rngs=rngs)
        self.down = nnx.Linear(16, 4, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        return self.down(self.dropout(nnx.gelu(self.norm(self.up(x)))))


class CNN(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.first = nnx.Conv(3, 8, (3, 3), use_bias=False, rngs=rngs)
        self.norm = nnx.BatchNorm(8, momentum=0.9, rngs=rngs)
        self.second = nnx.Conv(8, 8, (3, 3), strides=(2, 2), rngs=rngs)
        self.out = nnx.Linear(8, 4, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        x = nnx.relu(self.norm(self.first(x)))
        x = nnx.relu(self.second(nnx.max_pool(x, (2, 2), strides=(2, 2))))
        return self.out(nnx.avg_pool(x, (2, 2)).mean((1, 2)))


class LSTM(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.embed = nnx.Embed(16, 8, rngs=rngs)
        self.rnn = nnx.RNN(nnx.OptimizedLSTMCell(8, 16, rngs=rngs))
        self.out = nnx.Linear(16, 4, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        return self.out(self.rnn(self.embed(x))[:, -1])


class Transformer(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.embed = nnx.Embed(16, 8, rngs=rngs)
        self.first, self.second = nnx.LayerNorm(8, rngs=rngs), nnx.RMSNorm(8, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(
            4, 8, dropout_rate=0.2, deterministic=False, decode=False, use_bias=False, rngs=rngs
        )
        self.up, self.down = nnx.Linear(8, 32, rngs=rngs), nnx.Linear(32, 8, rngs=rngs)

    def __call__(self, tokens: Any) -> Any:
        x = self.embed(tokens)
        x = x + self.attention(self.first(x), mask=nnx.make_causal_mask(tokens))
        return self.embed.attend(x + self.down(nnx.relu(self.up(self.second(x)))))


class VAE(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.rngs = rngs.fork()
        self.encode, self.mean = nnx.Linear(12, 16, rngs=rngs), nnx.Linear(16, 4, rngs=rngs)
        self.logvar, self.decode = nnx.Linear(16, 4, rngs=rngs), nnx.Linear(4, 12, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        hidden = nnx.relu(self.encode(x))
        mean, logvar = self.mean(hidden), self.logvar(hidden)
        z = mean + jnp.exp(0.5 * logvar) * jax.random.normal(self.rngs.noise(), mean.shape)
        return self.decode(z), mean, logvar


def make(model: type, seed: int = 0) -> tuple[Any, nnx.Optimizer]:
    made = model(nnx.Rngs(seed))
    return made, nnx.Optimizer(made, optax.adam(0.1, eps=0.1), wrt=nnx.Param)


def train(model: Any, optimizer: nnx.Optimizer, batch: Any, criterion: Callable) -> Any:
    """What an example does inside of its jitted step: both are changed in place."""
    loss, grads = nnx.value_and_grad(lambda m: criterion(m(batch["x"]), batch))(model)
    optimizer.update(model, grads)
    return loss


def by_columns(x: Any) -> P | None:
    """Matrices over `tensor` by their last dim that it divides."""
    dims = [d for d, n in enumerate(x.shape) if n % 4 == 0]
    if x.ndim < 2 or not dims:
        return None
    return P(*["tensor" if d == dims[-1] else None for d in range(x.ndim)])


LABELS = ids(4, n=4)
IMAGES = {"x": real(4, 8, 8, 3), "labels": LABELS}
CASES: dict[str, tuple[type, Callable, dict[str, Any], Any, bool]] = {
    "mlp": (MLP, classes, {"x": real(4, 12), "labels": LABELS}, P("data"), True),
    "cnn-batch": (CNN, classes, IMAGES, P("data"), True),
    "cnn-spatial": (CNN, classes, IMAGES, {"x": P("data", "tensor"), "labels": None}, False),
    "lstm": (LSTM, classes, {"x": ids(4, 5, n=16), "labels": LABELS}, P("data"), True),
    "transformer": (Transformer, next_tokens, {"x": ids(4, 6, n=16)}, P("data"), True),
    "vae": (VAE, elbo, {"x": (real(4, 12) > 0).astype("f4")}, P("data"), True),
}


@pytest.mark.parametrize("name", CASES)
def test_split_and_merged_training_equals_the_unsharded_one(name: str) -> None:
    model, criterion, batch, where, sharded = CASES[name]
    graphdef, state = nnx.split(make(model))

    def step(state: Any, batch: Any) -> Any:
        model, optimizer = nnx.merge(graphdef, state)
        loss = train(model, optimizer, batch, criterion)
        return nnx.state((model, optimizer)), loss

    specs = jax.tree.map(by_columns, state) if sharded else None
    follow(step, (state,), (batch,), make_mesh(data=2, tensor=4), (specs, where), steps=2)


def test_modules_are_passed_as_they_are() -> None:
    """A module in and out. One that is only changed in place keeps its values, as in jax.jit."""
    batch = {"x": real(4, 12), "labels": LABELS}

    def step(pair: Any, batch: Any) -> Any:
        loss = train(*pair, batch, classes)
        return pair, loss

    follow(step, (make(MLP),), (batch,), make_mesh(data=2, tensor=4), (None, P("data")), steps=2)
    kept = make(MLP)
    run = spmd.jit(
        lambda pair, batch: step(pair, batch)[1], mesh=make_mesh(data=2, tensor=4),
        compiler_options=quick(),
    )  # fmt: skip
    run(kept, batch)
    assert_same(nnx.state(kept), nnx.state(make(MLP)), 0)


def test_graph_definition_is_a_static_argument() -> None:
    graphdef, state = nnx.split(MLP(nnx.Rngs(0)))

    def forward(graphdef: Any, state: Any, x: Any) -> Any:
        model = nnx.merge(graphdef, state)
        model.eval()
        return model(x)

    x = real(4, 12)
    want = jax.jit(forward, static_argnums=0)(graphdef, state, x)
    for static in (0, None):
        run = spmd.jit(
            forward, mesh=make_mesh(data=2, tensor=4), static_argnums=static,
            in_shardings=(None, P("data")) if static == 0 else (None, None, P("data")),
        )  # fmt: skip
        assert_same(run(graphdef, state, x), want, 1e-5)
    assert run(graphdef, state, x).sharding.spec == P("data")


def test_metadata_of_variables_is_an_annotation() -> None:
    """Adafactor's factored moments have the metadata of their parameter, and other shapes."""

    def make() -> tuple[Any, nnx.Optimizer]:
        metadata = {
            "kernel_metadata": {"out_sharding": ("embed", "mlp")},
            "bias_metadata": {"out_sharding": ("mlp",)},
        }
        model = nnx.Linear(12, 4, **metadata, rngs=nnx.Rngs(0))
        optimiser = optax.adafactor(0.1, min_dim_size_to_factor=4)
        return model, nnx.Optimizer(model, optimiser, wrt=nnx.Param)

    def step(model: Any, optimizer: Any, batch: Any) -> Any:
        loss = train(model, optimizer, batch, classes)
        return model, optimizer, loss

    batch, rules = {"x": real(4, 12), "labels": LABELS}, {"embed": "data", "mlp": "tensor"}
    with nnx.use_eager_sharding(False):
        run = follow(step, make(), (batch,), make_mesh(data=2, tensor=4), axis_rules=rules)
        assert run.carry[0].kernel.get_value().sharding.spec == P("data", "tensor")
        assert run.carry[0].bias.get_value().sharding.spec == P("tensor")
