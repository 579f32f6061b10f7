"""Explanations by their literal text: an MLP, a conflict, a scan, a gather; and errors."""

import dataclasses
import json
from typing import Any

import jax
import jax.numpy as jnp
import pytest

import spmd
from sharding import ArgumentError, MeshError, P, Sharding, shard
from spmd.explaining import remedy
from spmd.explaining.remedy import Candidate
from spmd.hardware import Machine

MESH = {"data": 2, "tensor": 4}
F32 = jnp.float32


def arr(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, F32)


def staged(fun: Any, *args: Any, ins: Any = None, **options: Any) -> spmd.Partitioned:
    function = spmd.jit(fun, mesh=MESH, in_shardings=ins, **options)
    return function.trace(*args).propagate().partition()


def mlp(x, w1, w2):
    return jax.nn.relu(x @ w1) @ w2


AT = f"unit/test_explain.py:{mlp.__code__.co_firstlineno + 1}"


def layers() -> spmd.Partitioned:
    ins = (P("data"), P(None, "tensor"), None)
    return staged(mlp, arr(64, 256), arr(256, 1024), arr(1024, 256), ins=ins)


def without_memory(text: Any) -> str:
    """Predicted peak memory is tested elsewhere."""
    return "\n".join(
        line for line in str(text).replace(", +0 B peak memory", "").splitlines()
        if "peak memory" not in line
    )


W2 = f"""\
w2: f32[1024,256] [tensor?, ?]
  dim 0 on tensor
    w1 dim 1: in_shardings of spmd.jit
    %3 dim 1: dot_general (m0 k0, k0 n0 -> m0 n0 [k0:reduce(add)]) along n0  # {AT} (mlp)
    %5 dim 1: max (d0 d1, () -> d0 d1) along d1  # {AT} (mlp)
    w2 dim 0: dot_general (m0 k0, k0 n0 -> m0 n0 [k0:reduce(add)]) along k0  # {AT} (mlp)
  dim 1 on no axis: no rule brings one here
  on every device
    [tensor, -]: (256, 256), 262,144 B per device, as it comes"""


def test_an_argument_of_an_mlp() -> None:
    partitioned = layers()
    assert str(partitioned.explain("w2")) == W2
    assert str(partitioned.propagated.explain("w2")) == W2
    assert str(spmd.explain(partitioned.propagated.traced, "w2")) == W2
    assert str(partitioned.lower().explain("w2")) == W2


def test_the_result_of_an_mlp() -> None:
    text = str(layers().explain("result")).splitlines()
    # An all-reduce of 32 x 256 floats over 4: 2 * 32,768 B * 3/4. The partial result is all that
    # the alternatives differ in; whole w2 takes a gather of 1 MiB * 3/4 besides.
    assert text[7:] == [
        "  on every device",
        "    [data, -] partial{tensor:add}: (32, 256), 32,768 B per device, from dot_general with "
        "m0 on data, k0 on tensor",
        "    [data, -]: (32, 256), 32,768 B per device, by all_reduce(tensor), 49,152 B, for the "
        "boundary",
        "  assignments of axes to named dims, by cost in link bytes",
        "    chosen: m0 on data, k0 on tensor: 49,152 B sent, cost 596,676",
        "    lost: m0 on data: 884,736 B sent, cost 3,152,644",
        "    lost: no axis: 1,015,808 B sent, cost 5,412,529",
    ]


def test_a_source_line_names_all_that_is_made_there() -> None:
    partitioned = layers()
    for asked in (AT, AT.split("/")[1], "/elsewhere/" + AT):
        values = partitioned.explain(asked).values
        assert [v.history.name for v in values] == ["%3", "%5", "result"]
    with pytest.raises(ArgumentError):
        partitioned.explain("other/" + AT.split("/")[1])


ALL_REDUCE = f"""\
all_reduce(tensor) of result: 49,152 B, 0.273 us  # {AT} (mlp)
  from [data, -] partial{{tensor:add}}
    result dim 0 on data: x dim 0, in_shardings of spmd.jit, through 3 rules
    partial over tensor: dot_general reduces k0 by add
    %5 dim 1 on tensor: w1 dim 1, in_shardings of spmd.jit, through 2 rules
  to [data, -], for the boundary
    result dim 0 on data: x dim 0, in_shardings of spmd.jit, through 3 rules
  removed by out_shardings P(('data', 'tensor'), None) for result, made at {AT} (mlp): -24,576 B \
sent per device
  4 annotations tried, each planned as a whole program"""


def test_why_a_collective() -> None:
    partitioned = layers()
    (record,) = partitioned.collectives
    for asked in (record, "all_reduce", "all_reduce(tensor)", "result", AT):
        assert without_memory(partitioned.why(asked)) == ALL_REDUCE
    # What it says holds when it is written out.
    ins = (P("data"), P(None, "tensor"), None)
    args = arr(64, 256), arr(256, 1024), arr(1024, 256)
    with_remedy = staged(mlp, *args, ins=ins, out_shardings=P(("data", "tensor"), None))
    assert with_remedy.wire_bytes - partitioned.wire_bytes == -24_576


