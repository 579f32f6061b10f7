"""Garbage is not searched for while a program is made, and is again after it."""

import gc

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

import spmd
from sharding.collector import uncollected


@pytest.fixture
def searches():
    """The number of searches so far; one is due after every ten new objects."""
    found = []
    thresholds = gc.get_threshold()

    def begins(phase, info):
        if phase == "start":
            found.append(info)

    gc.callbacks.append(begins)
    gc.set_threshold(10)
    yield lambda: len(found)
    gc.set_threshold(*thresholds)
    gc.callbacks.remove(begins)


def test_stages_search_no_more_for_longer_programs(searches, monkeypatch):
    monkeypatch.setattr("spmd.stages.ENABLED", False)  # to verify a plan makes objects too

    def layers(count):
        def fun(x):
            for _ in range(count):
                x = jnp.tanh(x @ x.T) @ x
            return x.sum()

        return spmd.jit(fun, mesh={"data": 4}, in_shardings=P("data"))

    def made(count):
        traced = layers(count).trace(jax.ShapeDtypeStruct((64, 32), jnp.float32))
        before = searches()
        traced.propagate().partition()
        return searches() - before

    made(1)
    assert searches()  # by JAX's tracing: the count counts
    assert made(40) <= made(1) + 2
    assert gc.isenabled()


def test_an_error_leaves_the_collector_on():
    with pytest.raises(KeyError), uncollected():
        raise KeyError
    assert gc.isenabled()


def test_a_collector_that_is_off_stays_off():
    gc.disable()
    try:
        with uncollected():
            assert not gc.isenabled()
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_nested_ones_end_with_the_outermost():
    with uncollected():
        with uncollected():
            assert not gc.isenabled()
        assert not gc.isenabled()
    assert gc.isenabled()
