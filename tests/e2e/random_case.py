"""A random program as text: how it is written line by line, and how it runs against the oracle.

Values that were only ever added, multiplied and moved about as small integers are *exact*: no order
of summation changes them, and only they are compared, sorted, rounded or used as indices.
"""

import math
import random
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec as P

from sharding import shard
from sharding.errors import ShardingWarning
from tests.e2e.plan_waste import waste
from tests.e2e.random_rounding import rounding
from tests.oracle import check, draw_spec, make_mesh

SIZES = (1, 2, 3, 4, 5, 6, 7, 8, 12, 16)
MAX_ELEMENTS = 4096
NAMES = {"jax": jax, "jnp": jnp, "lax": lax, "np": np, "shard": shard, "P": P}


class Skip(Exception):
    """The drawn line cannot be written for these values."""


@dataclass(frozen=True)
class Case:
    """A program, its arguments, and how it is partitioned.

    Attributes:
      inputs: name -> value.
      lines: (names that it assigns, source text).
      outputs: names.
      wrap: "" or a template around `f`, such as `jax.checkpoint(f)`.
    """

    inputs: dict[str, Any]
    lines: tuple[tuple[tuple[str, ...], str], ...]
    outputs: tuple[str, ...]
    mesh: dict[str, int]
    in_specs: tuple[Any, ...]
    out_specs: tuple[Any, ...]
    exact: frozenset[str] = frozenset()
    wrap: str = ""
    half: bool = False

    @property
    def source(self) -> str:
        body = "".join("    " + text.replace("\n", "\n    ") + "\n" for _, text in self.lines)
        returned = "[" + ", ".join(self.outputs) + "]"
        text = f"def f({', '.join(self.inputs)}):\n{body}    return {returned}\n"
        return text + (f"f = {self.wrap}\n" if self.wrap else "")

    def __str__(self) -> str:
        args = [f"{n} = {np.asarray(v).dtype}{list(np.shape(v))}" for n, v in self.inputs.items()]
        return (f"mesh {self.mesh} in {self.in_specs} out {self.out_specs}\n"
                f"{'; '.join(args)}\n{self.source}")

    def run(self) -> None:
        scope = dict(NAMES)
        exec(self.source, scope)
        exact = set(self.outputs) <= self.exact and not self.wrap
        tolerance = 0.0 if exact else 6e-2 if self.half else 2e-4
        args = tuple(self.inputs.values())
        try:
            partitioned = self.check(scope["f"], args, tolerance)
        except AssertionError:
            if exact:
                raise
            allowed = [tolerance + r for r in rounding(scope["f"], args)]
            partitioned = self.check(scope["f"], args, allowed)
        assert not waste(partitioned.plan), "\n".join(waste(partitioned.plan))

    def check(self, fun: Any, args: tuple[Any, ...], tolerance: Any) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ShardingWarning)
            return check(fun, args, make_mesh(**self.mesh), self.in_specs,
                         list(self.out_specs) if not self.wrap else None, tolerance)


