"""The suite's transformers: partitioned and written by hand, they give what one device gives.

Compared is all that a program returns: after a training step every parameter, the moments of the
optimiser, of which the first is a tenth of the gradient here, and the loss. The large sizes are
traced only. Programs are compiled without optimisation, which is most of the time otherwise.
"""

from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh, NamedSharding

import spmd
from benchmarks.suite.case import LARGE, RUNS, Case
from benchmarks.suite.programs import attention, transformer
from tests.oracle import assert_close, make_mesh

PROGRAMS = (*transformer.PROGRAMS, *attention.PROGRAMS)
SMALL = {program.name: program.make(RUNS) for program in PROGRAMS}
BIG = {program.name: program.make(LARGE) for program in PROGRAMS}
BY_HAND = [name for name, case in SMALL.items() if case.by_hand]
FAST = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
# gradients are sums over 1,024 positions, in another order
TOLERANCE = 1e-5
RESULTS: dict[Any, Any] = {}


def each(names: Any) -> list[Any]:
    # what these two do is in others, too
    again = ("megatron", "fsdp_tensor")
    return [pytest.param(name, marks=pytest.mark.slow if name in again else ()) for name in names]


def unsharded(case: Case) -> Any:
    """The result on one device; five programs differ in their shardings only."""
    key = (case.fun.func, case.fun.args)  # pyright: ignore[reportFunctionMemberAccess]
    if key not in RESULTS:
        want = jax.jit(case.fun, compiler_options=FAST)(*case.draw())
        RESULTS[key] = jax.tree.map(np.asarray, want)
    return RESULTS[key]


def assert_same(got: Any, want: Any) -> None:
    assert jax.tree.structure(got) == jax.tree.structure(want)
    leaves = jax.tree_util.tree_leaves_with_path(got)
    for (path, a), b in zip(leaves, jax.tree.leaves(want), strict=True):
        assert_close(a, b, TOLERANCE, f"result{jax.tree_util.keystr(path)}")


@pytest.mark.parametrize("name", each(SMALL))
def test_the_partitioned_program_gives_what_one_device_gives(name):
    case = SMALL[name]
    function = spmd.jit(
        case.fun, mesh=make_mesh(**case.mesh), in_shardings=case.in_specs,
        out_shardings=case.out_specs, axis_rules=case.axis_rules, compiler_options=FAST,
    )  # fmt: skip
    assert_same(function(*case.draw()), unsharded(case))


@pytest.mark.parametrize("name", each(BY_HAND))
def test_what_an_expert_writes_gives_what_one_device_gives(name):
    case, mesh = SMALL[name], make_mesh(**SMALL[name].mesh)
    placed = jax.tree.map(lambda spec: NamedSharding(mesh, spec), case.in_specs)
    function = jax.jit(mapped(case, mesh), compiler_options=FAST)
    assert_same(function(*jax.device_put(case.draw(), placed)), unsharded(case))


@pytest.mark.parametrize("name", BY_HAND)
def test_at_the_large_size_an_expert_writes_the_same_results(name):
    """Shapes and dtypes, bfloat16 among them; a dim that does not divide is an error."""
    case = BIG[name]
    sizes, axes = tuple(case.mesh.values()), tuple(case.mesh)
    got = jax.eval_shape(mapped(case, AbstractMesh(sizes, axes)), *case.args)
    want = jax.eval_shape(case.fun, *case.args)
    kind = lambda leaf: (leaf.shape, leaf.dtype)  # noqa: E731
    assert jax.tree.map(kind, got) == jax.tree.map(kind, want)


def test_heads_do_not_divide_where_their_parameters_do():
    for case in (SMALL["uneven_heads"], BIG["uneven_heads"]):
        config = case.fun.args[0]  # pyright: ignore[reportFunctionMemberAccess]
        assert config.kv_heads % case.mesh["tensor"] != 0
        assert case.args[0]["layers"]["query"].shape[-1] % case.mesh["tensor"] == 0


def mapped(case: Case, mesh: Any) -> Any:
    assert case.by_hand is not None
    return jax.shard_map(
        case.by_hand, mesh=mesh, in_specs=case.in_specs, out_specs=case.out_specs, check_vma=False
    )
