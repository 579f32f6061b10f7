"""The programs of the suite: what the modules of `benchmarks.suite.programs` list, joined.

A module lists its programs in `PROGRAMS`, a tuple of `Program`; those of the package without one
help others. Modules elsewhere may be named instead, so that the suite compares the systems on
programs of one's own.
"""

from __future__ import annotations

import importlib
import pkgutil
import re
from collections.abc import Sequence

from benchmarks.suite.case import Program

PACKAGE = "benchmarks.suite.programs"


def modules() -> tuple[str, ...]:
    """Full names of the modules that list the programs of the suite, sorted."""
    package = importlib.import_module(PACKAGE)
    names = sorted(f"{PACKAGE}.{m.name}" for m in pkgutil.iter_modules(package.__path__))
    return tuple(name for name in names if hasattr(importlib.import_module(name), "PROGRAMS"))


def programs(names: Sequence[str] = ()) -> tuple[Program, ...]:
    """What the named modules list; by default those of the suite.

    Raises:
      ValueError: two programs have one name.
      AttributeError: a named module lists none.
    """
    found: dict[str, Program] = {}
    for name in names or modules():
        for program in importlib.import_module(name).PROGRAMS:
            if program.name in found:
                raise ValueError(f"two programs are called {program.name!r}; rename one in {name}")
            found[program.name] = program
    return tuple(found.values())


def matching(only: str, names: Sequence[str] = ()) -> tuple[Program, ...]:
    """Programs whose name contains a match of the regular expression `only`."""
    return tuple(p for p in programs(names) if re.search(only, p.name))
