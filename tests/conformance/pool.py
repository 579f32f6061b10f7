"""Workers that restart, and what a dead or silent one means for the case that it ran."""

import contextlib
import json
import pathlib
import queue
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from tests.conformance.run import Record

START_SECONDS = 120.0  # until a worker has imported JAX
COMMAND = (sys.executable, "-m", "tests.conformance.worker")
ROOT = pathlib.Path(__file__).parents[2]
TAIL = 400  # characters of a dead worker's last words


class Task(NamedTuple):
    """All cases of one harness on one mesh, such as `2x2`."""

    harness: str
    group: str
    mesh: str


class Done(NamedTuple):
    task: Task
    seconds: float
    records: list[Record]


class Died(Exception):
    """The worker ended or said nothing for too long; `status` is what that makes of its case."""

    def __init__(self, status: str, detail: str):
        super().__init__(detail)
        self.status, self.detail = status, detail


class Worker:
    """One worker process, started again when it dies."""

    def __init__(self, seconds: float, flags: Sequence[str] = (), command: Sequence[str] = COMMAND):
        self.seconds, self.command = seconds, (*command, *flags)
        self.process: Any = None
        self.lines: queue.Queue[str] = queue.Queue()

    def close(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.reader.join()
            for stream in (self.process.stdin, self.process.stdout, self.errors):
                with contextlib.suppress(BrokenPipeError):  # of a task that was never read
                    stream.close()
            self.process = None

    def run(self, task: Task) -> Done:
        """Never raises: what goes wrong is in the records."""
        start = time.perf_counter()
        records: list[Record] = []
        try:
            self._ask(task, 0, False, records, [])
        except Died as death:
            records = self._one_by_one(task)
            innocent = not any(r["status"] in ("abort", "timeout") for r in records)
            if innocent and death.status == "abort":  # too slow together is no failure
                records.append(_fatal("all cases at once", death))
        return Done(task, time.perf_counter() - start, records)

    def _one_by_one(self, task: Task) -> list[Record]:
        """The same cases one after the other; those that kill the worker are known by name."""
        records: list[Record] = []
        first = 0
        while True:
            started: list[tuple[int, str]] = []
            try:
                self._ask(task, first, True, records, started)
                return records
            except Died as death:
                # Before the first case there is the unsharded program alone.
                records.append(_fatal(started[-1][1] if started else "", death))
                if not started:
                    return records
                first = started[-1][0] + 1

    def _ask(
        self, task: Task, first: int, alone: bool, records: list[Record],
        started: list[tuple[int, str]],
    ) -> None:  # fmt: skip
        """Appends records and announced cases as they come in, until the worker is done."""
        process = self._started()
        request = {"harness": task.harness, "mesh": task.mesh, "first": first, "alone": alone}
        try:
            process.stdin.write(json.dumps(request) + "\n")
            process.stdin.flush()
        except BrokenPipeError:
            self._raise_death()
        while "done" not in (answer := self._answer(self.seconds)):
            if "start" in answer:
                started.append((answer["start"], answer["case"]))
            records += answer.get("records", [])

    def _started(self) -> Any:
        if self.process is not None and self.process.poll() is not None:
            self.close()
        if self.process is None:
            self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115
            self.lines = queue.Queue()
            self.process = subprocess.Popen(
                self.command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                stderr=self.errors, text=True,
            )  # fmt: skip
            stream = self.process.stdout
            self.reader = threading.Thread(target=_forward, args=(stream, self.lines), daemon=True)
            self.reader.start()
            self._answer(START_SECONDS)
        return self.process

    def _answer(self, seconds: float) -> dict[str, Any]:
        try:
            line = self.lines.get(timeout=seconds)
        except queue.Empty:
            self.close()
            raise Died("timeout", f"no answer in {seconds:.0f} s") from None
        return json.loads(line) if line else self._raise_death()

    def _raise_death(self) -> Any:
        code = self.process.wait()
        self.errors.seek(0)
        words = " ".join(self.errors.read()[-TAIL:].split())
        self.close()
        raise Died("abort", f"exit code {code}: {words}")


def _fatal(case: str, death: Died) -> Record:
    return {"case": case, "status": death.status, "detail": death.detail}


def _forward(stream: Any, lines: queue.Queue[str]) -> None:
    for line in stream:
        lines.put(line)
    lines.put("")  # the end


def run_all(
    tasks: Sequence[Task], jobs: int, make: Callable[[], Worker], report: Callable[[Done], None]
) -> None:
    """Every task on some worker; `report` is called in this thread, as results come in."""
    todo: queue.Queue[Task | None] = queue.Queue()
    done: queue.Queue[Done] = queue.Queue()
    for task in (*tasks, *[None] * jobs):
        todo.put(task)

    def serve() -> None:
        worker = make()
        while (task := todo.get()) is not None:
            done.put(worker.run(task))
        worker.close()

    threads = [threading.Thread(target=serve, daemon=True) for _ in range(jobs)]
    for thread in threads:
        thread.start()
    for _ in tasks:
        report(done.get())
    for thread in threads:
        thread.join()
