"""Runs of train.py in processes of their own, to which something is done."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from training.checkpoint import manifest
from training.checkpoint.store import steps_in

ROOT = Path(__file__).parents[2]
LIMIT_S = 300.0
SHORT = "--steps 8 --checkpoint-every 2"
LONG = "--steps 100000 --checkpoint-every 5"
SMALL = (
    "--num-layers 1 --embed-dim 32 --mlp-dim 64 --head-dim 8 --sequence 32 --batch 8"
    " --eval-batches 1 --log-every 1 --sample-bytes 0 --dropout 0.1 --eval-every 1000"
).split()


class Skip(Exception):
    """A case that this machine does not permit."""


class Run:
    """One process of train.py, and what it prints.

    Args:
      options: of train.py, beside those of a small model.
      fault: a name in `tests.faults.faulty`: what is changed in the process before it runs.
      system: variables of `system.c`, which changes what the system does for the process.

    Attributes:
      folder: of its checkpoints.
      process: as `subprocess` has it.
    """

    def __init__(
        self, scratch: Path, name: str, options: str, fault: str = "",
        system: Mapping[str, str] | None = None,
    ):  # fmt: skip
        self.folder = scratch / name
        self._log = scratch / f"{name.replace('/', '-')}.log"  # not on the disk that is filled
        self._before = self._log.stat().st_size if self._log.exists() else 0
        program = ["-m", "tests.faults.faulty", fault] if fault else [str(ROOT / "train.py")]
        command = [sys.executable, *program, *SMALL, "--data", str(text(scratch))]
        command += ["--checkpoint-dir", str(self.folder), *options.split()]
        kept = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "SPMD_VERIFY")}
        environ = kept | {
            "JAX_PLATFORMS": "cpu",
            "PYTHONUNBUFFERED": "1",
            # All runs compile the same few programs.
            "JAX_COMPILATION_CACHE_DIR": str(scratch / "compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        }
        if system:
            environ |= {"LD_PRELOAD": str(preload(scratch)), **system}
        with self._log.open("ab") as log:
            self.process = subprocess.Popen(
                command, cwd=ROOT, env=environ, stdout=log, stderr=log
            )

    @property
    def output(self) -> str:
        """What this process has printed."""
        return self._log.read_bytes()[self._before :].decode(errors="replace")

    def until(self, condition: Callable[[], bool], what: str) -> Run:
        """Waits for a condition while the process runs.

        Raises:
          AssertionError: the process ended before, or it took too long.
        """
        limit = time.monotonic() + LIMIT_S
        while not condition():
            ended = self.process.poll() is not None
            if ended or time.monotonic() > limit:
                self.kill()
                how = f"code {self.process.returncode}" if ended else f"{LIMIT_S:.0f} s"
                raise AssertionError(f"{what} has not come after {how}:\n{self.output[-3000:]}")
            time.sleep(0.02)
        return self

    def said(self, text: str) -> Run:
        """Waits until it has printed `text`."""
        return self.until(lambda: text in self.output, repr(text))

    def reached(self, step: int) -> Run:
        """Waits until it has recorded `step`."""

        def recorded() -> bool:
            return max(losses(self.folder, "last"), default=0) >= step

        return self.until(recorded, f"step {step}")

    def signal(self, number: int) -> Run:
        self.process.send_signal(number)
        return self

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def end(self, code: int = 0) -> Run:
        """Waits for its end.

        Raises:
          AssertionError: it took too long, or ended with another code.
        """
        try:
            self.process.wait(LIMIT_S)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"it has not ended:\n{self.output[-3000:]}") from None
        found = self.process.returncode
        assert found == code, f"exit code {found}, not {code}:\n{self.output[-3000:]}"
        return self


def text(scratch: Path) -> Path:
    """A folder with a little text to train on."""
    folder = scratch / "text"
    if not folder.exists():
        folder.mkdir()
        generator = np.random.default_rng(0)
        for i in range(3):
            drawn = generator.choice(np.frombuffer(b"def f(x):\n", np.uint8), 4000)
            (folder / f"{i}.py").write_bytes(bytes(drawn))
    return folder


def preload(scratch: Path) -> Path:
    """The library of `system.c`.

    Raises:
      Skip: there is no C compiler.
    """
    built, source = scratch / "system.so", Path(__file__).with_name("system.c")
    if not built.exists() or built.stat().st_mtime < source.stat().st_mtime:
        compiler = shutil.which("cc")
        if compiler is None:
            raise Skip("there is no C compiler")
        command = [compiler, "-shared", "-fPIC", "-O1", "-o", str(built), str(source), "-ldl"]
        subprocess.run(command, check=True)
    return built


def losses(folder: Path, again: str = "equal") -> dict[int, float]:
    """Loss by step, as recorded.

    Args:
      again: of steps that were run again, whether the losses must be "equal", or the "last" one
        counts: on another mesh digits differ.

    Raises:
      AssertionError: a step that was run again had another loss.
    """
    path = folder / "metrics.jsonl"
    found: dict[int, float] = {}
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            entry = json.loads(line)
        except ValueError:
            continue  # its writer was killed
        if isinstance(entry, dict) and "loss" in entry and "step" in entry:
            step, loss = entry["step"], entry["loss"]
            before = found.get(step, loss)
            assert again == "last" or before == loss, f"step {step}: {before} and {loss}"
            found[step] = loss
    return found


def arrays(step: Path) -> dict[str, np.ndarray]:
    """All arrays of a step, on one device, by name."""
    import jax
    import orbax.checkpoint as ocp

    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        tree = checkpointer.metadata(step.absolute() / "state").item_metadata.tree
        numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
        state = checkpointer.restore(
            step.absolute() / "state", args=ocp.args.PyTreeRestore(restore_args=numpy)
        )
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


def broken(folder: Path) -> list[str]:
    """Listed steps that are not as they were written."""
    wrong = []
    for step in steps_in(folder):
        try:
            manifest.verify(folder / str(step), manifest.read(folder / str(step)))
        except manifest.BadStep as error:
            wrong.append(f"step {step} is listed and broken: {error}")
    return wrong


def goes_on(scratch: Path, name: str, options: str = SHORT) -> list[str]:
    """Whether the next run goes on from the newest step, and ends."""
    folder = scratch / name
    newest = steps_in(folder)[-1]
    run = Run(scratch, name, f"{options} --steps {newest + 2} --resume must").end()
    return [] if f"from step {newest};" in run.output else [f"it did not go on from {newest}"]


def fresh(path: Path) -> Path:
    """A folder of that name with nothing in it, and no log beside it."""
    shutil.rmtree(path, ignore_errors=True)
    path.with_name(f"{path.name}.log").unlink(missing_ok=True)
    return path
