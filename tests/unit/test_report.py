"""Reports against hand-counted programs, their text, JSON, differences, and who can be asked."""

import functools
import json
import re

import jax
import jax.numpy as jnp
import pytest

import spmd
from models.shardings import rules_for
from sharding import P, shard
from sharding.errors import ArgumentError, MeshError
from spmd import collectives
from spmd.hardware import Machine
from spmd.reporting import units
from spmd.reporting.build import kind_of
from spmd.reporting.model import Report
from tests.e2e.test_parallelism import BATCH, CONFIG, PARALLELISMS, SEQ, loss_of

ON_8 = {"data": 2, "tensor": 4}
X, W = jax.ShapeDtypeStruct((8, 16), jnp.float32), jax.ShapeDtypeStruct((16, 32), jnp.float32)
MATMUL = 2 * 8 * 16 * 32  # operations of X @ W


def matmul(x, w):
    return x @ w


def report(fun, *args, machine=None, mesh=None, **options) -> Report:
    return spmd.report(spmd.jit(fun, mesh=mesh or ON_8, **options), *args, machine=machine)


def test_what_every_device_computes_again_is_replicated() -> None:
    flops = report(matmul, X, W).flops
    assert flops == (MATMUL / 8, MATMUL * 7 / 8, 0, 0)


def test_what_the_axes_shard_is_useful() -> None:
    flops = report(matmul, X, W, in_shardings=(P("data"), P(None, "tensor"))).flops
    assert flops == (MATMUL / 8, 0, 0, 0)


def test_padding_of_an_uneven_dim_is_told_apart() -> None:
    x = jax.ShapeDtypeStruct((10, 16), jnp.float32)  # 10 rows over 4 devices: 3 on each
    flops = report(lambda x, w: shard(x, "data", None) @ w, x, W, mesh={"data": 4}).flops
    share = 2 * 10 * 16 * 32 / 4
    assert flops == (share, 0, 2 * 3 * 16 * 32 - share, 0)


def test_what_remat_computes_again_is_recomputed() -> None:
    def block(w, x, v):
        return jnp.tanh(jnp.tanh(x @ w) @ v)

    def loss(keep, w, x, v):
        return jnp.sum((block if keep else jax.checkpoint(block))(w, x, v))

    args = W, X, jax.ShapeDtypeStruct((32, 16), jnp.float32)
    found, kept = (
        report(jax.value_and_grad(functools.partial(loss, keep)), *args, mesh={"data": 8},
               in_shardings=(None, P("data"), None))
        for keep in (False, True)
    )  # fmt: skip
    # Both matmuls once more, on 1 row of 8, and a few operations for each element of a tanh.
    again = 2 * MATMUL / 8
    assert again + 32 + 16 <= found.flops.recomputed <= again + 4 * (32 + 16)
    assert kept.flops.recomputed == 0
    dots = [sum(r.op == "dot_general" for r in x.rows) for x in (found, kept)]
    assert dots[0] == dots[1] + 2


def test_loops_count_as_often_as_they_run() -> None:
    def loop(x, w):
        return jax.lax.scan(lambda c, _: (jnp.tanh(c @ w), None), x, length=5)[0]

    w = jax.ShapeDtypeStruct((16, 16), jnp.float32)
    found = report(loop, X, w, in_shardings=(P(None, "tensor"), P("tensor")), machine="v5e:2x4")
    dot = next(r for r in found.rows if r.op == "dot_general")
    scan = found.rows[dot.parent]
    assert (scan.op, scan.trips, dot.trips) == ("scan", 1, 5)
    assert sum(c.count for c in found.communication) % 5 == 0
    assert found.wire_bytes == sum(r.bytes for r in found.rows)
    inside = [r.seconds for r in found.rows if r.parent == dot.parent]
    assert scan.seconds == pytest.approx(sum(inside))
    assert found.flops.total == pytest.approx(sum(r.flops for r in found.rows))


@pytest.mark.parametrize("parallelism", PARALLELISMS)
def test_communication_is_that_of_the_per_device_program(parallelism: str) -> None:
    from models.transformer import Transformer

    mesh = {"data": 2, "fsdp": 2, "tensor": 2}
    tokens = jax.ShapeDtypeStruct((BATCH, SEQ + 1), jnp.int32)
    inputs = jax.ShapeDtypeStruct((BATCH, SEQ), jnp.int32)
    params = jax.eval_shape(Transformer(CONFIG).init, jax.random.key(0), inputs)["params"]
    step = spmd.jit(jax.value_and_grad(functools.partial(loss_of, CONFIG)), mesh=mesh,
                    axis_rules=rules_for(parallelism, mesh))  # fmt: skip
    partitioned = step.trace(params, tokens).propagate().partition()
    found = partitioned.report("v5e:2x4")
    want = {(c.kind, c.axes): (c.count, c.bytes)
            for c in collectives.summarize(partitioned.collectives)}  # fmt: skip
    got: dict[tuple, tuple[int, float]] = {}
    for c in found.communication:
        n, size = got.get((c.kind, c.axes), (0, 0.0))
        got[c.kind, c.axes] = n + c.count, size + c.bytes
    assert got == {key: (n, pytest.approx(size)) for key, (n, size) in want.items()}
    assert want
    assert found.memory.peak == max(found.memory.over) == found.memory.over[found.memory.at]
    assert sum(found.memory.by_kind.values()) == found.memory.peak
    # A described TPU pads arrays to tiles, and keeps small temporaries in the core's own memory.
    other = partitioned.report()
    assert other.memory.peak == partitioned.peak_memory
    assert {"parameter", "activation"} <= set(other.memory.by_kind)


