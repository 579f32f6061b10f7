"""The page of a report in a real browser: nothing is asked for, everything works by mouse and keys.

Skipped with the reason where there is no Chromium.
"""

import dataclasses
import functools
import json
import time

import jax
import jax.numpy as jnp
import pytest

import spmd
from models.shardings import rules_for
from sharding import P
from spmd.reporting import units
from spmd.reporting.model import Report
from tests.e2e.test_parallelism import BATCH, CONFIG, SEQ, loss_of
from tests.unit.test_propagation import unrolled
from tests.unit.test_report_diff import HOSTILE, data, hostile, tensor

LINES = "[...document.querySelectorAll('.space .line')]"
LABELS = LINES + ".map(l => l.querySelector('.label').innerText.trim())"
VIEWS = ("overview", "program", "memory", "communication", "mesh", "tensors", "findings")


@functools.cache
def model() -> Report:
    """Of the small language model's gradients."""
    from models.transformer import Transformer

    mesh = {"data": 2, "tensor": 4}
    tokens, inputs = (jax.ShapeDtypeStruct((BATCH, SEQ + n), jnp.int32) for n in (1, 0))
    params = jax.eval_shape(Transformer(CONFIG).init, jax.random.key(0), inputs)["params"]
    step = spmd.jit(jax.value_and_grad(functools.partial(loss_of, CONFIG)), mesh=mesh,
                    axis_rules=rules_for("tensor", mesh))  # fmt: skip
    return spmd.report(step, params, tokens, machine="v5e:2x4")


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [1280, 700])
def test_every_view_opens_and_fits_the_width(open_page, width: int, dark: bool) -> None:
    page = open_page(model().to_html(), width=width, dark=dark)
    for view in VIEWS:
        page.click(f"#tab-{view}")
        assert page.run(f"!document.getElementById('view-{view}').hidden")
        assert page.run("document.querySelectorAll('[role=tabpanel]:not([hidden])').length") == 1
        assert page.run("document.documentElement.scrollWidth") <= width, view
        if view != "findings":
            assert len(page.text(f"#view-{view}")) > 80
    back = page.run("getComputedStyle(document.documentElement).backgroundColor")
    assert (sum(map(int, back[4:-1].split(","))) < 3 * 128) is dark


def test_the_tiles_have_the_numbers_of_the_text(open_page) -> None:
    page = open_page(model().to_html())
    text, tiles = str(model()), page.text(".tiles")
    for line in ("Predicted step", "Peak memory", "Utilisation", "Exposed", "Sent", "Operations"):
        value = tiles.split(f"{line}\n")[1].split("\n")[0]
        assert value in text, (line, value)


def test_the_tree_expands_and_folds_by_keys(open_page) -> None:
    page = open_page(model().to_html())
    page.click("#tab-program")
    page.click("[data-key=order]")
    page.run("document.querySelector('.lines').style.height = '40000px'")  # all of it in sight
    page.wait(f"{LINES}.length === {sum(r.parent < 0 for r in model().rows)}")
    closed = page.run(LABELS)
    at = next(i for i, label in enumerate(closed) if "scan" in label)
    page.run("document.querySelector('.lines').focus()")
    page.key("Home", *["ArrowDown"] * at, "ArrowRight")
    opened, selected = page.run(LABELS), f"{LINES}.find(l => l.classList.contains('at'))"
    scan = [r.op for r in model().rows].index("scan")
    inside = sum(r.parent == scan for r in model().rows)
    assert len(opened) == len(closed) + inside and opened[:at] == closed[:at]
    assert opened[at + 1 + inside :] == closed[at + 1 :]
    assert page.run(f"{selected}.ariaExpanded") == "true"
    assert page.text(".details h3") == "scan"
    page.key("ArrowRight")
    assert page.run(f"{selected}.ariaLevel") == "2"
    page.key("ArrowLeft")
    assert page.run(f"{selected}.ariaLevel") == "1"
    page.key("ArrowLeft")
    assert page.run(LABELS) == closed


def test_every_operation_is_in_each_tree_once(open_page) -> None:
    page = open_page(model().to_html())
    page.click("#tab-program")
    shown = f"{len(model().rows):,} operations"
    for by in ("module", "source", "order"):
        page.click(f"[data-key={by}]")
        assert page.text(".tools [role=status]") == shown
        page.run("document.querySelector('.lines').style.height = '40000px'")
        page.wait("document.querySelector('.space').offsetHeight > 0")
        for _ in range(20):
            closed = f"{LINES}.filter(l => l.ariaExpanded === 'false')"
            if not page.run(closed + ".length"):
                break
            page.run(f"{closed}.reverse().forEach(l => "
                     "document.getElementById(l.id).querySelector('.label').click())")
        ops = page.run(f"{LINES}.filter(l => !l.querySelector('.group')).length")
        groups = {r.parent for r in model().rows if r.parent >= 0} if by == "order" else set()
        assert ops + len(groups) == len(model().rows), by


