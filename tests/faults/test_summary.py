"""What the long form writes down."""

import json

from tests.faults import __main__ as long_form


def test_a_part_that_is_left_out_keeps_its_last_result(tmp_path, monkeypatch):
    summary = tmp_path / "summary.json"
    summary.write_text(json.dumps({"kills": {"trials": 300}, "matrix": {"trials": 1}}))
    trials = [{"kind": "17", "faults": []}, {"kind": "18", "faults": ["it ended"]}]
    part = ("matrix", 2, lambda done: iter(trials[done:]))
    monkeypatch.setattr(long_form, "_parts", lambda *_: [part])
    monkeypatch.setattr(long_form, "simulate", lambda devices: True)
    argv = ["--folder", str(tmp_path / "trials"), "--summary", str(summary)]
    assert long_form.main(argv) == 1
    found = json.loads(summary.read_text())
    assert found["kills"] == {"trials": 300}
    assert (found["matrix"]["trials"], found["matrix"]["faults"]) == (2, ["it ended"])
    assert found["matrix"]["kinds"] == {"17": 1, "18": 1}
    # What was done is not done again.
    trials.append({"kind": "19", "faults": []})
    assert long_form.main(argv) == 1
    assert json.loads(summary.read_text())["matrix"]["trials"] == 3


def test_rows_that_were_done_are_not_done_again(tmp_path, monkeypatch):
    monkeypatch.setattr(long_form, "_cases", lambda folder, names: names)
    results = long_form.Results(tmp_path / "results.jsonl")
    results.add("matrix", {"kind": "17: slow disk (skipped: there is no C compiler)", "faults": []})
    options = long_form._options(["--cases", "17,18"])
    *_, (name, count, trials) = long_form._parts(options, results)
    assert (name, count) == ("matrix", 2)
    assert trials(1) == ["18: one batch that is not finite"]
