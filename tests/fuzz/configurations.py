"""Random command lines and TOML files for train.py."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any
from unittest import mock

import train
from spmd.mesh_text import read_across
from spmd.runtime.hybrid import make_mesh
from tests.fuzz import watch
from training import hosts
from training.config import RunConfig, owners
from training.program import plan
from training.state import make_optimizer

_FEW_LAYERS = 4
_PLAN_S = 60
_DEFAULTS = RunConfig()
_KEYS = list(owners(_DEFAULTS))
_INTEGERS = (0, 1, 2, 3, 4, 7, 8, 16, 64, 255, 4096, -1, -8, 2**31 - 1, 2**31, 2**32, 2**63, 10**30)
_FLOATS = (0.0, 0.1, 0.5, 1.0, 1.5, -1.0, 1e-30, 1e30, 1e308, float("inf"), float("nan"))
_TEXTS = (
    "", " ", "a", "../x", "/tmp/none", ".", "..", "$(id)", "a\0b", "a\nb", "x" * 300, "é", "\u202e",
    "\x1b[31m", "%s", "{}", "[red]", "--batch", "-", "=", "1e-3", "true", "no", "0x10", "1_000",
    "\udcff", "auto", "text", "tokens.bin", "empty", "none", "tokenizer.json", "*", "**", "[",
    "*.bin", "/*", "../*",
)  # fmt: skip
_USUAL = {int: (1, 2, 4, 8, 16, 64), float: (0.05, 0.1, 0.5), str: ("text", "empty", "a")}
_AXES = ("data", "fsdp", "tensor", "sequence", "expert", "stage", "tensro", "", "a b", "fsdp@dcn")
_TABLES = ("data", "fsdp", "tensor", "tensor_sequence", "2d", "tesnor", "")
_TOPOLOGIES = ("v5p:2x2x2", "v5e:2x4", "h100:8", "v9:1", "v5e:0x4", "v5e", "cpu:8", ":")
_BROKEN = ("[", "]", "=", '"', "'", "{", "\n[[a]]\n", "\0", "\xff", "a.b.c = 1\n", "[t]\n", "#")


def prepare(folder: Path) -> None:
    """The files that some of the configurations name; the folder above `folder` is data, too."""
    (folder / "text").mkdir(parents=True)
    (folder / "text" / "a.py").write_text("def f(x):\n    return x\n" * 100)
    (folder / "empty").mkdir()
    (folder / "tokens.bin").write_bytes(bytes(range(256)) * 40)
    (folder / "tokens.json").write_text('{"dtype": "uint16"}')
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')


def run(seed: int, folder: Path) -> tuple[str, ...]:
    """Configures train.py with the case `seed`, in the folder of `prepare`, reads its data, and
    makes its optimiser; then plans its step. Some one in seventy gets there.

    Returns:
      The command line.
    """
    argv = generate(seed, folder)
    alone = {"simulate": lambda *devices: True, "start": lambda *cluster: None}
    with mock.patch.multiple(hosts, **alone):
        run, sizes = train.configure(argv)
        if not run.mesh.aot:
            train.load_corpus(run.data)
        make_optimizer(run.optimizer, run.train.steps)
        # Layers one by one are as many programs, whose plan may take any time.
        alike = run.model.scan_layers or run.model.num_layers <= _FEW_LAYERS
        if alike and not run.mesh.aot:
            with watch.limited(_PLAN_S):
                plan(run, make_mesh(sizes, read_across(run.mesh.mesh, sizes)))
    return tuple(argv)


def generate(seed: int, folder: Path) -> list[str]:
    """A command line; the files that it names are written to `folder`."""
    rng = random.Random(seed)
    noise = rng.choice((0.0, 0.05, 0.5))
    argv: list[str] = []
    count = rng.choice((0, 1, 1, 2, 3, 6))
    for key in rng.sample(_KEYS, count):
        flag = "--" + key.replace("_", "-")
        text = _text(_value(rng, key, noise))
        argv += [f"{flag}={text}"] if rng.random() < 0.5 or text.startswith("-") else [flag, text]
    if rng.random() < noise / 4:
        argv.insert(rng.randint(0, len(argv)), rng.choice(("--", "-x", "--no", "word", "--help=1")))
    if rng.random() < noise / 4:
        argv.append(rng.choice(("--steps", "--no-remat", "--scan-layers", "--config")))
    if rng.random() < 0.6:
        path = folder / "run.toml"
        path.write_bytes(_toml(rng, noise))
        argv += ["--config", str(path)]
    if not any(word.startswith("--data") for word in argv):
        argv += ["--data", rng.choice(("text", "text", "text", "tokens.bin"))]
    return argv


def _value(rng: random.Random, key: str, noise: float) -> Any:
    component, field = owners(_DEFAULTS)[key]
    default = getattr(getattr(_DEFAULTS, component), key)
    if rng.random() < noise:
        return rng.choice((*_INTEGERS, *_FLOATS, *_TEXTS, True, False))
    if rng.random() < 0.3:
        return default
    if rng.random() > 2 * noise and type(default) in _USUAL and not field.metadata["choices"]:
        return rng.choice((default, *_USUAL[type(default)]))
    if key == "mesh":
        axes = [rng.choice(_AXES) for _ in range(rng.randint(1, 3))]
        return ",".join(f"{axis}={rng.choice((-1, 0, 1, 2, 4, 8, 3, 10**9))}" for axis in axes)
    if key == "parallelism":
        return "+".join(rng.choice(_TABLES) for _ in range(rng.randint(1, 3)))
    if key == "aot":
        return rng.choice(_TOPOLOGIES)
    if field.metadata["choices"]:
        return rng.choice((*field.metadata["choices"], "x"))
    if isinstance(default, bool):
        return rng.choice((True, False, "maybe", 1))
    if isinstance(default, int):
        return rng.choice(_INTEGERS)
    return rng.choice(_FLOATS if isinstance(default, float) else _TEXTS)


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _toml(rng: random.Random, noise: float) -> bytes:
    lines = []
    for owner in rng.sample(_KEYS, rng.randint(0, 5)):
        key, value = owner, _value(rng, owner, noise)
        if rng.random() < noise / 4:
            key = rng.choice((key[:-1], key.upper(), key.replace("_", "-"), f'"{key}"', ""))
        if rng.random() < noise / 4:
            value = rng.choice(([], [1, [2]], {"a": 1}))
        lines.append(f"{key} = {_toml_value(value)}")
    written = "\n".join(lines).encode(errors="surrogatepass")
    if rng.random() < noise / 2:
        at = rng.randint(0, len(written))
        written = written[:at] + rng.choice(_BROKEN).encode("latin-1") + written[at:]
    if rng.random() < 0.02:
        depth = rng.choice((10, 500, 5000))
        written += rng.choice((b"\na=" + b"[" * depth, b"\n" + b"a." * depth + b"a=1"))
    return written


def _toml_value(value: Any) -> str:
    if isinstance(value, dict):
        return "{a = 1}"
    if isinstance(value, float):
        return str(value)  # inf and nan are TOML's words, too
    return json.dumps(value)
