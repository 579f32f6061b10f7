"""`spmd.jit` as `jax.jit`: guards of transfers, and recompilation by profiles."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import spmd
from sharding import P
from tests.e2e.dropin_case import MESH, X, both, compilations, named, on_mesh

W = jnp.linspace(0, 1, 64).reshape(16, 4)
GUARDS = (
    jax.transfer_guard, jax.transfer_guard_host_to_device, jax.transfer_guard_device_to_device,
    jax.transfer_guard_device_to_host,
)  # fmt: skip
ARGUMENTS = {
    "placed": (jax.device_put(X, named("data")), jax.device_put(W, named())),
    "numpy": (np.asarray(X), np.asarray(W)),
    "uncommitted": (jax.device_put(X, named("data")), W),
    "scalar": (jax.device_put(X, named("data")), 2.0),
}


def times(x, w):
    return x @ w if jnp.ndim(w) else x * w


def outcome(function, args) -> str:
    try:
        function(*args)
        return "runs"
    except jax.errors.JaxRuntimeError as error:
        return str(error).split(": aval")[0]


@pytest.mark.parametrize("warm", [False, True], ids=["first call", "later call"])
@pytest.mark.parametrize("name", ARGUMENTS)
def test_guarded_transfers(name: str, warm: bool) -> None:
    args = ARGUMENTS[name]
    seen = set()
    for guard in GUARDS:
        for mode in ("allow", "disallow", "disallow_explicit"):
            found = []
            for jit in (jax.jit, on_mesh):
                function = jit(lambda x, w: times(x, w), in_shardings=(named("data"), named()))
                if warm:
                    function(*args)
                with guard(mode):
                    found.append(outcome(function, args))
            assert found[0] == found[1], (guard, mode)
            seen.add(found[0])
    assert len(seen) == (1 if name == "placed" else 2)


def logged(jit, capfd) -> list[str]:
    function = jit(lambda x, w: times(x, w), in_shardings=(named("data"), named()))
    function(*ARGUMENTS["numpy"])
    capfd.readouterr()
    with jax.transfer_guard("log"):
        function(*ARGUMENTS["numpy"])
        function(*ARGUMENTS["placed"])
    lines = capfd.readouterr().err.splitlines()
    return [line.split("] ")[-1] for line in lines if "transfer" in line]


def test_logged_transfers(capfd) -> None:
    """Of both numpy arrays, and of no array that lies where it is wanted."""
    ours, theirs = logged(on_mesh, capfd), logged(jax.jit, capfd)
    assert ours == theirs and len(ours) == 2 * 8  # a line for each shard
    assert all("host-to-device transfer" in line for line in ours)


@pytest.mark.parametrize("mode", ["allow", "disallow", "disallow_explicit"])
def test_moving_a_committed_argument_is_a_device_put(mode: str) -> None:
    """`jax.jit` refuses such an argument, so `jax.device_put` is what to compare with."""
    line = jax.sharding.Mesh(MESH.devices.reshape(-1), ("all",))
    function = spmd.jit(lambda x: x * 2, mesh=line, out_shardings=P("all"))
    x, wanted = jax.device_put(X, named("data")), jax.sharding.NamedSharding(line, P("all"))
    function(x)
    with jax.transfer_guard(mode):
        found = outcome(function, (x,)), outcome(jax.device_put, (x, wanted))
    assert found[0] == found[1] and (found[0] == "runs" or mode != "allow")


class Session:
    """In place of the profiler, of which a process has one, and not every platform all of it."""

    started = 0

    def __init__(self, options) -> None:
        type(self).started += 1

    def stop(self) -> bytes:
        return b"trace"


@pytest.fixture
def sessions(monkeypatch) -> type[Session]:
    stand_in = types.SimpleNamespace(
        ProfileOptions=types.SimpleNamespace, ProfilerSession=Session,
        get_fdo_profile=lambda trace: b"profile", aggregate_profiled_instructions=lambda *_: b"",
    )  # fmt: skip
    monkeypatch.setattr(jax._src.profiler, "_profiler", stand_in)
    monkeypatch.setattr(Session, "started", 0)
    return Session


@both
def test_a_program_is_compiled_again_when_it_was_profiled(jit, sessions) -> None:
    """Two calls are profiled, the third is compiled by what they told, and later ones run it."""

    def f(x, w):
        return jnp.tanh(x @ w)

    function = jit(f, in_shardings=(named("data"), named()))
    want, args = np.tanh(np.asarray(X) @ np.asarray(W)), ARGUMENTS["placed"]
    counts = []
    with jax._src.config.enable_pgle(True), jax._src.config.pgle_profiling_runs(2):
        for _ in range(5):
            before = sessions.started
            with compilations() as count:
                np.testing.assert_allclose(function(*args), want, 1e-6)
            counts.append((count[0], sessions.started - before))
    assert counts == [(1, 1), (0, 1), (1, 0), (0, 0), (0, 0)]
    with compilations() as count:
        function(*args)  # the setting is part of what a program is compiled for
    assert count == [1] and sessions.started == 2