def test_memory_by_kind_and_what_is_held() -> None:
    def step(params, opt_state, batch):
        grad = jax.grad(lambda w: jnp.sum((batch @ w) ** 2))(params["w"])
        mu = 0.9 * opt_state["mu"] + grad
        return {"w": params["w"] - mu}, {"mu": mu}

    found = report(step, {"w": W}, {"mu": W}, X, in_shardings=(None, None, P("data")),
                   mesh={"data": 8}, machine="v5e:2x4", donate_argnums=(0, 1))  # fmt: skip
    size, padded = 16 * 32 * 4, 16 * 128 * 4  # in memory, a TPU's tiles have 128 columns
    assert found.memory.by_kind["parameter"] == found.memory.by_kind["optimizer state"] == padded
    assert found.memory.by_kind["argument"] == 1 * 128 * 4
    assert found.memory.capacity == 16 * 2**30
    live = found.memory.live(found.memory.at)
    assert sum(b.bytes for b in live) == found.memory.peak
    assert [b.bytes for b in live] == sorted((b.bytes for b in live), reverse=True)
    assert all(b.start <= found.memory.at < b.end for b in live)
    for row, held in enumerate(found.memory.over):
        assert sum(b.bytes for b in found.memory.live(row)) == held, row
    kinds = {t.name: (t.kind, t.sharding, t.bytes) for t in found.arguments}
    assert kinds["params['w']"] == ("parameter", "[-, -]", size)
    assert kinds["batch"] == ("argument", "[data, -]", 64)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("state.params['layer']['kernel'].value", "parameter"),
        ("state.opt_state[0].mu['layer']['kernel']", "optimizer state"),
        ("optimizer.step", "optimizer state"), ("batch_BS", "argument"), ("v", "argument"),
    ],
)  # fmt: skip
def test_kinds_of_arguments_by_their_paths(name: str, kind: str) -> None:
    assert kind_of(name) == kind


def mlp(x, w1, w2):
    return jax.nn.relu(x @ w1) @ w2


def small(machine: str | None = "v5e:2x4") -> Report:
    shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((64, 256), (256, 1024), (1024, 256))]
    return report(mlp, *shapes, machine=machine, in_shardings=(P("data"), P(None, "tensor"), None))


def test_the_text() -> None:
    # 64 x 256 floats over data=2 are 32 KiB; a ring of 4 sends 2 * 3/4 of it.
    text = re.sub(r"\S*test_report.py:\d+", "FILE", str(small()))
    want = """\
mlp, per device and call
  mesh            data=2 tensor=4 (8 devices)
  machine         v5e:2x4
"""
    assert text.startswith(want)
    assert "  useful      8.40 MFLOP  100.0%\n  replicated      0 FLOP    0.0%\n" in text
    assert "peak memory  576 KiB of 16.0 GiB (0.0%)\n  argument   544 KiB  94.4%\n" in text
    assert "     256 KiB  [-, tensor]  w1\n" in text
    assert "communication  48.0 KiB sent\n  all_reduce(tensor)  x1  48.0 KiB  4.00 us" in text
    assert "  by source line\n    FILE (mlp)  x1  48.0 KiB" in text
    assert text.endswith("findings  none")
    assert repr(small()) == (
        "<Report of mlp: data=2 tensor=4, on v5e:2x4, "
        f"{units.seconds(small().seconds)} predicted, 576 KiB peak, 48.0 KiB sent>"
    )


def test_without_a_machine_there_are_no_times() -> None:
    found = small(None)
    assert (found.seconds, found.exposed, found.utilisation, found.machine) == (0, 0, 0, "")
    text = str(found)
    assert "  machine  none given: times are not predicted\n" in text
    assert "peak memory  608 KiB\n" in text
    assert "  all_reduce(tensor)  x1  48.0 KiB\n" in text
    assert "exposed" not in text


def test_the_time_and_the_utilisation() -> None:
    found, machine = small(), Machine.parse("v5e:2x4")
    wire = machine.lay(ON_8).wire_time("all_reduce", ("tensor",), 48 * 1024)
    assert found.communication[0].seconds == pytest.approx(wire)
    assert 0 < found.exposed <= wire * (1 + 1e-9)
    assert found.seconds == pytest.approx(sum(r.seconds for r in found.rows if r.parent < 0))
    peak = machine.chip.flops[0][1]
    assert found.utilisation == pytest.approx(found.flops.useful / peak / found.seconds)


