"""More kinds of lines of random programs: windows, matrices, edges of arrays."""

import jax.numpy as jnp

from tests.e2e.random_case import Skip, Writer, function


def convolve(w: Writer) -> None:
    """Of any value with at least two dims: the last is spatial, strided, dilated or grouped."""
    a = w.real(2)
    shape = w.scope[a].shape
    n, c = shape[-1], shape[-2]
    k = w.rng.randint(1, min(3, n))
    groups = w.rng.choice([g for g in (1, 2, 3) if c % g == 0])
    out = groups * w.rng.randint(1, 3)
    stride, dilation = w.rng.choice(((1, 1), (1, 1), (2, 1), (1, 2)))
    padding = w.rng.choice(("'SAME'", "'VALID'", f"[({w.rng.randint(0, 2)}, 1)]"))
    if dilation > 1:
        padding = f"[({w.rng.randint(0, 2)}, 1)]"
    kernel = (f"jnp.arange({out * (c // groups) * k}.0).reshape({out}, {c // groups}, {k}) % 5 - 2")
    text = (f"lax.conv_general_dilated({a}.reshape(-1, {c}, {n}), {kernel}, ({stride},), {padding},"
            f" lhs_dilation=({dilation},), feature_group_count={groups})")
    w.add(text, a in w.exact)


def window(w: Writer) -> None:
    a = w.real(1)
    shape = w.scope[a].shape
    d = w.axis(a)
    size = [min(3, n) if i == d else 1 for i, n in enumerate(shape)]
    stride = [w.rng.choice((1, 2)) if i == d else 1 for i in range(len(shape))]
    padding = w.rng.choice(("'SAME'", "'VALID'"))
    op, init = w.rng.choice((("lax.max", "-jnp.inf"), ("lax.add", "0.0"), ("lax.min", "jnp.inf")))
    text = f"lax.reduce_window({a}, {init}, {op}, {size}, {stride}, {padding})"
    if w.rng.random() < 0.4 and op != "lax.min":
        name = f"pool{w.count}"
        before = function(name, "t", [], text.replace(f"({a},", "(jnp.tanh(t),"))
        w.add(f"jax.grad(lambda t: jnp.sum(jnp.sin({name}(t))))({a})", False, 1, before)
    else:
        w.add(text, a in w.exact and "VALID" in padding)


def matrices(w: Writer) -> None:
    """Batched linear algebra of matrices that are far from singular. Not FFT: XLA on CPU refuses
    those that it has laid out in another order itself (fft_thunk.cc), jax.jit's too."""
    a = w.real(2)
    n = w.scope[a].shape[-1]
    if n > 8:
        raise Skip
    well = f"(jnp.tanh({a})[..., :1, :] * 0.1 + {n} * jnp.eye({n}))"
    text = w.rng.choice((
        f"jnp.linalg.solve({well}, jnp.swapaxes(jnp.tanh({a}), -1, -2))",
        f"jnp.linalg.inv({well})", f"jnp.linalg.det({well} / {n})",
        f"jnp.linalg.cholesky({well} @ jnp.swapaxes({well}, -1, -2))",
        f"lax.linalg.triangular_solve({well}, jnp.tanh({a}), lower=True)",
    ))  # fmt: skip
    w.add(text, False)


def edges(w: Writer) -> None:
    """Shifts and pads that copy what is at the border."""
    a = w.number(1)
    d = w.axis(a)
    n, rank = w.scope[a].shape[d], w.scope[a].ndim
    low, high = w.rng.randint(0, min(2, n - 1)), w.rng.randint(0, min(2, n - 1))
    widths = [(low, high) if i == d else (0, 0) for i in range(rank)]
    mode = w.rng.choice(("edge", "wrap", "reflect", "symmetric"))
    w.add(w.rng.choice((
        f"jnp.pad({a}, {widths}, mode='{mode}')",
        f"jnp.diff({a}, axis={d}, prepend=0, append=1)" if mode == "edge" else
        f"jnp.roll({a}, {w.rng.randint(-5, 5)}, {d})",
    )), a in w.exact)  # fmt: skip


def ragged(w: Writer) -> None:
    """Rows in groups, each with a matrix of its own."""
    a = w.pick(lambda v: v.ndim == 2 and v.dtype == jnp.float32)
    m, k = w.scope[a].shape
    first = w.rng.randint(0, m)
    second = (m - first) // 2
    groups = f"jnp.asarray([{first}, {second}, {m - first - second}], jnp.int32)"
    table = f"(jnp.arange({3 * k * 4}.0).reshape(3, {k}, 4) % 5 - 2)"
    w.add(f"lax.ragged_dot({a}, {table}, {groups})", a in w.exact)
