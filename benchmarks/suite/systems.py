"""Compiles a case by each of the systems that are compared, and times the phases.

    spmd.jit   trace, propagate, partition, lower, compile
    Shardy     jax.jit, XLA propagates with Shardy: trace, lower, compile
    GSPMD      the same with GSPMD
    by hand    jax.jit of one jax.shard_map over the whole mesh, of the body that an expert wrote

All take the same function (but for the last), shapes, shardings of arguments and results, and give
away the memory of the same arguments. Nothing that was compiled before is used again: every
compilation begins with empty caches, and after a small program that has loaded the compiler.
"""

from __future__ import annotations

import functools
import gc
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import sharding
import spmd
from benchmarks.suite.case import Case, array
from benchmarks.suite.names import BY_HAND, GSPMD, OURS, SYSTEMS

ROUNDS = 3  # compilations of each system


class Bound(NamedTuple):
    """A case on a mesh, with shardings in place of specs."""

    case: Case
    mesh: Mesh
    in_shardings: tuple[Any, ...]
    out_shardings: Any


class Built(NamedTuple):
    """An executable, and the seconds that each phase took: medians of all times it was built."""

    compiled: Any
    phases: dict[str, float]


def bind(case: Case, mesh: Mesh) -> Bound:
    def named(tree: Any) -> Any:
        return jax.tree.map(
            lambda spec: NamedSharding(mesh, spec), tree,
            is_leaf=lambda leaf: isinstance(leaf, PartitionSpec),
        )  # fmt: skip

    return Bound(case, mesh, tuple(map(named, case.in_specs)), named(case.out_specs))


def applicable(case: Case, whole: bool = True) -> tuple[str, ...]:
    """Systems that can compile the case; by hand where somebody wrote it for such a mesh.

    Args:
      whole: whether the mesh is the one that the case asks for.
    """
    return SYSTEMS if case.by_hand is not None and whole else SYSTEMS[:-1]


def warm_up(mesh: Mesh, systems: Iterable[str]) -> None:
    """Compiles a small program, so that none of the systems pays for what all have to load."""

    def fun(x: jax.Array) -> jax.Array:
        return jnp.tanh(x @ x.T).sum()

    def by_hand(x: jax.Array) -> jax.Array:
        return jax.lax.psum(jnp.tanh(x @ x.T).sum(), mesh.axis_names)

    whole = PartitionSpec()
    case = Case(fun, (array(128, 128),), dict(mesh.shape), (whole,), whole, by_hand=by_hand)
    for system in systems:
        build(system, bind(case, mesh))


def build_in_rounds(
    bound: Bound,
    systems: Iterable[str],
    begins: Callable[[str], None],
    built: Callable[[str, Built | Exception], None],
    seconds: float,
) -> dict[str, Built]:
    """Builds with every system in turn, as often as there is time for.

    Args:
      begins: called with the name of each system that begins.
      built: called for each system with what it built first, and with why it did not.
      seconds: of compilations of all systems, beyond the first of each.

    Returns:
      By system that did not fail, its last executable with the medians of all phases.
    """
    found: dict[str, list[Built]] = {}
    left, spent = list(systems), 0.0
    for number in range(ROUNDS):
        for system in list(left):
            begins(system)
            try:
                outcome = build(system, bound)
            except Exception as error:  # one system's failure must not hide what others do
                left.remove(system)
                found.pop(system, None)
                built(system, error)
                continue
            if system not in found:
                built(system, outcome)
            found.setdefault(system, []).append(outcome)
            spent += sum(outcome.phases.values())
        if spent * (number + 2) / (number + 1) > seconds:
            break
        left.reverse()  # so that none always follows the same one
    return {system: _median(found[system]) for system in found}


def _median(built: list[Built]) -> Built:
    """The last executable, with the median of each phase."""
    last = built[-1]
    phases = {p: statistics.median(b.phases[p] for b in built) for p in last.phases}
    return Built(last.compiled, phases)


def build(system: str, bound: Bound, options: Mapping[str, Any] | None = None) -> Built:
    """Compiles with one system, from nothing.

    Args:
      options: of XLA.
    """
    forget()
    clock = _Phases()
    make = _ours if system == OURS else _by_hand if system == BY_HAND else _theirs
    with _partitioner(system):
        compiled = make(bound, clock, dict(options) if options else None)
    return Built(compiled, clock.taken)


def _ours(bound: Bound, clock: _Phases, options: Any) -> Any:
    case = bound.case
    with clock("trace"):
        traced = spmd.jit(
            case.fun, mesh=bound.mesh, axis_rules=case.axis_rules,
            in_shardings=bound.in_shardings, out_shardings=bound.out_shardings,
            donate_argnums=case.donate,
        ).trace(*case.args)  # fmt: skip
    with clock("propagate"):
        propagated = traced.propagate()
    with clock("partition"):
        partitioned = propagated.partition()
    with clock("lower"):
        lowered = partitioned.lower()
    with clock("compile"):
        return lowered.compile(options)


def _theirs(bound: Bound, clock: _Phases, options: Any) -> Any:
    # a constraint may name the axes of the mesh that is set
    with (
        jax.set_mesh(bound.mesh),
        sharding.constrain_with(bound.mesh, bound.case.axis_rules),
    ):
        return _jax(bound.case.fun, bound, clock, options)


def _by_hand(bound: Bound, clock: _Phases, options: Any) -> Any:
    case = bound.case
    assert case.by_hand is not None, "nobody wrote it by hand"
    mapped = jax.shard_map(
        case.by_hand, mesh=bound.mesh, in_specs=case.in_specs, out_specs=case.out_specs,
        check_vma=False,
    )  # fmt: skip
    return _jax(mapped, bound, clock, options)


def _jax(fun: Callable, bound: Bound, clock: _Phases, options: Any) -> Any:
    with clock("trace"):
        traced = jax.jit(
            fun, in_shardings=bound.in_shardings, out_shardings=bound.out_shardings,
            donate_argnums=bound.case.donate,
        ).trace(*bound.case.args)  # fmt: skip
    with clock("lower"):
        lowered = traced.lower()
    # XLA propagates and partitions while it compiles
    with clock("compile"):
        return lowered.compile(options)


@contextmanager
def _partitioner(system: str) -> Iterator[None]:
    before = jax.config.values["jax_use_shardy_partitioner"]
    jax.config.update("jax_use_shardy_partitioner", system != GSPMD)
    try:
        yield
    finally:
        jax.config.update("jax_use_shardy_partitioner", before)


def forget() -> None:
    """Empties the caches of JAX, and those that our modules keep with `functools.lru_cache`."""
    jax.clear_caches()
    gc.collect()
    for cache in gc.get_objects():
        if isinstance(cache, functools._lru_cache_wrapper):
            home = str(getattr(cache, "__module__", "")).split(".")[0]
            if home in ("sharding", "spmd"):
                cache.cache_clear()


class _Phases:
    """Seconds by phase, in the order in which they ran."""

    def __init__(self) -> None:
        self.taken: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        begin = time.perf_counter()
        yield
        self.taken[name] = time.perf_counter() - begin
