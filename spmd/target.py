"""The chip that a program is compiled for, and what its compiler needs to be told."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from jax.sharding import AbstractMesh

from sharding.errors import ArgumentError, Problem
from spmd import chips, cost
from spmd.chips import EXCHANGES_AHEAD, Chip
from spmd.cost import Traits
from spmd.estimate.fusion import ANY, Compiler, held
from spmd.estimate.roofline import compute_seconds
from spmd.estimate.tiles import COLUMNS
from spmd.estimate.work import lines, totals
from spmd.options import Options
from spmd.partition.combined import combine_small
from spmd.partition.plan import Compute, ProgramPlan, steps
from spmd.partition.products import keep_products
from spmd.partition.scatters import by_rows, split_scatters
from spmd.partition.stacks import own_stacks
from spmd.partition.transposed import reduce_transposed
from spmd.streams import in_streams, streams


def chip_of(mesh: Any) -> Chip | None:
    """The chip of a mesh's devices; None for abstract meshes, and for chips that nobody described.

    Args:
      mesh: a `jax.sharding.Mesh`, whose devices may be described ones, or an `AbstractMesh`.
    """
    if isinstance(mesh, AbstractMesh) or not mesh.devices.size:
        return None
    return chips.of_kind(mesh.devices.flat[0].device_kind)


def compiler_of(options: Options) -> Compiler:
    """What the compiler for a mesh's devices, as it is told, does with memory; abstract meshes are
    taken for some TPU's."""
    mesh, chip = options.mesh, _asked(options)
    if chip is None:
        elsewhere = not isinstance(mesh, AbstractMesh) and mesh.devices.flat[0].platform != "tpu"
        return Compiler(False, False) if elsewhere else ANY
    return Compiler.of(chip)


# Changes to plans for the compilers of one family of chips, by the name of the pass.
_SUITED = {
    "tpu": (
        ("transposed_sums", reduce_transposed),
        ("split_scatters", split_scatters),
        ("own_stacks", own_stacks),
    ),
    "cpu": (("keep_products", keep_products),),
}  # fmt: skip
_SUMS = ("all_reduce", "reduce_scatter")
# Elements of rows that are worked on at once; GPUs read 32 bytes at a time.
_LANES = {"tpu": COLUMNS, "gpu": 8}
# Of a collective that runs beside computation, what a device waits for; of compiled programs. What
# all devices exchange is copied before and after on TPUs.
_AHEAD, _EXCHANGED = 1 / 6, 2 / 3
# What the compiler or SparseCores do as it is needs no change.
_UNLESS_KEPT = frozenset(("split_scatters",))


def suited(plan: ProgramPlan, options: Options) -> ProgramPlan:
    """The plan as the compiler for the mesh's chip takes it best."""
    chip = _asked(options)
    if chip is None:
        return plan
    for name, change in _SUITED.get(chip.family, ()):
        needless = name in _UNLESS_KEPT and chip.scatters
        plan = change(plan) if options.on(name) and not needless else plan
    if _in_parts(chip, options):
        plan = in_streams(plan, chip)
    odd = chip.family == "tpu" and options.on("split_scatters")
    return by_rows(plan, chip) if odd else plan


def combined(plan: ProgramPlan, options: Options) -> ProgramPlan:
    """The plan with the collectives combined that the compiler for the mesh's chip does not combine
    by itself: no matter of what is sent, so that nobody counts them so. It takes memory, of which
    there must be enough."""
    chip = chip_of(options.mesh)
    enough = options.memory_limit is None and options.on("combine_small")
    return combine_small(plan) if enough and chip is not None and chip.family == "cpu" else plan


def traits(options: Options) -> Traits:
    """What plans depend on of the mesh's chip. Sums in streams run beside the other stream, also
    where XLA waits for those of others."""
    chip = _asked(options)
    if chip is None:
        return cost.ANY
    in_streams = _SUMS if chip.gathers_alone and _in_parts(chip, options) else ()
    found = dict.fromkeys((*chip.overlaps, *in_streams), _AHEAD)
    copied = {"all_to_all": _EXCHANGED} if chip.family == "tpu" else {}
    waits = {kind: copied.get(kind, part) for kind, part in found.items()}
    return Traits(waits, _LANES.get(chip.family, 1))


def _asked(options: Options) -> Chip | None:
    """The mesh's chip, as its compiler is told."""
    chip = chip_of(options.mesh)
    return chip if chip is None or options.on("async_collectives") else chip.as_it_is()


