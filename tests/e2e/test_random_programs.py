"""Random programs on random meshes against the unsharded program.

A seed makes a program as source text, so that a failure prints what to run, and can be reduced line
by line. `RANDOM_PROGRAMS=first:last pytest -m slow tests/e2e/test_random_programs.py` runs others;
`python -m tests.e2e.test_random_programs first last` runs, reduces and prints every failure.

Values that were only ever added, multiplied and moved about as small integers are *exact*: no order
of summation changes them, and only they are compared, sorted, rounded or used as indices.
"""

import math
import os
import random
import re
import sys
import warnings
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

if __name__ == "__main__":
    os.environ.setdefault("SPMD_VERIFY", "1")
    from spmd.simulate import simulate

    simulate(8)

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec as P

from sharding import shard
from sharding.errors import ShardingWarning
from tests.oracle import assert_close, check, draw_spec, make_mesh

SIZES = (1, 2, 3, 4, 5, 6, 7, 8, 12, 16)
MESHES = ({"x": 8}, {"x": 2, "y": 4}, {"x": 2, "y": 2, "z": 2}, {"x": 3}, {"x": 3, "y": 2})
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
        exec(self.source, scope)  # noqa: S102
        exact = set(self.outputs) <= self.exact and not self.wrap
        tolerance = 0.0 if exact else 6e-2 if self.half else 2e-4
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ShardingWarning)
            check(scope["f"], tuple(self.inputs.values()), make_mesh(**self.mesh), self.in_specs,
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
        return "P(" + ", ".join(map(repr, draw_spec(self.rng, self.axes, self.scope[name].shape))) + ")"

    def new(self, count: int = 1) -> tuple[str, ...]:
        self.count += count
        return tuple(f"v{i}" for i in range(self.count - count, self.count))

    def add(self, text: str, exact: bool, count: int = 1, before: str = "") -> None:
        """Appends one line."""
        names = self.new(count)
        line = f"{before}{', '.join(names)} = {text}"
        try:
            values = jax.eval_shape(lambda scope: execute(line, scope, names), self.scope)
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
        kind = self.rng.choice(KINDS)
        try:
            kind(self)
        except Skip:
            pass


def execute(source: str, scope: dict[str, Any], names: Any) -> list[Any]:
    scope = {**NAMES, **scope}
    exec(source, scope)  # noqa: S102
    return [scope[n] for n in names]


def first_of(v: Any) -> Any:
    """What a loop over the leading dim sees."""
    return jax.ShapeDtypeStruct(v.shape[1:], v.dtype)


def fits(small: tuple[int, ...], large: tuple[int, ...]) -> bool:
    try:
        return np.broadcast_shapes(small, large) == large
    except ValueError:
        return False


def unary(w: Writer) -> None:
    if w.rng.random() < 0.5:
        a = w.number()
        op = w.rng.choice(("-{}", "jnp.abs({})", "jnp.sign({})", "jnp.clip({}, -2, 3)",
                           "jnp.maximum({}, 1)", "{} * 2", "{} + 1", "jnp.square(jnp.clip({}, -9, 9))"))
        w.add(op.format(a), a in w.exact)
    else:
        op = w.rng.choice(("jnp.tanh", "jax.nn.sigmoid", "jnp.sin", "jnp.arctan", "jax.nn.gelu",
                           "jax.nn.silu", "jnp.cos", "jnp.exp2", "jax.nn.softplus"))
        w.add(f"{op}(jnp.clip({w.real()}, -8, 8))", False)


def binary(w: Writer) -> None:
    a = w.number()
    b = w.like(a)
    op = w.rng.choice(("{} + {}", "{} - {}", "{} * {}", "jnp.maximum({}, {})", "jnp.minimum({}, {})"))
    if w.rng.random() < 0.5:
        a, b = b, a
    w.add(op.format(a, b), a in w.exact and b in w.exact)


def divide(w: Writer) -> None:
    a = w.real()
    w.add(f"{a} / (jnp.abs({w.like(a)}) + 1)", False)


def compare(w: Writer) -> None:
    a = w.settled()
    b = w.rng.choice((w.like(a), "1"))
    if b not in w.exact and b != "1":
        raise Skip
    c = w.like(a)
    w.add(f"jnp.where({a} {w.rng.choice(('<', '>=', '==', '!='))} {b}, {a}, {c})", c in w.exact)


def integers(w: Writer) -> None:
    a = w.settled()
    op = w.rng.choice(("({} % 3).astype(jnp.int32)", "({} // 2).astype(jnp.int32)",
                       "{}.astype(jnp.int32) & 5", "({} > 0)", "{}.astype(jnp.int32) ^ 3",
                       "({} > 0).astype(jnp.float32)", "({}).astype(jnp.float32)",
                       "(jnp.abs({}) % 5).astype(jnp.uint8)", "lax.shift_left(({}).astype(jnp.int32) & 7, 2)"))
    w.add(op.format(a), True)


def logic(w: Writer) -> None:
    a = w.pick(lambda v: v.dtype == jnp.bool_)
    op = w.rng.choice(("~{a}", "{a} & {b}", "{a} | {b}", "{a} ^ {b}", "jnp.all({a})", "jnp.any({a})",
                       "jnp.any({a}, axis=0)", "jnp.all({a}, axis=-1)", "jnp.sum({a}, axis=0)"))
    if w.scope[a].ndim == 0:
        raise Skip
    w.add(op.format(a=a, b=w.like(a)), True)


def to_half(w: Writer) -> None:
    a = w.real()
    w.add(f"{a}.astype(jnp.bfloat16).astype(jnp.float32)", a in w.exact)


def reduction(w: Writer) -> None:
    a = w.number(1)
    rank = w.scope[a].ndim
    axes = tuple(sorted(w.rng.sample(range(rank), w.rng.randint(1, rank))))
    keep = w.rng.random() < 0.3
    op = w.rng.choice(("sum", "sum", "max", "min", "prod", "mean", "var"))
    exact = op in ("sum", "max", "min", "prod") and a in w.exact
    if op in ("mean", "var") and w.scope[a].dtype != jnp.float32:
        raise Skip
    if op == "prod" and a not in w.exact:
        a = f"jnp.tanh({a})"
    w.add(f"jnp.{op}({a}, axis={axes}, keepdims={keep})", exact)


def softmax(w: Writer) -> None:
    a = w.real(1)
    op = w.rng.choice(("jax.nn.softmax", "jax.nn.log_softmax", "jax.nn.logsumexp"))
    w.add(f"{op}({a}, axis={w.axis(a)})", False)


def arg(w: Writer) -> None:
    a = w.settled(1)
    op = w.rng.choice(("jnp.argmax", "jnp.argmin"))
    w.add(f"{op}({a}, axis={w.axis(a)})", True)


def reshape(w: Writer) -> None:
    a = w.array(1)
    n = w.scope[a].size
    shape = []
    for _ in range(w.rng.randint(0, 3)):
        d = w.rng.choice([k for k in range(1, min(n, 24) + 1) if n % k == 0])
        shape.append(d)
        n //= d
    shape.insert(w.rng.randint(0, len(shape)), n)
    w.add(f"jnp.reshape({a}, {tuple(shape)})", a in w.exact)


def transpose(w: Writer) -> None:
    a = w.array(2)
    order = w.rng.sample(range(w.scope[a].ndim), w.scope[a].ndim)
    w.add(f"jnp.transpose({a}, {tuple(order)})", a in w.exact)


def broadcast(w: Writer) -> None:
    a = w.pick(lambda v: v.size * 2 <= MAX_ELEMENTS)
    shape = list(w.scope[a].shape)
    if w.rng.random() < 0.5:
        text = f"jnp.broadcast_to({a}, {(w.size(), *shape)})"
    else:
        text = f"jnp.expand_dims({a}, {w.rng.randint(0, len(shape))})"
    w.add(text, a in w.exact)


def squeeze(w: Writer) -> None:
    a = w.pick(lambda v: 1 in v.shape)
    w.add(f"jnp.squeeze({a})", a in w.exact)


def join(w: Writer) -> None:
    a = w.array(1)
    v = w.scope[a]
    same = [n for n, u in w.scope.items() if u.shape == v.shape and u.dtype == v.dtype]
    parts = [w.rng.choice(same) for _ in range(w.rng.randint(1, 2))] + [a]
    op = w.rng.choice(("concatenate", "stack"))
    w.add(f"jnp.{op}([{', '.join(parts)}], axis={w.axis(a)})", set(parts) <= w.exact)


def cut(w: Writer) -> None:
    a = w.array(1)
    d = w.axis(a)
    n = w.scope[a].shape[d]
    low = w.rng.randrange(n)
    high = w.rng.randint(low + 1, n)
    stride = w.rng.choice((1, 1, 2, 3))
    texts = (
        f"lax.slice_in_dim({a}, {low}, {high}, {stride}, axis={d})",
        f"jnp.flip({a}, {d})", f"jnp.roll({a}, {w.rng.randint(-3, 3)}, {d})",
        f"lax.index_in_dim({a}, {low}, {d}, keepdims=False)",
        f"jnp.split({a}, [{low}], axis={d})[1]",
        f"jnp.tile({a}, {(2,) + (1,) * (w.scope[a].ndim - 1)})",
        f"jnp.repeat({a}, 2, axis={d})",
    )
    w.add(w.rng.choice(texts), a in w.exact)


def pad(w: Writer) -> None:
    a = w.number(1)
    config = [(w.rng.randint(-1, 2), w.rng.randint(0, 2), w.rng.choice((0, 0, 1)))
              if w.rng.random() < 0.5 else (0, 0, 0) for _ in w.scope[a].shape]
    value = w.rng.choice((0, 0, 1))
    w.add(f"lax.pad({a}, jnp.asarray({value}, {a}.dtype), {config})", a in w.exact)


def contract(w: Writer) -> None:
    a, b = w.real(1), w.real(1)
    left, right = w.scope[a], w.scope[b]
    if left.ndim > 3 or right.ndim > 3:
        raise Skip
    letters_a = "abc"[: left.ndim]
    letters_b = [""] * right.ndim
    free = list("pqr")
    for d, n in enumerate(right.shape):
        options = [c for c, m in zip(letters_a, left.shape) if m == n and c not in letters_b]
        letters_b[d] = w.rng.choice(options) if options and w.rng.random() < 0.8 else free.pop()
    every = sorted(set(letters_a) | set(letters_b))
    out = [c for c in every if w.rng.random() < (0.4 if c in letters_a and c in letters_b else 0.9)]
    w.rng.shuffle(out)
    text = f"jnp.einsum('{letters_a},{''.join(letters_b)}->{''.join(out)}', {a}, {b})"
    w.add(text, a in w.exact and b in w.exact)


def iota(w: Writer) -> None:
    a = w.number(1)
    d = w.axis(a)
    w.add(f"lax.broadcasted_iota({a}.dtype, {w.scope[a].shape}, {d})", True)


def cumulate(w: Writer) -> None:
    a = w.number(1)
    op = w.rng.choice(("cumsum", "cumsum", "cummax", "cummin", "cumprod", "cumlogsumexp"))
    exact = a in w.exact and op != "cumlogsumexp"
    if op in ("cumlogsumexp", "cumprod"):
        a = w.real(1)
        exact = False
        text = f"jnp.tanh({a})"
    else:
        text = a
    w.add(f"lax.{op}({text}, axis={w.axis(a)}, reverse={w.rng.random() < 0.4})", exact)


def order(w: Writer) -> None:
    a = w.settled(1)
    d = w.axis(a)
    n = w.scope[a].shape[-1]
    op = w.rng.choice((f"jnp.sort({a}, axis={d})", f"jnp.argsort({a}, axis={d})",
                       f"lax.top_k({a}, {w.rng.randint(1, n)})[0]",
                       f"lax.top_k({a}, {w.rng.randint(1, n)})[1]", f"jnp.sort({a}, axis={d}, descending=True)"))
    w.add(op, True)


def index(w: Writer) -> None:
    a = w.number(1)
    i = w.settled()
    d = w.axis(a)
    n = w.scope[a].shape[d]
    mode = w.rng.choice(("clip", "fill", "wrap"))
    ids = f"{i}.astype(jnp.int32)"
    fill = ", fill_value=0" if mode == "fill" else ""
    choice = w.rng.randrange(6)
    if choice == 0:
        text = f"jnp.take({a}, {ids}, axis={d}, mode='{mode}'{fill})"
    elif choice == 1:
        text = f"jax.nn.one_hot({ids}, {w.size()})"
    elif choice == 2:
        text = f"{a}.at[({ids}).ravel() % {w.scope[a].shape[0]}].{w.rng.choice(('add', 'max', 'min', 'mul'))}(2)"
    elif choice == 3:
        m = w.scope[a].shape[0]
        text = f"jax.ops.segment_sum({a}, ({ids}).ravel()[:1].repeat({m}) + jnp.arange({m}), num_segments={w.size()})"
    elif choice == 4:
        text = f"jnp.take_along_axis({a}, (lax.broadcasted_iota(jnp.int32, {w.scope[a].shape}, {d}) * 3 + {w.rng.randint(0, 5)}) % {n}, axis={d})"
    else:
        text = f"{a}.at[({ids}).ravel()].set({w.rng.randint(0, 3)}, mode='drop')" if w.scope[i].size == 1 else f"{a}.at[{ids}].get(mode='fill', fill_value=1)"
    w.add(text, a in w.exact)


def dynamic(w: Writer) -> None:
    a = w.number(1)
    d = w.axis(a)
    i = w.pick(lambda v: v.ndim == 0 and v.dtype == jnp.int32) if w.rng.random() < 0.5 else w.rng.randint(-2, 9)
    n = w.rng.randint(1, w.scope[a].shape[d])
    if w.rng.random() < 0.5:
        w.add(f"lax.dynamic_slice_in_dim({a}, jnp.int32({i}), {n}, {d})", a in w.exact)
    else:
        # Not a slice of `a`: XLA on CPU reads it after the update has overwritten it in place.
        part = f"jnp.full({(*w.scope[a].shape[:d], n, *w.scope[a].shape[d + 1:])}, 2, {a}.dtype)"
        w.add(f"lax.dynamic_update_slice_in_dim({a}, {part}, jnp.int32({i}), {d})", a in w.exact)


def scalar(w: Writer) -> None:
    a = w.settled(1)
    w.add(f"jnp.sum({a}.astype(jnp.int32)) % 5", True)


def noise(w: Writer) -> None:
    key = w.rng.choice((f"jax.random.key({w.rng.randrange(9)})",
                        f"jax.random.fold_in(jax.random.key(1), jnp.sum({w.settled()}.astype(jnp.int32)))",
                        "jax.random.split(jax.random.key(2), 3)[1]"))
    shape = tuple(w.size() for _ in range(w.rng.randint(0, 2)))
    kind = w.rng.choice(("normal", "uniform", "bernoulli", "randint", "permutation"))
    args = {"bernoulli": f"0.5, {shape}", "randint": f"{shape}, -3, 4",
            "permutation": f"{w.size()}"}.get(kind, f"{shape}")
    w.add(f"jax.random.{kind}({key}, {args})", False)


def annotate(w: Writer) -> None:
    a = w.array(1)
    w.add(f"shard({a}, {w.spec(a)})", a in w.exact)


def block(w: Writer, inner: dict[str, Any], steps: int) -> tuple[list[str], "Writer"]:
    """Lines of a nested function of `inner`, which may also read what is outside."""
    outer = [n for n in w.scope if w.rng.random() < 0.15][:3]
    scope = {**{n: w.scope[n] for n in outer}, **inner}
    sub = Writer(w.rng, w.axes, scope, {n for n in scope if n in w.exact}, count=w.count + 10)
    for _ in range(steps):
        sub.step()
    w.count = sub.count
    w.half |= sub.half
    return [text for _, text in sub.lines], sub


def carried(sub: Writer, name: str) -> str:
    """An expression of the carry's shape and type, which is tame."""
    v = sub.scope[name]
    same = [n for n, u in sub.scope.items() if u.shape == v.shape and u.dtype == v.dtype]
    other = [n for n in sub.scope if sub.scope[n].dtype == jnp.float32]
    pick = sub.rng.choice(same)
    text = f"jnp.tanh({pick} * 0.5 + 0.1 * {name})"
    if sub.rng.random() < 0.5 and other:
        text += f" + 0.01 * jnp.tanh(jnp.sum({sub.rng.choice(other)}))"
    return text


def function(name: str, params: str, lines: list[str], result: str) -> str:
    body = "".join("    " + line.replace("\n", "\n    ") + "\n" for line in lines)
    return f"def {name}({params}):\n{body}    return {result}\n"


def loop(w: Writer) -> None:
    c = w.real()
    kind = w.rng.choice(("scan", "scan", "scan", "fori", "while"))
    name = f"body{w.count}"
    if kind == "scan":
        xs = w.real(1)
        lines, sub = block(w, {"c": w.scope[c], "x": first_of(w.scope[xs])}, w.rng.randint(1, 4))
        y = w.rng.choice([n for n in sub.scope])
        text = function(name, "c, x", lines, f"({carried(sub, 'c')}, {y})")
        w.add(f"lax.scan({name}, {c}, {xs}, reverse={w.rng.random() < 0.4})", False, 2, text)
        return
    lines, sub = block(w, {"c": w.scope[c]}, w.rng.randint(1, 3))
    trips = w.rng.randint(0, 4)
    if kind == "fori":
        n = w.rng.choice((str(trips), f"jnp.int32({trips}) + jnp.sum({w.settled()}.astype(jnp.int32)) % 3"))
        text = function(name, "i, c", lines, carried(sub, "c"))
        w.add(f"lax.fori_loop(0, {n}, {name}, {c})", False, 1, text)
    else:
        text = function(name, "s", ["i, c = s", *lines], f"(i + 1, {carried(sub, 'c')})")
        end = f"lambda s: (s[0] < {trips}) & (jnp.max(s[1]) < 1e4)"
        w.add(f"lax.while_loop({end}, {name}, (0, {c}))", False, 2, text)


def branch(w: Writer) -> None:
    c = w.real()
    texts, called = "", []
    for i in range(w.rng.randint(2, 3)):
        lines, sub = block(w, {"c": w.scope[c]}, w.rng.randint(1, 3))
        called.append(f"case{w.count}_{i}")
        texts += function(called[-1], "c", lines, carried(sub, "c"))
    on = f"jnp.sum({w.settled()}.astype(jnp.int32)) % {len(called)}"
    w.add(f"lax.switch({on}, [{', '.join(called)}], {c})", False, 1, texts)


def nested(w: Writer) -> None:
    """checkpoint, grad or vmap of a block."""
    c = w.real(1)
    kind = w.rng.choice(("checkpoint", "grad", "grad", "vmap", "gradckpt"))
    inner = first_of(w.scope[c]) if kind == "vmap" else w.scope[c]
    lines, sub = block(w, {"c": inner}, w.rng.randint(2, 6))
    name = f"part{w.count}"
    reals = [n for n, v in sub.scope.items() if v.dtype == jnp.float32][-4:]
    if "grad" in kind:
        total = " + ".join(f"jnp.sum(jnp.tanh({n}))" for n in reals)
        text = function(name, "c", lines, f"{total} + jnp.sum(c * 0)")
        made = f"jax.checkpoint({name})" if kind == "gradckpt" else name
        w.add(f"jax.grad({made})({c})", False, 1, text)
    else:
        text = function(name, "c", lines, w.rng.choice(reals))
        w.add(f"jax.{kind}({name})({c})", False, 1, text)


KINDS = (
    unary, unary, binary, binary, binary, divide, compare, integers, logic, to_half, reduction,
    reduction, reduction, softmax, arg, reshape, reshape, transpose, broadcast, squeeze, join, cut,
    pad, contract, contract, contract, iota, cumulate, order, index, index, dynamic, scalar, noise,
    annotate, annotate, loop, branch, nested, nested,
)  # fmt: skip


def draw(seed: int) -> Case:
    """The program of a seed."""
    rng = random.Random(seed)
    mesh = rng.choice(MESHES)
    axes = tuple(mesh)
    w = Writer(rng, axes)
    numbers = np.random.default_rng(seed)
    inputs: dict[str, Any] = {}
    for _ in range(rng.randint(1, 4)):
        shape = tuple(w.size() for _ in range(rng.choice((0, 1, 2, 2, 3))))
        (name,) = w.new()
        dtype = rng.choice((np.float32,) * 4 + (np.int32,))
        inputs[name] = numbers.integers(-3, 4, shape).astype(dtype)
        w.scope[name] = jax.ShapeDtypeStruct(shape, dtype)
        w.exact.add(name)
    for _ in range(rng.randint(8, 40)):
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


def outcome(case: Case) -> str:
    """"" or the kind of failure."""
    try:
        case.run()
    except AssertionError as error:
        return "wrong values" if "Mismatched" in str(error) or "not equal" in str(error).lower() else f"assertion {str(error)[:60]}"
    except Exception as error:  # noqa: BLE001
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


def smaller(case: Case) -> Any:
    scope = {**NAMES, **{n: jnp.asarray(v) for n, v in case.inputs.items()}}
    values = {}
    for names, text in case.lines:
        exec(text, scope)  # noqa: S102
        values.update({n: np.asarray(scope[n]) for n in names})
    for at in reversed(range(len(case.lines))):
        names = case.lines[at][0]
        if set(names) & set(case.outputs):
            continue
        inputs = {**case.inputs, **{n: values[n] for n in names}}
        lines = case.lines[:at] + case.lines[at + 1 :]
        yield without_dead_lines(
            replace(case, inputs=inputs, lines=lines, in_specs=case.in_specs + (None,) * len(names)))
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


def seeds(default: str) -> range:
    first, last = os.environ.get("RANDOM_PROGRAMS", default).split(":")
    return range(int(first), int(last))


@pytest.mark.parametrize("seed", range(24))
def test_random_program(seed: int) -> None:
    case = draw(seed)
    try:
        case.run()
    except Exception as error:
        raise AssertionError(f"seed {seed}\n{case}") from error


@pytest.mark.slow
@pytest.mark.parametrize("seed", seeds("1000:1400"))
def test_more_random_programs(seed: int) -> None:
    test_random_program(seed)


def main(first: int, last: int) -> None:
    for seed in range(first, last):
        print(f"seed {seed}", flush=True)
        try:
            case = draw(seed)
        except Exception as error:  # noqa: BLE001
            print(f"GENERATOR {seed}: {type(error).__name__} {str(error)[:300]}", flush=True)
            continue
        failure = outcome(case)
        if failure:
            print(f"FAILED {seed}: {failure}", flush=True)
            if os.environ.get("REDUCE", "1") == "1":
                print(reduce_case(case, failure), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