def test_search_finds_by_every_word(open_page) -> None:
    page = open_page(model().to_html())
    page.run("document.activeElement.blur()")
    page.key("/")
    assert page.run("document.activeElement.id") == "search"
    page.type("dot_general attend")
    want = [r for r in model().rows if r.op == "dot_general" and "attend" in r.source]
    assert want
    assert page.text(".tools [role=status]").startswith(f"{len(want)} operations of")
    leaves = page.run(f"{LINES}.filter(l => !l.querySelector('.group')).map(l => l.innerText)")
    assert len(leaves) == len(want) and all("dot_general" in leaf for leaf in leaves)
    page.type(" nothinglikeit")
    assert "nothing found" in page.text(".space")


def test_a_collective_leads_to_its_place_in_the_program(open_page) -> None:
    page = open_page(model().to_html())
    page.click("#tab-communication")
    first = model().communication[0]
    assert first.source in page.text("tr.pick").replace("\n", " ")
    page.click("tr.pick td")
    assert page.run("!document.getElementById('view-program').hidden")
    want = [r for r in model().rows if r.bytes and first.source in r.source]
    assert page.text(".tools [role=status]").startswith(f"{len(want)} operation")


def test_a_tensor_is_drawn_on_the_mesh(open_page) -> None:
    page = open_page(tensor().to_html())
    page.click("#tab-mesh")
    parts = "[...document.querySelectorAll('.cell')].map(c => Number(c.dataset.part))"

    def choose(name: str) -> list[int]:
        page.run("document.getElementById('tensor-search').value = ''")
        page.click("#tensor-search")
        page.type(name)
        page.click(".picks [role=option]")
        page.run("document.getElementById('tensor-search').select()")
        return page.run(parts)

    # x [data, -] on data=2, tensor=4: the devices of one row hold the same half.
    assert choose("x") == [0, 0, 0, 0, 1, 1, 1, 1]
    assert "every part is on 4 devices" in page.text(".mesh")
    # w1 [-, tensor]: a column has the same quarter.
    assert choose("w1") == [0, 1, 2, 3, 0, 1, 2, 3]
    page.run("document.querySelector('.cell').focus()")
    page.key("ArrowDown", "ArrowRight")
    assert page.text(".mesh .says") == (
        "device 5 (data=1, tensor=1) holds [0:256, 256:512]; the same part on 2 devices"
    )
    same = "[...document.querySelectorAll('.cell')].map((c, i) => c.matches('.same') ? i : -1)"
    assert page.run(f"{same}.filter(i => i >= 0)") == [1, 5]


@pytest.mark.parametrize(
    ("shape", "sharding", "axes", "want"),
    [
        # 10 rows over 4: 3, 3, 3 and 1 of them
        ([10], "[a]", [["a", 4]], ["[0:3]", "[3:6]", "[6:9]", "[9:10]"]),
        # one dim over two axes, major first
        ([8], "[b+a]", [["a", 2], ["b", 2]], ["[0:2]", "[4:6]", "[2:4]", "[6:8]"]),
        ([2, 2], "[-, a] partial{b:add}", [["a", 2], ["b", 2]],
         ["[0:2, 0:1]", "[0:2, 0:1]", "[0:2, 1:2]", "[0:2, 1:2]"]),
        ([], "[]", [["a", 2]], ["the scalar", "the scalar"]),
    ],
)  # fmt: skip
def test_parts_of_devices(open_page, shape, sharding, axes, want) -> None:
    page = open_page(tensor().to_html())
    arguments = ", ".join(map(json.dumps, (shape, sharding, axes)))
    assert page.run(f"place({arguments}).partOf.map(p => rangesText(p.ranges))") == want
    # Addends of the same elements are no replicas of each other.
    parts = 4 if "partial" in sharding else len(set(want))
    assert page.run(f"place({arguments}).parts.length") == parts


def test_numbers_are_written_as_in_the_text(open_page) -> None:
    page = open_page(tensor().to_html())
    numbers = [0, 1, 7, 999, 1000, 1023, 1024, 1536, 48 * 1024, 622_592, 1e6, 3.3e9, 2**40, 1.5e13]
    small = [0, 3.2e-9, 4.81e-6, 1.234e-3, 0.0186, 0.9996, 1, 12.5, 3600, 0.125e-6]
    for name, ours, given in (
        ("bytesText", units.size, numbers), ("flopsText", units.flops, numbers),
        ("secondsText", units.seconds, small),
        ("percentText", units.percent, [0, 0.001, 0.5, 2.447]),
    ):  # fmt: skip
        got = page.run(f"{json.dumps(given)}.map({name})")
        assert got == list(map(ours, given)), name


@pytest.mark.parametrize("mesh", [{"data": 2048}, {"a": 64, "b": 32}, {"a": 4, "b": 4, "c": 4}])
def test_meshes_of_one_to_three_axes_are_drawn(open_page, mesh: dict[str, int]) -> None:
    x = jax.ShapeDtypeStruct((2048, 64), jnp.float32)
    report = spmd.report(spmd.jit(jnp.tanh, mesh=mesh, in_shardings=P(tuple(mesh))), x)
    page = open_page(report.to_html())
    page.click("#tab-mesh")
    assert page.run("document.querySelectorAll('.cell').length") == report.devices
    assert page.run("new Set([...document.querySelectorAll('.cell')].map(c => c.dataset.part)).size"
                    ) == report.devices  # fmt: skip
    assert page.run("document.querySelectorAll('figure').length") == (4 if len(mesh) == 3 else 1)
    assert page.run("document.documentElement.scrollWidth") <= 1280
    page.run("document.querySelector('.cell').focus()")
    page.key("End")
    assert page.text(".mesh .says").startswith(f"device {report.devices - 1} (")
    page.click(".cell:nth-of-type(2)")
    assert page.text(".mesh .says").startswith("device 1 (")


