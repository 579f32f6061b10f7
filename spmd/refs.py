"""Mutable arrays (`jax.Ref`) among the arguments of a call.

A program takes and returns arrays. Of a function that changes some in place another one is made,
which takes their values and returns the new ones; these are written back after each call.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import jax

from sharding._jax import jit as _jit
from sharding.errors import ArgumentError, Problem
from spmd.options import Options


def places(args: Any) -> tuple[int, ...]:
    """Which leaves are mutable arrays.

    Raises:
      ArgumentError: one of them is there twice.
    """
    leaves = jax.tree.leaves(args)
    at = tuple(i for i, leaf in enumerate(leaves) if _jit.is_ref(leaf))
    if len({id(leaves[i]) for i in at}) < len(at):
        raise ArgumentError(
            Problem(
                f"one mutable array (jax.Ref) is passed as {len(at)} arguments",
                "what is written to one of them would not be seen in the others",
                "pass it once",
            )
        )
    return at


def on_values(fun: Callable, at: Sequence[int]) -> Callable:
    """`fun` on values in place of mutable arrays; returns its result and the new values."""

    @functools.wraps(fun, updated=())
    def pure(*args: Any, **kwargs: Any) -> Any:
        leaves, tree = jax.tree.flatten((args, kwargs))
        for i in at:
            leaves[i] = jax.new_ref(leaves[i])
        args, kwargs = jax.tree.unflatten(tree, leaves)
        return fun(*args, **kwargs), [leaves[i][...] for i in at]

    return pure


def options_on_values(options: Options) -> Options:
    """The options of the function on values: it may not give away what the caller keeps."""
    outs = options.out_shardings
    return replace(options, out_shardings=None if outs is None else (outs, None))


def call(function: Callable, at: Sequence[int], args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """Calls the function on values, and writes the new ones back."""
    leaves, tree = jax.tree.flatten((args, kwargs))
    refs = [leaves[i] for i in at]
    for i in at:
        leaves[i] = leaves[i][...]
    args, kwargs = jax.tree.unflatten(tree, leaves)
    results, values = function(*args, **kwargs)
    for ref, value in zip(refs, values, strict=True):
        ref[...] = value
    return results
