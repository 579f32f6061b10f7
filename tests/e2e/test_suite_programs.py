"""Programs of the benchmark suite: partitioned, and as written by hand, against the unsharded one.

Steps run from states whose first moments are 0: what the new ones are is the gradient.
"""

from collections.abc import Iterator
from typing import Any

import jax
import pytest
from jax.sharding import NamedSharding

from benchmarks.suite.case import RUNS, Case, Program
from benchmarks.suite.programs import (
    experts,
    graph,
    linalg,
    optimizers,
    pipeline,
    recommender,
    recurrent,
    vision,
)
from tests.oracle import assert_close, check, make_mesh

MODULES = (experts, vision, recommender, pipeline, recurrent, graph, optimizers, linalg)
SLOW = ("cnn", "muon", "recurrence", "unet_2d", "unet_3d")  # to plan or to compile
TOLERANCE = 2e-5
QUICK = {"xla_backend_optimization_level": 0}  # to compile


def programs() -> Iterator[Any]:
    for module in MODULES:
        for program in module.PROGRAMS:
            marks = [pytest.mark.slow] if program.name in SLOW else []
            yield pytest.param(program, marks=marks, id=program.name)


def placed(case: Case, tree: Any) -> Any:
    mesh = make_mesh(**case.mesh)
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), tree)


@pytest.mark.parametrize("program", list(programs()))
def test_program_gives_what_it_gives_unsharded(program: Program) -> None:
    case = program.make(RUNS)
    args = case.draw()
    assert_fits(args, case.args)
    partitioned = check(
        case.fun, args, make_mesh(**case.mesh), placed(case, case.in_specs),
        placed(case, case.out_specs), tolerance=TOLERANCE,
        compiler_options=QUICK,
    )  # fmt: skip
    assert partitioned.collectives
    if case.by_hand is None:
        return
    by_hand = jax.jit(
        jax.shard_map(
            case.by_hand, mesh=make_mesh(**case.mesh), in_specs=case.in_specs,
            out_specs=case.out_specs, check_vma=False,
        ),
        compiler_options=QUICK,
    )  # fmt: skip
    wanted = jax.tree_util.tree_leaves_with_path(jax.jit(case.fun)(*args))
    got = jax.tree.leaves(by_hand(*args))
    for (path, want), have in zip(wanted, got, strict=True):
        assert_close(have, want, TOLERANCE, f"result{jax.tree_util.keystr(path)} by hand")


def assert_fits(args: Any, shapes: Any) -> None:
    """Arguments have the shapes and dtypes that the case says."""
    for arg, shape in zip(jax.tree.leaves(args), jax.tree.leaves(shapes), strict=True):
        assert (arg.shape, arg.dtype) == (shape.shape, shape.dtype)