def test_memory_shows_what_is_held_where_it_is_clicked(open_page) -> None:
    report = model()
    page = open_page(report.to_html())
    page.click("#tab-memory")
    held = "[...document.querySelectorAll('#view-memory tbody tr td:nth-child(3)')]"
    assert f"Held at instruction {report.memory.at:,}, the peak" in page.text("#view-memory")
    live = report.memory.live(report.memory.at)
    assert page.run(f"{held}.map(e => e.innerText)")[: len(live)] == [b.name for b in live]
    page.run("document.getElementById('memory-chart').focus()")
    page.key("Home", "ArrowRight", "ArrowRight")
    assert f"at instruction 2: {report.rows[2].op}" in page.text("#view-memory .told")
    assert "Held at instruction 2:" in page.text("#view-memory")
    page.click(".chart svg")  # its middle
    middle = len(report.rows) // 2
    assert f"at instruction {middle:,}:" in page.text("#view-memory .told")


def test_the_capacity_line_is_drawn_where_it_matters(open_page) -> None:
    report = tensor()
    for capacity, lines in ((report.memory.peak - 1, 1), (100 * report.memory.peak, 0), (0, 0)):
        memory = dataclasses.replace(report.memory, capacity=capacity)
        page = open_page(dataclasses.replace(report, memory=memory).to_html())
        page.click("#tab-memory")
        assert page.run("document.querySelectorAll('line.capacity').length") == lines
        assert ("does not fit" in page.text(".tiles")) is (capacity == report.memory.peak - 1)


def test_hostile_names_stay_text(open_page) -> None:
    page = open_page(hostile().to_html())
    assert page.text("h1") == HOSTILE
    for view in VIEWS:
        page.click(f"#tab-{view}")
        assert "onerror" in page.text(f"#view-{view}"), view
    page.click("#tab-program")
    page.click("[data-key=order]")
    page.click(".space .line .cell")
    assert page.text(".details h3") == HOSTILE
    diff = open_page(hostile().diff(data()).to_html())
    assert "onerror" in diff.text("main")
    for shown in (page, diff):
        assert shown.run("document.querySelectorAll('img, script:not([id]) ~ script').length") == 0
        assert "owned" not in shown.run("document.title").split("document.title")[0]


def test_the_page_of_a_difference(open_page) -> None:
    page = open_page(tensor().diff(data()).to_html())
    text = page.text("main")
    for line in ("all_reduce(tensor)", "-48.0 KiB", "-100.0%", "[-, tensor]", "Shardings"):
        assert line in text
    assert page.run("document.documentElement.scrollWidth") <= 1280
    assert page.run("document.querySelectorAll('.both').length") > 0


def test_a_notebook_frame_runs_and_reaches_nothing(open_page) -> None:
    page = open_page(f"<!doctype html><title>n</title>{tensor()._repr_html_()}")
    assert "all_reduce(tensor)" in page.text("body")
    page.run("document.querySelector('details').open = true")
    page.run("document.querySelector('iframe').scrollIntoView()")
    frame = page.frame()
    frame.wait("document.querySelectorAll('.tile').length === 6")
    frame.run("document.getElementById('tab-mesh').click()")
    assert frame.run("document.querySelectorAll('.cell').length") == 8
    # Its origin is opaque: neither side can read the other.
    assert frame.run("self.origin") == "null"
    assert page.run("document.querySelector('iframe').contentDocument") is None


@pytest.mark.slow
def test_a_program_of_20000_equations_opens_in_3_seconds(open_page) -> None:
    sizes = {"data": 8, "fsdp": 16, "tensor": 16}
    step, state, batch = unrolled(32)
    jitted = spmd.jit(step, mesh=sizes, axis_rules=rules_for("fsdp+tensor", sizes))
    report = spmd.report(jitted, state, batch, machine="v5p:8x16x16")
    assert len(report.rows) > 20_000
    html = report.to_html()
    start = time.monotonic()
    page = open_page(html)
    page.wait("document.querySelectorAll('.tile').length === 6")
    elapsed = time.monotonic() - start
    for view in VIEWS:
        page.click(f"#tab-{view}")
        assert page.run("document.querySelectorAll('*').length") < 20_000, view
    page.click("#tab-program")
    page.click("#search")
    page.type("layer_17 dot_general")
    assert "operations of" in page.text(".tools [role=status]")
    busy = page.busy_seconds
    print(f"{len(html) / 1e6:.1f} MB: open {elapsed:.2f} s; thread, all views too: {busy:.2f} s")
    assert elapsed < 3 or busy < 3
