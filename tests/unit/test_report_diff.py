"""Differences of reports, what notebooks show, and the page as text."""

import dataclasses
import html
import json
import re

import jax
import jax.numpy as jnp
import pytest

import spmd
from sharding import P
from sharding.errors import ArgumentError
from spmd.reporting.diff import Change
from spmd.reporting.model import Finding, Report
from spmd.reporting.notebook import preformatted


def mlp(x, w1, w2):
    return jax.nn.relu(x @ w1) @ w2


def made(mesh: dict[str, int], *specs) -> Report:
    shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((64, 256), (256, 1024), (1024, 256))]
    return spmd.report(spmd.jit(mlp, mesh=mesh, in_shardings=specs), *shapes, machine="v5e:2x4")


def tensor() -> Report:
    return made({"data": 2, "tensor": 4}, P("data"), P(None, "tensor"), None)


def data() -> Report:
    return made({"data": 8}, P("data"), None, None)


HOSTILE = "</script><img src=x onerror=\"document.title='owned'\"><!--<script>&amp;"


def hostile() -> Report:
    """A report whose every name is an attack."""
    found = tensor()
    return dataclasses.replace(
        found, name=HOSTILE,
        arguments=tuple(t._replace(name=f"{HOSTILE}{i}") for i, t in enumerate(found.arguments)),
        rows=tuple(r._replace(source=f"{HOSTILE}:1 (f)", module=f"{HOSTILE}/a", op=HOSTILE,
                              results=tuple(x + HOSTILE for x in r.results))
                   for r in found.rows),
        communication=tuple(c._replace(source=HOSTILE) for c in found.communication),
        findings=(Finding("gather", HOSTILE, HOSTILE, 8.0, HOSTILE, HOSTILE),),
        memory=dataclasses.replace(
            found.memory, buffers=tuple(b._replace(name=HOSTILE) for b in found.memory.buffers)
        ),
    )  # fmt: skip


def test_the_difference_has_the_numbers_of_both() -> None:
    a, b = tensor(), data()
    found = spmd.report_diff(a, b)
    assert found == a.diff(b)
    by_name = {(c.group, c.name): c for c in found.changes}
    sent = by_name["summary", "sent"]
    assert (sent.before, sent.after, sent.ratio) == (48 * 1024, 0, 0)
    memory = by_name["summary", "peak memory"]
    assert (memory.before, memory.after) == (a.memory.peak, b.memory.peak)
    assert by_name["communication", "all_reduce(tensor)"].difference == -48 * 1024
    assert [(r.name, r.before, r.after) for r in found.resharded] == [
        ("w1", "[-, tensor]", "[-, -]"), ("w2", "[tensor, -]", "[-, -]")
    ]  # fmt: skip
    text = str(found)
    assert text.startswith("from  mlp: data=2 tensor=4, on v5e:2x4")
    assert "sent                   48.0 KiB       0 B  -48.0 KiB  -100.0%\n" in text
    assert "shardings\n  w1  [-, tensor]  ->  [-, -]\n  w2  [tensor, -]  ->  [-, -]" in text


@pytest.mark.parametrize(
    ("before", "after", "want"),
    [(0, 0, "="), (0, 8, "new"), (8, 0, "-100.0%"), (8, 12, "+50.0%"), (8, 80, "x10")],
)
def test_relative_differences(before: float, after: float, want: str) -> None:
    assert Change("summary", "sent", "bytes", before, after).texts()[3] == want


def test_a_report_does_not_differ_from_itself() -> None:
    found = tensor().diff(tensor())
    assert not any(c.difference for c in found.changes)
    assert (found.resharded, found.appeared, found.gone) == ((), (), ())
    assert found.group("communication", only_different=True) == ()


def test_findings_that_appear_and_go() -> None:
    finding = Finding("gather", "x", "sort needs a sharded dim whole", 8.0, "a.py:1 (f)", "")
    more = dataclasses.replace(tensor(), findings=(finding,))
    dearer = dataclasses.replace(tensor(), findings=(finding._replace(bytes=16.0),))
    assert tensor().diff(more).appeared == (finding,)
    assert more.diff(tensor()).gone == (finding,)
    assert more.diff(dearer).appeared == more.diff(dearer).gone == ()
    assert "new findings\n  gather: x: sort" in str(tensor().diff(more))


