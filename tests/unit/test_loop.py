"""The training loop around a step that does nothing but say what the loop asked of it."""

import dataclasses
import io
import queue
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from training import loop as loops
from training.config import RunConfig
from training.data import Corpus
from training.errors import DivergedError, StalledError
from training.loop import Loop
from training.metrics import FILE, read_metrics
from training.plot import PLOT
from training.profiling import check_profile
from training.signals import StopRequest
from training.state import TrainState

TEXT = np.arange(1000, dtype=np.uint32).astype(np.uint8)


class Saved:
    """Checkpoints that remember the steps."""

    def __init__(self, folder, events):
        self.folder, self.events = folder, events

    def save(self, step, state, record):
        self.events.append(f"save {step}")

    def poll(self):
        return None

    finish = poll


class Printed(io.StringIO):
    """What a console prints, among the other events."""

    def __init__(self, events):
        super().__init__()
        self.events = events

    def write(self, text):
        self.events += [" ".join(text.split()[:2])] if text.startswith("step ") else []
        return super().write(text)


def start(folder, bad=(), done=0, skipped=0, log=(), **train):
    """A loop over a step whose loss is not finite in the steps `bad`; its state, and the events."""
    events: list[str] = []
    run = RunConfig()
    chosen = {"batch": 2, "steps": 8, "eval_every": 100, "log_every": 2, "eval_batches": 1, **train}
    every = chosen.pop("checkpoint_every", 0)
    run = dataclasses.replace(
        run, train=dataclasses.replace(run.train, **chosen),
        model=dataclasses.replace(run.model, dtype="float32"),
        data=dataclasses.replace(run.data, sequence=8),
        checkpoint=dataclasses.replace(run.checkpoint, checkpoint_every=every),
        log=dataclasses.replace(run.log, **dict(log)),
    )  # fmt: skip

    def step(state, batch):
        number = int(state.step) + 1
        events.append(f"start {number}")
        in_a_row = int(state.skipped) + 1 if number in bad else 0
        metrics = {"loss": jnp.float32(np.nan if in_a_row else 9 - number / 10),
                   "grad_norm": jnp.float32(1), "learning_rate": jnp.float32(0.5),
                   "skipped": jnp.int32(in_a_row)}  # fmt: skip
        return state.replace(step=jnp.int32(number), skipped=jnp.int32(in_a_row)), metrics

    def evaluate(params, batch):
        events.append("evaluate")
        return jnp.float32(3.5)

    plan = SimpleNamespace(
        run=run, put=lambda batch: batch, mesh=SimpleNamespace(devices=np.array(jax.devices()[:1]))
    )
    state = TrainState(jnp.int32(done), {}, (), jnp.zeros(2, jnp.uint32), jnp.int32(skipped))
    console = Console(file=Printed(events), width=200)
    loop = Loop(plan, Corpus(TEXT, TEXT, "", 1, ""), step, evaluate, Saved(folder, events), {},
                console, StopRequest())  # fmt: skip
    return loop, state, events


def test_a_step_is_recorded_while_the_next_one_runs(tmp_path):
    loop, state, events = start(tmp_path, steps=4, log_every=1)
    loop.run(state)
    assert events == [
        "start 1", "start 2", "step 1", "start 3", "step 2", "start 4", "step 3",
        "step 4", "save 4", "evaluate", "step 4",
    ]  # fmt: skip
    assert loop.validation_loss == 3.5


def test_saves_and_validations_see_the_state_of_their_step(tmp_path):
    loop, state, events = start(tmp_path, steps=6, eval_every=2, checkpoint_every=3)
    loop.run(state)
    assert [event for event in events if not event.startswith("step")] == [
        "start 1", "start 2", "evaluate", "start 3", "save 3", "start 4", "evaluate", "start 5",
        "start 6", "save 6", "evaluate",
    ]  # fmt: skip


@pytest.mark.parametrize(("done", "traced"), [(2, True), (3, False), (5, False)])
def test_a_resume_behind_the_steps_to_trace_says_so(tmp_path, monkeypatch, done, traced):
    calls = []
    monkeypatch.setattr(jax.profiler, "start_trace", calls.append)
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: calls.append("stop"))
    loop, state, _ = start(tmp_path, done=done, log={"profile": "3:4"})
    loop.run(state)
    assert calls == ([str(tmp_path / "profile"), "stop"] if traced else [])
    text = (
        f"no trace is written: --profile 3:4 begins before step {done + 1}, the first one of this"
        " process\n"
    )
    assert (text in loop.console.file.getvalue()) != traced


def test_every_line_has_what_was_logged_and_where_time_went(tmp_path):
    loop, state, _ = start(tmp_path, steps=5, eval_every=2)
    loop.run(state)
    lines = read_metrics(tmp_path / FILE)
    assert [line["step"] for line in lines] == [2, 4, 5]
    assert [line.get("validation_loss") for line in lines] == [3.5, 3.5, 3.5]
    for line in lines:
        assert line["loss"] == pytest.approx(9 - line["step"] / 10)
        assert (line["learning_rate"], line["skipped"], line["skipped_total"]) == (0.5, 0, 0)
        assert line["tokens_per_second"] == pytest.approx(16 / line["step_seconds"])
        assert 0 < line["goodput"] == line["seconds"]["step"] / sum(line["seconds"].values())
        assert line["memory"]["process"] > 1e7
    assert (tmp_path / PLOT).exists()


