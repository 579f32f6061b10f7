"""Typical programs of published JAX packages under `spmd.jit`, sharded against unsharded."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.extend.core import Primitive
from jax.interpreters import mlir

import spmd
from sharding.errors import RuleError
from tests.e2e.follow import follow
from tests.oracle import P, check, make_mesh

SGD = optax.sgd(0.1, momentum=0.9)


def real(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng((seed, *shape)).normal(size=shape).astype(np.float32)


def ids(*shape: int, n: int) -> np.ndarray:
    return np.random.default_rng((n, *shape)).integers(0, n, shape).astype(np.int32)


@functools.cache
def mesh() -> Any:
    return make_mesh(data=2, tensor=4)


def by_columns(x: Any) -> P | None:
    """Matrices over `tensor` by their last dim that it divides."""
    dims = [d for d, n in enumerate(x.shape) if n % 4 == 0]
    if x.ndim < 2 or not dims:
        return None
    return P(*["tensor" if d == dims[-1] else None for d in range(x.ndim)])


def update(loss: Any, params: Any, state: Any, *args: Any) -> Any:
    value, grads = jax.value_and_grad(loss)(params, *args)
    updates, state = SGD.update(grads, state, params)
    return optax.apply_updates(params, updates), state, value


# equinox


def test_equinox_training() -> None:
    eqx = pytest.importorskip("equinox")
    model = eqx.nn.MLP(12, 4, 16, 2, activation=jax.nn.gelu, key=jax.random.key(0))
    params, static = eqx.partition(model, eqx.is_inexact_array)

    @eqx.filter_value_and_grad
    def loss(model: Any, x: Any, y: Any) -> Any:
        return jnp.mean((jax.vmap(model)(x) - y) ** 2)

    def step(params: Any, state: Any, x: Any, y: Any) -> Any:
        value, grads = loss(eqx.combine(params, static), x, y)
        updates, state = SGD.update(grads, state, params)
        return eqx.apply_updates(params, updates), state, value

    specs = jax.tree.map(by_columns, params)
    follow(step, (params, SGD.init(params)), (real(8, 12), real(8, 4)), mesh(),
           (specs, None, P("data"), P("data")), steps=2)  # fmt: skip


def test_equinox_layers_with_state() -> None:
    eqx = pytest.importorskip("equinox")

    class Net(eqx.Module):
        conv: Any
        norm: Any
        attention: Any
        dropout: Any
        out: Any

        def __init__(self, key: Any):
            a, b, c = jax.random.split(key, 3)
            self.conv = eqx.nn.Conv1d(3, 8, 3, padding=1, key=a, use_bias=False)
            self.norm = eqx.nn.BatchNorm(8, axis_name="batch", mode="batch")
            self.attention = eqx.nn.MultiheadAttention(4, 8, key=b)
            self.dropout = eqx.nn.Dropout(0.3)
            self.out = eqx.nn.Linear(8, 4, key=c)

        def __call__(self, x: Any, state: Any, key: Any) -> Any:
            x, state = self.norm(self.conv(x), state)
            x = self.attention(x.T, x.T, x.T)
            return self.out(self.dropout(x, key=key).mean(0)), state

    model, state = eqx.nn.make_with_state(Net)(jax.random.key(0))
    params, static = eqx.partition(model, eqx.is_inexact_array)

    def step(params: Any, state: Any, x: Any, y: Any, key: Any) -> Any:
        def loss(params: Any) -> Any:
            run = jax.vmap(eqx.combine(params, static), axis_name="batch",
                           in_axes=(0, None, 0), out_axes=(0, None))  # fmt: skip
            logits, after = run(x, state, jax.random.split(key, 4))
            return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean(), after

        (value, after), grads = jax.value_and_grad(loss, has_aux=True)(params)
        return jax.tree.map(lambda p, g: p - 0.1 * g, params, grads), after, value

    batch = (real(4, 3, 6), ids(4, n=4), jax.random.key(1))
    follow(step, (params, state), batch, mesh(), (None, None, P("data"), P("data"), None), steps=2)


# haiku


def test_haiku_training() -> None:
    hk = pytest.importorskip("haiku")

    @hk.transform_with_state
    def forward(x: Any, train: bool) -> Any:
        x = hk.BatchNorm(True, True, 0.9)(hk.Conv2D(8, 3, with_bias=False)(x), train)
        x = hk.MaxPool((2, 2, 1), (2, 2, 1), "SAME")(jax.nn.relu(x))
        x = hk.dropout(hk.next_rng_key(), 0.3, x)
        core = hk.LSTM(16)
        x, _ = hk.dynamic_unroll(core, x.mean(1), core.initial_state(x.shape[0]), time_major=False)
        return hk.Linear(4)(hk.LayerNorm(-1, True, True)(x[:, -1]))

    x, labels = real(4, 8, 8, 3), ids(4, n=4)
    shapes = jax.eval_shape(lambda: forward.init(jax.random.key(0), x, True))
    params = jax.tree.map(lambda x: 0.5 * real(*x.shape), shapes[0])
    stats = jax.tree.map(lambda x: abs(real(*x.shape)).astype(x.dtype), shapes[1])

    def step(params: Any, stats: Any, state: Any, key: Any, x: Any, labels: Any) -> Any:
        def loss(params: Any) -> Any:
            logits, after = forward.apply(params, stats, key, x, True)
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), after

        (value, stats), grads = jax.value_and_grad(loss, has_aux=True)(params)
        updates, state = SGD.update(grads, state)
        return optax.apply_updates(params, updates), stats, state, value

    specs = jax.tree.map(by_columns, params)
    follow(step, (params, stats, SGD.init(params)), (jax.random.key(1), x, labels), mesh(),
           (specs, None, None, None, P("data"), P("data")))  # fmt: skip


# diffrax


def test_diffrax_neural_ode() -> None:
    diffrax, eqx = pytest.importorskip("diffrax"), pytest.importorskip("equinox")
    field = eqx.nn.MLP(2, 2, 8, 1, activation=jnp.tanh, key=jax.random.key(0))
    params, static = eqx.partition(field, eqx.is_inexact_array)

    def solve(params: Any, y0: Any) -> Any:
        field = eqx.combine(params, static)
        solution = diffrax.diffeqsolve(
            diffrax.ODETerm(lambda t, y, args: field(y)), diffrax.Bosh3(), t0=0.0, t1=1.0,
            dt0=0.1, y0=y0, saveat=diffrax.SaveAt(ts=np.linspace(0.0, 1.0, 5)), max_steps=16,
            stepsize_controller=diffrax.PIDController(rtol=1e-3, atol=1e-4),
        )  # fmt: skip
        return solution.ys

    def loss(params: Any, y0: Any, target: Any) -> Any:
        return jnp.mean((jax.vmap(solve, (None, 0))(params, y0) - target) ** 2)

    def step(params: Any, state: Any, y0: Any, target: Any) -> Any:
        return update(loss, params, state, y0, target)

    follow(step, (params, SGD.init(params)), (real(8, 2), real(8, 5, 2)), mesh(),
           (None, None, P("data"), P("data")))  # fmt: skip


def test_diffrax_stochastic_differential_equation() -> None:
    diffrax = pytest.importorskip("diffrax")

    def solve(y0: Any, key: Any) -> Any:
        noise = diffrax.VirtualBrownianTree(0.0, 1.0, tol=0.05, shape=(2,), key=key)
        drift = diffrax.ODETerm(lambda t, y, args: -y)
        shake = diffrax.ControlTerm(lambda t, y, args: 0.1 * jnp.diag(jnp.cos(y)), noise)
        terms = diffrax.MultiTerm(drift, shake)
        solution = diffrax.diffeqsolve(
            terms, diffrax.Heun(), t0=0.0, t1=1.0, dt0=0.25, y0=y0, max_steps=8
        )
        return solution.ys[-1]

    def run(y0: Any, keys: Any) -> Any:
        return (jax.vmap(solve)(y0, keys),)

    follow(run, (), (real(8, 2), jax.random.split(jax.random.key(0), 8)), mesh(),
           (P("data"), P("data")))  # fmt: skip


# numpyro


def _logistic(x: Any, y: Any) -> None:
    import numpyro
    import numpyro.distributions as dist

    scale = numpyro.sample("scale", dist.HalfCauchy(1.0))
    w = numpyro.sample("w", dist.Normal(0, scale).expand([4]).to_event(1))
    with numpyro.plate("data", x.shape[0]):
        numpyro.sample("y", dist.Bernoulli(logits=x @ w), obs=y)


def test_numpyro_variational_inference() -> None:
    pytest.importorskip("numpyro")
    from numpyro.infer import SVI, Trace_ELBO
    from numpyro.infer.autoguide import AutoNormal

    x, y = real(16, 4), (real(16) > 0).astype(np.int32)
    svi = SVI(_logistic, AutoNormal(_logistic), optax.adam(0.1, eps=0.1), Trace_ELBO())
    state = svi.init(jax.random.key(0), x, y)
    follow(svi.update, (state,), (x, y), mesh(), (None, P("data"), P("data")), steps=2)


@pytest.mark.parametrize("kind", ["HMC", "NUTS"])
def test_numpyro_sampling(kind: str) -> None:
    pytest.importorskip("numpyro")
    from numpyro import infer

    x, y = real(16, 4), (real(16) > 0).astype(np.int32)
    options = {"max_tree_depth": 3} if kind == "NUTS" else {"trajectory_length": 0.4}
    kernel = getattr(infer, kind)(_logistic, step_size=0.1, **options)
    state = kernel.init(jax.random.key(0), 4, None, model_args=(x, y), model_kwargs={})

    def step(state: Any, x: Any, y: Any) -> Any:
        return (kernel.sample(state, (x, y), {}),)

    follow(step, (state,), (x, y), mesh(), (None, P("data"), P("data")), steps=2, tolerance=1e-4)


# optimistix and lineax


def test_optimistix_batched_solvers() -> None:
    optx = pytest.importorskip("optimistix")

    def residuals(y: Any, args: Any) -> Any:
        a, b = args
        return jnp.tanh(a @ y) - b

    def fit(a: Any, b: Any) -> Any:
        solver = optx.LevenbergMarquardt(rtol=1e-3, atol=1e-3)
        return optx.least_squares(
            residuals, solver, jnp.zeros(3), args=(a, b), max_steps=32, throw=False
        ).value

    def root(a: Any, b: Any) -> Any:
        solver = optx.Newton(rtol=1e-4, atol=1e-4)
        return optx.root_find(
            lambda y, b: y + 0.1 * jnp.sin(y) - b, solver, b[:3], args=b[:3], max_steps=16
        ).value

    def lowest(a: Any, b: Any) -> Any:
        solver = optx.BFGS(rtol=1e-3, atol=1e-3)
        return optx.minimise(
            lambda y, args: jnp.sum(residuals(y, args) ** 2 + 0.1 * jnp.sum(y**2)), solver,
            jnp.zeros(3), args=(a, b), max_steps=16, throw=False,
        ).value  # fmt: skip

    def run(a: Any, b: Any) -> Any:
        solved = [jax.vmap(f)(a, b) for f in (fit, root, lowest)]
        gradient = jax.grad(lambda b: jnp.sum(jax.vmap(root)(a, b) ** 2))(b)
        return (*solved, gradient)

    follow(run, (), (real(8, 5, 3), 0.5 * real(8, 5)), mesh(), (P("data"), P("data")),
           tolerance=1e-4)  # fmt: skip


# jraph


def test_jraph_graph_network() -> None:
    jraph = pytest.importorskip("jraph")
    nodes, edges = 16, 24
    weights = {
        n: 0.3 * real(*s) for n, s in {"edge": (8 + 4 + 8, 8), "node": (8 + 8 + 8, 8)}.items()
    }
    senders, receivers = ids(edges, n=nodes), ids(edges, n=nodes)[::-1].copy()
    sizes = np.array([10, 6]), np.array([14, 10])

    def loss(weights: Any, x: Any, e: Any, senders: Any, receivers: Any, target: Any) -> Any:
        graph = jraph.GraphsTuple(
            nodes=x, edges=e, senders=senders, receivers=receivers, globals=None,
            n_node=sizes[0], n_edge=sizes[1],
        )  # fmt: skip
        network = jraph.GraphNetwork(
            update_edge_fn=lambda e, s, r, g: jax.nn.relu(
                jnp.concatenate([e, s, r], -1) @ weights["edge"]
            ),
            update_node_fn=lambda n, s, r, g: jnp.concatenate([n, s, r], -1) @ weights["node"],
            attention_logit_fn=lambda e, s, r, g: jnp.sum(e * s, -1, keepdims=True),
            attention_reduce_fn=lambda e, w: e * w,
        )
        return jnp.mean((network(graph).nodes - target) ** 2)

    def step(weights: Any, state: Any, *args: Any) -> Any:
        return update(loss, weights, state, *args)

    batch = (real(nodes, 8), real(edges, 4), senders, receivers, real(nodes, 8, seed=1))
    follow(step, (weights, SGD.init(weights)), batch, mesh(),
           (P("tensor"), None, *[P("data")] * 5), steps=2)  # fmt: skip


# blackjax


def test_blackjax_chains() -> None:
    blackjax = pytest.importorskip("blackjax")
    x, y = real(16, 4), (real(16) > 0).astype(np.float32)

    def density(w: Any, x: Any, y: Any) -> Any:
        return -jnp.sum(optax.sigmoid_binary_cross_entropy(x @ w, y)) - jnp.sum(w**2)

    def step(states: Any, key: Any, x: Any, y: Any) -> Any:
        given = functools.partial(density, x=x, y=y)
        kernel = blackjax.nuts(given, 0.1, jnp.ones(4), max_num_doublings=3)
        return jax.vmap(kernel.step)(jax.random.split(key, 8), states)

    states = jax.vmap(lambda w: blackjax.nuts.init(w, lambda w: density(w, x, y)))(real(8, 4))
    follow(step, (states,), (jax.random.key(0), x, y), mesh(), (P("data"), None, P("tensor"),
           P("tensor")), tolerance=1e-4)  # fmt: skip


# Primitives that packages define


def _primitive(name: str, fun: Any) -> Any:
    made = Primitive(name)
    made.def_impl(fun)
    made.def_abstract_eval(lambda x, **params: x.update(shape=x.shape[:1]))
    mlir.register_lowering(made, mlir.lower_fun(fun, multiple_results=False))
    return made


def test_primitives_without_a_rule_are_what_they_are_lowered_as() -> None:
    def inner(x: Any) -> Any:
        return jnp.sum(jnp.tanh(x), 1)

    def outer(x: Any, *, power: int) -> Any:
        counts = jax.lax.fori_loop(0, power, lambda i, y: y * inner_p.bind(x), jnp.ones(x.shape[0]))
        return counts + jax.jit(inner_p.bind)(x)

    inner_p, outer_p = _primitive("inner", inner), _primitive("outer", outer)
    x = real(8, 16)
    partitioned = check(lambda x: outer_p.bind(x, power=2), (x,), mesh(), (P("data", "tensor"),))
    sums = [c for c in partitioned.collectives if c.kind == "all_reduce"]
    assert {c.axes for c in sums} == {("tensor",)} and len(sums) == len(partitioned.collectives)


def test_primitives_with_lowerings_of_their_own_need_a_rule() -> None:
    own_p = _primitive("own", lambda x: x[:, 0])
    mlir.register_lowering(own_p, lambda ctx, x: [x], platform="tpu")
    with pytest.raises(RuleError, match="primitive 'own' at .* has no rule"):
        spmd.jit(own_p.bind, mesh=mesh()).trace(real(8, 16))
