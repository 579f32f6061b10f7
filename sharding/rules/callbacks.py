"""Callbacks, prints and checks: they happen once per run of the program, with global values.

Operands are gathered whole by plan. The first device calls; what comes back is sent to all others
by an all-reduce of its bits.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import numpy as np
from jax import lax
from jax.core import ShapedArray
from jax.sharding import NamedSharding, PartitionSpec

from sharding import _jax
from sharding.errors import Problem, RuleError
from sharding.rule import Factor, Local, OpInfo, Rule, names, register, replicated_rule

p = _jax.primitives


@register(_jax.pure_callback_p, _jax.io_callback_p)
def _callback(op: OpInfo) -> Rule:
    """Every dim is FIXED: what the function does along a dim is not known."""
    sharding = op.params["sharding"]
    if sharding is not None and jax.process_count() > 1:
        # In one process nobody can tell which device calls.
        raise RuleError(
            Problem(
                f"{op.primitive.name} with sharding={sharding}",
                "the first device of the mesh calls back, in its own process",
                "leave out `sharding`, and make the mesh start with the device that should call",
            )
        )
    local = _returning if op.out_avals else _once
    return replace(replicated_rule(op), local=local, always=True)


def _once(ctx: Local, op: OpInfo, *operands: Any) -> Sequence[Any]:
    return ctx.on_first_device(ctx.bind, *operands)


def _returning(ctx: Local, op: OpInfo, *operands: Any) -> Sequence[Any]:
    """Results, with a flag: when the function raises, every device does. Otherwise the first one
    would stop, and all others wait for its results."""
    avals = op.params["result_avals"]
    call = _Guarded(op.params["callback"], avals)
    flag = ShapedArray((), np.dtype(bool))
    bind = partial(ctx.bind, callback=call, result_avals=(flag, *avals))
    failed, *results = ctx.on_first_device(bind, *operands)
    shapes = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in avals]

    def stop(*results: Any) -> Sequence[Any]:
        if op.primitive is _jax.pure_callback_p:
            return jax.pure_callback(call.fail, shapes)
        jax.debug.callback(call.fail)  # has an effect: happens even if nobody reads the results
        return results

    return lax.cond(failed, lambda *xs: list(stop(*xs)), lambda *xs: list(xs), *results)


class _Guarded:
    """A host function that gives back whether it failed, and its results or zeros."""

    def __init__(self, call: Callable[..., Any], avals: Sequence[Any]):
        self.call, self.avals = call, avals
        self.error: BaseException | None = None

    def __call__(self, *args: Any) -> Sequence[Any]:
        try:
            results = [_canonical(np.asarray(x)) for x in self.call(*args)]
            self.check(results)
            return [np.False_, *results]
        except BaseException as error:
            self.error = error
            return [np.True_, *(np.zeros(a.shape, a.dtype) for a in self.avals)]

    def check(self, results: Sequence[Any]) -> None:
        got, wanted = ([f"{x.dtype}{list(x.shape)}" for x in xs] for xs in (results, self.avals))
        if got != wanted:
            raise TypeError(f"the callback returned {got}, where {wanted} was announced")

    def fail(self) -> Any:
        raise self.error or RuntimeError("a callback failed in the process of the first device")


def _canonical(x: np.ndarray) -> np.ndarray:
    return x.astype(jax.dtypes.canonicalize_dtype(x.dtype), copy=False)


@register(_jax.buffer_callback_p)
def _buffer_callback(op: OpInfo) -> Rule:
    """Every dim is FIXED, as with other callbacks."""
    return replace(replicated_rule(op), local=_once, always=True)


@register(_jax.debug_callback_p, _jax.debug_print_p)
def _debug(op: OpInfo) -> Rule:
    """Once, with whole operands; with `partitioned=True` on every device, with its own part."""
    ordered = _jax.is_ordered(op.params)
    if not op.params["partitioned"]:
        return replace(replicated_rule(op), local=_in_order if ordered else _once, always=True)
    if ordered:
        raise RuleError(
            Problem(
                f"{op.primitive.name} with ordered=True and partitioned=True",
                "every device prints its own part, and there is no order among devices",
                "leave out `ordered` or `partitioned`",
            )
        )
    return _wherever(op)


def _in_order(ctx: Local, op: OpInfo, *operands: Any) -> Sequence[Any]:
    bind = partial(_jax.ordered_callback, op.primitive, op.params)
    return ctx.on_first_device(bind, *operands)


@register(_jax.check_p)
def _check(op: OpInfo) -> Rule:
    """Operands are whole on every device, so that when a check fails no device is left waiting
    for the others. A `debug_check` that is not functionalised does nothing."""
    return _wherever(op) if op.params["debug"] else replicated_rule(op)


@register(_jax.inspect_sharding_p)
def _inspect_sharding(op: OpInfo) -> Rule:
    """Tells where the value lies when the program is compiled; moves nothing."""
    shape = op.in_avals[0].shape
    dims = names("d", len(shape))
    factors = {d: Factor(n) for d, n in zip(dims, shape, strict=True)}
    return Rule((tuple((d,) for d in dims),), (), factors, local=_local_inspect_sharding)


def _local_inspect_sharding(ctx: Local, op: OpInfo, x: Any) -> Sequence[Any]:
    spec = PartitionSpec(*[ctx.axes(d) or None for d in names("d", x.ndim)])
    return ctx.bind(x, callback=partial(_tell, op.params["callback"], spec))


def _tell(callback: Callable, spec: PartitionSpec, inside: NamedSharding) -> Any:
    """Inside of the per-device program JAX knows the mesh, but not how the whole array lies."""
    return callback(NamedSharding(inside.mesh, spec))


@register(p.create_token_p, p.after_all_p)
def _token(op: OpInfo) -> Rule:
    """Tokens have no dims; each device has its own."""
    return Rule(((),) * len(op.in_avals), ((),), {})


def _wherever(op: OpInfo) -> Rule:
    """No results; every operand in the layout it has."""
    tensors, factors = [], {}
    for i, aval in enumerate(op.in_avals):
        dims = names(f"t{i}d", len(aval.shape))
        tensors.append(tuple((d,) for d in dims))
        factors |= {d: Factor(n) for d, n in zip(dims, aval.shape, strict=True)}
    return Rule(tuple(tensors), (), factors, elementary=True)
