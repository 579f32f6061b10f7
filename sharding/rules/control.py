"""Control flow: how scan, while, cond and remat tie values across their regions.

The same declaration serves propagation (ports are identity edges) and partitioning (`build`
rebuilds the equation around bodies that are traced at local shapes). Calls are inlined.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jax import lax

from sharding import _jax
from sharding.rule import Control, Port, register_control, register_inline

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
    ),
)


def _while_split(params: Params, args: Sequence[Any]) -> tuple[Any, Any, Any]:
    c, b = params["cond_nconsts"], params["body_nconsts"]
    return args[:c], args[c : c + b], args[c + b :]


def _while_inputs(op: Any) -> Sequence[Port]:
    c, b = op.params["cond_nconsts"], op.params["body_nconsts"]
    carry = range(len(op.inputs) - c - b)
    return [
        *(Port(i, 0, i) for i in range(c)),
        *(Port(c + i, 1, i) for i in range(b)),
        *(Port(c + b + i, 0, c + i) for i in carry),
        *(Port(c + b + i, 1, b + i) for i in carry),
    ]


def _while_carries(op: Any) -> Sequence[tuple[int, int, int]]:
    b = op.params["body_nconsts"]
    return [(1, i, b + i) for i in range(len(op.outputs))]


def _build_while(
    params: Params, bodies: Sequence[Callable], args: Sequence[Any]
) -> Sequence[Any]:
    cond_consts, body_consts, carry = _while_split(params, args)
    return lax.while_loop(
        lambda c: bodies[0](*cond_consts, *c)[0],
        lambda c: tuple(bodies[1](*body_consts, *c)),
        tuple(carry),
    )


register_control(
    p.while_p,
    Control(
        bodies=lambda params: [params["cond_jaxpr"], params["body_jaxpr"]],
        inputs=_while_inputs,
        outputs=lambda op: [Port(i, 1, i) for i in range(len(op.outputs))],
        carries=_while_carries,
        build=_build_while,
    ),
)


def _cond_inputs(op: Any) -> Sequence[Port]:
    return [
        Port(i, r, i - 1) for r in range(len(op.regions)) for i in range(1, len(op.inputs))
    ]


def _cond_outputs(op: Any) -> Sequence[Port]:
    return [Port(i, r, i) for r in range(len(op.regions)) for i in range(len(op.outputs))]


def _build_cond(
    params: Params, bodies: Sequence[Callable], args: Sequence[Any]
) -> Sequence[Any]:
    # Branches must agree in type to the letter; tuples keep one tree.
    branches = [lambda *xs, body=body: tuple(body(*xs)) for body in bodies]
    return lax.switch(args[0], branches, *args[1:])


register_control(
    p.cond_p,
    Control(
        bodies=lambda params: params["branches"],
        inputs=_cond_inputs,
        outputs=_cond_outputs,
        build=_build_cond,
    ),
)


def _build_remat(
    params: Params, bodies: Sequence[Callable], args: Sequence[Any]
) -> Sequence[Any]:
    # jax.checkpoint would mark the body as not differentiated, and XLA would then merge the
    # recomputation with the forward pass: the original parameters are kept.
    jaxpr, consts = _jax.body_jaxpr(lambda *xs: tuple(bodies[0](*xs)), args)
    return _jax.remat_p.bind(*consts, *args, jaxpr=jaxpr, **_jax.checkpoint_params(params))


register_control(
    _jax.remat_p,
    Control(
        bodies=lambda params: [_jax.closed(params["jaxpr"])],
        inputs=lambda op: [Port(i, 0, i) for i in range(len(op.inputs))],
        outputs=lambda op: [Port(i, 0, i) for i in range(len(op.outputs))],
        build=_build_remat,
    ),
)

register_inline(p.jit_p, lambda params: params["jaxpr"])
register_inline(p.closed_call_p, lambda params: _jax.closed(params["call_jaxpr"]))
register_inline(p.custom_jvp_call_p, lambda params: _jax.closed(params["call_jaxpr"]))
register_inline(p.custom_vjp_call_p, lambda params: _jax.closed(params["call_jaxpr"]))
register_inline(_jax.high_level_p, _jax.expansion)
