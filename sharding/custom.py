"""Rules for users' own primitives and functions, written as one line:
`rule("b m k, b k n -> b m n")(mine)`.

A function gets a primitive of its own: transformations and the partitioner see one equation, and
the function is traced again at local shapes, as a Pallas kernel must be.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial, update_wrapper
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import ShapedArray
from jax.interpreters import ad, batching, mlir

from sharding import _jax
from sharding.errors import Problem, RuleError
from sharding.names import Names, names_in, parse
from sharding.rule import Kind, Local, OpInfo, Rule, register


def rule(text: str, *, reduce: str = "add", fixed: str = "", replace: bool = False) -> Callable:
    """Says how the dims of a primitive or function are related, so that it can be partitioned.

    What is decorated runs on the shards of its operands. Names that results have are sharded
    freely. Names that only operands have are reduced: the shards' results are addends (or
    operands of `reduce`) of the whole ones. That is right for a matmul, and wrong for keys under a
    softmax: what must be whole is `fixed`. So is, by itself, a name that only some results have, or
    only results.

    Args:
      text: operands and results, comma-separated, a name per dim; `(a b)` for a dim that merges
        two factors, `1` for a dim of size 1. Dims of size 1 broadcast: any name will do for them.
      reduce: monoid of the reduced names: add, mul, max, min, and, or.
      fixed: names, space-separated, that must not be sharded.
      replace: allow a primitive that has a rule already.

    Returns:
      A decorator for a primitive, which it returns, or for a function of arrays. Arguments of the
      function that are not arrays are static. It is differentiated (in reverse, by running it
      again) and batched like any other; `jax.custom_vjp` belongs inside, or around two such
      functions.

    Raises:
      RuleError: the text is malformed; at trace time, when it does not fit the shapes.
    """
    names = parse(text, reduce, frozenset(fixed.split()))

    def decorate(target: Any) -> Any:
        if isinstance(target, _jax.Primitive):
            register(target, replace=replace)(lambda op: names.rule(op.in_avals, op.out_avals))
            return target
        if callable(target):
            return _decorated(target, names)
        raise RuleError(
            Problem(
                f"rule {text!r} for a {type(target).__name__}",
                "rules are for primitives and functions",
                "decorate a jax.extend.core.Primitive or a callable",
            )
        )

    return decorate


# Functions. Each has a primitive, and each of its equations a `call` parameter: the function
# itself, its derivative, or a batched one of these.


def _decorated(fun: Callable, names: Names) -> Callable:
    primitive = _primitive(getattr(fun, "__name__", type(fun).__name__))

    @register(primitive)
    def _rule(op: OpInfo) -> Rule:
        return op.params["call"].names.rule(op.in_avals, op.out_avals, _traced)

    def decorated(*args: Any, **kwargs: Any) -> Any:
        leaves, tree = jax.tree.flatten((args, kwargs))
        dynamic = tuple(isinstance(x, (jax.Array, np.ndarray, np.generic)) for x in leaves)
        arrays = [jnp.asarray(x) for x, is_array in zip(leaves, dynamic, strict=True) if is_array]
        static = tuple(None if is_array else x for x, is_array in zip(leaves, dynamic, strict=True))
        names.check_count(len(arrays), "operands", names.operands)
        call = Call(fun, names, tree, dynamic, static)
        out_tree = jax.tree.structure(jax.eval_shape(call.structured, *arrays))
        return jax.tree.unflatten(out_tree, primitive.bind(*arrays, call=call))

    return update_wrapper(decorated, fun)


def _primitive(name: str) -> Any:
    primitive = _jax.Primitive(name)
    primitive.multiple_results = True
    primitive.def_impl(lambda *args, call: jax.jit(call)(*args))
    primitive.def_abstract_eval(
        lambda *avals, call: [ShapedArray(a.shape, a.dtype) for a in call.avals(*avals)]
    )
    mlir.register_lowering(
        primitive, mlir.lower_fun(lambda *args, call: call(*args), multiple_results=True)
    )
    batching.primitive_batchers[primitive] = partial(_batch, primitive)
    ad.primitive_jvps[primitive] = partial(_jvp, primitive)
    ad.primitive_transposes[primitive] = partial(_transpose, primitive)
    return primitive


def _batch(primitive: Any, args: Any, dims: Any, *, call: Any) -> Any:
    batched, args = call.batched(args, dims)
    results = primitive.bind(*args, call=batched)
    return results, (0,) * len(results)


def _jvp(primitive: Any, primals: Any, tangents: Any, *, call: Any) -> Any:
    results = primitive.bind(*primals, call=call)
    wrt = tuple(i for i, t in enumerate(tangents) if type(t) is not ad.Zero)
    kept = tuple(i for i, r in enumerate(results) if jnp.issubdtype(r.dtype, jnp.inexact))
    found = [ad.Zero(jax.typeof(r).to_tangent_aval()) for r in results]
    if wrt and kept:
        moving = primitive.bind(
            *primals, *(tangents[i] for i in wrt), call=Tangent(call, wrt, kept)
        )
        for i, t in zip(kept, moving, strict=True):
            found[i] = t
    return results, found


def _transpose(primitive: Any, cotangents: Any, *args: Any, call: Any) -> Any:
    count = len(args) - len(call.wrt)  # operands first, then their tangents
    given = map(ad.instantiate_zeros, cotangents)
    found = primitive.bind(*args[:count], *given, call=Cotangent(call))
    wanted = [ad.is_undefined_primal(x) for x in args[count:]]
    return [None] * count + [x if w else None for x, w in zip(found, wanted, strict=True)]


def _traced(ctx: Local, op: OpInfo, *operands: Any) -> Sequence[Any]:
    """The function at local shapes."""
    try:
        return op.params["call"](*operands)
    except Exception as error:
        shapes = ", ".join(str(list(x.shape)) for x in operands)
        error.add_note(
            f"{op.primitive} was traced for shards of shapes {shapes}. A dim that it cannot take "
            "in parts belongs into fixed= of its sharding.rule."
        )
        raise


class _Function:
    """What equations call: a function of flat arrays, with the names of their dims."""

    names: Names

    def __call__(self, *arrays: Any) -> list[Any]:
        raise NotImplementedError

    def avals(self, *avals: Any) -> list[Any]:
        return jax.eval_shape(self.__call__, *avals)

    def batched(self, args: Sequence[Any], dims: Sequence[int | None]) -> tuple[Any, Sequence[Any]]:
        """What to call under vmap, and with which arrays."""
        return Batched(self, tuple(dims)), args

    def depth(self) -> int:
        """Of the functions that it is made of."""
        return 0


@dataclass(frozen=True)
class Call(_Function):
    """The user's function.

    Attributes:
      dynamic: per leaf of the arguments, whether it is an array; `static` has the others.
    """

    fun: Callable
    names: Names
    tree: Any
    dynamic: tuple[bool, ...]
    static: tuple[Any, ...]

    def structured(self, *arrays: Any) -> Any:
        left = iter(arrays)
        pairs = zip(self.dynamic, self.static, strict=True)
        args, kwargs = jax.tree.unflatten(
            self.tree, [next(left) if is_array else x for is_array, x in pairs]
        )
        return self.fun(*args, **kwargs)

    def __call__(self, *arrays: Any) -> list[Any]:
        return jax.tree.leaves(self.structured(*arrays))


@dataclass(frozen=True)
class Batched(_Function):
    """A function under vmap over `dims` of its operands; results have the new dim in front."""

    call: _Function
    dims: tuple[int | None, ...]

    @cached_property
    def names(self) -> Names:
        names, new = self.call.names, f"vmap{self.call.depth()}"
        operands = tuple(
            dims if d is None else (*dims[:d], (new,), *dims[d:])
            for dims, d in zip(names.operands, self.dims, strict=True)
        )
        results = tuple(((new,), *dims) for dims in names.results)
        return replace(names, operands=operands, results=results)

    def __call__(self, *arrays: Any) -> list[Any]:
        return jax.vmap(self.call, in_axes=self.dims)(*arrays)

    def depth(self) -> int:
        return 1 + self.call.depth()


@dataclass(frozen=True)
class Tangent(_Function):
    """(operands, tangents of those in `wrt`) -> tangents of the results in `kept`."""

    call: _Function
    wrt: tuple[int, ...]
    kept: tuple[int, ...]

    @cached_property
    def names(self) -> Names:
        names = _differentiable(self.call.names)
        return replace(
            names, operands=(*names.operands, *(names.operands[i] for i in self.wrt)),
            results=tuple(names.results[r] for r in self.kept),
            combine=tuple(names.combine[r] for r in self.kept) if names.combine else (),
        )  # fmt: skip

    def of(self, operands: Sequence[Any]) -> Callable:
        """The results in `kept` as a function of the operands in `wrt`."""

        def fun(*xs: Any) -> list[Any]:
            every = list(operands)
            for i, x in zip(self.wrt, xs, strict=True):
                every[i] = x
            results = self.call(*every)
            return [results[r] for r in self.kept]

        return fun

    def __call__(self, *arrays: Any) -> list[Any]:
        count = len(self.call.names.operands)
        operands, tangents = arrays[:count], arrays[count:]
        at = [operands[i] for i in self.wrt]
        return jax.jvp(self.of(operands), at, list(tangents))[1]

    def avals(self, *avals: Any) -> list[Any]:
        # The function may have a rule of its own for reverse mode, and none for forward mode.
        results = self.call.avals(*avals[: len(self.call.names.operands)])
        return [results[r] for r in self.kept]

    def batched(self, args: Sequence[Any], dims: Sequence[int | None]) -> tuple[Any, Sequence[Any]]:
        """The tangent of the batched function: operands and their tangents are batched alike."""
        args, dims = list(args), list(dims)
        size = next(x.shape[d] for x, d in zip(args, dims, strict=True) if d is not None)
        count = len(self.call.names.operands)
        for k, i in enumerate(self.wrt):
            pair = (i, count + k)
            if dims[i] == dims[count + k]:
                continue
            for place in pair:
                args[place] = _batch_first(args[place], dims[place], size)
                dims[place] = 0
        return Tangent(Batched(self.call, tuple(dims[:count])), self.wrt, self.kept), args

    def depth(self) -> int:
        return 1 + self.call.depth()


@dataclass(frozen=True)
class Cotangent(_Function):
    """(operands, cotangents of the kept results) -> cotangents of the operands in `wrt`."""

    call: Tangent

    @cached_property
    def names(self) -> Names:
        tangent = self.call
        names = _differentiable(tangent.call.names)
        return replace(
            names, combine=("add",) * len(tangent.wrt),
            operands=(*names.operands, *(names.results[r] for r in tangent.kept)),
            results=tuple(names.operands[i] for i in tangent.wrt),
        )  # fmt: skip

    def __call__(self, *arrays: Any) -> list[Any]:
        tangent = self.call
        count = len(tangent.call.names.operands)
        operands = arrays[:count]
        _, back = jax.vjp(tangent.of(operands), *[operands[i] for i in tangent.wrt])
        return list(back(list(arrays[count:])))

    def avals(self, *avals: Any) -> list[Any]:
        return [avals[i] for i in self.call.wrt]

    def depth(self) -> int:
        return 1 + self.call.depth()


def _batch_first(x: Any, dim: int | None, size: int) -> Any:
    if dim is None:
        return jnp.broadcast_to(x, (size, *x.shape))
    return jnp.moveaxis(x, dim, 0)


def _differentiable(names: Names) -> Names:
    """The names, with those fixed by name that were fixed by where they are."""
    if names.reduced and names.reduce != "add" or set(names.combine) - {"add"}:
        names.fail(
            f"is differentiated, and reduces by {names.reduce}",
            "only the derivative of a sum is the sum of the shards' derivatives",
            "give the function a jax.custom_vjp, or name the reduced dims in fixed=",
        )
    every = names_in((*names.operands, *names.results))
    return replace(names, fixed=frozenset(n for n in every if names.kind(n)[0] is Kind.FIXED))
