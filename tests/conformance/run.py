"""Runs all cases of one harness on one mesh, in one program of XLA."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from sharding import _jax
from sharding.errors import SpmdError, VerificationError
from tests.conformance import evidence
from tests.conformance.cases import Case, cases, make_mesh, partitioned
from tests.conformance.compare import mismatch, order_ties
from tests.conformance.harnesses import Harness, key_data
from tests.fast_compile import OPTIONS

# What may become of a case. `refused`: an error that says why and what to do. `unsharded`: the
# program itself fails.
STATUSES = ("right", "wrong", "refused", "error", "abort", "timeout", "unsharded")
FAILURES = ("wrong", "error", "abort", "timeout", "unsharded")

Record = dict[str, Any]


@cache
def fast_compile() -> dict[str, Any]:
    """Of the options that make compiling fast, those that this version of XLA knows."""
    return {k: v for k, v in OPTIONS.items() if _is_known({k: v})}


def _is_known(options: dict[str, Any]) -> bool:
    try:
        jax.jit(lambda x: x, compiler_options=options)(0).block_until_ready()
    except jax.errors.JaxRuntimeError:
        return False
    return True


@dataclass
class Subject:
    """One harness with what every mesh needs of it.

    Attributes:
      harness: function and arguments.
      options: of XLA's compiler.
    """

    harness: Harness
    options: dict[str, Any] = field(default_factory=fast_compile)

    @cached_property
    def args(self) -> tuple[Any, ...]:
        return self.harness.arguments

    @cached_property
    def program(self) -> Any:
        return evidence.program_of(self.harness.closed)

    @cached_property
    def want(self) -> list[np.ndarray]:
        """Of the unsharded program, on one device."""
        fun = _jax.as_fun(self.harness.closed)
        results = jax.jit(fun, compiler_options=self.options)(*self.args)
        return [np.asarray(key_data(x)) for x in results]

    def cases(self, sizes: tuple[int, ...]) -> list[Case]:
        closed = self.harness.closed
        shapes = [[v.shape for v in avals] for avals in (closed.in_avals, closed.out_avals)]
        return cases(shapes[0], shapes[1], sizes, self.harness.name)

    def failure(self) -> str:
        """Why the unsharded program cannot run; empty when it can."""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self.want  # noqa: B018
        except Exception as error:
            return _first_line(error)
        return ""

    def run(self, sizes: tuple[int, ...], wanted: Sequence[Case]) -> list[Record]:
        """A record per case, in order. What XLA itself does may still end the process."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            missing = evidence.missing_rules(self.program)
            if missing:
                text = f"no rule for {', '.join(missing)}"
                return [_record(c, "refused", text, missing=missing) for c in wanted]
            return self._run(sizes, wanted)

    def _run(self, sizes: tuple[int, ...], wanted: Sequence[Case]) -> list[Record]:
        records: list[Record] = []
        programs: dict[Any, Any] = {}  # equal programs run once
        keys: dict[int, Any] = {}
        for i, case in enumerate(wanted):
            record, closed = self._partition(sizes, case)
            records.append(record)
            if closed is not None:
                keys[i] = _program_key(closed)
                programs.setdefault(keys[i], closed)
        try:
            results = self._execute(list(programs.values()), make_mesh(sizes))
            found = dict(zip(programs, map(self._compare, results), strict=True))
        except Exception as error:
            if len(wanted) == 1:
                records[0].update(status="error", detail=_first_line(error))
                return records
            return [record for case in wanted for record in self._run(sizes, [case])]
        for i, key in keys.items():
            records[i].update(status="wrong" if found[key] else "right", detail=found[key])
        return records

    def _partition(
        self, sizes: tuple[int, ...], case: Case
    ) -> tuple[Record, Any]:
        """A record, and the per-device program, which decides about the verdict; or None."""
        try:
            part = partitioned(self.harness.closed, self.args, case, make_mesh(sizes))
            found = evidence.of_case(part, self.harness.group, case)
            return _record(case, "", "", **found), part.jaxpr
        except VerificationError as error:
            return _record(case, "error", _first_line(error)), None
        except SpmdError as error:
            return _record(case, "refused", _first_line(error)), None
        except Exception as error:
            return _record(case, "error", _first_line(error)), None

    def _execute(self, programs: Sequence[Any], mesh: Any) -> list[list[Any]]:
        """Results of all programs, from one executable; arguments keep XLA from folding them.

        Arguments lie whole on every device, so that no collective is XLA's own.
        """
        if not programs:
            return []
        functions = [_jax.as_fun(closed) for closed in programs]
        every = jax.jit(
            lambda *args: [fun(*args) for fun in functions],
            in_shardings=NamedSharding(mesh, PartitionSpec()), compiler_options=self.options,
        )  # fmt: skip
        return jax.block_until_ready(every(*self.args))

    def _compare(self, results: Sequence[Any]) -> str:
        pointwise = evidence.is_pointwise(self.program)
        axis, wanted = evidence.unstable_axis(self.program), self.want
        if axis is not None:
            ordered = order_ties([np.asarray(x) for x in results], axis)
            results = [jax.numpy.asarray(x) for x in ordered]
            wanted = order_ties(wanted, axis)
        for i, (got, want) in enumerate(zip(results, wanted, strict=True)):
            text = mismatch(got, want, self.harness.name, pointwise)
            if text:
                return f"result {i}: {text}"
        return ""


