"""The suite that compares systems: what it counts, how it survives crashes, what it calls a miss.

This module lists programs of its own, as those of the suite do; children of the suite import it.
"""

import dataclasses
import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import sharding
from benchmarks.suite import __main__ as suite
from benchmarks.suite import measure, names, registry, steps, systems, table
from benchmarks.suite.case import RUNS, Case, Program, Size, array
from benchmarks.suite.child import Child, Launched, has, merged, run_apart
from benchmarks.suite.measure import Result
from benchmarks.suite.targets import Target, defaults, on_one, simulated_mesh
from spmd.hardware import Machine

HERE = "tests.unit.test_suite"
LAYERS, BATCH, WIDTH = 3, 16, 32
MESH = {"data": 4, "model": 2}


def _loss(weights, x):
    def layer(h, w):
        h = sharding.shard(jnp.tanh(h @ w[0]), "data", "model")
        return jax.lax.with_sharding_constraint(h @ w[1], P("data", None)), None

    return (jax.lax.scan(layer, x, weights)[0] ** 2).mean()


def _step(weights, x):
    loss, grads = jax.value_and_grad(_loss)(weights, x)
    return jax.tree.map(lambda w, d: w - d, weights, grads), loss


def _step_by_hand(weights, x):
    def loss(weights):
        def layer(h, w):
            return jax.lax.psum(jnp.tanh(h @ w[0]) @ w[1], "model"), None

        return (jax.lax.scan(layer, x, weights)[0] ** 2).mean() / jax.lax.axis_size("data")

    value, grads = jax.value_and_grad(loss)(weights)
    grads = jax.tree.map(lambda g: jax.lax.psum(g, "data"), grads)
    return jax.tree.map(lambda w, d: w - d, weights, grads), jax.lax.psum(value, "data")


def make_step(size: Size) -> Case:
    weights = (
        array(LAYERS, WIDTH, 2 * WIDTH, dtype=size.dtype),
        array(LAYERS, 2 * WIDTH, WIDTH, dtype=size.dtype),
    )
    specs = (P(None, None, "model"), P(None, "model", None))
    x = array(BATCH, WIDTH, dtype=size.dtype)
    ins, outs = (specs, P("data", None)), (specs, P())
    return Case(_step, (weights, x), MESH, ins, outs, donate=(0,), by_hand=_step_by_hand)


def make_product(size: Size) -> Case:
    """Compiles in no time: rows over data, the contraction over model."""

    def by_hand(x, y):
        return jax.lax.psum(x @ y, "model")

    args = (array(8, 4, dtype=size.dtype), array(4, 2, dtype=size.dtype))
    specs = (P("data", "model"), P("model", None))
    return Case(jnp.matmul, args, MESH, specs, P("data", None), by_hand=by_hand)


def make_crash(size: Size) -> Case:
    os.abort()


PROGRAMS = (
    Program("step", "an MLP over data and model", make_step),
    Program("product", "one matmul", make_product),
    Program("crash", "takes the process down", make_crash),
)


@pytest.fixture(scope="module")
def built():
    case = make_step(RUNS)
    bound = systems.bind(case, simulated_mesh(case.mesh))
    return bound, {name: systems.build(name, bound) for name in systems.applicable(case)}


def test_systems_are_built_in_rounds_and_told_of_once(monkeypatch):
    """A system that failed is not tried again; phases are medians; time over, no more rounds."""
    seconds = iter([1.0, 5.0, 3.0])

    def build(system, bound):
        if system == names.GSPMD:
            raise ValueError("no")
        return systems.Built("executable", {"compile": next(seconds)})

    monkeypatch.setattr(systems, "build", build)
    told, wanted = [], (names.OURS, names.GSPMD)
    bound = systems.bind(make_product(RUNS), on_one(MESH))

    def rounds():
        return systems.build_in_rounds(
            bound, wanted, lambda *_: None, lambda s, _: told.append(s), 20.0
        )

    assert rounds()[names.OURS].phases == {"compile": 3.0}
    assert told == list(wanted)
    seconds = iter([21.0])
    assert rounds()[names.OURS].phases == {"compile": 21.0}


def _run(programs, bound):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(steps, "STEPS", 3)
        return steps.run(programs, bound, lambda now: None, 1.0)


def test_every_system_builds_and_agrees_with_the_unsharded_program(built):
    bound, found = built
    assert tuple(found) == names.SYSTEMS
    assert list(found[names.OURS].phases) == [
        "trace", "propagate", "partition", "lower", "compile"
    ]  # fmt: skip
    assert list(found[names.GSPMD].phases) == ["trace", "lower", "compile"]
    for ran in _run({s: b.compiled for s, b in found.items()}, bound).values():
        assert isinstance(ran, tuple), ran
        assert ran[0] > 0 and ran[1] < 1e-5


