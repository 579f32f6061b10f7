"""Random programs on random meshes against the unsharded program.

Hypothesis draws a program as source text, so that a failure prints what to run, and is shrunk.
`python -m tests.e2e.random_run` runs as many as one likes.
"""

import random
import re
import warnings
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st

from sharding import shard
from sharding.errors import ShardingWarning
from tests.e2e import random_case
from tests.e2e.random_case import NAMES, Case, Writer, tame_lines, without_dead_lines
from tests.e2e.random_lines import KINDS
from tests.e2e.random_rounding import rounding
from tests.oracle import P, assert_close, check, draw_spec, make_mesh

MESHES = ({"x": 8}, {"x": 2, "y": 4}, {"x": 2, "y": 2, "z": 2}, {"x": 3}, {"x": 3, "y": 2})


def draw(rng: random.Random) -> Case:
    """A random program with its arguments, mesh and shardings."""
    mesh = rng.choice(MESHES)
    axes = tuple(mesh)
    w = Writer(rng, axes, kinds=KINDS)
    numbers = np.random.default_rng(rng.randrange(1 << 30))
    inputs: dict[str, Any] = {}
    for _ in range(rng.randint(1, 4)):
        shape = tuple(w.size() for _ in range(rng.choice((0, 1, 2, 2, 3))))
        (name,) = w.new()
        dtype = rng.choice((np.float32,) * 4 + (np.int32,))
        inputs[name] = numbers.integers(-3, 4, shape).astype(dtype)
        w.scope[name] = jax.ShapeDtypeStruct(shape, dtype)
        w.exact.add(name)
    for _ in range(rng.randint(5, 40)):
        w.step()
    lines = tame_lines(w.lines, inputs)
    made = [n for names, _ in lines for n in names] or list(inputs)
    outputs = tuple(dict.fromkeys(rng.choice(made[-6:] + made) for _ in range(rng.randint(1, 4))))

    def specs(names: Any) -> tuple[Any, ...]:
        return tuple(draw_spec(rng, axes, w.scope[n].shape) if rng.random() < 0.7 else None
                     for n in names)

    case = Case(inputs, lines, outputs, mesh,
                specs(inputs), specs(outputs), frozenset(w.exact), "", w.half)
    return without_dead_lines(case)


def outcome(case: Case) -> str:
    """The kind of failure; "" where there is none."""
    try:
        case.run()
    except AssertionError:
        return "wrong values"
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:50]}"
    return ""


def reduce_case(case: Case, failure: str) -> Case:
    """Fewer outputs, lines, inputs and specs, as long as the same failure remains."""

    def fails(new: Case) -> bool:
        return outcome(new)[:18] == failure[:18]

    for i, name in enumerate(case.outputs):
        new = without_dead_lines(replace(case, outputs=(name,), out_specs=(case.out_specs[i],)))
        if fails(new):
            case = new
            break
    changed = True
    while changed:
        changed = False
        for new in smaller(case):
            if fails(new):
                case, changed = new, True
                break
    return case


def smaller(case: Case) -> Iterator[Case]:
    scope = {**NAMES, **{n: jnp.asarray(v) for n, v in case.inputs.items()}}
    values = {}
    for names, text in case.lines:
        exec(text, scope)
        values.update({n: np.asarray(scope[n]) for n in names})
    for at in reversed(range(len(case.lines))):
        names = case.lines[at][0]
        if set(names) & set(case.outputs):
            continue
        inputs = {**case.inputs, **{n: values[n] for n in names}}
        lines = case.lines[:at] + case.lines[at + 1 :]
        yield without_dead_lines(
            replace(case, inputs=inputs, lines=lines,
                    in_specs=case.in_specs + (None,) * len(names)))
    used = set(case.outputs) | {n for _, text in case.lines for n in re.findall(r"\bv\d+\b", text)}
    for i, name in enumerate(case.inputs):
        if name not in used and len(case.inputs) > 1:
            yield replace(case, inputs={n: v for n, v in case.inputs.items() if n != name},
                          in_specs=case.in_specs[:i] + case.in_specs[i + 1 :])
    for i, spec in enumerate(case.in_specs):
        if spec is not None:
            yield replace(case, in_specs=(*case.in_specs[:i], None, *case.in_specs[i + 1 :]))
    if any(s is not None for s in case.out_specs):
        yield replace(case, out_specs=(None,) * len(case.out_specs))


@settings(
    max_examples=24, deadline=None, derandomize=True, database=None,
    suppress_health_check=list(HealthCheck),
)  # fmt: skip
@given(st.randoms(use_true_random=False))
def test_random_programs(rng: random.Random) -> None:
    case = draw(rng)
    note(str(case))
    case.run()


