"""What a `Program` is made of: values, equations, and the regions that hold them."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

from sharding import _jax
from sharding.region import Control, Manual, Port
from sharding.rule import REGISTRY, Kind, Rule, replicated_rule


class Value:
    """One SSA value: an input, a constant, a literal or a result of an `Op`."""

    __slots__ = ("aval", "const", "dtype", "id", "itemsize", "name", "op", "shape")

    def __init__(self, id: int, aval: Any, name: str = "", const: Any = None):
        self.id = id
        self.aval = aval
        self.shape: tuple[int, ...] = tuple(getattr(aval, "shape", ()))
        self.dtype: Any = getattr(aval, "dtype", None)
        # Bytes per element; of a random key, of its words.
        self.itemsize: int = getattr(self.dtype, "itemsize", 4)
        self.name = name
        self.const = const
        self.op: Op | None = None

    @property
    def rank(self) -> int:
        return len(self.shape)

    def __str__(self) -> str:
        return self.name or f"%{self.id}"

    def __repr__(self) -> str:
        return f"{self}: {type_text(self)}"


# What `jax.checkpoint` calls the forward pass that it repeats, and names of JAX's own around it.
_RECOMPUTED = "rematted_computation"
_NOT_MODULES = frozenset(
    (_RECOMPUTED, "checkpoint", "while", "body", "cond", "closed_call", "scan")
)
_TRANSFORMED = re.compile(r"\b(?:jvp|transpose|vmap|jit|pjit|remat|linearize)\(([^()]*)\)")


def _module(stack: str) -> str:
    before = ""
    while before != stack:
        before, stack = stack, _TRANSFORMED.sub(r"\1", stack)
    parts: list[str] = []
    for part in stack.split("/"):
        if part and part not in _NOT_MODULES and part not in parts[-1:]:
            parts.append(part)
    return "/".join(parts)


class Scope(NamedTuple):
    """What is around an operation.

    Attributes:
      site: the equation on a line of the user that it was inlined from, or is in; or None.
      manual: axes that the region it is in keeps to itself.
      axis_rules: those of the nested program that it comes from; None: those of the whole one.
      stack: JAX's name stack of the calls and regions that it is in.
    """

    site: Any = None
    manual: Manual | None = None
    axis_rules: Any = None
    stack: str = ""

    def inside(self, manual: Manual | None) -> "Scope":
        """Of a region in which axes become manual."""
        if manual is not None and self.manual is not None:
            manual = Manual(manual.mesh, manual.axes | self.manual.axes)
        return self._replace(manual=manual or self.manual)


@dataclass(eq=False)
class Op:
    """One equation. `regions` is empty but for control flow."""

    index: int
    primitive: Any
    params: Mapping[str, Any]
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    eqn: Any
    regions: tuple["Region", ...] = ()
    scope: Scope = Scope()

    @property
    def in_avals(self) -> Sequence[Any]:
        return [v.aval for v in self.inputs]

    @property
    def out_avals(self) -> Sequence[Any]:
        return [v.aval for v in self.outputs]

    def literal(self, operand: int) -> Any:
        return self.inputs[operand].const

    @property
    def site(self) -> Any:
        """The equation on a line of the user's code: its own, or the one that it is a part of."""
        unknown = self.scope.site is not None and not _jax.source_of(self.eqn)
        return self.scope.site if unknown else self.eqn

    @cached_property
    def source(self) -> str:
        """`file.py:line (function)` in the user's code; of the call it was inlined from where the
        equation itself was traced in a library."""
        return _jax.source_of(self.site)

    @property
    def stack(self) -> str:
        """JAX's name stack, outermost first: `jvp(Model)/layer0/up`. Modules, `jax.named_scope` and
        transformations write it."""
        return "/".join(filter(None, (self.scope.stack, _jax.name_stack_of(self.eqn))))

    @cached_property
    def module(self) -> str:
        """The name stack without transformations: `Model/layer0/up`, forward and backward."""
        return _module(self.stack)

    @property
    def recomputed(self) -> bool:
        """Whether remat computes again here what the forward pass had computed."""
        return _RECOMPUTED in self.stack

    @cached_property
    def rule(self) -> Rule:
        """The primitive's rule for these shapes.

        One without a rule runs replicated; `Program.check_rules` lets that pass only where the
        user accepted it.
        """
        return REGISTRY.rules.get(self.primitive, replicated_rule)(self)

    @cached_property
    def control(self) -> Control | None:
        return REGISTRY.controls.get(self.primitive)

    @cached_property
    def from_nothing(self) -> bool:
        """An iota, or an array filled with a scalar: any layout of it costs nothing."""
        return (
            self.control is None
            and len(self.outputs) == 1
            and all(v.rank == 0 and v.const is not None for v in self.inputs)
            and self.outputs[0].rank > 0
            and not any(f.kind is Kind.REDUCE for f in self.rule.factors.values())
        )

    @cached_property
    def in_ports(self) -> tuple[Port, ...]:
        return tuple(self.control.inputs(self)) if self.control else ()

    @cached_property
    def out_ports(self) -> tuple[Port, ...]:
        return tuple(self.control.outputs(self)) if self.control else ()

    def __str__(self) -> str:
        return f"{self.primitive.name}.{self.index}"


@dataclass(eq=False)
class Region:
    """A straight-line list of ops: the program's body, or the body of a control-flow op."""

    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    ops: tuple[Op, ...]
    consts: tuple[Value, ...] = ()

    def walk(self) -> Iterator[Op]:
        """Every op, those of nested regions after their parent."""
        for op in self.ops:
            yield op
            for region in op.regions:
                yield from region.walk()


def type_text(value: Value) -> str:
    short = getattr(value.aval, "str_short", None)
    return short(short_dtypes=True) if short else str(value.aval)