def _in_parts(chip: Chip, options: Options) -> bool:
    """Whether instructions may run in parts, see `streams`: where SparseCores reduce, or XLA starts
    gathers ahead as it is. Before v5e it makes all-reduces of more of the scatters of halves."""
    able = bool(chip.offloaded) or "all_gather" in chip.unasked
    return chip.family == "tpu" and able and options.on("streams")


def compiler_options(options: Options, plan: ProgramPlan | None = None) -> dict[str, Any]:
    """What XLA is told: the options of the chip and of the plan, and those that the user gave,
    which win."""
    told = {name: value for found in _told(options, plan).values() for name, value in found.items()}
    return {**told, **dict(options.compiler_options)}


# What the compiler is told things for, by the name of the pass.
_PURPOSES = {
    "async_collectives":
        "collectives beside computation, which TPUs are asked for",
    "bounded_schedule": "an order of operations within memory_limit, which TPUs are asked for",
    "streams": "sums of two streams that stay two, which TPUs are asked for",
}
# Communication that is no more than this part of a program is waited for.
_NEXT_TO_NOTHING = 1 / 64
# Exchanges that are no more than this part of all that is sent are waited for.
_FEW = 1 / 32
# Sums of this many bytes are not combined: XLA for TPUs makes one of those of two streams.
_APART = {"xla_jf_crs_combiner_threshold_in_bytes": "1000000"}
# Above this part of the memory, in percent, the scheduler is left to its own limit.
_OWN_LIMIT = 90


def _told(options: Options, plan: ProgramPlan | None = None) -> dict[str, dict[str, str]]:
    """Options of XLA by the name of the pass, of those that are on."""
    chip = chip_of(options.mesh)
    if chip is None:
        return {}
    asked = dict(chip.options)
    if asked and plan is not None and not _waits(plan, chip):
        asked.clear()
    if EXCHANGES_AHEAD in asked and plan is not None and not _exchanges(plan):
        del asked[EXCHANGES_AHEAD]
    found = {"async_collectives": asked, "bounded_schedule": _schedule(chip, options)}
    found["streams"] = _APART if plan is not None and streams(plan) else {}
    return {name: told for name, told in found.items() if told and options.on(name)}


def _waits(plan: ProgramPlan, chip: Chip) -> bool:
    """Whether collectives take enough of a program to run beside computation: where they take next
    to nothing, XLA's scheduler holds copies of what is needed much later, to have something to do
    meanwhile. Scatters need those that reduce them."""
    if any(isinstance(one, Compute) and not steps(one.op, 0) for one, _ in plan.body.walk()):
        return True  # of a loop nobody knows how often it runs
    found = lines(plan)
    kept = held(plan, found, Compiler.of(chip))
    computed = sum(line.trips * compute_seconds(line, kept, chip) for line in found)
    sent = totals(found)
    seconds = chip.ring_seconds(sum(size for _, size in sent.values()))
    scatters = any(kind == "reduce_scatter" for kind, _ in sent)
    return scatters or seconds > _NEXT_TO_NOTHING * (computed + seconds)


def _exchanges(plan: ProgramPlan) -> bool:
    """Whether all devices exchange enough with each other to be worth starting: XLA's scheduler
    holds more memory all over a program where it may."""
    found = totals(lines(plan))
    exchanged = sum(size for (kind, _), (_, size) in found.items() if kind == "all_to_all")
    return exchanged > _FEW * sum(size for _, size in found.values())


def _schedule(chip: Chip, options: Options) -> dict[str, str]:
    """How much memory XLA's scheduler may take to start transfers early, in whole percents of the
    device's. It takes what there is, also where nothing runs earlier for it."""
    if options.memory_limit is None or chip.family != "tpu":
        return {}
    percent = int(100 * options.memory_limit / chip.usable_bytes)
    if percent >= _OWN_LIMIT:
        return {}
    return {"xla_tpu_scheduler_percent_shared_memory_limit": str(max(percent, 1))}


@contextmanager
def explained(options: Options, plan: ProgramPlan) -> Iterator[None]:
    """Errors of a compiler that does not know what it is told say how to go on.

    Raises:
      ArgumentError: it does not.
    """
    try:
        yield
    except Exception as error:
        given, told = dict(options.compiler_options), _told(options, plan).items()
        names = [(off, name) for off, found in told for name in found if name not in given]
        pairs = [(off, name) for off, name in names if name in str(error)]
        if not pairs:
            raise
        off, name = pairs[0]
        why = f"this compiler does not take the option {name}: {str(error).splitlines()[0]}"
        fix = f'spmd.jit(..., disable_passes=["{off}"]) compiles without it'
        raise ArgumentError(Problem(_PURPOSES[off], why, fix)) from error
