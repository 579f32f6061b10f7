"""The programs of one function: which of them is for which arguments, and how it is run."""

import functools
import logging
import threading
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AbstractMesh, NamedSharding

from sharding._jax import jit as _jit
from sharding.annotate import Spec, spec_of
from sharding.errors import ArgumentError, Problem
from spmd.arguments import Arguments, trimmed
from spmd.compiled import Compiled, Lowered
from spmd.devices import check_devices
from spmd.stages import Partitioned

logger = logging.getLogger(__name__)


class Executable:
    """One partitioned program; lowered and compiled when that is first asked for, and again when it
    was profiled often enough for `jax_enable_pgle`."""

    def __init__(self, partitioned: Partitioned):
        self.partitioned = partitioned
        self.traced = partitioned.propagated.traced
        self._lock = threading.RLock()

    def accepts(self, arguments: Arguments) -> bool:
        """Whether the program is the one for these arguments: they carry the same annotations, or
        lie where the program has them."""
        mine = self.traced.arguments
        triples = zip(arguments.specs, mine.specs, self.wanted, strict=True)
        return all(own in (made_for, want) for own, made_for, want in triples)

    @property
    def lowered(self) -> Lowered:
        with self._lock:
            return self._lowered

    @property
    def compiled(self) -> Compiled:
        with self._lock:
            return self._compiled

    @functools.cached_property
    def _lowered(self) -> Lowered:
        return self.partitioned.lower()

    @functools.cached_property
    def _compiled(self) -> Compiled:
        return self.lowered.compile()

    @functools.cached_property
    def profiler(self) -> Any:
        return _jit.profiler()

    @functools.cached_property
    def _guided(self) -> Compiled:
        """Compiled by what was seen in the profiled runs."""
        return self.lowered.compile({"fdo_profile": self.profiler.consume_fdo_profile()})

    def runnable(self) -> tuple[Compiled, bool]:
        """What to run, and whether that stays so."""
        with self._lock:
            if self.profiler is None or not self.profiler.is_enabled():
                return self._compiled, True
            if self.profiler.consume_fdo_profile() is None:
                return self._compiled, False
            return self._guided, True

    @functools.cached_property
    def shardings(self) -> list[NamedSharding]:
        """Of the flat arguments."""
        return self.partitioned.propagated.flat_in_shardings[len(self.traced.captured) :]

    @functools.cached_property
    def wanted(self) -> tuple[Spec | None, ...]:
        """The spec that the program wants each flat argument in."""
        pairs = zip(self.shardings, self.traced.arguments.avals, strict=True)
        return tuple(trimmed(spec_of(s, len(x.shape))) for s, x in pairs)

    def run(self, arguments: Arguments) -> tuple[Any, Any, bool]:
        """Runs the program.

        Returns:
          The result, what the C++ dispatch needs for the next call like this (or None), and whether
          another program may run then.

        Raises:
          ArgumentError: arguments lie elsewhere than `in_shardings` says.
          MeshError: arguments lie on other devices.
        """
        self.check_places(arguments)
        leaves = self.placed(arguments)
        args, kwargs = jax.tree.unflatten(arguments.tree, leaves)
        made, lasting = self.runnable()
        compiled = made.compiled
        if not lasting:
            return _jit.profiled(self.profiler, lambda: compiled(*args, **kwargs)), None, True
        results = compiled(*args, **kwargs)
        if any(a is not b for a, b in zip(leaves, arguments.leaves, strict=True)):
            return results, None, False
        flat, tree = jax.tree.flatten(results)
        effects = self.traced.program.effects
        return results, _jit.fast_call(compiled, tree, leaves, flat, effects), False

    def check_places(self, arguments: Arguments) -> None:
        """Raises ArgumentError when arguments lie elsewhere than `in_shardings` says, MeshError
        when they lie on other devices."""
        mesh = self.partitioned.options.mesh
        if not isinstance(mesh, AbstractMesh):
            check_devices(mesh, arguments, self.partitioned.used)
        explicit = self.traced.annotated.in_entries[len(self.traced.captured) :]
        rows = zip(arguments.placed, arguments.names, self.moves(arguments), explicit, strict=True)
        problems = [
            _elsewhere(name, lies, wanted)
            for (lies, name, wanted, entry), aval in zip(rows, arguments.avals, strict=True)
            if entry is not None and wanted is not None and 0 not in aval.shape
        ]
        if problems:
            raise ArgumentError(*problems)

    def placed(self, arguments: Arguments) -> list[Any]:
        """The leaves, those that lie elsewhere on the mesh's devices moved to where they belong."""
        pairs = zip(arguments.leaves, self.moves(arguments), strict=True)
        return [leaf if wanted is None else jax.device_put(leaf, wanted) for leaf, wanted in pairs]

    def moves(self, arguments: Arguments) -> list[NamedSharding | None]:
        """Per leaf, where it is wanted when it was put elsewhere on purpose; else None."""
        rows = zip(arguments.placed, self.shardings, arguments.avals, strict=True)
        return [want if _moves(lies, want, len(aval.shape)) else None for lies, want, aval in rows]


class Variants:
    """The programs for one signature: arguments of the same types on several shardings.

    Attributes:
      calls: by annotations of the arguments, the function as one call inside of other programs.
    """

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.executables: list[Executable] = []
        self.calls: dict[Any, Any] = {}

    def find(self, arguments: Arguments, make: Callable[[], Partitioned]) -> Executable:
        """The program for these arguments; made by the first thread that asks."""
        with self.lock:
            found = next((e for e in self.executables if e.accepts(arguments)), None)
            if found is None:
                if self.executables and _jit.setting("explain_cache_misses"):
                    self._explain(arguments)
                found = Executable(make())
                self.executables.append(found)
            return found

    def _explain(self, arguments: Arguments) -> None:
        last = self.executables[-1]
        changed = [
            f"{name} lies on {_spec_text(now)}, before on {_spec_text(before)}"
            for name, now, before in zip(
                arguments.names, arguments.specs, last.traced.arguments.specs, strict=True
            )
            if now != before
        ]
        logger.warning(
            "PARTITION CACHE MISS: %s was traced for these types, but not partitioned for where "
            "its arguments lie: %s", last.traced.fun_name, "; ".join(changed),
        )  # fmt: skip


def _spec_text(spec: Spec | None) -> str:
    return "no sharding of its own" if spec is None else str(spec)


@functools.lru_cache(maxsize=8192)
def _moves(lies: Any, wanted: NamedSharding, rank: int) -> bool:
    """Whether an argument that was put on `lies` is wanted elsewhere."""
    if lies is None:
        return False
    same_memory = _jit.special_memory(lies) == _jit.special_memory(wanted)
    return not same_memory or not lies.is_equivalent_to(wanted, rank)


def _elsewhere(name: str, lies: Any, wanted: NamedSharding) -> Problem:
    spec = spec_of(wanted, 0)
    here = spec_of(lies, 0) if isinstance(lies, NamedSharding) else lies
    memories = [_jit.special_memory(s) or "device" for s in (lies, wanted)]
    there = str(spec)
    if memories[0] != memories[1]:
        here, there = f"{here} in {memories[0]} memory", f"{spec} in {memories[1]} memory"
    return Problem(
        f"{name} lies on {here}, committed",
        f"in_shardings says {there}; moving it silently could cost more than the program",
        f"move it with jax.device_put({name}, NamedSharding(mesh, {spec})), or leave in_shardings "
        "out for it",
    )