@pytest.mark.parametrize("number", [1, 8, 14])
def test_programs_with_dims_of_size_zero(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(random_case, "SIZES", (0, 0, *random_case.SIZES))
    case = draw(random.Random(number))
    assert any(0 in np.shape(v) for v in case.inputs.values())
    case.run()


def ill_conditioned(x: Any) -> list[Any]:
    """1 - tanh(var)**2 to the power of the columns; what is well-conditioned; what is exact."""
    slope = jax.grad(lambda x: jnp.tanh(jnp.var(x)))(x)
    return [jnp.prod(jnp.tanh(slope * 1e5), axis=1), jnp.sin(x), jnp.sum(x * 8), x > 2]


def test_rounding_is_measured_where_a_program_amplifies_it() -> None:
    x = np.arange(64, dtype=np.float32).reshape(8, 8) / 8
    moves = rounding(ill_conditioned, (x,))
    assert 5e-3 < moves[0] < 0.5 and 0 < moves[1] < 1e-5 and moves[2:] == [0, 0]


def test_rounding_of_loops_and_ties() -> None:
    def f(x):
        y = jnp.sin(x)
        tied = jax.grad(lambda y: jnp.sum(jnp.minimum(y, y) * y + jnp.max(y)))(y)
        looped, _ = jax.lax.scan(lambda c, row: (jnp.tanh(c + row), None), y[0], y)
        last = jax.lax.while_loop(lambda s: s[0] < 3, lambda s: (s[0] + 1, jnp.cos(s[1])), (0, y))
        return [tied, looped, jax.lax.cond(x[0, 0] > 0, jnp.sin, jnp.cos, last[1])]

    x = np.linspace(-2, 2, 24, dtype=np.float32).reshape(4, 6)
    x[1] = x[0]
    moves = rounding(f, (x,))
    assert all(0 < move < 1e-5 for move in moves), moves


def test_wrong_values_are_not_taken_for_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    """A factor of 1.5 in the result that rounding moves most, a thousandth in the other one."""
    lines = ("v1 = jax.grad(lambda x: jnp.tanh(jnp.var(x)))(v0)",
             "v2 = jnp.prod(jnp.tanh(v1 * 1e4), axis=1)", "v3 = jnp.sin(v0)")
    made = tuple(((line[:2],), line) for line in lines)
    x = np.arange(8, dtype=np.float32)[:, None].repeat(7, 1)
    mesh, specs = {"x": 2, "y": 4}, (P("x", "y"),)
    case = Case({"v0": x}, made, ("v2", "v3"), mesh, specs, (None, None))

    def scaled(output: int, factor: float, measured: bool = True) -> str:
        """The outcome when one result comes out larger by a factor."""

        def close(got: Any, want: Any, allowed: float, what: str) -> None:
            by = factor if what.startswith(f"result[{output}]") else 1.0
            assert_close(got * by, want, allowed, what)

        with monkeypatch.context() as patch:
            patch.setattr("tests.oracle.assert_close", close)
            if not measured:
                patch.setattr(random_case, "rounding", lambda fun, args: [0.0, 0.0])
            return outcome(case)

    assert outcome(case) == ""
    # A thousandth is less than rounding moves the first result, and wrong for who does not know.
    assert (scaled(0, 1.001), scaled(0, 1.001, measured=False)) == ("", "wrong values")
    assert (scaled(0, 1.5), scaled(1, 1.001)) == ("wrong values", "wrong values")


# Failures that random programs have found, reduced.

XYZ = {"x": 2, "y": 2, "z": 2}


@pytest.mark.parametrize("given, wanted", [
    (P("x", "z", "y"), P("z", "y", None)),
    (P(None, ("z", "x"), None), P(None, ("z", "y"), None)),
])  # fmt: skip
def test_permutation_along_axes_that_are_not_in_mesh_order(given: P, wanted: P) -> None:
    x = np.arange(4 * 8 * 5, dtype=np.float32).reshape(4, 8, 5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ShardingWarning)
        check(lambda x: shard(x, given), (x,), make_mesh(**XYZ), None, wanted)


def test_single_update_outside_of_a_shard_that_was_sliced_off() -> None:
    """XLA merges the slice of the shard with that of the scatter, and forgets to clamp."""

    def f(x, i):
        return x.at[i].set(9.0, mode="drop").astype(jnp.bfloat16)

    x = np.arange(8, dtype=np.float32)
    for i in range(8):
        check(f, (x, np.array([i])), make_mesh(y=2), (P(), P()), P("y"), 0.0)
