"""The suite itself: it finds planted faults, and names the case that killed a worker."""

import sys
import textwrap
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sharding import _jax
from sharding.rule import REGISTRY, Factor, Rule
from tests.conformance import evidence, harnesses, report
from tests.conformance.cases import Case, Place, cases, make_mesh, partitioned
from tests.conformance.compare import differing, mismatch, order_ties
from tests.conformance.pool import Task, Worker
from tests.conformance.run import Record, Subject

CUMSUM = "cumsum_axis_by_fun_shape_float32_8_9_axis_0_reverse_False"
SUM = "reduce_sum_dtypes_shape_float32_2_3_"


def statuses(name: str, sizes: tuple[int, ...]) -> dict[str, str]:
    subject = Subject(harnesses.by_name()[name])
    assert not subject.failure()
    return {r["case"]: r["status"] for r in subject.run(sizes, subject.cases(sizes))}


def test_cases_are_every_dim_in_turn_and_pairs_on_two_axes() -> None:
    shapes = ([(4, 1), (0,)], [(4,)])
    assert [str(c) for c in cases(*shapes, (3,), "")] == [
        "in0.0=x", "in0.1=x", "in1.0=x", "out0.0=x"
    ]  # fmt: skip
    assert [str(c) for c in cases(*shapes, (2, 2), "")] == [
        "in0.0=x in0.1=y", "in0.0=x in1.0=y", "in0.1=x in1.0=y"
    ]  # fmt: skip


@pytest.mark.parametrize("side", ["in", "out"])
def test_a_dim_that_does_not_divide_is_sharded_inside(side: str) -> None:
    closed = jax.make_jaxpr(lambda x: [jnp.tanh(x)])(np.ones(7, np.float32))
    case = Case((Place(side, 0, 0, "x"),))
    part = partitioned(closed, (np.ones(7, np.float32),), case, make_mesh((3,)))
    assert "tanh" in str(part.jaxpr) and "f32[3]" in str(part.jaxpr)  # ceil(7 / 3) per device
    assert part.in_shardings[0].spec == jax.sharding.PartitionSpec()


def test_evidence_is_of_the_primitive_through_what_passes_dims_on() -> None:
    """A transposed operand, whose gathered dim is that of the sort; the boundary does not count."""
    closed = jax.make_jaxpr(lambda x: [jax.lax.sort(x.T * 2, dimension=0)])(np.ones((6, 8)))
    args = (np.ones((6, 8), np.float32),)
    fixed, free = (
        evidence.of_case(partitioned(closed, args, case, make_mesh((2,))), "sort", case)
        for case in (Case((Place("in", 0, dim, "x"),)) for dim in (1, 0))
    )
    assert fixed["factor"] == "fixed" and free["factor"] == "pass"
    assert free["sharded"] and free["alone"] and not free["cost"] and not free["gathers"]
    assert fixed["cost"] or fixed["gathers"]


def test_right_programs_are_right() -> None:
    assert set(statuses(CUMSUM, (4,)).values()) == {"right"}
    assert set(statuses(SUM, (2, 2)).values()) == {"right"}


def test_a_wrong_rule_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each shard accumulates on its own: wrong along the accumulated dim alone."""

    def independent(op) -> Rule:
        dims = (("d0",), ("d1",))
        n, m = op.in_avals[0].shape
        return Rule((dims,), (dims,), {"d0": Factor(n), "d1": Factor(m)})

    monkeypatch.setitem(REGISTRY.rules, _jax.primitives.cumsum_p, independent)
    found = statuses(CUMSUM, (4,))
    assert found["in0.0=x"] == "wrong" and found["in0.1=x"] == "right"


def test_a_lost_reduction_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device holds its own addend only; the others' copies differ from the first one's."""

    def unreduced(op) -> Rule:
        n, m = op.in_avals[0].shape
        return Rule(((("n",), ("m",)),), ((("m",),),), {"n": Factor(n), "m": Factor(m)})

    monkeypatch.setitem(REGISTRY.rules, _jax.primitives.reduce_sum_p, unreduced)
    assert statuses(SUM, (2,))["in0.0=x"] == "wrong"


def test_an_unexplained_error_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(op) -> Rule:
        raise KeyError("axis")

    monkeypatch.setitem(REGISTRY.rules, _jax.primitives.cumsum_p, broken)
    assert set(statuses(CUMSUM, (4,)).values()) == {"error"}


