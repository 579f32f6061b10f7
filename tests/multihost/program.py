"""What each process of `test_processes.py` runs: the same lines in all of them, and in one alone.

    python -m tests.multihost.program CASES COORDINATOR PROCESSES PROCESS

Prints a line of JSON per case. Leaves without the barrier of `jax.distributed` when something
fails, since the other processes would wait for this one.
"""

import json
import os
import sys
import traceback
from collections.abc import Callable
from typing import Any

from spmd.simulate import simulate

DEVICES = 8
PATIENCE_S = 60  # for processes to find each other, and to end together

CASES: dict[str, Callable[[], Any]] = {}


def case(fun: Callable[[], Any]) -> Callable[[], Any]:
    CASES[fun.__name__] = fun
    return fun


def _message(error: type[Exception], fun: Callable[[], Any]) -> str:
    try:
        fun()
    except error as raised:
        return str(raised)
    return "nothing was raised"


def _whole(x: Any) -> list:
    """Every element, from the shards of all processes."""
    import numpy as np
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(x, tiled=True)).tolist()


def _mesh(**axes: int) -> Any:
    import jax

    return jax.make_mesh(
        tuple(axes.values()), tuple(axes), axis_types=(jax.sharding.AxisType.Auto,) * len(axes)
    )


def _training(mesh: Any, specs: Any, batches: Any, **options: Any) -> tuple[list[float], Any]:
    """Losses of a few steps of gradient descent, and the weights after them."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    import spmd

    def loss(w, x, y):
        hidden = jnp.tanh(x @ w["up"])
        return jnp.mean((hidden @ w["down"] - y) ** 2)

    def step(w, x, y):
        value, grads = jax.value_and_grad(loss)(w, x, y)
        return jax.tree.map(lambda a, g: a - 0.3 * g, w, grads), value

    rng = np.random.default_rng(0)
    w = {"up": rng.normal(size=(16, 32)), "down": rng.normal(size=(32, 8))}
    w = jax.tree.map(lambda a: (a / 4).astype(np.float32), w)
    weights, batch = specs
    run = spmd.jit(
        step, mesh=mesh, in_shardings=(weights, batch, batch), out_shardings=(weights, None),
        donate_argnums=0, **options,
    )  # fmt: skip
    losses = []
    for x, y in batches:
        w, value = run(w, x, y)
        losses.append(float(value))
    assert run._cache_size() == 1
    return losses, w


def _batches(rows: int = 16) -> list:
    import numpy as np

    rng = np.random.default_rng(1)
    return [
        (rng.normal(size=(rows, 16)).astype(np.float32), rng.normal(size=(rows, 8)).astype("f4"))
        for _ in range(4)
    ]


@case
def training() -> Any:
    """Numpy arguments, the same in every process; weights over all devices."""
    from sharding import P

    weights = {"up": P("data", "tensor"), "down": P("tensor", "data")}
    losses, w = _training(_mesh(data=2, tensor=4), (weights, P("data")), _batches())
    return losses, _whole(w["up"])[3][:4], w["up"].is_fully_addressable


@case
def across() -> Any:
    """The axis of the contractions crosses processes."""
    from sharding import P

    weights = {"up": P(None, "tensor"), "down": P("tensor")}
    return _training(_mesh(tensor=8), (weights, None), _batches())[0]


@case
def uneven() -> Any:
    """Dims that the mesh does not divide, sorted, gathered, padded."""
    import jax.numpy as jnp
    import numpy as np

    import spmd
    from sharding import P, shard

    def fun(x):
        y = shard(jnp.pad(x * 2, (1, 2)), "data")
        return jnp.sort(x), jnp.cumsum(y), jnp.argmax(x), jnp.roll(y, 3)

    x = (np.arange(24, dtype=np.int32) * 7) % 24
    out = spmd.jit(fun, mesh=_mesh(data=8), in_shardings=P("data"))(x)
    return [_whole(a) for a in out]


@case
def placed() -> Any:
    """Arrays of which each process made its part stay where they are, or are moved."""
    import jax
    import numpy as np
    from jax.sharding import NamedSharding

    import spmd
    from sharding import P

    mesh = _mesh(data=2, tensor=4)
    rows = np.arange(64, dtype=np.float32).reshape(8, 8)
    lies = NamedSharding(mesh, P("data", "tensor"))
    x = jax.make_array_from_callback(rows.shape, lies, lambda index: rows[index])
    f = spmd.jit(lambda x, y: (x + y, x.sum(0)), mesh=mesh)
    total, columns = f(x, jax.numpy.ones(8))
    twice, _ = f(total, jax.numpy.ones(8))
    # On other axes over the same devices.
    line = jax.sharding.Mesh(mesh.devices.reshape(-1), ("all",))
    moved = spmd.jit(lambda x: x * 2, mesh=line, out_shardings=P("all"))(x)
    return str(total.sharding.spec), _whole(twice), _whole(columns), _whole(moved)


@case
def stages() -> Any:
    """Plans need no devices of other processes; executables know who has what."""
    import jax.numpy as jnp
    import numpy as np

    import spmd
    from sharding import P

    f = spmd.jit(lambda x, w: jnp.tanh(x @ w), mesh=_mesh(data=2, tensor=4),
                 in_shardings=(P("data"), P("tensor")), out_shardings=P("data"))  # fmt: skip
    x, w = np.ones((8, 4), np.float32), np.ones((4, 4), np.float32) / 8
    partitioned = f.trace(x, w).propagate().partition()
    compiled = partitioned.lower().compile()
    out = compiled(x, w)
    return str(partitioned), _whole(out), str(compiled.in_shardings[1].spec)


@case
def donation() -> Any:
    """What was donated is gone, in every process."""
    import jax
    import numpy as np
    from jax.sharding import NamedSharding

    import spmd
    from sharding import P
    from sharding.errors import DonationError

    mesh = _mesh(data=8)
    x = jax.device_put(np.ones(16, np.float32), NamedSharding(mesh, P("data")))
    f = spmd.jit(lambda x: x + 1, mesh=mesh, donate_argnums=0)
    y = f(x)
    return x.is_deleted(), _whole(y), _message(DonationError, lambda: f(x))


@case
def errors() -> Any:
    """The same in all processes, so that all of them raise."""
    import jax
    import numpy as np
    from jax.sharding import Mesh, NamedSharding

    import spmd
    from sharding import P
    from sharding.errors import ArgumentError, MeshError, SpecError

    mesh, x = _mesh(data=2, tensor=4), np.ones((8, 8), np.float32)
    back = Mesh(np.array(jax.devices()[::-1]).reshape(2, 4), ("data", "tensor"))
    backwards = jax.device_put(x, NamedSharding(back, P("data")))
    f = spmd.jit(lambda x: x + 1, mesh=mesh)
    g = spmd.jit(lambda x: x + 1, mesh=mesh, in_shardings=P("data"))
    columns = jax.device_put(x, NamedSharding(mesh, P(None, "tensor")))
    return [
        _message(MeshError, lambda: f(backwards)),
        _message(ArgumentError, lambda: g(columns)),
        _message(SpecError, lambda: spmd.jit(lambda x: x, mesh=mesh, in_shardings=P("rows"))(x)),
    ]


@case
def local() -> Any:
    """Each process runs a program of its own devices, and keeps its own arrays out of others."""
    import jax
    import numpy as np
    from jax.sharding import Mesh, NamedSharding

    import spmd
    from sharding import P
    from sharding.errors import MeshError

    devices = np.array(jax.local_devices())
    mesh, me = Mesh(devices, ("data",)), jax.process_index()
    mine = jax.device_put(np.full(8, me, np.float32), NamedSharding(mesh, P("data")))
    out = spmd.jit(lambda x: (x + 1, x.sum()), mesh=mesh)(mine)
    everywhere = spmd.jit(lambda x: x, mesh=_mesh(data=8))
    refused = _message(MeshError, lambda: everywhere(mine)) if jax.process_count() > 1 else ""
    return np.asarray(out[0]).tolist(), float(out[1]), refused


@case
def random() -> Any:
    """Random values depend on keys, not on processes."""
    import jax

    import spmd
    from sharding import P

    draw = spmd.jit(lambda k: jax.random.normal(k, (8, 4)), mesh=_mesh(data=8),
                    out_shardings=P("data"))  # fmt: skip
    return _whole(draw(jax.random.key(3)))


@case
def callbacks() -> Any:
    """A callback runs in the process of the first device; its results reach all."""
    import jax
    import numpy as np

    import spmd
    from sharding import P

    seen = []

    def host(x):
        seen.append(x.shape)
        return np.sort(x)

    def fun(x):
        return jax.pure_callback(host, jax.ShapeDtypeStruct(x.shape, x.dtype), x) + x

    x = np.arange(8, dtype=np.float32)[::-1].copy()
    out = spmd.jit(fun, mesh=_mesh(data=8), in_shardings=P("data"))(x)
    found = _whole(out)
    return found, (len(seen) > 0) == (jax.process_index() == 0)


@case
def talk() -> Any:
    """Processes agree, wait for each other, and learn what process 0 knows."""
    import jax

    from spmd.runtime import processes
    from spmd.runtime.processes import AgreementError, BarrierError

    me, several = jax.process_index(), jax.process_count() > 1
    processes.agree("start", {"mesh": "data=8"}, PATIENCE_S)
    differ = _message(
        AgreementError, lambda: processes.agree("start", {"seed": str(me)}, PATIENCE_S)
    )
    told = [processes.broadcast("folder", name if me == 0 else None, PATIENCE_S) for name in "ab"]
    late = ""
    if me == 0 and several:
        late = _message(BarrierError, lambda: processes.barrier("save", 0.3))
    processes.barrier("end", PATIENCE_S)
    return processes.count(), processes.index() == me, differ, told, late


def main(cases: str, coordinator: str, processes: int, process: int) -> None:
    simulate(DEVICES // processes)
    import jax

    if processes > 1:
        jax.distributed.initialize(
            coordinator, processes, process, coordinator_bind_address=coordinator,
            initialization_timeout=PATIENCE_S, heartbeat_timeout_seconds=20,
            shutdown_timeout_seconds=20,
        )  # fmt: skip
    assert (len(jax.devices()), len(jax.local_devices())) == (DEVICES, DEVICES // processes)
    for name in cases.split(","):
        print(json.dumps({name: CASES[name]()}), flush=True)


if __name__ == "__main__":
    try:
        main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
