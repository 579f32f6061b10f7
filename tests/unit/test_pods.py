"""The programs at the sizes of pods are well formed, and plans of them send what is divided."""

import math
from collections.abc import Iterator
from typing import Any

import jax
import pytest
from jax.sharding import PartitionSpec as P

from benchmarks.suite import registry
from benchmarks.suite.case import LARGE, RUNS, Case
from benchmarks.suite.planned import planned
from benchmarks.suite.pods import PROGRAMS

BY_NAME = {program.name: program for program in PROGRAMS}
OTHERS = tuple(f"benchmarks.suite.{name}" for name in ("everyday", "fragments", "unannotated"))
SLOW = (
    "deepseek", "evoformer", "gemma2", "griffin", "mamba2", "nequip", "t5_adafactor",
    "translation_packed", "unet_text",
)  # fmt: skip
NAMES = [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in BY_NAME]


def placed(args: Any, specs: Any) -> Iterator[tuple[Any, P]]:
    """Arrays with their specs, which have the same structure."""
    yield from zip(jax.tree.leaves(args), jax.tree.leaves(specs), strict=True)


def shards(case: Case, entry: Any) -> int:
    """Of a dim, from its entry in a spec."""
    axes = () if entry is None else (entry,) if isinstance(entry, str) else entry
    return math.prod(case.mesh[axis] for axis in axes)


def divides(case: Case, leaf: Any, spec: P) -> bool:
    dims = zip(leaf.shape, spec, strict=False)
    return len(spec) <= leaf.ndim and all(dim % shards(case, entry) == 0 for dim, entry in dims)


@pytest.mark.parametrize("name", BY_NAME)
def test_specs_fit_the_arguments(name: str) -> None:
    case = BY_NAME[name].make(LARGE)
    assert jax.tree.structure(case.in_specs) == jax.tree.structure(case.args)
    assert all(divides(case, leaf, spec) for leaf, spec in placed(case.args, case.in_specs))


@pytest.mark.parametrize("name", BY_NAME)
def test_meshes_fit_32_devices(name: str) -> None:
    assert math.prod(BY_NAME[name].make(LARGE).mesh.values()) in (16, 32)


@pytest.mark.parametrize("name", NAMES)
def test_plans_send_something(name: str) -> None:
    case = BY_NAME[name].make(LARGE)
    plan = planned(case)
    assert plan.wire_bytes > 0
    assert plan.peak_memory > 0
    results = jax.tree.leaves(jax.eval_shape(case.fun, *case.args))
    specs = jax.tree.leaves(case.out_specs)
    assert all(divides(case, *pair) for pair in zip(results, specs, strict=True))


def test_sizes_are_their_own() -> None:
    small, large = (BY_NAME["llama"].make(size) for size in (RUNS, LARGE))
    assert small.args == large.args
    assert small.mesh == large.mesh


def test_names_are_unique() -> None:
    """`registry.programs` refuses two of one name."""
    assert registry.programs((*registry.modules(), *OTHERS, "benchmarks.suite.pods"))
