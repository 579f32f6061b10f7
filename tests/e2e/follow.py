"""Training steps, sharded against unsharded: what the tests of third-party programs share."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

import spmd
from tests.oracle import assert_close, make_mesh


@dataclasses.dataclass(frozen=True)
class Run:
    """What the sharded steps ended with, and how to ask the compiler about them."""

    carry: Any
    function: Any
    args: Sequence[Any]

    @functools.cached_property
    def partitioned(self) -> spmd.Partitioned:
        return self.function.trace(*self.args).propagate().partition()


@functools.cache
def quick() -> dict[str, Any]:
    """Compiler options for a short compilation: what is tested lies above code generation."""
    options: dict[str, Any] = {"xla_backend_optimization_level": 0}
    faster = {**options, "xla_cpu_use_fusion_emitters": False}
    try:
        jax.jit(lambda: 0, compiler_options=faster).lower().compile()
    except jax.errors.JaxRuntimeError:  # newer versions have no such option
        return options
    return faster


def follow(
    step: Callable,
    carry: Sequence[Any],
    batch: Sequence[Any],
    mesh: Mesh,
    in_shardings: Any = None,
    steps: int = 1,
    tolerance: float = 1e-5,
    programs: int = 1,
    **options: Any,
) -> Run:
    """Asserts that `steps` calls of `step` under `spmd.jit` give what they give under `jax.jit`.

    A step takes the carry and the batch, and returns the next carry and anything else after it.
    The carry comes back as it went in: nothing is compiled twice that would not be for one device,
    unless `programs` says otherwise.
    """
    plain = jax.jit(step, compiler_options=quick())
    sharded = spmd.jit(
        step, mesh=mesh, in_shardings=in_shardings, compiler_options=quick(), **options
    )
    want, got, n = tuple(carry), tuple(carry), len(carry)
    for _ in range(steps):
        want, got = plain(*want[:n], *batch), sharded(*got[:n], *batch)
    assert_same(got, want, tolerance)
    assert sharded._cache_size() <= max(programs, plain._cache_size())
    return Run(got[:n], sharded, (*carry, *batch))


def assert_same(got: Any, want: Any, tolerance: float) -> None:
    """The same tree, and every leaf within `tolerance` of its largest element."""
    assert jax.tree.structure(got) == jax.tree.structure(want)
    pairs = zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), strict=True)
    for (path, a), b in pairs:
        assert_close(a, b, tolerance, f"result{jax.tree_util.keystr(path)}")


def value_and_gradients(fun: Callable, given: Sequence[Any], rest: Sequence[Any]) -> Any:
    """What `fun` returns, and the gradient by `given` of its results with weights."""

    def weighted(given: Sequence[Any]) -> Any:
        out = fun(*given, *rest)
        floats = [x for x in jax.tree.leaves(out) if jnp.issubdtype(x.dtype, jnp.inexact)]
        return sum(jnp.sum(x * jnp.cos(jnp.arange(x.size)).reshape(x.shape)) for x in floats), out

    if not given:
        return fun(*rest)
    return jax.grad(weighted, has_aux=True)(tuple(given))


def check_group(cases: dict[str, Any], place: Callable[[Any], Any]) -> Run:
    """Values and gradients of cases with `fun`, `given` and `rest`, all in one program."""

    def run(given: Any, rest: Any) -> Any:
        return ({n: value_and_gradients(c.fun, given[n], rest[n]) for n, c in cases.items()},)

    args = ({n: c.given for n, c in cases.items()}, {n: c.rest for n, c in cases.items()})
    return follow(run, (), args, make_mesh(data=2, tensor=4), jax.tree.map(place, args))


def classes(logits: Any, batch: Any) -> Any:
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch["labels"]).mean()


def next_tokens(logits: Any, batch: Any) -> Any:
    return classes(logits[:, :-1], {"labels": batch["x"][:, 1:]})


def elbo(outputs: Any, batch: Any) -> Any:
    logits, mean, logvar = outputs
    bce = optax.sigmoid_binary_cross_entropy(logits, batch["x"]).sum(-1)
    kld = -0.5 * jnp.sum(1 + logvar - mean**2 - jnp.exp(logvar), -1)
    return jnp.mean(bce + kld)
