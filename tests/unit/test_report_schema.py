"""What a file that says it is a report may not hold, by its literal text."""

import json

import pytest

from sharding import ArgumentError
from spmd.reporting.model import Report
from tests.unit.test_report_diff import data


def written():
    return json.loads(data().to_json())


def refused(found):
    with pytest.raises(ArgumentError) as error:
        Report.from_json(json.dumps(found))
    return error.value.problems[0].why


@pytest.mark.parametrize(
    ("path", "value", "why"),
    [
        ("name", 3, "name is no text that can be shown"),
        ("name", "\x1b[2J", "name is no text that can be shown"),
        ("name", "\ud800", "name is no text that can be shown"),
        ("seconds", float("nan"), "seconds is out of range"),
        ("seconds", True, "seconds is a bool, and a number is needed"),
        ("devices", 2.0, "devices is a float, and a number is needed"),
        ("devices", 0, "the mesh has an axis without a device"),
        ("mesh", {"data": 0}, "the mesh has an axis without a device"),
        ("mesh", [], "mesh is a list, and a dict is needed"),
        ("flops", {}, "flops has no useful"),
        ("memory.peak", 10**31, "peak is out of range"),
        ("memory.at", -1, "memory is of other rows than the program has"),
        ("memory.over", [1] * 99, "memory is of other rows than the program has"),
        ("rows.rows", {}, "rows is a dict, and a list is needed"),
        ("rows.columns", ["op"], "rows has other columns than parent, op, results, operands,"
         " module, source, trips, flops, bytes, seconds, exposed"),
    ],
)  # fmt: skip
def test_a_value_of_another_kind_is_refused(path, value, why):
    found = written()
    *parents, last = path.split(".")
    here = found
    for parent in parents:
        here = here[parent]
    here[last] = value
    assert refused(found) == why


def test_rows_lie_in_rows_before_them_and_buffers_in_rows():
    row = {"parent": 0, "op": "", "results": [], "operands": [], "module": "", "source": "",
           "trips": 1, "flops": 0.0, "bytes": 0.0, "seconds": 0.0, "exposed": 0.0}  # fmt: skip
    found = written()
    found["rows"]["rows"] = [list(row.values())]  # in itself
    assert refused(found) == "a row comes before the one that it is in"
    found = written()
    buffer = ["", "", "", [], "", 0, "", 5, 5]
    found["memory"]["buffers"]["rows"] = [buffer]
    assert refused(found) == "a buffer lives at rows that are not there"


def test_what_is_nested_without_end_is_no_json():
    with pytest.raises(ArgumentError, match="it is no JSON: "):
        Report.from_json("[" * 100_000)
