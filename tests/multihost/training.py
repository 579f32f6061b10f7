"""Runs of `train.py` in several processes on this machine, and what is done to them.

    python -m tests.multihost.training FAULT ARGUMENTS...

runs `train.py ARGUMENTS` with a fault put into it, see FAULTS.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[2]
PATIENCE_S = 600  # for what is no claim of a test: compiling, on a machine with much to do
TINY = (
    "--num-layers 1 --embed-dim 8 --mlp-dim 8 --num-heads 1 --num-kv-heads 1 --head-dim 8"
    " --sequence 8 --batch 8 --mesh fsdp=8 --parallelism fsdp --eval-batches 1 --log-every 1"
    " --no-scan-layers --remat none"
    f" --sample-bytes 0 --data {ROOT / 'LICENSE'}"
).split()


class Run:
    """Processes of one run, as a launcher would start them.

    Args:
      faults: by process, the name of its fault.
    """

    def __init__(
        self, folder: Path, processes: int, arguments: Sequence[str],
        faults: dict[int, str] | None = None, **own: Sequence[str],
    ):  # fmt: skip
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.coordinator = f"127.0.0.1:{free.getsockname()[1]}"
        self.folder = folder
        self.log = folder.parent / f"{folder.name}-log"
        self.log.mkdir(exist_ok=True)
        dropped = ("XLA_FLAGS", "NPROC")
        environ = {k: v for k, v in os.environ.items() if k not in dropped}
        environ |= {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
        self.processes: list[subprocess.Popen] = []
        for i in range(processes):
            fault = (faults or {}).get(i)
            program = ["-m", "tests.multihost.training", fault] if fault else ["train.py"]
            command = [sys.executable, "-u", *program, *TINY, "--checkpoint-dir", str(folder)]
            if processes > 1:
                command += ["--coordinator", self.coordinator, "--process-id", str(i)]
                command += ["--num-processes", str(processes)]
            command += [*arguments, *own.get(f"process_{i}", ())]
            with open(self.log / f"{i}.out", "w") as out, open(self.log / f"{i}.err", "w") as err:
                self.processes.append(
                    subprocess.Popen(command, cwd=ROOT, env=environ, stdout=out, stderr=err)
                )

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            process.kill()
            process.wait()

    def until_step(self, step: int, limit_s: float = PATIENCE_S) -> None:
        """Waits until process 0 has written the metrics of a step."""
        deadline = time.monotonic() + limit_s
        while not (found := losses(self.folder)) or found[-1][0] < step:
            ended = [p.returncode for p in self.processes if p.poll() is not None]
            assert not ended, f"ended before step {step}: {self.codes(0)}\n{self.said()}"
            assert time.monotonic() < deadline, f"no step {step}\n{self.said()}"
            time.sleep(0.05)

    def codes(self, limit_s: float, but: Sequence[int] = ()) -> list[int | None]:
        """The exit code of each process but some, which are waited for; None: it still runs."""
        deadline = time.monotonic() + limit_s
        waited = [p for i, p in enumerate(self.processes) if i not in but]
        while any(p.poll() is None for p in waited) and time.monotonic() < deadline:
            time.sleep(0.05)
        return [p.poll() for p in self.processes]

    def finished(self, limit_s: float = PATIENCE_S) -> Run:
        """Asserts that all processes end well."""
        codes = self.codes(limit_s)
        assert codes == [0] * len(codes), f"exit codes {codes}\n{self.said()}"
        return self

    def out(self, process: int) -> str:
        """What a process printed; without the lines of gloo, which several threads mix."""
        text = (self.log / f"{process}.out").read_text(errors="replace")
        return "\n".join(x for x in text.splitlines() if "connected to" not in x)

    def err(self, process: int) -> str:
        return (self.log / f"{process}.err").read_text(errors="replace")

    def rows(self, process: int) -> list[dict[str, Any]]:
        """Of each batch, what `tell_rows` says."""
        text = (self.log / f"{process}.rows").read_text()
        return [json.loads(line) for line in text.splitlines()]

    def said(self) -> str:
        numbers = range(len(self.processes))
        return "\n".join(f"process {i}:\n{self.out(i)}\n{self.err(i)}" for i in numbers)

    def listening(self) -> set[str]:
        """Addresses in hexadecimal on which the processes listen, from /proc."""
        found = set()
        for process in self.processes:
            inodes = set()
            for link in Path(f"/proc/{process.pid}/fd").iterdir():
                if match := re.fullmatch(r"socket:\[(\d+)\]", os.readlink(link)):
                    inodes.add(match[1])
            for table in ("tcp", "tcp6"):
                rows = Path(f"/proc/{process.pid}/net/{table}").read_text().splitlines()[1:]
                for _, local, _, state, *rest in map(str.split, rows):
                    if state == "0A" and rest[5] in inodes:
                        found.add(local.rpartition(":")[0])
        return found


def steps_saved(folder: Path) -> list[int]:
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit())


def losses(folder: Path) -> list[tuple[int, float]]:
    """(step, loss) of all steps that were logged whole."""
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    rows = [json.loads(line) for line in lines if line.endswith("}")]
    return [(row["step"], row["loss"]) for row in rows if "loss" in row]


def crash() -> None:
    """Raises in the third step."""
    import training.loop as loop

    batch_at = loop.batch_at

    def failing(text: object, seed: int, step: int, *sizes: int) -> object:
        if step == 2:
            raise RuntimeError("this host has bad memory")
        return batch_at(text, seed, step, *sizes)

    loop.batch_at = failing


def other_jax() -> None:
    """Has another version of JAX."""
    version = importlib.metadata.version
    importlib.metadata.version = lambda name: "0.0.1" if name == "jax" else version(name)


def other_plan() -> None:
    """Makes another plan of the same options."""
    import training.state as state

    decays = state._decays
    state._decays = lambda params: not decays(params)


def slow_steps() -> None:
    """Takes long for each step."""
    import training.loop as loop

    batch_at = loop.batch_at

    def slow(*arguments: object) -> object:
        time.sleep(0.2)
        return batch_at(*arguments)

    loop.batch_at = slow


def slow_validation() -> None:
    """Validates for minutes, and says when it begins."""
    import training.loop as loop

    batches = loop.validation_batches

    def slow(*arguments: object) -> object:
        print("validating", flush=True)
        for batch in batches(*arguments):
            time.sleep(0.2)
            yield batch

    loop.validation_batches = slow


def tell_rows() -> None:
    """Writes beside the log which rows of each batch it reads, their digests, and which rows its
    devices then have."""
    from training.program import Plan

    own = f"/proc/{os.getpid()}/fd/1"
    told = Path(os.readlink(own)).with_suffix(".rows")
    put = Plan.put

    def telling(plan: Plan, batch: Any) -> Any:
        counted = Counted(batch)
        placed = put(plan, counted)
        rows = {}
        for shard in placed.addressable_shards:
            first = shard.index[0].start or 0
            for row, values in enumerate(shard.data, first):
                rows[row] = hashlib.sha256(np.asarray(values).tobytes()).hexdigest()
        with told.open("a") as file:
            file.write(json.dumps({"read": counted.rows, "rows": rows}) + "\n")
        return placed

    class Counted:
        def __init__(self, batch: Any):
            self.batch, self.shape, self.rows = batch, batch.shape, 0

        def __getitem__(self, part: tuple[slice, slice]) -> Any:
            found = self.batch[part]
            self.rows += len(found)
            return found

    Plan.put = telling


FAULTS: dict[str, Callable[[], None]] = {
    fault.__name__: fault
    for fault in (crash, other_jax, other_plan, slow_steps, slow_validation, tell_rows)
}


def main(argv: list[str]) -> int:
    FAULTS[argv[0]]()
    import train

    return train.main(argv[1:])


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.exit(main(sys.argv[1:]))
