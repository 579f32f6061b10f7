"""`Rule`: the one declaration per primitive that drives every stage, and its registry.

A rule names the *factors* (iteration dims) of an equation and says which array dims they make up.
`dot_general` of `bm,mh->bh` has the factors b, m and h; b and h pass through, m is reduced by add.
Propagation, partitioning, padding, cost and explanations all read this one declaration.
"""

from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from enum import Enum
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sharding.errors import Problem, RuleError
from sharding.local import Local as Local
from sharding.local import OpInfo as OpInfo
from sharding.region import Control, Inline


class Kind(Enum):
    """What may happen along a factor when it is sharded."""

    PASS = "pass"  # every shard is computed on its own
    REDUCE = "reduce"  # shards hold addends (or other monoid operands) of the result
    PERMUTE = "permute"  # shards are computed from their own and their neighbours' elements
    FIXED = "fixed"  # must not be sharded: gathered by plan


class Factor(NamedTuple):
    """One iteration dim: its global size, its kind and, for REDUCE, the monoid.

    A PERMUTE factor may have another size in operands than in results (windows, strides, padding):
    its size is that of the result.
    """

    size: int
    kind: Kind = Kind.PASS
    monoid: str = ""


Dims = tuple[tuple[str, ...], ...]


class Gathered(NamedTuple):
    """Why operands are gathered along a factor, and what avoids it."""

    why: str
    remedy: str = ""


def _nowhere(shards: Mapping[str, int], free: Set[int] = frozenset()) -> Mapping[str, Gathered]:
    return {}


