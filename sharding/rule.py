"""`Rule`: the one declaration per primitive that drives every stage, and its registry.

A rule names the *factors* (iteration dims) of an equation and says which array dims they make up.
`dot_general` of `bm,mh->bh` has the factors b, m and h; b and h pass through, m is reduced by add.
Propagation, partitioning, padding, cost and explanations all read this one declaration.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from functools import cached_property, lru_cache
from typing import Any, NamedTuple, Protocol

from sharding.errors import Problem, RuleError


class Kind(Enum):
    """What may happen along a factor when it is sharded."""

    PASS = "pass"  # every shard is computed on its own
    REDUCE = "reduce"  # shards hold addends (or other monoid operands) of the result
    FIXED = "fixed"  # must not be sharded: gathered by plan


class Factor(NamedTuple):
    """One iteration dim: its global size, its kind and, for REDUCE, the monoid."""

    size: int
    kind: Kind = Kind.PASS
    monoid: str = ""


Dims = tuple[tuple[str, ...], ...]


class Local(Protocol):
    """What a `local` function may ask of the partitioner. Implemented in `spmd/partition`."""

    def axes(self, factor: str) -> tuple[str, ...]:
        """Mesh axes that shard `factor`, major to minor."""
        ...

    def shards(self, factor: str) -> int:
        """Number of shards of `factor`."""
        ...

    def local_size(self, factor: str) -> int:
        """ceil(size / shards)."""
        ...

    def offset(self, factor: str) -> Any:
        """Traced int32: global index of this device's first element along `factor`."""
        ...

    def local_out(self, result: int) -> tuple[int, ...]:
        """Local shape of a result."""
        ...

    def index(self, axes: tuple[str, ...]) -> Any:
        """Traced int32: this device's place along `axes`, major to minor."""
        ...

    def mask(self, x: Any, operand: int, factor: str, fill: Any) -> Any:
        """`x` with the padding of an uneven `factor` replaced by `fill`."""
        ...

    def all_gather(self, x: Any, axes: tuple[str, ...], dim: int) -> Any:
        """Shards along `axes` concatenated on `dim`."""
        ...

    def bind(self, *operands: Any, **changed: Any) -> Sequence[Any]:
        """The primitive at local shapes, `resize` applied, with `changed` parameters."""
        ...


class OpInfo(Protocol):
    """What a rule function sees of an equation: global shapes and static parameters."""

    primitive: Any
    params: Mapping[str, Any]

    @property
    def in_avals(self) -> Sequence[Any]: ...

    @property
    def out_avals(self) -> Sequence[Any]: ...

    def literal(self, operand: int) -> Any:
        """Value of a literal operand, or None."""
        ...


