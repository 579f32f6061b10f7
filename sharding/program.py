"""`Program`: the traced function as flat SSA with regions, in names that its user recognises.

Nested calls (jit, custom_jvp, custom_vjp ...) are inlined; scan, while, cond and remat keep their
bodies as regions. Shapes are global. Everything after this stage reads the Program, not the jaxpr.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from typing import Any

from sharding import _jax
from sharding.errors import ArgumentError, Problem, RuleError
from sharding.op import Op as Op
from sharding.op import Region as Region
from sharding.op import Scope, type_text
from sharding.op import Value as Value
from sharding.region import Inline
from sharding.rule import REGISTRY


@dataclass(eq=False)
class Program:
    """A traced function.

    Attributes:
      body: the top-level region; its inputs and outputs are the flat arguments and results.
      values: every value, by id.
      closed: the closed jaxpr it was made from.
      replaced: the equations in whose place something else is.
    """

    body: Region
    values: list[Value]
    closed: Any
    effects: Any = field(default=())
    replaced: tuple[Any, ...] = ()

    def again(
        self, make: Callable[[Sequence[Any]], Any], instead: Sequence[Any]
    ) -> Callable[[Sequence[Any]], Any] | None:
        """`make`, which made the program with functions in place of equations, with further ones.
        None where some were not found: what is traced anew each time has other equations every
        time, which would be asked for forever."""
        if len(self.replaced) < len(instead):
            return None
        return lambda more: make([*instead, *more])

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
        missing: dict[tuple[Any, str], list[Op]] = {}
        for op in self.ops():
            if op.scope.manual is not None and op.scope.manual.full:
                continue  # runs as it is
            if op.primitive not in REGISTRY.rules and op.control is None:
                missing.setdefault((op.primitive, _kernel(op)), []).append(op)
        if missing and fallback != "replicate":
            raise RuleError(*(_missing_rule(prim, k, ops) for (prim, k), ops in missing.items()))

    def __str__(self) -> str:
        return "\n".join(render(self))


def build(
    closed: Any, in_names: Sequence[str] = (), out_names: Sequence[str] = (),
    instead: Sequence[tuple[Any, Callable]] = (),
) -> Program:  # fmt: skip
    """A Program from a closed jaxpr; names are those of the flat arguments and results.

    Args:
      instead: equations, each with a JAX function of its operands and parameters to put there.

    Raises:
      ArgumentError: it changes mutable arrays outside of itself.
    """
    _check_refs(closed, in_names)
    closed = _jax.without_refs(closed)
    builder = _Builder(instead)
    body = builder.region(closed, list(in_names), Scope())
    for value, name in zip(body.outputs, out_names, strict=False):
        if not value.name and value.const is None:
            value.name = name
    effects = _jax.effects_of(closed.jaxpr)
    replaced = tuple(builder.replaced.values())
    return Program(body, builder.numbered(), closed, effects, replaced)


class _Builder:
    def __init__(self, instead: Sequence[tuple[Any, Callable]]) -> None:
        self.instead = {id(eqn): fun for eqn, fun in instead}
        self.replaced: dict[int, Any] = {}
        self.values: list[Value] = []
        self.count = 0
        self.merged: set[int] = set()  # indices of equations that others were merged with
        self.dropped: set[int] = set()  # values that nothing makes any more

    def numbered(self) -> list[Value]:
        """The values that there still are, numbered anew."""
        values = [v for v in self.values if v.id not in self.dropped]
        for i, value in enumerate(values):
            value.id = i
        return values

    def value(self, aval: Any, name: str = "", const: Any = None) -> Value:
        value = Value(len(self.values), aval, name, const)
        self.values.append(value)
        return value

    def region(self, closed: Any, in_names: list[str], scope: Scope) -> Region:
        jaxpr = closed.jaxpr
        in_names += [""] * (len(jaxpr.invars) - len(in_names))
        inputs = [self.value(v.aval, n) for v, n in zip(jaxpr.invars, in_names, strict=True)]
        consts: list[Value] = []
        ops: list[Op] = []
        outputs = self.equations(closed, inputs, ops, consts, scope)
        return Region(tuple(inputs), tuple(outputs), self.without_merged(ops, outputs),
                      tuple(consts))  # fmt: skip

    def without_merged(self, ops: Sequence[Op], outputs: Sequence[Value]) -> tuple[Op, ...]:
        """Without equations that became part of others, where nothing else reads them."""
        if not self.merged:
            return tuple(ops)
        used = {v.id for v in outputs}
        kept: list[Op] = []
        for op in reversed(ops):
            if op.index in self.merged and used.isdisjoint(v.id for v in op.outputs):
                self.dropped |= {v.id for v in op.outputs}
            else:
                kept.append(op)
                used |= {v.id for v in op.inputs}
        return tuple(reversed(kept))

    def equations(
        self, closed: Any, args: Sequence[Value], ops: list[Op], consts: list[Value], scope: Scope
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
            inline = self.inlined(eqn, scope)
            merge = REGISTRY.merged.get(eqn.primitive)
            found = merge(eqn.params, inputs) if merge is not None else None
            if found is not None:
                self.merged |= set(_makers(inputs, {v.id for v in found.operands}))
                with _jax.tracing_context(eqn):
                    body = _jax.trace(found.function, *(v.aval for v in found.operands))
                inner = _around(scope, eqn)
                outputs = self.equations(body, found.operands, ops, consts, inner)
            elif inline is None:
                outputs = self.op(eqn, inputs, ops, scope)
            else:
                with _jax.tracing_context(eqn):  # the body may be traced only now
                    body = inline.expand(eqn)
                inputs = [inputs[i] for i in inline.operands(eqn.params, len(inputs))]
                rules = inline.axis_rules(eqn.params, scope.axis_rules)
                inner = _around(scope, eqn)._replace(axis_rules=rules)
                outputs = self.equations(body, inputs, ops, consts, inner)
            env.update(zip(eqn.outvars, outputs, strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    def inlined(self, eqn: Any, scope: Scope) -> Inline | None:
        """What replaces an equation: as registered; for one without a rule that other packages
        define, the JAX function that it is lowered as."""
        if id(eqn) in self.instead:
            self.replaced[id(eqn)] = eqn
            return Inline(None, function=self.instead[id(eqn)])
        if eqn.primitive in REGISTRY or (scope.manual is not None and scope.manual.full):
            return REGISTRY.inlined.get(eqn.primitive)
        fun = _jax.lowered_as(eqn.primitive)
        return None if fun is None else Inline(None, function=fun)

    def op(self, eqn: Any, inputs: Sequence[Value], ops: list[Op], scope: Scope) -> list[Value]:
        """Appends one equation, with its regions; or one op per operand, where it says so."""
        avals = [var.aval for var in eqn.outvars]
        one = REGISTRY.apart.get(eqn.primitive)
        if one is not None:
            each = [one(eqn.params, i) for i in range(len(inputs))]
            return self.each(eqn.primitive, each, eqn, inputs, avals, ops, scope)
        control = REGISTRY.controls.get(eqn.primitive)
        if control is not None and control.enter is not None:
            each = [{}] * len(inputs)
            inputs = self.each(
                control.enter, each, eqn, inputs, [v.aval for v in inputs], ops, scope
            )
        outputs = self.append(eqn.primitive, eqn.params, eqn, inputs, avals, ops, scope)
        if control is not None:
            inner = scope.inside(control.manual(eqn.params))._replace(
                site=ops[-1].site, stack=_below(scope, eqn)
            )
            with _jax.tracing_context(eqn):
                bodies = control.bodies(eqn.params)
            ops[-1].regions = tuple(self.region(body, [], inner) for body in bodies)
        return outputs

    def each(
        self, primitive: Any, params: Sequence[Mapping[str, Any]], eqn: Any,
        inputs: Sequence[Value], avals: Sequence[Any], ops: list[Op], scope: Scope,
    ) -> list[Value]:  # fmt: skip
        """The results of one new op per operand."""
        made = [
            self.append(primitive, mine, eqn, [v], [aval], ops, scope)
            for mine, v, aval in zip(params, inputs, avals, strict=True)
        ]
        return [values[0] for values in made]

    def append(
        self, primitive: Any, params: Mapping[str, Any], eqn: Any, inputs: Sequence[Value],
        avals: Sequence[Any], ops: list[Op], scope: Scope,
    ) -> list[Value]:  # fmt: skip
        """The results of a new op at the end of `ops`."""
        outputs = [self.value(aval) for aval in avals]
        op = Op(self.count, primitive, params, tuple(inputs), tuple(outputs), eqn, (), scope)
        self.count += 1
        for value in outputs:
            value.op = op
        ops.append(op)
        return outputs


def _makers(values: Sequence[Value], of: Set[int]) -> Iterator[int]:
    """Indices of the equations that make values of those with ids `of`."""
    for value in values:
        if value.id not in of and value.op is not None:
            yield value.op.index
            yield from _makers(value.op.inputs, of)


def _around(scope: Scope, eqn: Any) -> Scope:
    """The scope of what replaces an equation."""
    site = eqn if _jax.source_of(eqn) else scope.site
    return scope._replace(site=site, stack=_below(scope, eqn))


def _below(scope: Scope, eqn: Any) -> str:
    """The name stack inside of an equation."""
    return "/".join(filter(None, (scope.stack, _jax.name_stack_of(eqn))))


def value_bytes(value: Value) -> int:
    """Global size in bytes."""
    return prod(value.shape) * value.itemsize


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


def _check_refs(closed: Any, in_names: Sequence[str]) -> None:
    arguments, captured = _jax.outer_refs(closed)
    named = [in_names[i] if i < len(in_names) else f"argument {i}" for i in arguments]
    if named or captured:
        raise ArgumentError(
            Problem(
                f"mutable arrays (jax.Ref) from outside: {', '.join(named) or 'closed over'}",
                "a partitioned program takes and returns arrays, and changes none in place",
                "pass it as an argument of a call of spmd.jit, which writes the new value back; "
                "or pass ref[...] and assign what the program returns",
            )
        )


def _kernel(op: Op) -> str:
    """What a primitive that runs anything runs here; empty for all others."""
    opaque = REGISTRY.opaque.get(op.primitive.name)
    return opaque(op.params) if opaque else ""


def _missing_rule(primitive: Any, kernel: str, ops: Sequence[Op]) -> Problem:
    op = ops[0]
    size = sum(value_bytes(v) for v in (*op.inputs, *op.outputs))
    more = f" and {len(ops) - 1} more" if len(ops) > 1 else ""
    text = _rule_text(op)
    accept = 'accept the cost with fallback="replicate"'
    opaque = primitive.name in REGISTRY.opaque
    name = f"primitive {primitive.name!r}" + (f" {kernel!r}" if kernel else "")
    fix = (
        f'decorate the function that calls it with @sharding.rule("{text}"), with one name for '
        f"dims that are sharded alike and fixed= for those that must be whole, or {accept}"
        if opaque
        else
        f'register sharding.rule("{text}")({primitive.name}_p) with the dims that pass through, '
        f"or {accept}"
        if text
        else accept
    )
    return Problem(
        f"{name} at {op.source or 'unknown source'}{more} has no rule",
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