@dataclass(frozen=True, eq=False)
class Rule:
    """How the factors of one equation make up the dims of its operands and results.

    Attributes:
      operands: per operand and dim the factor names, major to minor; () for a dim of size 1.
      results: the same for the results.
      factors: every factor by name.
      linear: groups of operands in which the equation is linear *together*: when every operand of
        one group is partial by `add` along an axis, the results are partial by `add` too.
        add has ((0, 1),), mul ((0,), (1,)).
      resize: shape-bearing parameter -> index of the result whose local shape replaces it.
      local: what plain re-binding at local shapes cannot do.
      local_when: factors whose sharding calls for `local`; None: any of them.
      always: `local` is called whatever is sharded.
      gathers: (number of shards per sharded factor, operands that are whole anyway) -> factors that
        are left whole then, because what `local` exchanges would be more than gathering the others.
      identity: the operand is the result: nothing is bound.
      alone: factor -> factors that must not be sharded with it. Such a factor comes first in dims
        of several: it stands for the whole dim, and is used where the others cannot express a
        sharding (uneven merges and splits); its `local` function exchanges what crosses shards.
      divided: factors that only axes that divide them may shard: padding would count.
      elementary: result i is operand i whatever the others are: each keeps the layout it has.
      owned: factor -> (tensor, place): of all shards of the factor, only the one that holds `place`
        makes the result (others make zeros), or reads the operand. Results come after operands.
      fetches: operands of which `local` takes all by `fetch` along PERMUTE factors: where one is
        whole on every device anyway it may stay so, and each takes its part of it.
      keeps: factor of rows that are taken from a tensor -> factor of those that were taken, which
        keep the axes where nothing else shards them: what is made of them is not repeated.
      masked: whether re-binding needs the padding of uneven REDUCE factors masked (default).
      early: pointwise, reshape, transpose and data-flow edges, which propagate first.
      expands: the result is a larger copy of the operand: operands hear of results early, results
        of operands last.
      once: pointwise, but too dear to be computed again for each reader.
      spatial: factors that the kernel of a convolution passes over.
      annotation: the user's spec on the result, not yet resolved against axis rules and mesh.
      flops: floating-point operations per element of the iteration space; 0 of what only takes
        elements, or writes them.
    """

    operands: tuple[Dims, ...]
    results: tuple[Dims, ...]
    factors: Mapping[str, Factor]
    linear: tuple[tuple[int, ...], ...] = ()
    resize: tuple[tuple[str, int], ...] = ()
    local: Callable[..., Sequence[Any]] | None = None
    local_when: frozenset[str] | None = None
    always: bool = False
    gathers: Callable[..., Mapping[str, Gathered]] = _nowhere
    identity: bool = False
    alone: Mapping[str, frozenset[str]] = field(default_factory=dict)
    divided: frozenset[str] = frozenset()
    spatial: frozenset[str] = frozenset()
    elementary: bool = False
    keeps: Mapping[str, str] = field(default_factory=dict)
    owned: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    fetches: tuple[int, ...] = ()
    masked: bool = True
    early: bool = False
    expands: bool = False
    once: bool = False
    annotation: Any = None
    flops: int = 1
    # Filled in below; part of the declaration only by consequence.
    tensors: tuple[Dims, ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "tensors", self.operands + self.results)

    @cached_property
    def canonical(self) -> "Rule":
        """The declaration without its other functions, one object for all that are equal, as those
        of repeated layers: what follows from it alone is worked out once, and kept. So `gathers`
        is equal to others, and holds on to no equation."""
        owned, alone = tuple(self.owned.items()), tuple(self.alone.items())
        keeps = tuple(self.keeps.items())
        return _canonical(
            self.operands, self.results, tuple(self.factors.items()), self.linear, alone, keeps,
            self.divided, owned, self.elementary, self.early, self.expands, self.flops,
            self.gathers, self.fetches,
        )  # fmt: skip

    @cached_property
    def even(self) -> frozenset[str]:
        """Factors that are sharded evenly or not at all: those that are `divided`, and those that
        share a dim with another, since only even shards keep such a dim contiguous."""
        return self.divided | frozenset(
            f for dims in self.tensors for names in dims if len(names) > 1 for f in names
            if f not in self.alone
        )

    @cached_property
    def where(self) -> Mapping[str, tuple[tuple[int, int], ...]]:
        """factor -> its (tensor, dim) places; results are numbered after operands."""
        places: dict[str, list[tuple[int, int]]] = {name: [] for name in self.factors}
        for t, dims in enumerate(self.tensors):
            for d, names in enumerate(dims):
                for name in names:
                    places[name].append((t, d))
        return {name: tuple(where) for name, where in places.items()}

    @cached_property
    def spread(self) -> frozenset[int]:
        """Operands that are repeated along factors of the result which they do not have, as a bias
        is along the batch."""
        if self.elementary or not (self.early or self.expands):
            return frozenset()
        made = {f for dims in self.results for names in dims for f in names}
        wide = {f for f in made if self.factors[f].size > 1}
        own = [{f for names in dims for f in names} for dims in self.operands]
        return frozenset(t for t, mine in enumerate(own) if not wide <= mine)

    @cached_property
    def simple(self) -> bool:
        """Every dim has at most one factor, which may be sharded in any way."""
        return not self.even and not self.alone

    @property
    def picky(self) -> bool:
        """Whether there are factors that are rather left whole, see `gathers`."""
        return self.gathers is not _nowhere

    def __str__(self) -> str:
        def side(tensors: tuple[Dims, ...]) -> str:
            return ", ".join(" ".join("".join(d) or "1" for d in dims) or "()" for dims in tensors)

        kinds = [f"{n}:{f.kind.value}" + (f"({f.monoid})" if f.monoid else "")
                 for n, f in self.factors.items() if f.kind is not Kind.PASS]
        return f"{side(self.operands)} -> {side(self.results)}" + (
            f" [{', '.join(kinds)}]" if kinds else "")