@dataclass
class Writer:
    """A program under construction: `scope` holds every value by name."""

    rng: random.Random
    axes: tuple[str, ...]
    scope: dict[str, Any] = field(default_factory=dict)
    exact: set[str] = field(default_factory=set)
    lines: list[tuple[tuple[str, ...], str]] = field(default_factory=list)
    half: bool = False
    count: int = 0
    kinds: tuple[Callable[["Writer"], None], ...] = ()

    def size(self) -> int:
        return self.rng.choice(SIZES)

    def pick(self, want: Any = None) -> str:
        found = [n for n, v in self.scope.items() if want is None or want(v)]
        if not found:
            raise Skip
        return self.rng.choice(found[-8:] + found)

    def array(self, rank: int = 1) -> str:
        return self.pick(lambda v: v.ndim >= rank)

    def real(self, rank: int = 0) -> str:
        return self.pick(lambda v: v.ndim >= rank and v.dtype == jnp.float32)

    def number(self, rank: int = 0) -> str:
        return self.pick(lambda v: v.ndim >= rank and v.dtype != jnp.bool_)

    def settled(self, rank: int = 0) -> str:
        found = [n for n in self.exact if self.scope[n].ndim >= rank]
        found = [n for n in found if self.scope[n].dtype != jnp.bool_]
        if not found:
            raise Skip
        return self.rng.choice(sorted(found))

    def axis(self, name: str) -> int:
        return self.rng.randrange(self.scope[name].ndim)

    def like(self, name: str) -> str:
        """A value that broadcasts with this one; made from it when there is none."""
        v = self.scope[name]
        found = [n for n, w in self.scope.items()
                 if w.dtype == v.dtype and fits(w.shape, v.shape)]
        return self.rng.choice(found)

    def spec(self, name: str) -> str:
        spec = draw_spec(self.rng, self.axes, self.scope[name].shape)
        return "P(" + ", ".join(map(repr, spec)) + ")"

    def new(self, count: int = 1) -> tuple[str, ...]:
        self.count += count
        return tuple(f"v{i}" for i in range(self.count - count, self.count))

    def add(self, text: str, exact: bool, count: int = 1, before: str = "") -> None:
        """Appends one line."""
        names = self.new(count)
        line = f"{before}{', '.join(names)} = {text}"
        read = {n: self.scope[n] for n in re.findall(r"\w+", line) if n in self.scope}
        try:
            values = jax.eval_shape(lambda scope: execute(line, scope, names), read)
        except NotImplementedError:  # JAX's own limits
            raise Skip from None
        except ValueError as error:  # a loop of unknown length has no gradient
            if "Reverse-mode" in str(error):
                raise Skip from None
            raise
        if any(math.prod(v.shape) > MAX_ELEMENTS for v in values):
            raise Skip
        self.lines.append((names, line))
        for n, v in zip(names, values, strict=True):
            self.scope[n] = v
            self.half |= v.dtype == jnp.bfloat16
            if v.dtype not in (jnp.float32, jnp.bfloat16) or exact:
                self.exact.add(n)

    def step(self) -> None:
        kind = self.rng.choice(self.kinds)
        try:
            kind(self)
        except Skip:
            pass
        except (ArithmeticError, IndexError, TypeError, ValueError):
            if not any(0 in v.shape for v in self.scope.values()):
                raise  # else it is one of the many lines that no dim of size 0 allows


def execute(source: str, scope: dict[str, Any], names: Any) -> list[Any]:
    scope = {**NAMES, **scope}
    exec(source, scope)
    return [scope[n] for n in names]


def function(name: str, params: str, lines: list[str], result: str) -> str:
    body = "".join("    " + line.replace("\n", "\n    ") + "\n" for line in lines)
    return f"def {name}({params}):\n{body}    return {result}\n"


def first_of(v: Any) -> Any:
    """What a loop over the leading dim sees."""
    return jax.ShapeDtypeStruct(v.shape[1:], v.dtype)


def fits(small: tuple[int, ...], large: tuple[int, ...]) -> bool:
    try:
        return np.broadcast_shapes(small, large) == large
    except ValueError:
        return False


def tame_lines(lines: Any, inputs: dict[str, Any]) -> tuple[Any, ...]:
    """Without the lines whose values grow or are not finite, and those that read them."""
    source = "\n".join(text for _, text in lines)
    every = [n for names, _ in lines for n in names]
    values = jax.jit(lambda scope: execute(source, scope, every))(inputs)
    wild = {n for n, v in zip(every, values, strict=True)
            if not np.abs(np.asarray(v, np.float64)).max(initial=0) < 3e4}
    kept = []
    for names, text in lines:
        if wild & {*names, *re.findall(r"\bv\d+\b", text)}:
            wild |= set(names)
        else:
            kept.append((names, text))
    return tuple(kept)


def without_dead_lines(case: Case) -> Case:
    needed, kept = set(case.outputs), []
    for names, text in reversed(case.lines):
        if needed & set(names):
            kept.append((names, text))
            needed |= set(re.findall(r"\bv\d+\b", text))
    return replace(case, lines=tuple(reversed(kept)))
