"""`spmd.check`: the partitioned program against the unsharded one, down to the operation."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh

from sharding import _jax
from sharding.errors import ArgumentError, MeshError, Problem, SpmdError
from sharding.mesh import MeshShape
from spmd import dispatch, stages
from spmd.arguments import output_names
from spmd.checking import shards
from spmd.checking.compare import Difference, Tolerance, difference, largest, tolerance_of
from spmd.checking.judge import Judge, rounding_size
from spmd.checking.report import CheckReport, ResultDifference
from spmd.checking.unsharded import host_inputs
from spmd.devices import automatic, under
from spmd.simulate import simulate


class CheckError(SpmdError, AssertionError):
    """A partitioned program does not give what the unsharded one gives.

    Attributes:
      report: what was found.
    """

    def __init__(self, report: CheckReport):
        self.report = report
        super().__init__(
            Problem(
                report.summary,
                "\n  ".join("\n".join(report.details).splitlines()),
                "if the operation has a rule of yours, correct it; if the numbers differ by "
                "rounding that grew, pass tolerance=; else report it as a defect, with this text",
            )
        )


def check(
    f: Callable,
    *args: Any,
    mesh: Any = None,
    axis_rules: Any = None,
    in_shardings: Any = None,
    out_shardings: Any = None,
    static_argnums: Any = None,
    static_argnames: Any = None,
    fallback: str = "error",
    tolerance: Tolerance = None,
    iterations: int | None = None,
    raise_on_error: bool = True,
    **kwargs: Any,
) -> CheckReport:
    """Runs `f` partitioned and unsharded, compares the results, and finds the first operation that
    is wrong.

    Every operation of the plan runs on its own as well, on the operands that the unsharded program
    has, with poison in its padding; loops, branches and calls are entered, and each iteration is
    compared. What is compared on every device: integers, flags and random keys exactly, floats
    within rounding, NaN equal to NaN. A `jax.shard_map` is compared as a whole. Operations with
    side effects are not repeated on their own, but the program runs several times.

    Args:
      f: a plain function, what `spmd.jit` returned, or a `Partitioned` stage.
      args, kwargs: of one call. Nothing is donated.
      mesh: as in `spmd.jit`; names and sizes are laid over the first devices, which are simulated
        where JAX has not started yet.
      axis_rules, in_shardings, out_shardings, static_argnums, static_argnames, fallback: as in
        `spmd.jit`, for a plain function.
      tolerance: relative error that counts as rounding, for all floats or by dtype name; by
        default 1e-12, 1e-5, 4e-3 and 3e-2 for float64, float32, float16 and bfloat16.
      iterations: of how many runs of a loop's body the operations are compared; None: all.
      raise_on_error: whether a difference raises.

    Raises:
      CheckError: something is wrong; its `report` is what would have been returned.
      ArgumentError: options for a function that has its own.
      MeshError: there are fewer devices than the mesh needs.
    """
    given = {
        "axis_rules": axis_rules, "in_shardings": in_shardings, "out_shardings": out_shardings,
        "static_argnums": static_argnums, "static_argnames": static_argnames,
    }  # fmt: skip
    if isinstance(f, stages.Partitioned):
        _no_options(given | {"mesh": mesh}, "a partitioned program")
        flat = jax.tree.leaves((args, kwargs))
        found = _checked(f, flat, tolerance, iterations)
    else:
        function = _function(f, mesh, given, fallback)
        partitioned = function.trace(*args, **kwargs).propagate().partition()
        flat = function._family.flat(args, kwargs).leaves
        found = _checked(partitioned, flat, tolerance, iterations)
    if raise_on_error and not found.ok:
        raise CheckError(found)
    return found


def _checked(
    partitioned: stages.Partitioned, leaves: Sequence[Any], tolerance: Tolerance,
    iterations: int | None,
) -> CheckReport:  # fmt: skip
    traced = partitioned.propagated.traced
    values = partitioned.plan.program.body.inputs
    inputs = host_inputs(values, [*traced.captured, *leaves])
    judge = Judge(partitioned.plan, partitioned.mesh, tolerance, iterations)
    # Types that hold shardings would have JAX partition the program.
    want = judge.outputs(inputs) if traced.typed else _unsharded(traced, leaves)
    first = judge.first(inputs)
    got = _run(partitioned, inputs)
    sizes = [largest(b) for b in want]
    results = _differing(traced, got, want, sizes, tolerance)
    faithful = True
    if results:
        sizes = [
            rounding_size(b, noisy, tolerance)
            for b, noisy in zip(want, judge.outputs(inputs, noise=True), strict=True)
        ]
        results = _differing(traced, got, want, sizes, tolerance)
    if results and first is None:
        faithful = _faithful(judge, inputs, want, tolerance)
        first = judge.first_together(inputs) if faithful else None
    rounding = sorted(judge.rounding.values(), key=lambda found: -found.error)
    return CheckReport(
        partitioned, tuple(results), first, tuple(rounding), judge.operations, faithful
    )


def _unsharded(traced: stages.Traced, leaves: Sequence[Any]) -> list[np.ndarray]:
    """Results of the program that JAX traced, by `jax.jit`."""
    inputs = [*traced.constants, *leaves]
    avals = traced.program.closed.in_avals
    args = [
        x if shards.is_key(a.dtype) else np.asarray(x, a.dtype)
        for x, a in zip(inputs, avals, strict=True)
    ]
    with under(automatic(traced.options.mesh)):
        results = jax.jit(_jax.as_fun(traced.program.closed))(*args)
    return [shards.on_host(x) for x in results]


def _run(partitioned: stages.Partitioned, inputs: Sequence[np.ndarray]) -> list[jax.Array]:
    options = partitioned.jit_options()
    del options["donate_argnums"]
    values = partitioned.plan.program.body.inputs
    args = [shards.from_words(x, v.dtype) for x, v in zip(inputs, values, strict=True)]
    return list(jax.jit(partitioned.sharded, **options)(*args))


def _differing(
    traced: stages.Traced, got: Sequence[jax.Array], want: Sequence[np.ndarray],
    sizes: Sequence[float], tolerance: Tolerance,
) -> list[ResultDifference]:  # fmt: skip
    """Results that are wrong on any device."""
    found = []
    names = output_names(traced.out_tree)
    for name, a, b, size in zip(names, got, want, sizes, strict=True):
        parts: dict[str, Difference] = {}  # by place: devices may hold copies
        for shard in shards.to_words(a).addressable_shards:
            here, there = np.asarray(shard.data), b[shard.index]
            off = difference(here, there, tolerance_of(b.dtype, tolerance), size=size)
            if off is None or not off.wrong:
                continue
            starts = [s.start or 0 for s in shard.index]
            at = tuple(i + s for i, s in zip(off.at, starts, strict=True))
            off = off._replace(at=at)
            before = parts.get(repr(shard.index), off)
            parts[repr(shard.index)] = max(before, off, key=lambda d: d.error)
        if parts:
            worst = max(parts.values(), key=lambda d: d.error)
            wrong = sum(d.wrong for d in parts.values())
            found.append(ResultDifference(name, worst._replace(wrong=wrong, total=b.size)))
    return found


def _faithful(
    judge: Judge, inputs: Sequence[np.ndarray], want: Sequence[np.ndarray], tolerance: Tolerance
) -> bool:
    """Whether the program, evaluated equation by equation, gives what JAX gives."""
    noisy = judge.outputs(inputs, noise=True)
    for a, b, moved in zip(judge.outputs(inputs), want, noisy, strict=True):
        size = rounding_size(b, moved, tolerance)
        off = difference(a, b, tolerance_of(b.dtype, tolerance), size=size)
        if off is not None and off.wrong:
            return False
    return True


def _function(f: Any, mesh: Any, given: dict[str, Any], fallback: str) -> dispatch.Function:
    """`f` as a function that `spmd.jit` returns, over a mesh with devices."""
    if isinstance(f, dispatch.Function):
        _no_options(given, "a function that spmd.jit returned")
        options = f._family.given
        found = options.mesh if mesh is None else mesh
        if found is None:
            return f
        return dispatch.Function(f._family.fun, replace(options, mesh=_concrete(found)))
    found = None if mesh is None else _concrete(mesh)
    return dispatch.jit(f, mesh=found, fallback=fallback, **given)


def _concrete(mesh: Any) -> Mesh:
    """A mesh with devices: names and sizes are laid over the first ones that there are."""
    if isinstance(mesh, Mesh):
        return mesh
    shape = MeshShape.of(mesh)
    try:
        simulate(shape.size)
    except RuntimeError:
        pass  # JAX has started: its devices are what there is
    devices = jax.devices()
    if len(devices) < shape.size:
        raise MeshError(
            Problem(
                f"the mesh {shape} has {shape.size} devices",
                f"a check runs the program, and JAX has {len(devices)}",
                f"call spmd.simulate.simulate({shape.size}) before the first use of JAX",
            )
        )
    sizes = tuple(size for _, size in shape.axes)
    types = mesh.axis_types if isinstance(mesh, AbstractMesh) else (AxisType.Auto,) * len(sizes)
    grid = np.asarray(devices[: shape.size]).reshape(sizes)
    return Mesh(grid, shape.names, axis_types=types)


def _no_options(given: dict[str, Any], what: str) -> None:
    named = [name for name, value in given.items() if value is not None]
    if named:
        raise ArgumentError(
            Problem(
                f"{', '.join(named)} for {what}",
                "it has its own",
                "pass the plain function with them, or leave them out",
            )
        )
