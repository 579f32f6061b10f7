"""The tables of the suite: ratios, means, what misses a bar, what is said below."""

import dataclasses
import io

import pytest
from rich.console import Console

from benchmarks.suite import names, table
from benchmarks.suite.measure import Result


def _row(system: str, **values) -> dict:
    return dataclasses.asdict(Result(system, **values))


def _entry(ours: dict, theirs: dict, **more) -> dict:
    return {"systems": {names.OURS: _row(names.OURS, **ours),
                        names.SHARDY: _row(names.SHARDY, **theirs), **more}}  # fmt: skip


def _phases(**seconds):
    return {"phases_s": seconds}


def test_ratios():
    two = _entry({"wire_bytes": 3.0, "flops": 0.0}, {"wire_bytes": 4.0, "flops": 0.0})
    assert table.ratio(two, table.WIRE, names.SHARDY) == 0.75
    assert table.ratio(two, table.FLOPS, names.SHARDY) is None  # nothing to compare
    assert table.ratio(two, table.WIRE, names.BY_HAND) is None
    none = _entry({"wire_bytes": 3.0}, {"wire_bytes": 0.0})
    assert table.ratio(none, table.WIRE, names.SHARDY) == float("inf")
    failed = _entry({"wire_bytes": 3.0}, {"wire_bytes": 4.0, "error": "it crashed"})
    assert table.ratio(failed, table.WIRE, names.SHARDY) is None
    phases = _phases(trace=1.0, propagate=2.0, partition=1.0, lower=1.0, compile=5.0)
    timed = _entry(phases, _phases(trace=1.0, lower=1.0, compile=18.0))
    assert table.ratio(timed, table.TOTAL, names.SHARDY) == 0.5
    assert table.ratio(timed, table.SHARE, names.OURS) == 0.3


def test_means_are_geometric_and_of_cut_ratios():
    assert table.mean([0.5, 2.0, 1.0]) == pytest.approx(1.0)
    assert table.mean([0.0, float("inf")]) == pytest.approx(1.0)
    assert table.mean([]) is None


def test_misses_name_bars_programs_and_means():
    entries = {
        "worse": _entry({"wire_bytes": 1.2}, {"wire_bytes": 1.0}),
        "equal": _entry({"wire_bytes": 1.0004}, {"wire_bytes": 1.0}),
        "better": _entry({"wire_bytes": 0.5}, {"wire_bytes": 1.0}),
    }
    found = [str(miss) for miss in table.misses("cpu", entries)]
    assert found == [
        "geometric mean: wire/Shardy 0.844, bar 0.70", "worse: wire/Shardy 1.200, bar 1.00"
    ]  # fmt: skip
    assert not table.misses("gpu", entries)  # one device sends nothing


def test_times_are_asked_for_where_they_are_measured():
    slow = {"a": _entry({"step_s": 2.0, "estimated_s": 1.1}, {"step_s": 1.0, "estimated_s": 1.0})}
    metrics = {t: {m.bar.metric for m in table.misses(t, slow)} for t in ("cpu", "gpu", "v5e:4x4")}
    assert metrics == {"cpu": {table.STEP}, "gpu": {table.STEP}, "v5e:4x4": {table.ESTIMATE}}


def test_tables_show_errors_and_what_does_not_fit():
    entries = {
        "a": _entry({"wire_bytes": 2e6}, {"error": "it crashed"}),
        "b": _entry({"fits": False, "peak_bytes": 2.0**34}, {"peak_bytes": 2.0**33}),
        "c": {"systems": {}, "error": "never began"},
    }
    console = Console(record=True, width=200, file=io.StringIO())
    table.show(console, "v5e:4x4", entries)
    for text in (console.export_text(), table.markdown("v5e:4x4", entries)):
        for line in ("a, Shardy: it crashed", "c: never began", "b, spmd.jit: needs 16.00 GiB"):
            assert line in text
    assert table.errors(entries) == ["a, Shardy: it crashed", "c: never began"]