@dataclass(frozen=True)
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
      identity: the operand is the result: nothing is bound.
      elementary: result i is operand i whatever the others are: each keeps the layout it has.
      masked: whether re-binding needs the padding of uneven REDUCE factors masked (default).
      early: pointwise, reshape, transpose and data-flow edges, which propagate first.
      expands: the result is a larger copy of the operand: operands hear of results early, results
        of operands last.
      annotation: the user's spec on the result, not yet resolved against axis rules and mesh.
      flops: floating-point operations per element of the iteration space.
    """

    operands: tuple[Dims, ...]
    results: tuple[Dims, ...]
    factors: Mapping[str, Factor]
    linear: tuple[tuple[int, ...], ...] = ()
    resize: tuple[tuple[str, int], ...] = ()
    local: Callable[..., Sequence[Any]] | None = None
    local_when: frozenset[str] | None = None
    identity: bool = False
    elementary: bool = False
    masked: bool = True
    early: bool = False
    expands: bool = False
    annotation: Any = None
    flops: int = 1
    # Filled in below; part of the declaration only by consequence.
    tensors: tuple[Dims, ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "tensors", self.operands + self.results)

    @cached_property
    def even(self) -> frozenset[str]:
        """Factors that share a dim with another: only even shards keep such a dim contiguous."""
        return frozenset(
            f for dims in self.tensors for names in dims if len(names) > 1 for f in names
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
    def simple(self) -> bool:
        """Every dim has at most one factor."""
        return not self.even

    def __str__(self) -> str:
        def side(tensors: tuple[Dims, ...]) -> str:
            return ", ".join(" ".join("".join(d) or "1" for d in dims) or "()" for dims in tensors)

        kinds = [f"{n}:{f.kind.value}" + (f"({f.monoid})" if f.monoid else "")
                 for n, f in self.factors.items() if f.kind is not Kind.PASS]
        return f"{side(self.operands)} -> {side(self.results)}" + (
            f" [{', '.join(kinds)}]" if kinds else "")


RuleFn = Callable[[OpInfo], Rule]


@dataclass(frozen=True)
class Port:
    """An operand or result of a control-flow equation, tied to a value at a region's boundary.

    Attributes:
      outer: index of the operand (or result).
      region: index of the region.
      inner: index of the region's input (or output).
      stacked: the outer value has one more leading dim, which the loop runs over.
    """

    outer: int
    region: int
    inner: int
    stacked: bool = False


@dataclass(frozen=True)
class Control:
    """A primitive with regions: how it ties values across their boundaries, and how to rebuild it.

    Attributes:
      bodies: params -> the closed jaxprs of the regions.
      inputs: op -> ports of operands; one operand may have several.
      outputs: op -> ports of results.
      carries: op -> (region, output, input) triples that must agree, as in a loop.
      build: (params, traceable region functions, local operands) -> local results.
      trips: op -> how often each region runs, for counting; 1 where unknown.
    """

    bodies: Callable[[Mapping[str, Any]], Sequence[Any]]
    inputs: Callable[[Any], Sequence[Port]]
    outputs: Callable[[Any], Sequence[Port]]
    build: Callable[[Mapping[str, Any], Sequence[Callable], Sequence[Any]], Sequence[Any]]
    carries: Callable[[Any], Sequence[tuple[int, int, int]]] = lambda op: ()
    trips: Callable[[Any], int] = lambda op: 1


@dataclass
class Registry:
    """Everything the project knows about primitives: rules, control flow, and what is inlined."""

    rules: dict[Any, RuleFn] = field(default_factory=dict)
    controls: dict[Any, Control] = field(default_factory=dict)
    inlined: dict[Any, Callable[[Mapping[str, Any]], Any]] = field(default_factory=dict)

    def claim(self, primitive: Any) -> None:
        if primitive in self.rules or primitive in self.controls or primitive in self.inlined:
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


def register_inline(primitive: Any, body: Callable[[Mapping[str, Any]], Any]) -> None:
    """`primitive` is replaced by the equations of `body(params)`, a closed jaxpr."""
    REGISTRY.claim(primitive)
    REGISTRY.inlined[primitive] = body


def names(prefix: str, count: int) -> tuple[str, ...]:
    return tuple(f"{prefix}{i}" for i in range(count))


def pointwise_rule(
    in_shapes: Sequence[tuple[int, ...]],
    out_shapes: Sequence[tuple[int, ...]],
    linear: tuple[tuple[int, ...], ...] = (),
) -> Rule:
    """One factor per dim of the results; size-1 and scalar operands broadcast without a factor."""
    return _pointwise_rule(tuple(in_shapes), tuple(out_shapes), linear)


@lru_cache(maxsize=8192)
def identity_rule(shape: tuple[int, ...], annotation: Any = None) -> Rule:
    """The result is the operand, on which the user's `annotation` may say where it lies."""
    same = pointwise_rule([shape], [shape])
    return Rule(same.operands, same.results, same.factors, identity=True, early=True,
                annotation=annotation)


@lru_cache(maxsize=8192)
def _pointwise_rule(
    in_shapes: tuple[tuple[int, ...], ...],
    out_shapes: tuple[tuple[int, ...], ...],
    linear: tuple[tuple[int, ...], ...],
) -> Rule:
    shape = max(out_shapes, key=len) if out_shapes else max(in_shapes, key=len)
    dims = names("d", len(shape))

    def of(operand: tuple[int, ...]) -> Dims:
        if len(operand) != len(shape):
            return ((),) * len(operand)
        return tuple(
            (dims[i],) if n == shape[i] and n != 1 else () for i, n in enumerate(operand)
        )

    factors = {d: Factor(n) for d, n in zip(dims, shape, strict=True) if n != 1}
    return Rule(
        tuple(map(of, in_shapes)), tuple(map(of, out_shapes)), factors,
        linear=linear, early=True,
    )  # fmt: skip


@lru_cache(maxsize=8192)
def edge_rule(shape: tuple[int, ...], stacked: bool) -> Rule:
    """The identity between a value at a region's boundary (first) and its partner outside.

    A stacked partner has one more leading dim, over which the loop runs: it is FIXED.
    """
    dims = names("d", len(shape))
    factors = {d: Factor(n) for d, n in zip(dims, shape, strict=True) if n != 1}
    inner = tuple((d,) if n != 1 else () for d, n in zip(dims, shape, strict=True))
    if not stacked:
        return Rule((inner,), (inner,), factors, early=True)
    factors["loop"] = Factor(0, Kind.FIXED)
    return Rule((inner,), ((("loop",), *inner),), factors, early=True)


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
