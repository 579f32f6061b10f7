"""What the tests of `spmd.jit` as a drop-in share: both compilers, and a count of compilations."""

import contextlib
import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import spmd
from tests.oracle import make_mesh

P = PartitionSpec
MESH = make_mesh(data=2, tensor=4)
X = jnp.arange(128.0).reshape(8, 16) / 64

on_mesh = functools.partial(spmd.jit, mesh=MESH)
# A test of both: `jax.jit` is the oracle of the behaviour.
both = pytest.mark.parametrize("jit", [jax.jit, on_mesh], ids=["jax.jit", "spmd.jit"])


def named(*spec, **options) -> NamedSharding:
    return NamedSharding(MESH, P(*spec), **options)


_compiled: list[str] = []


def _listen(event: str, duration: float, **details) -> None:
    if event == "/jax/core/compile/backend_compile_duration":
        _compiled.append(details["fun_name"])


jax.monitoring.register_event_duration_secs_listener(_listen)


@contextlib.contextmanager
def compilations(of: str = "jit(f)") -> Iterator[list[int]]:
    """A list that holds, at the end of the block, how often XLA compiled a program of this name."""
    found: list[int] = []
    before = _compiled.count(of)
    yield found
    found.append(_compiled.count(of) - before)
