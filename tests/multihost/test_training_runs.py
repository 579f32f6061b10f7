"""`train.py` in several processes: the same losses, and what ends a run ends all of it in time."""

import re
import signal
import time
from pathlib import Path

import pytest

from tests.multihost.training import PATIENCE_S, Run, losses, steps_saved

LOOPBACK = {"0100007F", "0000000000000000FFFF00000100007F"}
SLOW = {0: "slow_steps", 1: "slow_steps"}
LONG = ("--steps", "1000", "--checkpoint-every", "0")


def test_losses_are_the_same_however_the_devices_are_shared(tmp_path: Path) -> None:
    """Sums are taken in another order, nothing else; one process prints and writes. Batches are
    equal bit for bit, and each process reads the rows of its own devices."""
    arguments = ("--steps", "3", "--sample-bytes", "3", "--temperature", "0")
    found, texts, batches = [], [], []
    for processes in (1, 2, 4):
        faults = dict.fromkeys(range(processes), "tell_rows")
        with Run(tmp_path / f"{processes}", processes, arguments, faults) as run:
            run.finished()
            told = [run.rows(i) for i in range(processes)]
            # Eight rows for as many devices; three steps and a validation.
            assert {batch["read"] for one in told for batch in one} == {8 // processes}
            batches.append([{k: v for one in parts for k, v in one["rows"].items()}
                            for parts in zip(*told, strict=True)])  # fmt: skip
            found.append(losses(run.folder))
            texts.append(run.out(0).rpartition("sample (cache")[2])
            assert [run.out(i) + run.err(i) for i in range(1, processes)] == [""] * (processes - 1)
    assert [step for step, _ in found[0]] == [1, 2, 3] and texts[0]
    assert len(batches[0]) == 4 and set(batches[0][0]) == set("01234567")
    assert batches[1] == batches[0] and batches[2] == batches[0]
    for others, text in zip(found[1:], texts[1:], strict=True):
        assert [step for step, _ in others] == [1, 2, 3]
        assert [loss for _, loss in others] == pytest.approx([x for _, x in found[0]], rel=1e-5)
        assert text == texts[0]


@pytest.mark.parametrize(
    ("number", "process", "code"), [("SIGTERM", 0, 75), ("SIGTERM", 1, 75), ("SIGINT", 1, 130)]
)
def test_a_signal_to_one_process_saves_the_same_step_in_all(
    tmp_path: Path, number: str, process: int, code: int
) -> None:
    with Run(tmp_path / "run", 2, LONG, SLOW) as run:
        run.until_step(2)
        assert run.listening() <= LOOPBACK
        run.processes[process].send_signal(signal.Signals[number])
        assert run.codes(60) == [code, code], run.said()
        assert "interrupted and saved; go on with:" in run.err(0)
        assert "interrupted and saved" not in run.err(1)
        [saved] = steps_saved(run.folder)
        assert saved == losses(run.folder)[-1][0]
    with Run(run.folder, 2, ("--steps", str(saved + 1), "--resume", "must")) as again:
        again.finished()
        assert losses(again.folder)[-1][0] == saved + 1


def test_a_termination_request_is_seen_while_it_validates(tmp_path: Path) -> None:
    arguments = ("--steps", "9", "--eval-every", "1", "--eval-batches", "5000")
    with Run(tmp_path / "run", 2, arguments, {0: "slow_validation", 1: "slow_validation"}) as run:
        run.until_step(1)
        while "validating" not in run.out(0):
            time.sleep(0.1)
        run.processes[1].send_signal(signal.SIGTERM)
        assert run.codes(60) == [75, 75], run.said()
        assert steps_saved(run.folder) == [1]


@pytest.mark.parametrize(
    ("number", "process", "limit_s"), [("SIGKILL", 1, 30), ("SIGKILL", 0, 10), ("SIGSTOP", 1, 30)]
)
def test_a_lost_process_ends_the_others(
    tmp_path: Path, number: str, process: int, limit_s: float
) -> None:
    """By JAX's client, which aborts the process, or by a collective that fails."""
    with Run(tmp_path / "run", 2, ("--steps", "1000", "--checkpoint-every", "1"), SLOW) as run:
        run.until_step(2)
        run.processes[process].send_signal(signal.Signals[number])
        code = run.codes(limit_s, but=[process])[1 - process]
        assert code in (6, -signal.SIGABRT), run.said()
        told = run.err(1 - process)
        if code != 6:
            assert re.search(rf"unhealthy.*\n{process}\n|Socket closed|Failed to send", told), told
    with Run(run.folder, 2, ("--steps", "4", "--resume", "must")) as again:
        again.finished()
        assert losses(again.folder)[-1][0] >= 4


def test_an_exception_in_one_process_ends_all_and_is_printed_once(tmp_path: Path) -> None:
    with Run(tmp_path / "run", 2, LONG, {0: "slow_steps", 1: "crash"}) as run:
        run.until_step(2)
        assert run.codes(30) == [6, 1], run.said()
        assert run.err(0).strip() == "process 1 failed: all processes end"
        assert run.err(1).startswith("process 1: Traceback (most recent call last):")
        assert run.err(1).strip().endswith("RuntimeError: this host has bad memory")


@pytest.mark.parametrize(
    ("own", "faults", "message"),
    [
        (
            ("--seed", "16"), {},
            "error: --seed differs between processes (start)\n"
            "  why: 0 in process 0; 16 in process 1: they would run",
        ),
        ((), {1: "other_jax"}, "error: jax differs between processes (start)\n  why: 0.10"),
        ((), {1: "other_plan"}, "error: the plan (its digest) differs between processes (before"),
        (
            ("--num-processes", "3"), {},
            "error: the number of processes differs between processes (start)\n"
            "  why: 2 in process 0; 3 in process 1",
        ),
        (("--batch", "x"), {}, "process 1: error: --batch x\n  why: a whole number is needed"),
    ],
    ids=["options", "versions", "plan", "processes", "a-problem-of-one"],
)  # fmt: skip
def test_processes_that_differ_stop_before_the_first_step(
    tmp_path: Path, own: tuple[str, ...], faults: dict[int, str], message: str
) -> None:
    with Run(tmp_path / "run", 2, ("--steps", "2"), faults, process_1=own) as run:
        assert run.codes(PATIENCE_S) == [2, 2], run.said()
        said = run.err(0) + run.err(1)
        assert said.count("error: ") == 1 and message in said, said
        assert not run.folder.exists()


def test_a_process_that_does_not_come_is_not_waited_for_longer_than_asked(tmp_path: Path) -> None:
    with Run(tmp_path / "run", 2, ("--start-timeout", "20")) as run:
        run.processes[1].kill()
        assert run.codes(60, but=[1])[0] == 6, run.said()
        assert run.err(0).startswith(
            f"error: process 0 waited 20 s for 2 processes at {run.coordinator} (flags)\n"
            "  why: some did not come, or two have the same number\n"
        )
