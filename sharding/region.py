"""Equations with bodies: how values are tied across a region's boundary, and what is inlined."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from sharding import _jax
from sharding.mesh import MeshShape


@dataclass(frozen=True)
class Port:
    """An operand or result of a control-flow equation, tied to a value at a region's boundary.

    Attributes:
      outer: index of the operand (or result).
      region: index of the region.
      inner: index of the region's input (or output).
      stacked: the outer value has one more leading dim, which the loop runs over.
      lead: per dim, axes that are manual in the region; the region sees one of their shards.
    """

    outer: int
    region: int
    inner: int
    stacked: bool = False
    lead: tuple[tuple[str, ...], ...] = ()

    def outside(self, dims: tuple[tuple[str, ...], ...]) -> tuple[tuple[str, ...], ...]:
        """The dims of the outer value's layout, from those of the inner one's."""
        if self.lead:
            return tuple(a + b for a, b in zip(self.lead, dims, strict=True))
        return ((), *dims) if self.stacked else dims


class Manual(NamedTuple):
    """Mesh axes that the equations of a region know by name: the partitioner leaves them alone.

    Attributes:
      mesh: of the `jax.shard_map` that the region is the body of.
      axes: the manual ones among its axes.
    """

    mesh: MeshShape
    axes: frozenset[str]

    @property
    def full(self) -> bool:
        """Nothing is left for the partitioner."""
        return all(name in self.axes or size == 1 for name, size in self.mesh.axes)


@dataclass(frozen=True)
class Control:
    """A primitive with regions: how it ties values across their boundaries, and how to rebuild it.

    Attributes:
      bodies: params -> the closed jaxprs of the regions.
      inputs: op -> ports of operands; one operand may have several.
      outputs: op -> ports of results.
      carries: op -> (region, output, input) triples that must agree, as in a loop.
      build: (params, traceable region functions, local operands) -> local results.
      trips: op, or equation of a jaxpr -> how often each region runs, to count; 1 where unknown.
      counted: all devices run a loop equally often, whatever its values are.
      exclusive: one of the regions runs, not all of them.
      manual: params -> axes that become manual in the regions.
      trees: operands and results of `build` and of the regions may be pytrees.
      in_parts: op -> (JAX mesh, axes) -> a JAX function of its operands and parameters that does
        the same, in which every device along the axes runs steps of its own; None where the steps
        of a loop need one another.
      enter: with manual axes, a primitive for the identity on each operand: what this equation
        demands of its layout is demanded of no other reader.
    """

    bodies: Callable[[Mapping[str, Any]], Sequence[Any]]
    inputs: Callable[[Any], Sequence[Port]]
    outputs: Callable[[Any], Sequence[Port]]
    build: Callable[[Mapping[str, Any], Sequence[Callable], Sequence[Any]], Sequence[Any]]
    carries: Callable[[Any], Sequence[tuple[int, int, int]]] = lambda op: ()
    trips: Callable[[Any], int] = lambda op: 1
    counted: bool = False
    exclusive: bool = False
    manual: Callable[[Mapping[str, Any]], Manual | None] = lambda params: None
    trees: bool = False
    in_parts: Callable[[Any], Callable[..., Callable] | None] = lambda op: None
    enter: Any = None


class Inline(NamedTuple):
    """A primitive that is replaced by the equations of its body.

    Attributes:
      body: params -> closed jaxpr; None: see `function`.
      operands: (params, number of operands) -> those that the body takes; by default all.
      axis_rules: (params, those around it) -> the axis rules that annotations in the body obey.
      function: a function of JAX arrays that does the same: (*operands, **params) -> results.
    """

    body: Callable[[Mapping[str, Any]], Any] | None
    operands: Callable[[Mapping[str, Any], int], Sequence[int]] = lambda params, n: range(n)
    axis_rules: Callable[[Mapping[str, Any], Any], Any] = lambda params, around: around
    function: Callable[..., Any] | None = None

    def expand(self, eqn: Any) -> Any:
        """The closed jaxpr that replaces an equation."""
        if self.function is not None:
            return _jax.traced_as(self.function, eqn)
        assert self.body is not None
        return self.body(eqn.params)
