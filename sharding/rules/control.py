"""Control flow: how scan, while, cond and remat tie values across their regions.

The same declaration serves propagation (ports are identity edges) and partitioning (`build`
rebuilds the equation around bodies that are traced at local shapes). Calls are inlined.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
from jax import lax

from sharding import _jax
from sharding.errors import Problem, RuleError
from sharding.region import Control, Port
from sharding.rule import (
    OpInfo,
    Rule,
    pointwise_rule,
    register,
    register_control,
    register_inline,
    replicated_rule,
)
from sharding.rules.own_steps import scan_in_parts
from sharding.rules.trips import trips_of_while

p = _jax.primitives
Params = Mapping[str, Any]


def _scan_counts(params: Params) -> tuple[int, int]:
    """(number of constants, number of carries)."""
    return _jax.scan_counts(params)


def _scan_inputs(op: Any) -> Sequence[Port]:
    consts, carry = _scan_counts(op.params)
    return [Port(i, 0, i, stacked=i >= consts + carry) for i in range(len(op.inputs))]


def _scan_outputs(op: Any) -> Sequence[Port]:
    _, carry = _scan_counts(op.params)
    return [Port(i, 0, i, stacked=i >= carry) for i in range(len(op.outputs))]


def _scan_carries(op: Any) -> Sequence[tuple[int, int, int]]:
    consts, carry = _scan_counts(op.params)
    return [(0, i, consts + i) for i in range(carry)]


def _build_scan(
    params: Params, bodies: Sequence[Callable], args: Sequence[Any]
) -> Sequence[Any]:
    n_consts, n_carry = _scan_counts(params)
    consts, init = args[:n_consts], args[n_consts : n_consts + n_carry]

    def body(carry: Any, x: Any) -> Any:
        out = bodies[0](*consts, *carry, *x)
        return tuple(out[:n_carry]), tuple(out[n_carry:])

    carry, ys = lax.scan(
        body, tuple(init), tuple(args[n_consts + n_carry :]), length=params["length"],
        reverse=params["reverse"], unroll=params["unroll"],
    )  # fmt: skip
    return [*carry, *ys]


register_control(
    p.scan_p,
    Control(
        bodies=lambda params: [params["jaxpr"]],
        inputs=_scan_inputs,
        outputs=_scan_outputs,
        carries=_scan_carries,
        build=_build_scan,
        trips=lambda op: op.params["length"],
        counted=True,
        trees=True,
        in_parts=scan_in_parts,
    ),
)


def _while_counts(params: Params) -> tuple[int, int, int]:
    """(constants of the predicate, of the body, and of the predicate that the body takes too)."""
    c, b = params["cond_nconsts"], params["body_nconsts"]
    return c, b, c if _batched(params) else 0


def _batched(params: Params) -> bool:
    """vmap made a predicate per example: the loop runs while any holds, for those where it does."""
    return bool(params["cond_jaxpr"].out_avals[0].shape)


def _while_bodies(params: Params) -> Sequence[Any]:
    cond, body = params["cond_jaxpr"], params["body_jaxpr"]
    if not _batched(params):
        return [cond, body]
    c, b = params["cond_nconsts"], params["body_nconsts"]
    holds, step = _jax.as_fun(cond), _jax.as_fun(body)

    def some(*args: Any) -> Any:
        (each,) = holds(*args)
        return [lax.reduce_or(each, tuple(range(each.ndim)))]

    def step_where(*args: Any) -> Any:
        consts, carry = args[c : c + b], args[c + b :]
        (each,) = holds(*args[:c], *carry)
        return [
            lax.select(lax.broadcast_in_dim(each, new.shape, tuple(range(each.ndim))), new, old)
            for new, old in zip(step(*consts, *carry), carry, strict=True)
        ]

    consts = cond.in_avals[:c]
    return [
        _jax.trace(some, *cond.in_avals), _jax.trace(step_where, *consts, *body.in_avals)
    ]  # fmt: skip


def _while_inputs(op: Any) -> Sequence[Port]:
    c, b, shared = _while_counts(op.params)
    carry = range(len(op.inputs) - c - b)
    return [
        *(Port(i, 0, i) for i in range(c)),
        *(Port(i, 1, i) for i in range(shared)),
        *(Port(c + i, 1, shared + i) for i in range(b)),
        *(Port(c + b + i, 0, c + i) for i in carry),
        *(Port(c + b + i, 1, shared + b + i) for i in carry),
    ]


def _while_carries(op: Any) -> Sequence[tuple[int, int, int]]:
    _, b, shared = _while_counts(op.params)
    return [(1, i, shared + b + i) for i in range(len(op.outputs))]


def _build_while(
    params: Params, bodies: Sequence[Callable], args: Sequence[Any]
) -> Sequence[Any]:
    c, b, shared = _while_counts(params)
    cond_consts, body_consts, carry = args[:c], args[c : c + b], args[c + b :]
    return lax.while_loop(
        lambda c: bodies[0](*cond_consts, *c)[0],
        lambda c: tuple(bodies[1](*cond_consts[:shared], *body_consts, *c)),
        tuple(carry),
    )


register_control(
    p.while_p,
    Control(
        bodies=_while_bodies,
        inputs=_while_inputs,
        outputs=lambda op: [Port(i, 1, i) for i in range(len(op.outputs))],
        carries=_while_carries,
        build=_build_while,
        trips=trips_of_while,
    ),
)


def _cond_inputs(op: Any) -> Sequence[Port]:
    return [
        Port(i, r, i - 1) for r in range(len(op.regions)) for i in range(1, len(op.inputs))
    ]


def _cond_outputs(op: Any) -> Sequence[Port]:
    return [Port(i, r, i) for r in range(len(op.regions)) for i in range(len(op.outputs))]


def _rebuilt(primitive: Any, *names: str) -> Callable[..., Sequence[Any]]:
    """`build` for a primitive that is bound again, with all of its parameters but the bodies."""

    def build(params: Params, bodies: Sequence[Callable], args: Sequence[Any]) -> Sequence[Any]:
        closed = [_jax.body(body, args) for body in bodies]
        return primitive.bind(*args, **{**params, **dict(zip(names, closed, strict=True))})

    return build


def _build_cond(
    params: Params, bodies: Sequence[Callable], args: Sequence[Any]
) -> Sequence[Any]:
    # Bound as it was: branches for other platforms than the one it is compiled for are dropped.
    branches = tuple(_jax.body(body, args[1:]) for body in bodies)
    return p.cond_p.bind(*args, **{**params, "branches": branches})


register_control(
    p.cond_p,
    Control(
        bodies=lambda params: params["branches"],
        inputs=_cond_inputs,
        outputs=_cond_outputs,
        build=_build_cond,
        exclusive=True,
    ),
)


@register(*_jax.available("platform_index_p"))
def _platform_index(op: OpInfo) -> Rule:
    """A number that is known when the program is compiled."""
    return Rule((), ((),), {})


def _build_remat(
    params: Params, bodies: Sequence[Callable], args: Sequence[Any]
) -> Sequence[Any]:
    # jax.checkpoint would mark the body as not differentiated, and XLA would then merge the
    # recomputation with the forward pass: the original parameters are kept.
    flat, tree = jax.tree.flatten(tuple(args))
    made: Any = None

    def body(*xs: Any) -> tuple[Any, ...]:
        nonlocal made
        found, made = jax.tree.flatten([*bodies[0](*jax.tree.unflatten(tree, xs))])
        return tuple(found)

    jaxpr, consts = _jax.body_jaxpr(body, flat)
    prevent = params["prevent_cse"]  # for all operands alike, or for each
    if not isinstance(prevent, bool):
        each = (p for p, x in zip(prevent, args, strict=True) for _ in jax.tree.leaves(x))
        params = {**params, "prevent_cse": (True,) * len(consts) + tuple(each)}
    found = _jax.remat_p.bind(*consts, *flat, **{**params, "jaxpr": jaxpr})
    return jax.tree.unflatten(made, found)


def _same(op: Any, count: int) -> Sequence[Port]:
    return [Port(i, 0, i) for i in range(count)]


def _call(body: str, build: Callable[..., Sequence[Any]], trees: bool = False) -> Control:
    """A call that means something to the compiler: its body stays together."""
    return Control(
        bodies=lambda params: [_jax.closed(params[body])],
        inputs=lambda op: _same(op, len(op.inputs)),
        outputs=lambda op: _same(op, len(op.outputs)),
        build=build,
        trees=trees,
    )


register_control(_jax.remat_p, _call("jaxpr", _build_remat, trees=True))
for _prim in _jax.available("compute_on_p", "xla_metadata_call_p"):
    register_control(_prim, _call("jaxpr", _rebuilt(_prim, "jaxpr")))


@register(*_jax.available("xla_metadata_value_p"))
def _metadata(op: OpInfo) -> Rule:
    """Marks the operation that makes the value, at local shapes: every dim passes."""
    shape = op.in_avals[0].shape
    return pointwise_rule([shape], [shape])


@register(*_jax.available("dce_sink_p"))
def _sink(op: OpInfo) -> Rule:
    """Keeps what makes the value alive: in any layout, and nothing comes out."""
    shape = op.in_avals[0].shape
    rule = pointwise_rule([shape], [shape])
    return Rule(rule.operands, (), rule.factors, elementary=True)


@register(*_jax.available("call_exported_p"))
def _exported(op: OpInfo) -> Rule:
    """Compiled code for one device: it needs whole operands, and runs on every device."""
    devices = op.params["exported"].nr_devices
    if devices != 1:
        raise RuleError(
            Problem(
                f"a function exported for {devices} devices is called in the program",
                "its partitioning is part of it, and cannot be made part of another one",
                "export it for one device, or call it outside of spmd.jit",
            )
        )
    return replicated_rule(op)


# What calls name their body, by version of JAX.
_BODIES = ("call_jaxpr", "jaxpr", "call", "callee", "fwd_jaxpr")


def _called(params: Params) -> Any:
    return _jax.closed(next(params[name] for name in _BODIES if name in params))


def _solve_operands(params: Params, count: int) -> Sequence[int]:
    """Of all operands the constants of `solve`, and the right-hand sides."""
    lengths = params["const_lengths"]
    first = lengths.matvec + lengths.vecmat
    return [*range(first, first + lengths.solve), *range(sum(lengths), count)]


_CALLS = _jax.available(
    "jit_p", "call_p", "closed_call_p", "eval_jaxpr_p", "custom_jvp_call_p", "custom_vjp_call_p",
    "custom_vmap_p", "linear_call_p", "remat_opt_p", "composite_p",
)  # fmt: skip
for _prim in dict.fromkeys(_CALLS):  # two of the names may stand for one primitive
    register_inline(_prim, _called)
for _prim in _jax.available("linear_solve_p"):
    register_inline(_prim, lambda params: params["jaxprs"].solve, operands=_solve_operands)
for _prim in _jax.available("run_state_p"):
    register_inline(_prim, _jax.run_state_body)
for _prim in _jax.available("program_order_p"):
    register_inline(_prim, partial(_jax.ordered_body, _prim))
register_inline(_jax.high_level_p, _jax.expansion)
