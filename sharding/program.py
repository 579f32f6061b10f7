"""`Program`: the traced function as flat SSA with regions, in names that its user recognises.

Nested calls (jit, custom_jvp, custom_vjp ...) are inlined; scan, while, cond and remat keep their
bodies as regions. Shapes are global. Everything after this stage reads the Program, not the jaxpr.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from sharding import _jax
from sharding.errors import Problem, RuleError
from sharding.rule import REGISTRY, Control, Port, Rule, replicated_rule


class Value:
    """One SSA value: an input, a constant, a literal or a result of an `Op`."""

    __slots__ = ("aval", "const", "id", "name", "op", "shape")

    def __init__(self, id: int, aval: Any, name: str = "", const: Any = None):
        self.id = id
        self.aval = aval
        self.shape: tuple[int, ...] = tuple(getattr(aval, "shape", ()))
        self.name = name
        self.const = const
        self.op: Op | None = None

    @property
    def rank(self) -> int:
        return len(self.shape)

    @property
    def dtype(self) -> Any:
        return getattr(self.aval, "dtype", None)

    def __str__(self) -> str:
        return self.name or f"%{self.id}"

    def __repr__(self) -> str:
        return f"{self}: {type_text(self)}"


@dataclass(eq=False)
class Op:
    """One equation. `regions` is empty but for control flow; `caller` is the source line of the
    call that it was inlined from."""

    index: int
    primitive: Any
    params: Mapping[str, Any]
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    eqn: Any
    regions: tuple["Region", ...] = ()
    caller: str = ""

    @property
    def in_avals(self) -> Sequence[Any]:
        return [v.aval for v in self.inputs]

    @property
    def out_avals(self) -> Sequence[Any]:
        return [v.aval for v in self.outputs]

    def literal(self, operand: int) -> Any:
        return self.inputs[operand].const

    @cached_property
    def source(self) -> str:
        """`file.py:line (function)` in the user's code; of the call it was inlined from where the
        equation itself was traced in a library."""
        return _jax.source_of(self.eqn) or self.caller

    @cached_property
    def rule(self) -> Rule:
        """The primitive's rule for these shapes.

        One without a rule runs replicated; `Program.check_rules` lets that pass only where the
        user accepted it.
        """
        return REGISTRY.rules.get(self.primitive, replicated_rule)(self)

    @property
    def control(self) -> Control | None:
        return REGISTRY.controls.get(self.primitive)

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


@dataclass(eq=False)
class Program:
    """A traced function.

    Attributes:
      body: the top-level region; its inputs and outputs are the flat arguments and results.
      values: every value, by id.
      closed: the closed jaxpr it was made from.
    """

    body: Region
    values: list[Value]
    closed: Any
    effects: Any = field(default=())

    def ops(self) -> Iterator[Op]:
        return self.body.walk()

    @cached_property
    def uses(self) -> list[int]:
        """How often each value is read, by id; a program or region output counts as a use."""
        count = [0] * len(self.values)
        regions = [self.body, *(r for op in self.ops() for r in op.regions)]
        for region in regions:
            for value in region.outputs:
                count[value.id] += 1
            for op in region.ops:
                for value in op.inputs:
                    count[value.id] += 1
        return count

    @cached_property
    def readers(self) -> list[list[tuple[Op, int]]]:
        """By value id, the (op, operand index) pairs that read it."""
        found: list[list[tuple[Op, int]]] = [[] for _ in self.values]
        for op in self.ops():
            for i, value in enumerate(op.inputs):
                found[value.id].append((op, i))
        return found

    def check_rules(self, fallback: str = "error") -> None:
        """Every op has a rule.

        Raises:
          RuleError: naming every primitive without one, unless `fallback` is "replicate".
        """
        missing: dict[Any, list[Op]] = {}
        for op in self.ops():
            if op.primitive not in REGISTRY.rules and op.control is None:
                missing.setdefault(op.primitive, []).append(op)
        if missing and fallback != "replicate":
            raise RuleError(*(_missing_rule(prim, ops) for prim, ops in missing.items()))

    def __str__(self) -> str:
        return "\n".join(render(self))


def build(closed: Any, in_names: Sequence[str] = (), out_names: Sequence[str] = ()) -> Program:
    """A Program from a closed jaxpr; names are those of the flat arguments and results."""
    builder = _Builder()
    body = builder.region(closed, list(in_names))
    for value, name in zip(body.outputs, out_names, strict=False):
        if not value.name and value.const is None:
            value.name = name
    return Program(body, builder.values, closed, _jax.effects_of(closed.jaxpr))


class _Builder:
    def __init__(self) -> None:
        self.values: list[Value] = []
        self.count = 0

    def value(self, aval: Any, name: str = "", const: Any = None) -> Value:
        value = Value(len(self.values), aval, name, const)
        self.values.append(value)
        return value

    def region(self, closed: Any, in_names: list[str], caller: str = "") -> Region:
        jaxpr = closed.jaxpr
        in_names += [""] * (len(jaxpr.invars) - len(in_names))
        inputs = [self.value(v.aval, n) for v, n in zip(jaxpr.invars, in_names, strict=True)]
        consts: list[Value] = []
        ops: list[Op] = []
        outputs = self.equations(closed, inputs, ops, consts, caller)
        return Region(tuple(inputs), tuple(outputs), tuple(ops), tuple(consts))

    def equations(
        self, closed: Any, args: Sequence[Value], ops: list[Op], consts: list[Value], caller: str
    ) -> list[Value]:
        """Appends the equations of `closed`, applied to `args`, and returns its results."""
        jaxpr = closed.jaxpr
        env: dict[Any, Value] = dict(zip(jaxpr.invars, args, strict=True))
        for var, const in zip(jaxpr.constvars, closed.consts, strict=True):
            env[var] = self.value(var.aval, f"const{len(consts)}", const)
            consts.append(env[var])

        def read(atom: Any) -> Value:
            if isinstance(atom, _jax.Literal):
                return self.value(atom.aval, "", atom.val)
            return env[atom]

        for eqn in jaxpr.eqns:
            inputs = [read(atom) for atom in eqn.invars]
            inline = REGISTRY.inlined.get(eqn.primitive)
            if inline is not None:
                with _jax.at_source(eqn):  # the body may be traced only now
                    body = inline(eqn.params)
                outputs = self.equations(
                    body, inputs, ops, consts, _jax.source_of(eqn) or caller
                )
            else:
                outputs = self.op(eqn, inputs, ops, caller)
            env.update(zip(eqn.outvars, outputs, strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    def op(self, eqn: Any, inputs: list[Value], ops: list[Op], caller: str) -> list[Value]:
        outputs = [self.value(var.aval) for var in eqn.outvars]
        op = Op(self.count, eqn.primitive, eqn.params, tuple(inputs), tuple(outputs), eqn)
        op.caller = caller
        self.count += 1
        control = REGISTRY.controls.get(eqn.primitive)
        if control is not None:
            op.regions = tuple(
                self.region(body, [], op.source) for body in control.bodies(eqn.params)
            )
        for value in outputs:
            value.op = op
        ops.append(op)
        return outputs


def value_bytes(value: Value) -> int:
    """Global size in bytes; an extended dtype (a random key) counts its element size."""
    count = 1
    for n in value.shape:
        count *= n
    return count * getattr(value.dtype, "itemsize", 4)


def type_text(value: Value) -> str:
    short = getattr(value.aval, "str_short", None)
    return short(short_dtypes=True) if short else str(value.aval)


def describe(value: Value) -> str:
    """The value as its user knows it: argument path, or operation and source line."""
    if value.name:
        return value.name
    if value.op is not None:
        at = f" at {value.op.source}" if value.op.source else ""
        return f"result of {value.op.primitive.name}{at}"
    return f"%{value.id}"


def render(
    program: Program, note: Any = lambda value: "", detail: Any = lambda op: ()
) -> Iterator[str]:
    """Lines of text; `note(value)` follows each type, `detail(op)` gives lines before an op."""

    def show(value: Value) -> str:
        if value.const is not None and value.rank == 0:
            return str(value.const)
        return str(value)

    def typed(value: Value) -> str:
        return f"{value}: {type_text(value)}{note(value)}"

    def region(body: Region, indent: str) -> Iterator[str]:
        for op in body.ops:
            yield from (f"{indent}{line}" for line in detail(op))
            left = ", ".join(typed(v) for v in op.outputs)
            source = f"  # {op.source}" if op.source else ""
            args = ", ".join(show(v) for v in op.inputs)
            yield f"{indent}{left} = {op.primitive.name}({args}){source}"
            for i, inner in enumerate(op.regions):
                yield f"{indent}  region {i}({', '.join(typed(v) for v in inner.inputs)}):"
                yield from region(inner, indent + "    ")
                yield f"{indent}    return {', '.join(show(v) for v in inner.outputs)}"

    for value in (*program.body.inputs, *program.body.consts):
        yield f"in  {typed(value)}"
    yield from region(program.body, "")
    for value in program.body.outputs:
        yield f"out {show(value)}{note(value)}"


def _missing_rule(primitive: Any, ops: Sequence[Op]) -> Problem:
    op = ops[0]
    size = sum(value_bytes(v) for v in (*op.inputs, *op.outputs))
    more = f" and {len(ops) - 1} more" if len(ops) > 1 else ""
    text = _rule_text(op)
    accept = 'accept the cost with fallback="replicate"'
    fix = (
        f'register sharding.rule("{text}")({primitive.name}_p) with the dims that pass through, '
        f"or {accept}"
        if text
        else accept
    )
    return Problem(
        f"primitive {primitive.name!r} at {op.source or 'unknown source'}{more} has no rule",
        "without one its partitioning cannot be inferred; running it replicated would hold "
        f"{size:,} bytes of operands and results on every device",
        fix,
    )


def _rule_text(op: Op) -> str:
    """A first guess at the rule: a letter per dim; arrays of one shape share their letters.
    Empty where there are no dims to name."""
    letters = iter("abcdefghijklmnopqrstuvwxyz" * 4)
    named: dict[tuple[int, ...], str] = {}

    def dims(value: Value) -> str:
        if value.shape not in named:
            named[value.shape] = " ".join(next(letters) for _ in value.shape)
        return named[value.shape]

    if not op.inputs or not op.outputs or any(v.rank == 0 for v in op.inputs):
        return ""
    sides = [", ".join(map(dims, values)) for values in (op.inputs, op.outputs)]
    return f"{sides[0]} -> {sides[1]}"
