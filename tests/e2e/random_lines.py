"""The kinds of lines that random programs are made of, one function each."""

from typing import Any

import jax.numpy as jnp

from tests.e2e.random_case import MAX_ELEMENTS, Skip, Writer, first_of, function
from tests.e2e.random_numeric import convolve, edges, matrices, ragged, window


def unary(w: Writer) -> None:
    if w.rng.random() < 0.5:
        a = w.number()
        op = w.rng.choice((
            "-{}", "jnp.abs({})", "jnp.sign({})", "jnp.clip({}, -2, 3)", "jnp.maximum({}, 1)",
            "{} * 2", "{} + 1", "jnp.square(jnp.clip({}, -9, 9))",
        ))  # fmt: skip
        w.add(op.format(a), a in w.exact)
    else:
        op = w.rng.choice(("jnp.tanh", "jax.nn.sigmoid", "jnp.sin", "jnp.arctan", "jax.nn.gelu",
                           "jax.nn.silu", "jnp.cos", "jnp.exp2", "jax.nn.softplus"))
        w.add(f"{op}(jnp.clip({w.real()}, -8, 8))", False)


def binary(w: Writer) -> None:
    a = w.number()
    b = w.like(a)
    calls = ("jnp.maximum({}, {})", "jnp.minimum({}, {})")
    op = w.rng.choice(("{} + {}", "{} - {}", "{} * {}", *calls))
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
                       "(jnp.abs({}) % 5).astype(jnp.uint8)",
                       "jnp.left_shift(({}).astype(jnp.int32) & 7, 2)"))
    w.add(op.format(a), True)


def logic(w: Writer) -> None:
    a = w.pick(lambda v: v.dtype == jnp.bool_)
    op = w.rng.choice(("~{a}", "{a} & {b}", "{a} | {b}", "{a} ^ {b}", "jnp.all({a})",
                       "jnp.any({a})", "jnp.any({a}, axis=0)", "jnp.all({a}, axis=-1)",
                       "jnp.sum({a}, axis=0)"))
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
        options = [c for c, m in zip(letters_a, left.shape, strict=True)
                   if m == n and c not in letters_b]
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
                       f"lax.top_k({a}, {w.rng.randint(1, n)})[1]",
                       f"jnp.sort({a}, axis={d}, descending=True)"))
    w.add(op, True)


def index(w: Writer) -> None:
    a = w.number(1)
    i = w.settled()
    d = w.axis(a)
    shape = w.scope[a].shape
    m, n = shape[0], shape[d]
    mode = w.rng.choice(("clip", "fill", "wrap"))
    fill = ", fill_value=0" if mode == "fill" else ""
    ids = f"{i}.astype(jnp.int32)"
    combine = w.rng.choice(("add", "max", "min", "mul"))
    along = f"lax.broadcasted_iota(jnp.int32, {shape}, {d}) * 3 + {w.rng.randint(0, 5)}"
    segments = f"({ids}).ravel()[:1].repeat({m}) + jnp.arange({m})"
    texts = [
        f"jnp.take({a}, {ids}, axis={d}, mode='{mode}'{fill})",
        f"jax.nn.one_hot({ids}, {w.size()})",
        f"{a}.at[({ids}).ravel() % {m}].{combine}(2)",
        f"jax.ops.segment_sum({a}, {segments}, num_segments={w.size()})",
        f"jnp.take_along_axis({a}, ({along}) % {n}, axis={d})",
        f"{a}.at[{ids}].get(mode='fill', fill_value=1)",
    ]
    if w.scope[i].size == 1:  # of several, those to one place would race
        texts.append(f"{a}.at[({ids}).ravel()].set({w.rng.randint(0, 3)}, mode='drop')")
    w.add(w.rng.choice(texts), a in w.exact)


def dynamic(w: Writer) -> None:
    a = w.number(1)
    d = w.axis(a)
    i: Any = w.rng.randint(-2, 9)
    if w.rng.random() < 0.5:
        i = w.pick(lambda v: v.ndim == 0 and v.dtype == jnp.int32)
    n = w.rng.randint(1, w.scope[a].shape[d])
    if w.rng.random() < 0.5:
        w.add(f"lax.dynamic_slice_in_dim({a}, jnp.int32({i}), {n}, {d})", a in w.exact)
    else:
        # Not a slice of `a`: XLA on CPU reads it after the update has overwritten it in place.
        shape = w.scope[a].shape
        part = f"jnp.full({(*shape[:d], n, *shape[d + 1 :])}, 2, {a}.dtype)"
        w.add(f"lax.dynamic_update_slice_in_dim({a}, {part}, jnp.int32({i}), {d})", a in w.exact)


def scalar(w: Writer) -> None:
    a = w.settled(1)
    w.add(f"jnp.sum({a}.astype(jnp.int32)) % 5", True)


def noise(w: Writer) -> None:
    key = w.rng.choice((f"jax.random.key({w.rng.randrange(9)})",
                        "jax.random.fold_in(jax.random.key(1), "
                        f"jnp.sum({w.settled()}.astype(jnp.int32)))",
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
    sub = Writer(w.rng, w.axes, scope, {n for n in scope if n in w.exact}, count=w.count + 10,
                 kinds=w.kinds)
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
        more = f"jnp.int32({trips}) + jnp.sum({w.settled()}.astype(jnp.int32)) % 3"
        n = w.rng.choice((str(trips), more))
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
    convolve, window, matrices, edges, ragged,
    unary, unary, binary, binary, binary, divide, compare, integers, logic, to_half, reduction,
    reduction, reduction, softmax, arg, reshape, reshape, transpose, broadcast, squeeze, join, cut,
    pad, contract, contract, contract, iota, cumulate, order, index, index, dynamic, scalar, noise,
    annotate, annotate, loop, branch, nested, nested,
)  # fmt: skip
