"""Runs `program.py` in one process of 8 devices, and in several that share 8."""

import json
import os
import pathlib
import socket
import subprocess
import sys
import tempfile
import time
from typing import Any

ROOT = pathlib.Path(__file__).parents[2]
POLL_S = 0.1


def run(cases: list[str], processes: int, limit_s: float) -> list[dict[str, Any]]:
    """What each process says of each case.

    Args:
      limit_s: all processes are killed after this many seconds.

    Raises:
      AssertionError: a process failed or took too long, with what each wrote.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        coordinator = f"127.0.0.1:{free.getsockname()[1]}"
    environ = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "NPROC")}
    environ |= {"JAX_PLATFORMS": "cpu", "SPMD_VERIFY": "1"}
    outputs: list[Any] = []
    started: list[subprocess.Popen] = []
    try:
        for i in range(processes):
            # Files, as a pipe that nobody reads would block its writer.
            outputs.append((tempfile.TemporaryFile("w+"), tempfile.TemporaryFile("w+")))
            command = [sys.executable, "-u", "-m", "tests.multihost.program", ",".join(cases)]
            started.append(
                subprocess.Popen(
                    [*command, coordinator, str(processes), str(i)], cwd=ROOT, env=environ,
                    stdout=outputs[-1][0], stderr=outputs[-1][1],
                )  # fmt: skip
            )
        deadline = time.monotonic() + limit_s
        while any(p.poll() is None for p in started) and time.monotonic() < deadline:
            if any(p.poll() for p in started):  # the others would wait for it
                break
            time.sleep(POLL_S)
        codes = [p.poll() for p in started]
    finally:
        for p in started:
            p.kill()
            p.wait()
    texts = [[_read(f) for f in files] for files in outputs]
    wrote = "\n".join(f"process {i}:\n{out}{err}" for i, (out, err) in enumerate(texts))
    assert codes == [0] * processes, f"exit codes {codes} (None: killed after {limit_s} s)\n{wrote}"
    return [_results(out) for out, _ in texts]


def _results(text: str) -> dict[str, Any]:
    """The lines of JSON; gloo writes others between them."""
    found: dict[str, Any] = {}
    for line in text.splitlines():
        if line.startswith("{"):
            found |= json.loads(line)
    return found


def _read(file: Any) -> str:
    with file:
        file.seek(0)
        return file.read()