@lru_cache(maxsize=1 << 14)
def _canonical(
    operands: tuple[Dims, ...], results: tuple[Dims, ...], factors: tuple[tuple[str, Factor], ...],
    linear: tuple[tuple[int, ...], ...], alone: tuple[tuple[str, frozenset[str]], ...],
    keeps: tuple[tuple[str, str], ...], divided: frozenset[str],
    owned: tuple[tuple[str, tuple[int, int]], ...],
    elementary: bool, early: bool, expands: bool, flops: int, gathers: Callable,
    fetches: tuple[int, ...],
) -> Rule:  # fmt: skip
    return Rule(
        operands, results, dict(factors), linear, alone=dict(alone), keeps=dict(keeps),
        divided=divided,
        owned=dict(owned), elementary=elementary, early=early, expands=expands, flops=flops,
        gathers=gathers, fetches=fetches,
    )  # fmt: skip


class Merged(NamedTuple):
    """What several equations make together: a function of JAX arrays, and the values it is of."""

    function: Callable[..., Any]
    operands: Sequence[Any]


RuleFn = Callable[[OpInfo], Rule]
MergeFn = Callable[[Mapping[str, Any], Sequence[Any]], Merged | None]


@dataclass
class Registry:
    """Everything the project knows about primitives: rules, control flow, and what is inlined.

    Attributes:
      opaque: name of a primitive that runs anything -> parameters -> what it runs.
      merged: primitive -> (parameters, operands) -> what it makes together with the equations that
        make its operands, see `register_merged`.
    """

    rules: dict[Any, RuleFn] = field(default_factory=dict)
    controls: dict[Any, Control] = field(default_factory=dict)
    inlined: dict[Any, Inline] = field(default_factory=dict)
    opaque: dict[str, Callable[[Mapping[str, Any]], str]] = field(default_factory=dict)
    apart: dict[Any, Callable[[Mapping[str, Any], int], Mapping[str, Any]]] = field(
        default_factory=dict
    )
    merged: dict[Any, "MergeFn"] = field(default_factory=dict)

    def __contains__(self, primitive: Any) -> bool:
        return any(primitive in found for found in (self.rules, self.controls, self.inlined))

    def claim(self, primitive: Any) -> None:
        if primitive in self:
            raise RuleError(
                Problem(
                    f"a second rule for primitive {primitive}",
                    "two rules for one primitive would be two truths",
                    "change the rule that is there, or register it with replace=True",
                )
            )


REGISTRY = Registry()


def register(*primitives: Any, replace: bool = False) -> Callable[[RuleFn], RuleFn]:
    """Decorator: the decorated function is the rule of `primitives`.

    Raises:
      RuleError: a primitive has a rule already and `replace` is not set.
    """

    def decorate(fn: RuleFn) -> RuleFn:
        for primitive in primitives:
            if not replace:
                REGISTRY.claim(primitive)
            REGISTRY.rules[primitive] = fn
        return fn

    return decorate


def register_control(primitive: Any, control: Control) -> None:
    REGISTRY.claim(primitive)
    REGISTRY.controls[primitive] = control


def register_inline(
    primitive: Any, body: Callable[[Mapping[str, Any]], Any] | None, **options: Any
) -> None:
    """`primitive` is replaced by other equations, see `Inline`."""
    REGISTRY.claim(primitive)
    REGISTRY.inlined[primitive] = Inline(body, **options)


def register_apart(
    primitive: Any, one: Callable[[Mapping[str, Any], int], Mapping[str, Any]]
) -> None:
    """`primitive` acts on each operand alone: `one(params, i)` are the parameters for one of them,
    and its rule is for one operand."""
    REGISTRY.apart[primitive] = one


def register_merged(*primitives: Any) -> Callable[[MergeFn], MergeFn]:
    """Decorator: the decorated function recognises what an equation makes together with others.

    It gets parameters and operands (values of a `Program`: what makes one is its `op`), and returns
    what has the same result, or None. Equations that nothing reads any more are left out then.
    """

    def decorate(fn: MergeFn) -> MergeFn:
        for primitive in primitives:
            REGISTRY.merged[primitive] = fn
        return fn

    return decorate


def names(prefix: str, count: int) -> tuple[str, ...]:
    return tuple(f"{prefix}{i}" for i in range(count))