def test_what_a_compiled_program_says_is_what_the_case_is(built):
    """Wire and FLOPs of the program by hand, from its sizes; the schedule on described wires."""
    bound, found = built
    result = Result(names.BY_HAND)
    layout = Machine.parse("v5e:2x4").lay(bound.case.mesh)
    measure.examine(result, found[names.BY_HAND].compiled, bound.mesh.shape, layout)
    rows = BATCH // MESH["data"]
    # forward, the recomputed one of the transposed psum, and of the input's gradient in each layer
    over_model = result.wire_by_axes["model"] / (rows * WIDTH * 4)
    assert over_model == int(over_model) >= 2 * LAYERS
    weights = LAYERS * 2 * WIDTH * WIDTH  # elements per device, of both
    assert result.wire_by_axes["data"] == 2 * 3 / 4 * (weights * 4 + 4)
    assert result.wire_bytes == sum(result.wire_by_kind.values())
    assert result.flops == 3 * 2 * rows * weights  # once forward, twice backward
    assert result.exact and (result.peak_bytes or 0) > weights * 4
    assert (result.compute_s or 0) > 0 and (result.exposed_s or 0) > 0
    assert result.estimated_s == pytest.approx((result.compute_s or 0) + (result.exposed_s or 0))


def test_peaks_of_devices_here_hold_temporaries():
    def fun(x):
        return jnp.sort(jnp.sin(x) @ jnp.cos(x)).sum()

    compiled = jax.jit(fun).lower(array(256, 256)).compile()
    result = Result(names.SHARDY)
    measure.examine(result, compiled, {"data": 1})
    assert (result.peak_bytes or 0) >= 3 * 256 * 256 * 4  # the argument, and two of its size


def test_a_wrong_result_is_an_error(built):
    bound, found = built

    def forgets_a_sum(weights, x):
        weights, loss = _step_by_hand(weights, x)
        return weights, loss / jax.lax.axis_size("data")

    case = dataclasses.replace(bound.case, by_hand=forgets_a_sum)
    wrong = systems.build(names.BY_HAND, bound._replace(case=case)).compiled
    right = found[names.SHARDY].compiled
    ran = _run({names.BY_HAND: wrong, names.SHARDY: right}, bound)
    assert isinstance(ran[names.BY_HAND], steps.Differs)
    assert "result[1] differs by" in str(ran[names.BY_HAND])
    assert isinstance(ran[names.SHARDY], tuple)


def test_one_device_stands_in_for_a_mesh():
    case = make_product(RUNS)
    bound = systems.bind(case, on_one(case.mesh))
    wanted = systems.applicable(case, whole=False)
    assert wanted == names.SYSTEMS[:3]
    found = {s: systems.build(s, bound).compiled for s in wanted[:2]}
    assert all(isinstance(ran, tuple) for ran in _run(found, bound).values())


@pytest.mark.parametrize(
    ("got", "message"),
    [
        (np.array([1, 3]), "differs in 1 of 2"),
        (np.array([1, 2, 3]), "not int64"),
    ],
)
def test_integers_are_equal(got, message):
    with pytest.raises(steps.Differs, match=message):
        steps.difference({"n": got}, {"n": np.array([1, 2])})


def test_what_is_not_finite_is_so_in_both():
    true = np.array([1.0, np.nan], np.float32)
    assert steps.difference(true.copy(), true) == 0
    with pytest.raises(steps.Differs, match="infinities"):
        steps.difference(np.ones(2, np.float32), true)


def test_low_precision_may_differ_more():
    true = np.ones(4, jnp.bfloat16)
    near = np.full(4, 1 + 2**-6, jnp.bfloat16)
    assert steps.difference(near, true) == pytest.approx(2**-6)
    with pytest.raises(steps.Differs, match="0.016 of its norm"):
        steps.difference(near.astype(np.float32), true.astype(np.float32))


def test_a_program_that_does_not_fit_says_how_much_it_needs(monkeypatch):
    message = (
        "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 20.50G of 15.75G hbm."
    )

    def build(*_):
        raise RuntimeError(message)

    monkeypatch.setattr(measure, "build", build)
    result, bound = Result(names.OURS), systems.bind(make_step(RUNS), on_one(MESH))
    assert measure.too_large(result, RuntimeError(message), bound)
    assert (result.fits, result.peak_bytes, result.error) == (False, 20.5 * 2**30, "")
    assert not measure.too_large(result, RuntimeError("something else"), bound)


def _row(system: str, **values) -> dict:
    return dataclasses.asdict(Result(system, **values))


class _Process:
    """Stands for a child: systems in `deadly` take it down, those that follow are not reached."""

    def __init__(self, deadly: tuple[str, ...]) -> None:
        self.deadly, self.launched = deadly, []

    def __call__(self, wanted) -> Launched:
        self.launched.append(tuple(wanted))
        chosen = [s for s in names.SYSTEMS if not wanted or s in wanted]
        values = {"now": "", "applicable": chosen, "systems": {}, "versions": "1"}
        for system in chosen:
            if system in self.deadly:
                return Launched(values | {"now": system}, f"SIGABRT of {system}")
            values["systems"][system] = _row(system, flops=float(len(chosen)))
        return Launched(values, "")


def test_a_process_that_lives_is_the_only_one():
    process = _Process(())
    entry = run_apart(process, runs=True)
    assert process.launched == [()] and list(entry["systems"]) == list(names.SYSTEMS)