def test_every_stage_and_the_function_say_the_same() -> None:
    step = spmd.jit(matmul, mesh=jax.make_mesh((2, 4), ("data", "tensor")), in_shardings=P("data"))
    traced = step.trace(X, W)
    partitioned = traced.propagate().partition()
    lowered = partitioned.lower()
    stages = (traced, traced.propagate(), partitioned, lowered, lowered.compile())
    want = spmd.report(step, X, W, machine="v5e:2x4")
    for stage in stages:
        assert spmd.report(stage, machine=Machine.parse("v5e:2x4")) == want, type(stage)
        assert stage.report("v5e:2x4") == want


@pytest.mark.parametrize("donate", [(), 0])
def test_memory_without_a_machine_is_that_of_the_mesh(donate) -> None:
    """On CPUs tanh(x) is written before the matmul reads it; a donated x makes room for it."""
    mesh = jax.make_mesh((8,), ("data",))
    step = spmd.jit(lambda x, w: jnp.tanh(x) @ w + 1, mesh=mesh, donate_argnums=donate,
                    in_shardings=P("data"))  # fmt: skip
    x, w = (jax.ShapeDtypeStruct((1024, 1024), jnp.float32) for _ in range(2))
    partitioned = step.trace(x, w).propagate().partition()
    peak = partitioned.report().memory.peak
    assert peak == partitioned.peak_memory
    tpu = partitioned.report("v3:2x2").memory.peak
    shard = 4 * 1024 * 1024 // 8
    # x, w gathered and its shard, tanh(x) (in the place of a donated x), the product
    assert peak == (1 + 8 + 1 + (0 if donate == 0 else 1) + 1) * shard
    assert tpu == (peak if donate == 0 else peak - shard)


def test_what_cannot_be_reported() -> None:
    traced = spmd.jit(matmul, mesh=ON_8).trace(X, W)
    with pytest.raises(ArgumentError) as error:
        spmd.report(traced, X)
    assert str(error.value) == (
        "spmd.report was given a Traced and arguments\n"
        "  why: a stage is of a program that has its arguments already\n"
        "  fix: pass the stage alone, and the machine as machine="
    )
    with pytest.raises(ArgumentError, match="spmd.report was given a function\n"):
        spmd.report(matmul)
    with pytest.raises(MeshError, match="data=2 x tensor=4 = 8 devices, and v5e:4x4 has 16"):
        traced.report("v5e:4x4")


def test_json_round_trip() -> None:
    for found in (small(), small(None), report(lambda x: x, X)):
        assert Report.from_json(found.to_json()) == found
        assert Report.from_json(found.to_json(indent=1)) == found


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("{", "it is no JSON: Expecting property name enclosed in double quotes: "
              "line 1 column 2 (char 1)"),
        ("[]", "its format is 'list', this version reads 2"),
        ('{"format": 99}', "its format is 99, this version reads 2"),
        ('{"format": 2}', "the report has no name"),
    ],
)  # fmt: skip
def test_what_is_no_report(text: str, why: str) -> None:
    with pytest.raises(ArgumentError) as error:
        Report.from_json(text)
    fix = "write it with Report.to_json() of this version"
    assert str(error.value) == f"a report to read\n  why: {why}\n  fix: {fix}"


def test_a_report_with_another_column_is_refused() -> None:
    data = json.loads(small().to_json())
    data["rows"]["columns"][0] = "mother"
    with pytest.raises(ArgumentError, match="rows has other columns than parent, op"):
        Report.from_json(json.dumps(data))


def test_save_writes_by_the_ending(tmp_path) -> None:
    found = small()
    found.save(tmp_path / "a.json")
    found.save(tmp_path / "a.html")
    assert Report.from_json((tmp_path / "a.json").read_text()) == found
    assert (tmp_path / "a.html").read_text() == found.to_html()


@pytest.mark.parametrize(
    ("text", "want"),
    [
        (units.size(0), "0 B"), (units.size(1023), "1,023 B"), (units.size(1536), "1.50 KiB"),
        (units.size(5e9), "4.66 GiB"), (units.flops(999), "999 FLOP"),
        (units.flops(2.1e12), "2.10 TFLOP"), (units.seconds(0), "0 s"),
        (units.seconds(0.0186), "18.6 ms"), (units.seconds(3.2e-8), "32.0 ns"),
        (units.seconds(12.5), "12.5 s"), (units.signed(units.size(-2048)), "-2.00 KiB"),
        (units.signed(units.size(2048)), "+2.00 KiB"),
        (units.shortened("abcdefghij", 9), "ab...ghij"),
    ],
)  # fmt: skip
def test_numbers_as_people_read_them(text: str, want: str) -> None:
    assert text == want
