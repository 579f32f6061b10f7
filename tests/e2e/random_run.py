"""Many random programs: `python -m tests.e2e.random_run [--first 0] [--last 10000] [--jobs 2]`.

Every program has a number, so that a run can be repeated and resumed (`--first`). Workers are
processes of their own: an abort is a failure of one program, and the rest goes on. Failures are
reduced line by line and printed; the exit code is 1 where there are any.
"""

import argparse
import os
import subprocess
import sys
import threading
from collections.abc import Iterator

from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from tests import fast_compile

CHUNK = 100  # programs per process: compiled programs are never freed
TIMEOUT = 3600.0


def work(first: int, last: int) -> None:
    """Runs the programs of these numbers, in this process."""
    os.environ.setdefault("SPMD_VERIFY", "1")
    from spmd.simulate import simulate

    simulate(8)
    import random

    from tests.e2e.test_random_programs import draw, outcome, reduce_case

    for number in range(first, last):
        print(f"start {number}", flush=True)
        case = draw(random.Random(number))
        failure = outcome(case)
        if failure:
            print(f"FAILED {number}: {failure}\n{reduce_case(case, failure)}", flush=True)
        print(f"done {number}", flush=True)


def run_chunk(first: int, last: int) -> Iterator[str]:
    """The lines of worker processes, one after an abort after the other, for these numbers."""
    while first < last:
        command = [sys.executable, "-m", "tests.e2e.random_run", "--worker", str(first), str(last)]
        worker = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        errors: list[str] = []
        assert worker.stdout is not None and worker.stderr is not None
        drain = threading.Thread(target=errors.extend, args=(worker.stderr,), daemon=True)
        drain.start()
        at = first
        for line in worker.stdout:
            if line.startswith("start "):
                at = int(line.split()[1])
            yield line
        drain.join()
        if worker.wait(TIMEOUT) == 0:
            return
        yield f"FAILED {at}: the process ended with {worker.returncode}\n"
        yield "".join(errors[-15:])
        yield f"done {at}\n"
        first = at + 1


def run_all(first: int, last: int, jobs: int) -> int:
    """How many of the programs fail."""
    chunks = [(n, min(n + CHUNK, last)) for n in range(first, last, CHUNK)]
    failed = 0
    console = Console()
    columns = (*Progress.get_default_columns()[:2], MofNCompleteColumn(),
               TextColumn("{task.fields[failed]} failed"), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("programs", total=last - first, failed=0)
        lock = threading.Lock()

        def consume() -> None:
            nonlocal failed
            while True:
                with lock:
                    if not chunks:
                        return
                    chunk = chunks.pop(0)
                for line in run_chunk(*chunk):
                    with lock:
                        if line.startswith("done "):
                            progress.advance(task)
                        elif not line.startswith("start "):
                            failed += line.startswith("FAILED ")
                            progress.update(task, failed=failed)
                            console.print(line, end="", markup=False, highlight=False)
                if not console.is_terminal:  # in a file, where a later run resumes
                    console.print(f"{chunk[0]} to {chunk[1] - 1} are done", highlight=False)

        threads = [threading.Thread(target=consume) for _ in range(jobs)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    return failed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--last", type=int, default=10_000)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--worker", nargs=2, type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        work(*args.worker)
        return 0
    fast_compile.use()  # the workers inherit it
    failed = run_all(args.first, args.last, args.jobs)
    print(f"{args.last - args.first} programs, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