def test_a_crash_spares_the_other_systems_and_they_run_together_again():
    process = _Process((names.SHARDY,))
    entry = run_apart(process, runs=True)
    others = [names.OURS, names.GSPMD, names.BY_HAND]
    assert process.launched == [(), *((s,) for s in names.SYSTEMS), tuple(others)]
    assert entry["systems"][names.SHARDY]["error"] == "SIGABRT of Shardy"
    assert all(entry["systems"][s]["flops"] == 3 for s in others)
    assert list(entry["systems"]) == list(names.SYSTEMS)


def test_where_nothing_runs_what_a_dead_process_had_finished_is_kept():
    process = _Process((names.SHARDY,))
    entry = run_apart(process, runs=False)
    assert process.launched == [(), (names.SHARDY,), (names.GSPMD,), (names.BY_HAND,)]
    assert entry["systems"][names.OURS]["flops"] == 4
    assert entry["systems"][names.SHARDY]["error"] == "SIGABRT of Shardy"


def test_one_system_is_measured_again_beside_the_others() -> None:
    row = {"error": "", "wire_bytes": 1.0}
    old = {"systems": {name: row for name in names.SYSTEMS}, "took_s": 9.0}
    launched = []

    def launch(wanted):
        launched.append(tuple(wanted))
        return Launched({"systems": {names.OURS: {**row, "wire_bytes": 2.0}},
                         "applicable": [names.OURS], "done": True}, "")  # fmt: skip

    new = run_apart(launch, runs=False, wanted=[names.OURS])
    assert launched == [(names.OURS,)] and new["asked"] == [names.OURS]
    found = merged(old, new)
    assert {s: r["wire_bytes"] for s, r in found["systems"].items()} == {
        names.OURS: 2.0, names.SHARDY: 1.0, names.GSPMD: 1.0, names.BY_HAND: 1.0,
    }  # fmt: skip
    assert has(found, ()) and has(new, [names.OURS])
    assert not has(new, ()) and not has(None, [names.OURS])
    assert merged(None, new) is new


def _child(program: str, limit: float) -> Child:
    return Child("cpu", program, (HERE,), limit, lambda now: None, 1.0)


def test_a_child_that_dies_before_its_systems_is_an_error_of_the_program():
    entry = run_apart(_child("crash", 60).launch, runs=True)
    assert entry["systems"] == {}
    assert "the process died, SIGABRT (start)" in entry["error"]


def test_a_child_is_stopped_when_its_time_is_over():
    entry = run_apart(_child("product", 0.3).launch, runs=True)
    assert entry["error"] == "took more than 0.3 s (start)"


def test_the_command_runs_stores_and_goes_on(tmp_path, monkeypatch, capsys):
    path = tmp_path / "results.json"
    options = ["--target", "cpu", "--programs", HERE, "--only", "^product$", "--json", str(path)]
    assert suite.main(options) == 0
    entry = json.loads(path.read_text())["cpu"]["product"]
    assert entry["mesh"] == MESH and entry["size"] == "small float32"
    assert list(entry["systems"]) == list(names.SYSTEMS)
    assert all(row["step_s"] > 0 and not row["error"] for row in entry["systems"].values())
    assert "product" in capsys.readouterr().out

    def refuse(*_):
        raise AssertionError("the results file has it already")

    monkeypatch.setattr(Child, "launch", refuse)
    assert suite.main([*options, "--markdown"]) == 0
    assert "| product |" in capsys.readouterr().out
    with pytest.raises(AssertionError, match="has it already"):
        suite.main([*options, "--again"])


def test_the_suite_has_programs_with_names_of_their_own():
    found = registry.programs()
    assert len({p.name for p in found}) == len(found) > 0
    assert [p.name for p in registry.matching("^st", [HERE])] == ["step"]
    with pytest.raises(ValueError, match="two programs are called 'step'"):
        registry.programs([HERE, HERE])


def test_children_are_kept_from_accelerators_unless_they_are_the_target(monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert "JAX_PLATFORMS" not in Target("gpu").environment()
    monkeypatch.delenv("JAX_PLATFORMS")
    assert Target("cpu").environment()["JAX_PLATFORMS"] == "cpu"
    assert Target("v5e:4x4").environment()["JAX_PLATFORMS"] == "cpu"
    assert defaults()[:2] == ("cpu", "v5p:2x2x4")
    assert "JAX_PLATFORMS" not in Target("gpu:16").environment()
    assert Target("gpu:16").described_gpus == 16 and not Target("gpu:16").runs
    assert Target("cpu:32").described_cpus == 32 and not Target("cpu:32").runs
    assert Target("cpu:32").environment()["JAX_PLATFORMS"] == "cpu"
    with pytest.raises(RuntimeError, match="no GPU"):
        Target("gpu").place(PROGRAMS[0])


def test_more_simulated_devices_take_the_larger_size_and_only_compile():
    assert table.kind("cpu:8") == "cpus" and table.kind("gpu:16") == "gpus"
    (program,) = registry.matching("^dlrm$")
    placed = Target("cpu:8").place(program)
    assert not placed.size.small and placed.size.devices == placed.mesh.size == 8