def test_why_times_a_collective_on_a_machine() -> None:
    partitioned = layers()
    (record,) = partitioned.collectives
    machine = Machine.parse("v5e:2x4")
    times = machine.lay(partitioned.plan.mesh)
    for given in (machine, "v5e:2x4"):
        (row,) = partitioned.why("all_reduce", machine=given).collectives
        assert row.seconds == times.wire_time("all_reduce", ("tensor",), record.bytes)
    assert row.seconds > partitioned.why("all_reduce").collectives[0].seconds  # 45 GB/s links
    with pytest.raises(MeshError, match="v5e:2x2"):
        partitioned.why("all_reduce", machine="v5e:2x2")


def test_an_annotation_that_keeps_the_collective_is_no_remedy(monkeypatch: Any) -> None:
    partitioned = layers()
    w2 = partitioned.plan.program.body.inputs[2]
    kept = Candidate(w2, Sharding.parse("[tensor, -]"), "in_shardings P('tensor', None) for w2")
    monkeypatch.setattr(remedy, "_candidates", lambda *_: [kept])
    (row,) = partitioned.why("result").collectives
    assert row.remedy is None
    assert row.tried == "1 annotation tried, none removes it"
    monkeypatch.setattr(remedy, "SMALL", 2)
    (row,) = partitioned.why("result").collectives
    assert row.remedy is None
    assert row.tried == "no annotation was tried: 3 operations, over 2"


def test_why_not() -> None:
    text = without_memory(layers().why_not("w2", P(None, "data")))
    # The result is gathered over data: 32 x 256 floats.
    assert text == (
        "w2 is [tensor, -], not [-, data]\n"
        "  w2 dim 0 on tensor: w1 dim 1, in_shardings of spmd.jit, through 3 rules\n"
        "  dim 1: no rule brings data here\n"
        "  with in_shardings P(None, 'data') for w2\n"
        "    sent 49,152 -> 81,920 B per device (+32,768)\n"
        "    all_gather(data): none -> x1 32,768 B"
    )
    args = arr(64, 256), arr(256, 1024), arr(1024, 256)
    ins = (P("data"), P(None, "tensor"), P(None, "data"))
    assert staged(mlp, *args, ins=ins).wire_bytes == 81_920
    same = layers().why_not("w1", "[-, tensor]")
    assert same.reasons == ("it is so already",) and same.before == same.after
    closed = layers().why_not("w1", P(None, ("data", "tensor")))
    assert closed.reasons == ("dim 1 is closed by in_shardings of spmd.jit",)


def test_what_cannot_be() -> None:
    partitioned = layers()
    assert str(partitioned.why_not("w2", P("data", "data"))) == (
        "w2 is [tensor, -], not P('data', 'data')\n"
        "  cannot be: w2 has spec P('data', 'data'), which uses axis 'data' twice\n"
        "  why: the devices along one axis can hold the parts of one dim only\n"
        "  fix: keep 'data' in one dim and remove it from the others"
    )
    longer = partitioned.why_not("x", P(None, None, None))
    assert "the spec has 3 entries, the array 2 dims" in str(longer)
    few = staged(lambda x: x + 1, arr(2, 8), ins=P("tensor")).why_not("x", P("tensor"))
    assert few.reasons == ("it is so already",)
    short = staged(lambda x: x + 1, arr(3, 8)).why_not("x", P("tensor"))
    assert short.illegal == (
        "dim 0 of x has size 3, and tensor makes 4 shards\n"
        "  why: some devices would have nothing but padding\n"
        "  fix: use fewer axes for it",
    )


def test_names_that_are_none() -> None:
    partitioned = layers()
    cases = {
        "model.py:12": partitioned.explain,
        "nothing": partitioned.why,
    }
    for asked, ask in cases.items():
        with pytest.raises(ArgumentError) as error:
            ask(asked)
        assert str(error.value) == (
            f"'{asked}' names no value of the program\n"
            "  why: a value is named by its argument path, by its name in the printed program, or "
            "by the source line that makes it\n"
            "  fix: print the stage to see every name: params['w'], %12, result[0]; or model.py:12"
        )
    with pytest.raises(ArgumentError) as error:
        partitioned.why("w1")
    assert str(error.value) == (
        "no collective for w1\n"
        "  why: the program has all_reduce(tensor)\n"
        "  fix: ask for a record of .collectives, a kind such as all_reduce(tensor), a value that "
        "is moved, or a source line"
    )
    with pytest.raises(ArgumentError) as error:
        partitioned.why_not(AT, P())
    assert str(error.value) == (
        f"{AT} names 3 arrays: %3, %5, result\n"
        "  why: one annotation is of one array\n"
        "  fix: ask for one of them by its name"
    )