def test_stages_are_reported_before_they_are_compared() -> None:
    shapes = [jax.ShapeDtypeStruct((8, 8), jnp.float32)] * 3
    stage = spmd.jit(mlp, mesh={"data": 8}).trace(*shapes)
    assert spmd.report_diff(stage, stage, machine="v5e:2x4").changes[1].name == "predicted step"
    with pytest.raises(ArgumentError, match="spmd.report was given a int"):
        spmd.report_diff(stage, 1)


def test_the_difference_as_json() -> None:
    read = json.loads(tensor().diff(data()).to_json())
    sent = next(c for c in read["changes"] if c["name"] == "sent")
    assert sent == {"group": "summary", "name": "sent", "unit": "bytes", "before": 49152.0,
                    "after": 0}  # fmt: skip
    assert read["resharded"][0] == {"name": "w1", "before": "[-, tensor]", "after": "[-, -]"}


def _before_script(page: str) -> str:
    """The markup of a page, but for the icon that keeps browsers from asking for one."""
    return page.split("<style>")[0].replace('<link rel="icon" href="data:,">', "")


@pytest.mark.parametrize("page", [lambda: hostile().to_html(),
                                  lambda: hostile().diff(data()).to_html()])  # fmt: skip
def test_names_are_data_of_the_page_and_never_markup(page) -> None:
    text = page()
    assert "<img" not in text and "<!--" not in text
    assert len(re.findall("</script>", text)) == 2  # the data, and the script
    assert "http" not in re.sub(r"http-equiv|http://www.w3.org/2000/svg", "", text)
    assert not re.search(r"<[^>]*\s(on\w+|style|src|href)=", _before_script(text))


def test_the_data_of_the_page_is_the_report() -> None:
    found = hostile()
    inside = re.search(r'<script type="application/json" id="data">(.*?)</script>',
                       found.to_html(), re.S)  # fmt: skip
    assert inside and Report.from_json(inside[1]) == found


def test_the_policy_names_the_script_and_the_style() -> None:
    page = tensor().to_html()
    policy = html.unescape(re.search(r'Policy" content="([^"]*)"', page)[1])  # pyright: ignore
    assert policy.startswith("default-src 'none'; img-src data:; script-src 'sha256-")
    assert "unsafe" not in policy


def test_notebooks_show_tables_and_the_page_in_a_frame() -> None:
    shown = hostile()._repr_html_()
    tables, frame = shown.split("<iframe ")
    assert frame.startswith('sandbox="allow-scripts" srcdoc="')
    assert "<script" not in shown and "<img" not in shown
    inside = re.match(r'sandbox="allow-scripts" srcdoc="([^"]*)"', frame)
    assert inside and html.unescape(inside[1]) == hostile().to_html()
    assert "all_reduce(tensor)" in tables
    diff = tensor().diff(data())._repr_html_()
    assert "-48.0 KiB" in diff and "<iframe sandbox=" in diff


def test_a_large_page_is_left_out_of_notebooks() -> None:
    found = tensor()
    many = dataclasses.replace(found, rows=found.rows * 8000)
    shown = many._repr_html_()
    assert "<iframe" not in shown and "report.save('report.html')" in shown
    assert len(shown) < 20_000


def test_notebooks_show_stages() -> None:
    x = jax.ShapeDtypeStruct((8, 8), jnp.float32)
    traced = spmd.jit(lambda x: x < 1, mesh={"data": 8}, in_shardings=P("data")).trace(x)
    for stage in (traced, traced.propagate()):
        shown = f'<pre style="line-height:1.3">{html.escape(str(stage))}</pre>'
        assert stage._repr_html_() == shown
    assert "... 100 more lines: print it" in preformatted("line\n" * 599)
    partitioned = traced.propagate().partition()
    assert partitioned._repr_html_() == partitioned.report()._repr_html_()