def _record(case: Case, status: str, detail: str, **more: Any) -> Record:
    return {"case": str(case), "status": status, "detail": detail, **more}


def _program_key(closed: Any) -> Any:
    """Equal for programs that compute the same; printing one would take longer, and fails where a
    harness binds a primitive with fewer parameters than its printer expects."""
    return _jaxpr_key(closed.jaxpr), tuple(map(_value_key, closed.consts))


def _jaxpr_key(jaxpr: Any) -> Any:
    numbers: dict[Any, int] = {}

    def number(var: Any) -> Any:
        if hasattr(var, "val"):
            return str(var.aval), _value_key(var.val)
        return numbers.setdefault(var, len(numbers))

    inputs = [(number(v), str(v.aval)) for v in (*jaxpr.constvars, *jaxpr.invars)]
    rows = [
        (
            eqn.primitive.name,
            tuple(map(number, eqn.invars)),
            tuple((k, _value_key(v)) for k, v in sorted(eqn.params.items())),
            tuple((number(v), str(v.aval)) for v in eqn.outvars),
        )
        for eqn in jaxpr.eqns
    ]
    return tuple(inputs), tuple(rows), tuple(map(number, jaxpr.outvars))


def _value_key(x: Any) -> Any:
    if hasattr(x, "eqns"):
        jaxpr = getattr(x, "jaxpr", x)  # of a closed one
        return _jaxpr_key(jaxpr), tuple(map(_value_key, getattr(x, "consts", ())))
    if isinstance(x, (tuple, list)):
        return tuple(map(_value_key, x))
    if isinstance(x, (np.ndarray, np.generic, jax.Array)):
        return str(x.dtype), x.shape, np.asarray(key_data(x)).tobytes()
    return repr(x)


def _first_line(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' / '.join(lines[:4])}"[:400]


def batches(
    subject: Subject, sizes: tuple[int, ...], first: int, alone: bool,
    starts: Callable[[int, str], None],
) -> Iterator[list[Record]]:  # fmt: skip
    """Records of the cases from `first` on: all at once, or one by one, announced by `starts`."""
    failure = subject.failure()
    if failure:
        yield [{"case": "", "status": "unsharded", "detail": failure}]
        return
    wanted = subject.cases(sizes)
    if not alone:
        yield subject.run(sizes, wanted)
        return
    for i in range(first, len(wanted)):
        starts(i, str(wanted[i]))
        yield subject.run(sizes, [wanted[i]])