def test_a_missing_rule_is_a_refusal_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(REGISTRY.rules, _jax.primitives.cumsum_p)
    subject = Subject(harnesses.by_name()[CUMSUM])
    records = subject.run((2,), subject.cases((2,)))
    assert {r["status"] for r in records} == {"refused"} and records[0]["missing"] == ["cumsum"]


def test_every_devices_copy_is_compared() -> None:
    mesh = make_mesh((2,))
    copies = jax.shard_map(
        lambda: jnp.float32(1) + jax.lax.axis_index("x"), mesh=mesh, in_specs=(),
        out_specs=jax.sharding.PartitionSpec(), check_vma=False,
    )()  # fmt: skip
    assert "device 1" in mismatch(copies, np.ones((), np.float32), "", True)


def test_tolerance_is_of_an_element_where_nothing_is_summed() -> None:
    want = np.array([1e6, 1.0, np.nan, np.inf], np.float32)
    got = np.array([1e6, 1.1, np.nan, np.inf], np.float32)
    assert differing(got, want, 1e-5, None).tolist() == [False, True, False, False]
    assert not differing(got, want, 1e-5, 1e6).any()
    assert differing(want[::-1], want, 1e-5, 1e6).all()


def test_ties_of_an_unstable_sort_may_come_in_any_order() -> None:
    keys, values = np.array([1, 1, 2]), np.array([5, 4, 9])
    swapped = order_ties([keys, values[[1, 0, 2]]], 0)
    assert all(map(np.array_equal, swapped, order_ties([keys, values], 0)))
    wrong = order_ties([keys, values[[0, 2, 1]]], 0)
    assert not all(map(np.array_equal, wrong, order_ties([keys, values], 0)))


def scripted(tmp_path: Path, fatal: str) -> Worker:
    """A worker of three cases, one of which runs `fatal`."""
    script = tmp_path / "worker.py"
    script.write_text(textwrap.dedent(f"""
        import json, os, sys, time
        def say(**answer): print(json.dumps(answer), flush=True)
        def run(i):
            if i == 1: {fatal}
            say(records=[{{"case": f"c{{i}}", "status": "right", "detail": ""}}])
        say(ready=True)
        for line in sys.stdin:
            task = json.loads(line)
            for i in range(task["first"], 3):
                if task["alone"]: say(start=i, case=f"c{{i}}")
                run(i)
            say(done=0)
    """))
    return Worker(2.0, command=(sys.executable, str(script)))


@pytest.mark.parametrize(
    ("fatal", "status", "detail"),
    [
        ("os.abort()", "abort", "exit code -6"),
        ("sys.exit('no such axis')", "abort", "no such axis"),
        ("time.sleep(60)", "timeout", "no answer in 2 s"),
    ],
)
def test_what_kills_a_worker_is_found_and_the_rest_runs(
    fatal: str, status: str, detail: str, tmp_path: Path
) -> None:
    worker = scripted(tmp_path, fatal)
    records = worker.run(Task("h", "g", "2")).records
    worker.close()
    assert [(r["case"], r["status"]) for r in records] == [
        ("c0", "right"), ("c1", status), ("c2", "right")
    ]  # fmt: skip
    assert detail in records[1]["detail"]


def test_results_are_read_back_without_a_line_that_was_cut_off(tmp_path: Path) -> None:
    record: Record = {"case": "in0.0=x", "status": "wrong", "detail": "3 of 4"}
    done = report.Done(Task("h", "g", "2x2"), 0.5, [record])
    path = tmp_path / "results.jsonl"
    with path.open("w") as file:
        report.write(file, done)
        file.write('{"harness": "cut')
    assert list(report.read(path)) == [done]
    totals = report.Totals()
    totals.add(done)
    assert totals.failed == 1 and totals.cases == 1
    assert report.lines(totals, 5)[0] == "WRONG h mesh 2x2 in0.0=x (1 like it)"


def test_equal_programs_run_once() -> None:
    subject = Subject(harnesses.by_name()[SUM])
    ran = []
    execute = subject._execute
    subject._execute = lambda programs, mesh: ran.extend(programs) or execute(programs, mesh)
    subject.run((2,), subject.cases((2,)) * 3)
    assert len(ran) <= len(subject.cases((2,)))


