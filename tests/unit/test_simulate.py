"""What `simulate` sets, and what it leaves as it was."""

import os

import pytest

from spmd import simulate as module
from spmd.simulate import simulate

NAMES = ("XLA_FLAGS", "NPROC", "OPENBLAS_NUM_THREADS", "JAX_PLATFORMS", "SPMD_NODES")


@pytest.fixture(autouse=True)
def before_jax_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a machine without accelerators; all is put back afterwards."""
    monkeypatch.setattr(os, "environ", {k: v for k, v in os.environ.items() if k not in NAMES})
    monkeypatch.setattr(module, "accelerators", lambda: "")
    monkeypatch.setattr(module, "_backend_started", lambda: False)


def found() -> dict[str, str]:
    return {name: os.environ[name] for name in NAMES}


def test_devices_and_threads() -> None:
    """Two threads of XLA for each device, and one of LAPACK."""
    assert simulate(12)
    assert found() == {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=12", "NPROC": "24",
        "OPENBLAS_NUM_THREADS": "1", "JAX_PLATFORMS": "cpu", "SPMD_NODES": "1",
    }  # fmt: skip


def test_what_the_user_set_stays_but_too_few_threads() -> None:
    os.environ.update({
        "XLA_FLAGS": "--xla_dump_to=x --xla_force_host_platform_device_count=4", "NPROC": "2",
        "OPENBLAS_NUM_THREADS": "3", "JAX_PLATFORMS": "cpu,tpu",
    })  # fmt: skip
    given = {name: os.environ[name] for name in NAMES if name in os.environ}
    assert simulate(12)
    assert found() == {**given, "NPROC": "16", "SPMD_NODES": "1"}


def test_accelerators_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "accelerators", lambda: "gpu")
    assert not simulate(8)
    assert not {*NAMES} & {*os.environ}
