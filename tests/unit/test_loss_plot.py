"""The picture of the losses: what is in it, and that no name of a run gets out of its text."""

import xml.etree.ElementTree as ElementTree

from sharding.errors import Problem
from training.metrics import FILE, Metrics
from training.plot import PLOT, draw, write_plot

SVG = "{http://www.w3.org/2000/svg}"


def parsed(lines, title="run"):
    return ElementTree.fromstring(draw(lines, title))


def by_class(root, name):
    return [element for element in root.iter() if element.get("class") == name]


def run(steps=20, **more):
    return [{"step": n, "loss": 5.0 - n / 10, **more.get(f"at{n}", {})} for n in range(1, steps)]


def test_both_losses_skipped_steps_and_resumes_are_drawn():
    lines = run(at10={"validation_loss": 4.5}, at19={"validation_loss": 3.5},
                at5={"loss": None, "skipped": 1}, at12={"resumed": 11})  # fmt: skip
    root = parsed(lines)
    titles = [element.text for element in root.iter(f"{SVG}title")]
    assert titles == [
        "run: losses", "resumed after step 11", "step 10: 4.5000", "step 19: 3.5000",
        "step 5 was skipped",
    ]  # fmt: skip
    texts = [element.text for element in root.iter(f"{SVG}text")]
    for legend in ("training, last 3.1000", "validation, last 3.5000", "skipped steps: 1",
                   "resumed: 1", "step", "nats per token"):  # fmt: skip
        assert legend in texts
    assert len(by_class(root, "train")[0].get("d").split("L")) == 18


def test_larger_losses_are_higher_and_later_steps_further_right():
    [path] = by_class(parsed(run()), "train")[:1]
    places = [tuple(map(float, part.split())) for part in path.get("d")[1:].split(" L")]
    assert places == sorted(places) and [y for _, y in places] == sorted(y for _, y in places)


def test_a_name_is_text_and_nothing_else():
    title = '</title><script>alert(1)</script>"&\x01' + "x" * 200
    root = parsed(run(), title)
    assert not list(root.iter(f"{SVG}script"))
    assert next(root.iter(f"{SVG}title")).text == title.replace("\x01", "?") + ": losses"


def test_many_points_stay_small_and_keep_their_extremes():
    lines = [{"step": n, "loss": 2.0 + (n == 33_333)} for n in range(1, 100_001)]
    text = draw(lines, "run")
    assert len(text) < 100_000
    frame_top = by_class(ElementTree.fromstring(text), "raw")[0].get("d")
    assert len({part.split()[-1] for part in frame_top.split("L")}) == 2


def test_few_or_equal_values_and_none_at_all():
    assert draw([], "run") == draw([{"step": 1, "loss": None, "skipped": 1}], "run") == ""
    assert by_class(parsed([{"step": 1, "loss": 2.0}]), "point")
    parsed([{"step": 1, "loss": 0.0}, {"step": 2, "loss": 0.0}])
    parsed([{"step": 5, "validation_loss": 1e-9}])


def test_it_is_written_into_the_folder_or_the_problem_told(tmp_path):
    assert write_plot(tmp_path) is None and not (tmp_path / PLOT).exists()
    metrics = Metrics(tmp_path)
    metrics.add(1, {"loss": 2.0})
    metrics.close()
    assert write_plot(tmp_path) is None
    assert ElementTree.parse(tmp_path / PLOT).getroot().tag == f"{SVG}svg"
    (tmp_path / PLOT).unlink()
    (tmp_path / PLOT).mkdir()
    assert write_plot(tmp_path) == Problem(
        f"{tmp_path / PLOT} cannot be written", "Is a directory",
        "make room on the disk, or make the folder writable",
    )  # fmt: skip
    assert (tmp_path / FILE).exists()