def test_it_is_json() -> None:
    partitioned = layers()
    for answer in (
        partitioned.explain(AT), partitioned.why("result"), partitioned.why_not("w2", P("data"))
    ):
        data = json.loads(json.dumps(dataclasses.asdict(answer)))
        assert data and type(data) is dict
    data = dataclasses.asdict(partitioned.explain("w2"))
    chain = data["values"][0]["history"]["chains"][0]
    assert [step["value"] for step in chain["steps"]] == ["w1", "%3", "%5", "w2"]


def product(x, w):
    return x @ w


def test_a_conflict() -> None:
    partitioned = staged(
        product, arr(1024, 1024), arr(1024, 4096), ins=(P("tensor"), P(None, "tensor"))
    )
    at = f"unit/test_explain.py:{product.__code__.co_firstlineno + 1} (product)"
    # x is the smaller: its 4 MiB are gathered, w's 16 MiB stay. 3 * 2**20 B arrive.
    text = str(partitioned.explain("result")).splitlines()
    assert text[:6] == [
        f"result: f32[1024,4096] [?, tensor?]  # {at}",
        "  dim 1 on tensor",
        "    w dim 1: in_shardings of spmd.jit",
        "    result dim 1: dot_general (m0 k0, k0 n0 -> m0 n0 [k0:reduce(add)]) along n0"
        f"  # {at}",
        "  dim 0 on no axis: what was proposed was not taken",
        "  not taken",
    ]
    assert text[6] == (
        f"    dim 0 on tensor, from x by dot_general at {at}: tensor is used by another dim, or "
        "kept for one; this costs 3,145,728 B"
    )
    assert text[9:] == [
        "  assignments of axes to named dims, by cost in link bytes",
        "    chosen: n0 on tensor: 3,145,728 B sent, cost 272,457,558",
        "    lost: m0 on tensor: 15,728,640 B sent, cost 287,197,605",
        "    lost: no axis: 15,728,640 B sent, cost 1,093,852,142",
    ]
    assert without_memory(partitioned.why("x")).splitlines()[:5] == [
        f"all_gather(tensor) of x: 3,145,728 B, 17.5 us  # {at}",
        "  from [tensor, -]",
        "    x dim 0 on tensor: in_shardings of spmd.jit",
        "  to [-, -], for dot_general",
        "    dim 0 whole: tensor divides n0 in dot_general",
    ]


def accumulate(w, xs):
    def body(acc, x):
        x = shard(x, "data", None)
        return acc + x.T @ x, jnp.sum(x)

    return jax.lax.scan(body, w, xs)


def test_a_scan_body() -> None:
    args = arr(512, 512), arr(16, 256, 512)
    partitioned = staged(accumulate, *args, ins=(P(), None), disable_passes=["loop_sums"])
    line = accumulate.__code__.co_firstlineno
    text = str(partitioned.explain("xs")).splitlines()
    # The annotation is in the body: it goes out of it through the operand of the scan.
    assert text[:5] == [
        "xs: f32[16,256,512] [?, data?, ?]",
        "  dim 1 on data",
        f"    %6 dim 0: annotation P('data', None)  # unit/test_explain.py:{line + 2} "
        "(accumulate.<locals>.body)",
        "    %5 dim 0: shard (d0 d1 -> d0 d1) along d0  # unit/test_explain.py:"
        f"{line + 2} (accumulate.<locals>.body)",
        "    xs dim 1: scan: operand (d0 d1 -> loop d0 d1 [loop:fixed]) along d0  "
        f"# unit/test_explain.py:{line + 5} (accumulate)",
    ]
    why = without_memory(partitioned.why("%8")).splitlines()
    # 16 steps, each an all-reduce of 512 x 512 floats over 2: 2 * 2**20 / 2 B.
    assert why[0] == (
        "all_reduce(data) x16 of result of dot_general at unit/test_explain.py:"
        f"{line + 3} (accumulate.<locals>.body): 16,777,216 B, 93.2 us  # unit/test_explain.py:"
        f"{line + 3} (accumulate.<locals>.body)"
    )


def factorize(x):
    return jax.lax.linalg.cholesky(x, symmetrize_input=False)


def test_a_gather() -> None:
    partitioned = staged(factorize, arr(1024, 1024), ins=P("data"))
    found = partitioned.why("x").collectives[0].remedy
    assert found is not None and found.gains and found.wire_bytes == -2_097_152
    assert found.annotation == "in_shardings P(None, None) for x"
    at = f"unit/test_explain.py:{factorize.__code__.co_firstlineno + 1} (factorize)"
    assert without_memory(partitioned.why(at.split()[0])) == (
        f"all_gather(data) of x: 2,097,152 B, 11.7 us  # {at}\n"
        "  from [data, -]\n"
        "    x dim 0 on data: in_shardings of spmd.jit\n"
        "  to [-, -], for cholesky\n"
        "    dim 0 whole: cholesky has no form along f0-2 that is divided\n"
        "  2 annotations tried, each planned as a whole program"
    )