def sum_monoid(dtype: Any) -> str:
    """The monoid under which one element and any number of zeros are that element; "" for keys and
    for floats that have no zero (float8_e8m0fnu)."""
    if jnp.issubdtype(dtype, jax.dtypes.extended) or np.zeros((), dtype) != 0:
        return ""
    return "or" if dtype == jnp.bool_ else "add"


def pointwise_rule(
    in_shapes: Sequence[tuple[int, ...]],
    out_shapes: Sequence[tuple[int, ...]],
    linear: tuple[tuple[int, ...], ...] = (), once: bool = False,
) -> Rule:  # fmt: skip
    """One factor per dim of the results; size-1 and scalar operands broadcast without a factor."""
    return _pointwise_rule(tuple(in_shapes), tuple(out_shapes), linear, once)


@lru_cache(maxsize=8192)
def identity_rule(shape: tuple[int, ...], annotation: Any = None) -> Rule:
    """The result is the operand, on which the user's `annotation` may say where it lies."""
    same = pointwise_rule([shape], [shape])
    return Rule(same.operands, same.results, same.factors, linear=((0,),), identity=True,
                early=True, annotation=annotation)


@lru_cache(maxsize=8192)
def _pointwise_rule(
    in_shapes: tuple[tuple[int, ...], ...],
    out_shapes: tuple[tuple[int, ...], ...],
    linear: tuple[tuple[int, ...], ...], once: bool,
) -> Rule:  # fmt: skip
    shape = max(out_shapes, key=len) if out_shapes else max(in_shapes, key=len)
    dims = names("d", len(shape))

    def of(operand: tuple[int, ...]) -> Dims:
        if len(operand) != len(shape):
            return ((),) * len(operand)
        return tuple(
            (dims[i],) if n == shape[i] and n != 1 else () for i, n in enumerate(operand)
        )

    factors = {d: Factor(n) for d, n in zip(dims, shape, strict=True) if n != 1}
    return Rule(tuple(map(of, in_shapes)), tuple(map(of, out_shapes)), factors, linear=linear,
                early=True, once=once)  # fmt: skip


@lru_cache(maxsize=8192)
def edge_rule(shape: tuple[int, ...], stacked: bool, shards: tuple[int, ...] = ()) -> Rule:
    """The identity between a value at a region's boundary (first) and its partner outside.

    A stacked partner has one more leading dim, over which the loop runs: it is FIXED.
    Of dim d of the partner the region sees one of `shards[d]` manual shards; 0: it has no axes.
    """
    dims = names("d", len(shape))
    factors = {d: Factor(n) for d, n in zip(dims, shape, strict=True) if n != 1}
    inner = tuple((d,) if n != 1 else () for d, n in zip(dims, shape, strict=True))
    if stacked:
        factors["loop"] = Factor(0, Kind.FIXED)
        keeps = {"loop": inner[0][0]} if inner and inner[0] else {}
        return Rule((inner,), ((("loop",), *inner),), factors, keeps=keeps, early=True)
    outer: list[tuple[str, ...]] = list(inner)
    for d, count in enumerate(shards):
        if count:
            factors[f"m{d}"] = Factor(count)
            outer[d] = (f"m{d}", *inner[d])
    return Rule((inner,), (tuple(outer),), factors, early=True)


def replicated_rule(op: OpInfo) -> Rule:
    """No factor may be sharded: every operand is gathered, every result is whole."""
    factors: dict[str, Factor] = {}

    def of(side: str, avals: Sequence[Any]) -> tuple[Dims, ...]:
        tensors = []
        for i, aval in enumerate(avals):
            dims = []
            for d, n in enumerate(getattr(aval, "shape", ())):
                name = f"{side}{i}_{d}"
                factors[name] = Factor(n, Kind.FIXED)
                dims.append((name,))
            tensors.append(tuple(dims))
        return tuple(tensors)

    return Rule(of("i", op.in_avals), of("o", op.out_avals), factors)
