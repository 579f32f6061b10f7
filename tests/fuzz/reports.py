"""Mutated JSON files of reports, through everything that `python -m spmd plan diff` does."""

from __future__ import annotations

import copy
import functools
import json
import random
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

import spmd
from sharding import P
from spmd.cli.main import parser
from spmd.reporting.model import Report

_VALUES = (
    None, True, False, 0, -1, 1, 7, 2**31, 2**63, 10**30, 10**300, -0.5, 1e308, float("nan"),
    float("inf"), "", "a", "[data, -]", "[", "\ud800", "\x1b[2J", "</script><img onerror=x>",
    "é" * 500, [], [[]], [1, "a"], {}, {"a": {}}, {"columns": [], "rows": []},
)  # fmt: skip


@functools.cache
def written() -> str:
    """The JSON of a report with everything in it."""

    def step(w: dict, x: Any) -> Any:
        def layer(h: Any, w: Any) -> Any:
            return jnp.tanh(h @ w), None

        h, _ = jax.lax.scan(layer, x, w["layers"])
        return jnp.mean(h**2)

    mesh = {"data": 2, "tensor": 4}
    specs = ({"layers": P(None, "data", "tensor")}, P("data"))
    f = spmd.jit(jax.value_and_grad(step), mesh=mesh, in_shardings=specs)
    w = {"layers": jax.ShapeDtypeStruct((3, 64, 64), jnp.float32)}
    x = jax.ShapeDtypeStruct((16, 64), jnp.float32)
    return spmd.report(f, w, x, machine="v5e:2x4").to_json()


def run(seed: int, folder: Path) -> None:
    """Reads the mutation `seed`; what is read is printed, drawn and compared."""
    mutated = mutate(seed)
    path = folder / "mutated.json"
    path.write_bytes(mutated.encode(errors="surrogatepass"))
    found = Report.from_json(mutated)
    str(found), repr(found), found._repr_html_(), found.to_html(), found.to_json()
    (folder / "whole.json").write_text(written())
    for pair in (("mutated", "whole"), ("whole", "mutated")):
        files = [str(folder / f"{name}.json") for name in pair]
        given = parser().parse_args(["plan", "diff", *files, "--html", str(folder / "d.html")])
        given.run(given)


def mutate(seed: int) -> str:
    """A report's JSON with a few changes, of its values or of its text."""
    rng = random.Random(seed)
    text = written()
    if rng.random() < 0.15:
        return _mutate_text(rng, text)
    data = json.loads(text)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        _mutate_value(rng, data)
    return json.dumps(data)


def _mutate_text(rng: random.Random, text: str) -> str:
    at, length = rng.randrange(len(text)), rng.choice((1, 1, 5, 100, 10_000))
    kind = rng.randrange(5)
    if kind == 0:
        return text[:at]
    if kind == 1:
        return text[:at] + text[at + length :]
    if kind == 2:
        return text[:at] + rng.choice('{}[],:"0-e\\\0\n') + text[at:]
    if kind == 3:
        return "[" * length + text
    return text[:at] + text[max(0, at - length) :]


def _mutate_value(rng: random.Random, data: Any) -> None:
    """Changes one value, at a place that a walk of random steps comes to."""
    here = data
    while True:
        keys = list(here) if isinstance(here, dict) else list(range(len(here)))
        if not keys:
            return
        key = rng.choice(keys)
        below = here[key]
        if isinstance(below, dict | list) and below and rng.random() < 0.85:
            here = below
            continue
        kind = rng.randrange(6)
        if kind == 0:
            del here[key]
        elif kind == 1 and isinstance(here, dict):
            here[str(rng.choice(_VALUES[:18])).replace("\ud800", "x")] = here.pop(key)
        elif kind == 1:
            here.append(copy.deepcopy(rng.choice(here)))
        elif kind == 2 and isinstance(below, int | float) and not isinstance(below, bool):
            here[key] = rng.choice((-below, below + 1, below - 1, below * 10**9, float(below)))
        else:
            here[key] = copy.deepcopy(rng.choice(_VALUES))
        return