def test_skipped_steps_are_logged_each_and_not_saved(tmp_path):
    loop, state, events = start(tmp_path, bad=(3, 4, 6), checkpoint_every=2, log_every=8)
    loop.run(state)
    lines = read_metrics(tmp_path / FILE)
    assert [(line["step"], line["loss"] is None, line["skipped"], line["skipped_total"])
            for line in lines] == [(3, True, 1, 1), (4, True, 2, 2), (6, True, 1, 3),
                                   (8, False, 0, 3)]  # fmt: skip
    assert [event for event in events if event.startswith("save")] == ["save 2", "save 8"]
    assert (
        "warning: step 4 was skipped: loss nan, gradient norm 1; its batch is the one of seed 0,"
        " step 3; 2 in a row, 2 in all\n"
    ) in loop.console.file.getvalue()
    assert loop.goodput.now()["skipped"] > 0


def test_too_many_in_a_row_end_the_run_at_once_and_the_count_goes_on_after_a_resume(
    tmp_path, monkeypatch
):
    monkeypatch.setattr("training.nonfinite.NonFinite._before", lambda *_: (None, None))
    monkeypatch.setattr("training.nonfinite.first_bad_tensor", lambda *_: "the loss")
    loop, state, events = start(tmp_path, bad=range(3, 9), max_skipped=3, checkpoint_every=1)
    with pytest.raises(DivergedError, match="3 steps in a row, up to step 5"):
        loop.run(state)
    assert [event for event in events if event.startswith(("start", "save"))] == [
        "start 1", "save 1", "start 2", "save 2", "start 3", "start 4", "start 5",
    ]  # fmt: skip
    assert (tmp_path / PLOT).exists()
    again = start(tmp_path, bad=range(3, 9), max_skipped=3, done=3, skipped=1)
    with pytest.raises(DivergedError, match="up to step 5"):
        again[0].run(again[1])
    assert again[0]._log.total == 3
    assert [line["step"] for line in read_metrics(tmp_path / FILE)] == [2, 3, 4, 5]


def test_speed_leaves_out_pauses(tmp_path):
    loop, state, _ = start(tmp_path)
    with loop._recorded(state):
        log, values = loop._log, {"loss": 1.0, "grad_norm": 1.0, "skipped": 0.0}
        log.pause(100.0)
        log.step(2, values, done=log._since + 104.0)
        log.step(4, values, done=log._since + 8.0)
    assert [line["step_seconds"] for line in read_metrics(tmp_path / FILE)] == pytest.approx([2, 4])
    assert [line["tokens_per_second"] for line in read_metrics(tmp_path / FILE)] == pytest.approx(
        [8, 4]
    )


def test_to_look_for_nans_steps_do_not_overlap(tmp_path):
    loop, state, events = start(tmp_path, steps=3, log_every=1, log={"debug_nans": True})
    loop.run(state)
    assert events[:5] == ["start 1", "step 1", "start 2", "step 2", "start 3"]


def test_a_trace_has_the_steps_asked_for_and_no_other(tmp_path, monkeypatch):
    loop, state, events = start(tmp_path, steps=5, log_every=1, log={"profile": "2:3"})
    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder: events.append(folder))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: events.append("stop"))
    loop.run(state)
    first, last = events.index(f"{tmp_path}/profile"), events.index("stop")
    assert events[first - 1] == "step 1"
    assert events[first + 1 : last] == ["start 2", "start 3", "step 2", "step 3"]


def test_a_step_that_hangs_is_told(tmp_path, monkeypatch):
    done = loops.Watch.done
    waits = iter([queue.Empty, queue.Empty])

    def patient(watch, timeout):
        if error := next(waits, None):
            raise error
        return done(watch, timeout)

    monkeypatch.setattr(loops.Watch, "done", patient)
    loop, state, _ = start(tmp_path)
    loop.run(state)
    text = loop.console.file.getvalue()
    assert "warning: step 1 has been running for 60 s\nwarning: step 1 has been running for" in text
    assert "for 120 s\n" in text and "step 2 has been" not in text


def test_a_step_that_does_not_end_ends_the_run(tmp_path, monkeypatch):
    waits = []

    def patient(watch, timeout):
        waits.append(timeout)
        raise queue.Empty

    monkeypatch.setattr(loops.Watch, "done", patient)
    loop, state, _ = start(tmp_path)
    processes = dataclasses.replace(loop.plan.run.processes, step_timeout=150.0)
    loop.plan.run = dataclasses.replace(loop.plan.run, processes=processes)
    with pytest.raises(StalledError) as error:
        loop.run(state)
    assert (waits, error.value.exit_code) == ([60, 60, 30], 6)
    assert str(error.value) == (
        "step 1 has been running for 150 s, --step-timeout\n  why: a process, a device or the"
        " network does not answer; nothing of this step is saved\n"
        "  fix: start all processes again with --resume must, or allow steps more time"
    )


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("10", "it is not of the form first:last"),
        ("a:b", "it is not of the form first:last"),
        ("0:2", "the steps of the run are 1 to 20, and the first comes before the last"),
        ("5:4", "the steps of the run are 1 to 20, and the first comes before the last"),
        ("19:21", "the steps of the run are 1 to 20, and the first comes before the last"),
    ],
)
def test_steps_to_trace_that_make_no_sense(text, why):
    [problem] = check_profile(text, 20)
    assert str(problem) == (
        f"--profile {text}\n  why: {why}\n"
        "  fix: write the first and the last step, for instance --profile 10:12"
    )
    assert check_profile("10:12", 20) == []
