"""A pytest plugin: simulated devices, meshes, and golden files of partitioned programs.

Installed with the package. In a checkout: `pytest_plugins = ["spmd.pytest_plugin"]` in the
top-level conftest.py, or `-p spmd.pytest_plugin`.

    --spmd-devices=8, or `spmd_devices = 8` in the configuration: that many simulated devices
    --update-golden: `spmd.testing.assert_same_plan` writes its files
"""

from collections.abc import Callable, Generator
from typing import Any

import pytest

from spmd import golden
from spmd.simulate import simulate

_UPDATE = "--update-golden"


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("spmd", "partitioned programs")
    text = "number of devices to simulate, unless the machine has accelerators"
    group.addoption("--spmd-devices", type=int, default=None, metavar="N", help=text)
    parser.addini("spmd_devices", text, default="0")


@pytest.hookimpl(wrapper=True)
def pytest_load_initial_conftests(parser: pytest.Parser) -> Generator[None, Any, Any]:
    """Adds `--update-golden` once conftest files had their turn: many projects have one of their
    own, which then counts."""
    result = yield
    try:
        parser.addoption(_UPDATE, action="store_true", help="rewrite golden files")
    except ValueError:
        pass
    return result


def pytest_configure(config: pytest.Config) -> None:
    """Simulates devices before a test module can start JAX's backend."""
    count = config.getoption("--spmd-devices") or int(config.getini("spmd_devices"))
    if count:
        simulate(count)
    golden.update_by_default = config.getoption(_UPDATE, default=False) or None


@pytest.fixture
def simulated_devices() -> list[Any]:
    """The devices of the session."""
    import jax

    return list(jax.devices())


@pytest.fixture
def spmd_mesh(simulated_devices: list[Any]) -> Callable[..., Any]:
    """Makes a mesh of the first devices: `spmd_mesh(data=2, tensor=4)`."""
    import numpy as np
    from jax.sharding import AxisType, Mesh

    def make(**axes: int) -> Mesh:
        sizes = tuple(axes.values())
        needed = int(np.prod(sizes))
        if needed > len(simulated_devices):
            pytest.fail(
                f"the mesh {axes} needs {needed} devices, and there are {len(simulated_devices)}: "
                f"run pytest with --spmd-devices={needed}",
                pytrace=False,
            )
        grid = np.asarray(simulated_devices[:needed]).reshape(sizes)
        return Mesh(grid, tuple(axes), axis_types=(AxisType.Auto,) * len(sizes))

    return make
