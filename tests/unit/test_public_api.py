"""The public names and the flags of train.py change on purpose only: they are a golden text."""

import importlib
import pathlib
import re
import subprocess
import sys
import types

import pytest

ROOT = pathlib.Path(__file__).parents[2]


def public_names(module: types.ModuleType) -> list[str]:
    """`__all__`, or without one everything but modules and names that start with `_`."""
    if hasattr(module, "__all__"):
        missing = [name for name in module.__all__ if not hasattr(module, name)]
        assert not missing, f"{module.__name__}.__all__ lists what does not exist: {missing}"
        return sorted(module.__all__)
    return sorted(
        name
        for name, value in vars(module).items()
        if not name.startswith("_") and not isinstance(value, types.ModuleType)
    )


@pytest.mark.parametrize("package", ["sharding", "spmd"])
def test_public_names_are_frozen(package, golden):
    if not (ROOT / package / "__init__.py").exists():
        pytest.skip(f"{package} has no public names yet")
    names = public_names(importlib.import_module(package))
    golden.check(f"public_api/{package}", "\n".join(names))


def test_flags_of_train_are_frozen(golden):
    if not (ROOT / "train.py").exists():
        pytest.skip("there is no train.py yet")
    command = [sys.executable, "train.py", "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    flags = sorted(set(re.findall(r"(?<![\w-])--[a-z][\w-]*", done.stdout)))
    golden.check("public_api/train_flags", "\n".join(flags))
