"""JAX's own harnesses and primitives; the one file of the tests that imports `jax._src`."""

import importlib
import pkgutil
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax._src import core
from jax._src.internal_test_util import test_harnesses
from jax.extend.core import ClosedJaxpr

from tests.conformance import more


@dataclass(frozen=True)
class Harness:
    """A function on arrays that exercises one primitive.

    Attributes:
      name: unique, such as `cumsum_axis_by_fun_shape_float32_8_9_axis_0_reverse_False`.
      group: the primitive, or the function it is for.
      fun: a function of arrays.
      make: random state -> the arrays.
    """

    name: str
    group: str
    fun: Callable
    make: Callable[[Any], Sequence[Any]]

    @cached_property
    def arguments(self) -> tuple[Any, ...]:
        """The arrays, the same in every run; in the dtypes that JAX would give them."""
        made = self.make(np.random.RandomState(0))
        return tuple(np.asarray(x, jax.dtypes.canonicalize_dtype(x.dtype)) for x in made)

    @cached_property
    def closed(self) -> Any:
        """The traced function: equations at global shapes."""
        closed = jax.make_jaxpr(self.fun)(*self.arguments)
        eqns = [_completed(eqn) for eqn in closed.jaxpr.eqns]
        return ClosedJaxpr(closed.jaxpr.replace(eqns=eqns), closed.consts)


# Harnesses bind some primitives without all of their parameters, as no public function does, and
# parts of JAX ask for those.
_PUBLIC: dict[str, Callable] = {
    "mul": lambda x: lax.mul(x, x),
    "reduce_max": lambda x: lax.reduce_max(x, (0,)),
    "reduce_min": lambda x: lax.reduce_min(x, (0,)),
}


def _completed(eqn: Any) -> Any:
    """The equation with the parameters that the primitive's public function would give it."""
    if eqn.primitive.name not in _PUBLIC:
        return eqn
    (public,) = jax.make_jaxpr(_PUBLIC[eqn.primitive.name])(np.ones(1, np.float32)).jaxpr.eqns
    return eqn.replace(params={**public.params, **eqn.params})


@cache
def every() -> tuple[Harness, ...]:
    """All harnesses that JAX can run on CPU, in order of their definition, and those of `more`."""
    found = [
        Harness(h.fullname, h.group_name, h.dyn_fun, h.dyn_args_maker)
        for h in test_harnesses.all_harnesses
        if h.filter("cpu")
    ]
    for name, fun, args in more.CASES:
        found.append(Harness(name, name.split("-")[0], fun, lambda rng, args=args: args))
    return tuple(found)


@cache
def by_name() -> dict[str, Harness]:
    return {h.name: h for h in every()}


def groups() -> list[str]:
    return list(dict.fromkeys(h.group for h in every()))


def sample(harnesses: Sequence[Harness], count: int) -> list[Harness]:
    """`count` of the harnesses: one of every group, then a second of every group, and so on.

    Which one is first in its group depends on the names alone; a larger sample contains a smaller.
    """
    ranked: dict[str, list[Harness]] = {}
    for h in sorted(harnesses, key=lambda h: (zlib.crc32(h.name.encode()), h.name)):
        ranked.setdefault(h.group, []).append(h)
    place = {h.name: i for members in ranked.values() for i, h in enumerate(members)}
    chosen = {h.name for h in sorted(harnesses, key=lambda h: place[h.name])[:count]}
    return [h for h in harnesses if h.name in chosen]


# Packages that define primitives. Test utilities and command line tools are left out.
_PACKAGES = (
    "jax._src", "jax._src.lax", "jax._src.interpreters", "jax._src.state", "jax._src.random",
    "jax._src.cudnn", "jax._src.export", "jax._src.pallas", "jax._src.pallas.mosaic",
    "jax._src.pallas.mosaic_gpu", "jax.experimental.sparse",
)  # fmt: skip
_LEFT_OUT = ("test_", "tools", "mosaic_gpu_", "internal_test_util", "shard_map_internal")


@cache
def primitives() -> dict[str, tuple[Any, str]]:
    """Name -> (a primitive of that name, the module that defines it), of everything in JAX.

    Several primitives of one name (kernels have some of their own) count once: the one that is
    public, or defined in the module that comes first.
    """
    found: dict[str, tuple[Any, str]] = {}
    for module in _modules():
        for value in list(vars(module).values()):
            if isinstance(value, core.Primitive):
                found.setdefault(value.name, (value, module.__name__))
    return dict(sorted(found.items()))


def _modules() -> Iterator[Any]:
    yield importlib.import_module("jax.extend.core.primitives")
    for package in _PACKAGES:
        try:
            home = importlib.import_module(package)
        except ImportError:
            continue
        names = [package, *(f"{package}.{m.name}" for m in pkgutil.iter_modules(home.__path__))]
        for name in sorted(names):
            if not any(part in name for part in _LEFT_OUT):
                try:
                    yield importlib.import_module(name)
                except Exception:  # for other machines than this one
                    continue


def key_data(x: Any) -> Any:
    """Random keys as integers; other arrays as they are."""
    return jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.extended) else x
