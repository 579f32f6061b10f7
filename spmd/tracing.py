"""From a function and the arguments of one call to a `Traced` program."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import AxisType, NamedSharding

from sharding._jax import jit as _jit
from sharding.annotate import Spec, resolve, spec_of
from sharding.errors import ArgumentError, Problem, SpmdError
from sharding.mesh import MeshShape
from sharding.program import Program, build
from sharding.stated import one_mesh
from spmd.annotations import given_entries, resolve_all
from spmd.arguments import Arguments, output_names, rebuild
from spmd.boundary import even_spec
from spmd.devices import automatic, under
from spmd.options import Options, sharding_of
from spmd.stages import Traced

# Arrays of this size and more that a function closes over become arguments of its program: in the
# program they would be held whole by every device, twice, and folded by the compiler.
CAPTURED_BYTES = 1 << 16


def trace(jitted: Any, arguments: Arguments, options: Options) -> Traced:
    """Traces a function for the arguments of one call, and resolves every annotation.

    Args:
      jitted: the function under `jax.jit`, which traces each signature once.

    Raises:
      SpecError: every annotation that does not fit.
      RuleError: a primitive has no rule.
      ArgumentError: sizes are not known.
    """
    arguments = arguments.abstract()
    _check_sizes(arguments)
    found = source(jitted, arguments, options)
    closed, constants = _jit.traced_program(found)
    names = [
        "one that the function closes over" if _jit.is_ref(x) else f"const{i}"
        for i, x in enumerate(constants)
    ]
    out_names = output_names(found.out_tree)

    def made(instead: Sequence[tuple[Any, Callable]]) -> Traced:
        with under(automatic(options.mesh)):
            program = build(closed, [*names, *arguments.names], out_names, instead)
        inputs = program.body.inputs
        captured = _keep_small(program, constants)
        program.check_rules(options.fallback)
        annotated = resolve_all(program, arguments, found.out_tree, options, captured)
        return Traced(
            program, arguments, annotated, found.out_tree, options, captured, constants, inputs,
            found, program.again(made, instead),
        )  # fmt: skip

    return made(())


def _check_sizes(arguments: Arguments) -> None:
    unknown = [
        f"{name} has shape ({', '.join(map(str, aval.shape))})"
        for name, aval in zip(arguments.names, arguments.avals, strict=True)
        if not all(isinstance(n, int) for n in getattr(aval, "shape", ()))
    ]
    if unknown:
        raise ArgumentError(
            Problem(
                "; ".join(unknown),
                "layouts and costs are computed from sizes, which symbolic dims do not have",
                "export one program for each size that is needed",
            )
        )


def source(jitted: Any, arguments: Arguments, options: Options) -> Any:
    """The `jax.stages.Traced`, with axes of type Auto where the program allows it.

    A program that says things only Explicit axes know (`reshard`, `out_sharding=`) is traced with
    those, and its types say where its values lie.
    """
    try:
        return _under(automatic(options.mesh), jitted, arguments, arguments.leaves)
    except Exception as error:
        # JAX has no type for this error; its text names the type of axes that it wants.
        if AxisType.Explicit not in options.mesh.axis_types or "Auto" not in str(error):
            raise
        of_auto = error
    try:
        return _under(options.mesh, jitted, arguments, _typed(arguments, options))
    except Exception:
        if isinstance(of_auto, SpmdError):  # says more than JAX does
            raise of_auto from None
        raise


def _under(mesh: Any, jitted: Any, arguments: Arguments, leaves: Sequence[Any]) -> Any:
    args, kwargs = rebuild(arguments, leaves)
    with under(mesh), one_mesh(MeshShape.of(mesh)):
        try:
            return jitted.trace(*args, **kwargs)
        except AssertionError as error:
            if not error.args:
                error.add_note(
                    "JAX says no more than that where psum, pmax, pmin or ppermute name an axis"
                    f" that no mesh around them has; here the mesh is {MeshShape.of(mesh)}"
                )
            raise


def _typed(arguments: Arguments, options: Options) -> list[Any]:
    """The arguments with their shardings in their types."""
    leaves = []
    entries = given_entries(arguments, options)
    for aval, entry, own in zip(arguments.avals, entries, arguments.specs, strict=True):
        rank, mesh = len(aval.shape), options.mesh_shape
        spec = own if entry is None else spec_of(sharding_of(entry), rank)
        given, _ = resolve(spec or Spec(()), rank, mesh, options.axis_rules, "")
        sharding = NamedSharding(options.mesh, even_spec(given, aval.shape, mesh))
        leaves.append(
            jax.ShapeDtypeStruct(
                aval.shape, aval.dtype, sharding=sharding, weak_type=aval.weak_type
            )
        )
    return leaves


def _keep_small(program: Program, constants: list[Any]) -> tuple[Any, ...]:
    """Turns small inputs that the function closes over into constants of the program.

    Returns:
      The others: arrays that come first among the arguments.
    """
    body, count = program.body, len(constants)
    captured = []
    inputs = []
    for value, constant in zip(body.inputs[:count], constants, strict=True):
        if _large(constant):
            captured.append(constant)
            inputs.append(value)
        else:
            value.const = constant
            body.consts = (*body.consts, value)
    body.inputs = (*inputs, *body.inputs[count:])
    return tuple(captured)


def _large(constant: Any) -> bool:
    sharding = _jit.committed_sharding(constant)
    spread = sharding is not None and len(sharding.device_set) > 1
    return spread or getattr(constant, "nbytes", 0) >= CAPTURED_BYTES
