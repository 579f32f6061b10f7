"""`python -m tests.conformance.table`: writes sharding/rules/COVERAGE.md.

Made from the rules that are registered and from summary.json, which a run of the suite wrote.
"""

import inspect
import pathlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import spmd  # noqa: F401 (registers what spmd itself has primitives for)
from sharding.program import build
from sharding.rule import REGISTRY
from tests.conformance import harnesses, summary

PATH = pathlib.Path(__file__).parents[2] / "sharding" / "rules" / "COVERAGE.md"

# Why primitives have no rule: by name, or by the start of the module that defines them.
_REFERENCE = "references to mutable arrays; those made inside go when `run_state` is discharged"
_TRANSFORM = "only while JAX transforms a program: none is left in what is partitioned"
_HALF = "private halves of collectives, which shard_map does not emit"
_HIGH_LEVEL = "experimental types that are no arrays"
REASONS_BY_NAME = {
    **dict.fromkeys(
        ["accum_grad_in_ref", "addupdate", "create_linear", "empty_ref", "free_ref", "freeze",
         "get", "new_ref", "pin", "swap", "unpin"], _REFERENCE),
    **dict.fromkeys(
        ["call_hi_primitive_linearized", "custom_jvp_call_jaxpr", "custom_lin", "stage",
         "unreachable", "zeros_like"], _TRANSFORM),
    **dict.fromkeys(["box_get", "box_set", "log_extend", "log_read", "new_box", "new_log"],
                    _HIGH_LEVEL),
    **dict.fromkeys(["precv", "psend"], _HALF),
    "broadcast_to": "only inside of kernels, which run on one device",
    "ffi_call": "a foreign function: only who calls it can say how, with `sharding.rule`",
}  # fmt: skip
REASONS_BY_MODULE = {
    "jax._src.pallas": "only inside of kernels, which run on one device",
    "jax.experimental.sparse": "sparse formats have no sharded form; their arrays are dense dims",
    "jax._src.cudnn": "library calls of one accelerator",
    "jax._src.tpu_custom_call": "only inside of kernels, which run on one device",
    "jax._src.export": "a program that JAX compiled for its own number of devices",
}
NO_REASON = "no rule yet"

TABLES = (REGISTRY.rules, REGISTRY.controls, REGISTRY.inlined)

HEADER = """# Coverage

Every primitive of JAX {version}: what stays sharded, which collectives that costs, and where dims
are gathered. Written by `python -m tests.conformance.table` from the rules and from a run of the
[conformance suite](../../tests/README.md#conformance): {harnesses:,} harnesses, {cases:,} cases, of
which {right:,} right, {wrong:,} wrong and {refused:,} refused.

Evidence is from cases with one dim of an operand sharded evenly over 2, 3, 4 or 8 devices, in
programs where nothing else communicates (of a result, where no operand has such a dim). `pass 2/3`:
in 2 of 3 cases; without a number it is so in all of them. Gathered is what the planner reports,
because there is no distributed form or a dearer one. `-`: there is no such program.

- `pass`: every shard is computed on its own; `pass by own code`: with code of the rule, which may
  communicate
- `reduce add`: shards hold addends
- `permute`: shards exchange what they need of their neighbours
- `fixed`: the dim must be whole
"""


class Row(NamedTuple):
    """One primitive in the table."""

    name: str
    rule: str
    sharded: str
    cost: str
    gathers: str

    def __str__(self) -> str:
        return f"| {' | '.join(self)} |"


def text() -> str:
    """The whole file."""
    found = summary.load()
    counts = [c for group in found["groups"].values() for c in group.items()]
    total = {s: sum(n for name, n in counts if name == s) for s, _ in counts}
    total["cases"] = sum(total.values()) - total.get("unsharded", 0)
    numbers = {k: total.get(k, 0) for k in ("right", "wrong", "refused", "cases")}
    parts = [HEADER.format(version=found["jax"], harnesses=found["harnesses"], **numbers)]
    for file, rows in sorted(_by_file(found["primitives"]).items()):
        parts.append(f"## {file}\n")
        parts.append("| primitive | example of a rule | stays sharded | collectives | gathered |")
        parts.append("|---|---|---|---|---|")
        parts += [*map(str, sorted(rows)), ""]
    parts += ["## Control flow and calls\n", *_regions(), ""]
    parts += ["## Without a rule\n", *_without(), ""]
    return "\n".join(parts)


def _by_file(shown: dict[str, Any]) -> dict[str, list[Row]]:
    files: dict[str, list[Row]] = {}
    for name, (primitive, _) in harnesses.primitives().items():
        if primitive in REGISTRY.rules:
            module = inspect.unwrap(REGISTRY.rules[primitive]).__module__
            row = _row(name, shown.get(name))
            files.setdefault(module.removeprefix("sharding."), []).append(row)
    return files


def _row(name: str, found: dict[str, Any] | None) -> Row:
    if found is None:
        return Row(f"`{name}`", *["-"] * 4)
    factors = found["factors"]
    inputs = {k: f for k, f in factors.items() if not k.startswith("result ")}
    rest = {
        k: f for k, f in factors.items()
        if k.startswith("result ") and k.removeprefix("result ") not in inputs
    }  # fmt: skip
    sharded, cost, gathers = [], [], []
    for kind, (cases, ran, gathered, collectives) in {**inputs, **rest}.items():
        if ran:
            sharded.append(_of(kind, ran, cases))
        if collectives:
            counted = ", ".join(_of(c, n, cases) for c, n in collectives.items())
            cost.append(f"{kind}: {counted}")
        if gathered:
            gathers.append(_of(kind, gathered, cases))
    rule = f"`{_example(name, found['example'])}`"
    return Row(f"`{name}`", rule, *("; ".join(part) or "none" for part in (sharded, cost, gathers)))


def _of(what: str, count: int, cases: int) -> str:
    """`reduce add 2/3` where it is so in 2 of 3 cases; the name alone where it always is."""
    return what if count == cases else f"{what} {count}/{cases}"


def _example(name: str, harness: str) -> str:
    """The rule as it is now, of the equation in a harness."""
    program = build(harnesses.by_name()[harness].closed)
    op = next(op for op in program.ops() if op.primitive.name == name)
    return str(op.rule)


def _regions() -> Iterator[str]:
    yield "| primitive | how |"
    yield "|---|---|"
    for name, (primitive, _) in harnesses.primitives().items():
        if primitive in REGISTRY.controls:
            yield f"| `{name}` | keeps its body; values at its boundary are tied |"
        elif primitive in REGISTRY.inlined:
            yield f"| `{name}` | replaced by the equations of its body |"


def _without() -> list[str]:
    reasons: dict[str, list[str]] = {}
    for name, (primitive, module) in harnesses.primitives().items():
        if not any(primitive in table for table in TABLES):
            reasons.setdefault(_reason(name, module), []).append(f"`{name}`")
    return [f"- {reason}: {' '.join(names)}" for reason, names in sorted(reasons.items())]


def _reason(name: str, module: str) -> str:
    if name in REASONS_BY_NAME:
        return REASONS_BY_NAME[name]
    if name.endswith(("_start", "_done")) and module == "jax._src.lax.parallel":
        return _HALF
    found = [why for start, why in REASONS_BY_MODULE.items() if module.startswith(start)]
    return found[0] if found else NO_REASON


if __name__ == "__main__":
    PATH.write_text(text())
