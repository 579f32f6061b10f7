"""Times and buffers read from what the TPU compiler prints; nothing is compiled here."""

import pytest

from spmd.ahead import libtpu
from spmd.ahead.buffers import parse_assignment, shortage
from spmd.ahead.libtpu import CompilerMissing, check_installed
from spmd.ahead.schedule import read_schedule
from spmd.ahead.source import Sources
from spmd.hardware import Machine
from tests.unit.hlo_programs import BY_ROW, compare, loop, program, run_loop

# 8 devices: 2 x 4 chips, tensor on the line of 4
LAYOUT = Machine.parse("v5p:2x4x1").lay({"data": 2, "tensor": 4})
CYCLES = 'backend_config={"window_config":{"estimated_cycles":"1750000"}}'  # 1 ms at 1.75 GHz
MS = 1e-3
# 200 MB on a line of 4 at 100 GB/s: 3/4 of it passes over the last link
GATHER = 0.15e9 / 100e9
BIG = "f32[50000000]"
TABLES = """
FileNames
1 "/src/model.py"
2 "/usr/lib/python3/site-packages/flax/core.py"

FunctionNames
1 "Model.__call__"
2 "apply"

FileLocations
1 {file_name_id=1 function_name_id=1 line=12 end_line=12 column=4 end_column=9}
2 {file_name_id=2 function_name_id=2 line=99 end_line=99 column=4 end_column=9}

StackFrames
1 {file_location_id=1 parent_frame_id=1}
2 {file_location_id=2 parent_frame_id=2}
"""


def gather(name, start=False):
    opcode = "all-gather-start" if start else "all-gather"
    shape = f"(f32[12500000], {BIG})" if start else BIG
    return f"%{name} = {shape} {opcode}(%shard), {BY_ROW}, dimensions={{0}}"


def matmul(name, operand="%x"):
    return f"%{name} = f32[8,4] fusion({operand}), kind=kOutput, calls=%nothing, {CYCLES}"


SHARD = "%shard = f32[12500000] iota(), iota_dimension=0"
NOTHING = "\n%nothing (p: f32[8,4]) -> f32[8,4] {\n  ROOT %p = f32[8,4] parameter(0)\n}\n"


def schedule(*lines):
    return read_schedule(program(SHARD, *lines, before=NOTHING), LAYOUT)


def test_a_synchronous_collective_is_exposed():
    found = schedule(gather("ag"), matmul("m"))
    assert found.compute == pytest.approx(1 * MS)
    assert found.cycles == 1_750_000
    assert found.exposed == pytest.approx(GATHER)
    assert found.seconds == pytest.approx(1 * MS + GATHER)
    (transfer,) = found.transfers
    assert (transfer.kind, transfer.axes, transfer.count) == ("all_gather", ("tensor",), 1)
    assert transfer.bytes == 200_000_000
    assert not transfer.asynchronous


def test_a_started_collective_hides_behind_what_is_scheduled():
    done = f"%ag.done = {BIG} all-gather-done(%ag)"
    found = schedule(gather("ag", start=True), matmul("m"), done)
    assert found.transfers[0].asynchronous
    assert found.transfers[0].seconds == pytest.approx(GATHER)
    assert found.exposed == pytest.approx(GATHER - 1 * MS)
    hidden = schedule(gather("ag", start=True), *(matmul(f"m{i}") for i in range(4)), done)
    assert hidden.exposed == 0.0
    assert hidden.seconds == pytest.approx(4 * MS)


def test_a_collective_on_a_sparse_core_hides_too():
    called = (
        "\n%offloaded (p: f32[12500000]) -> f32[50000000] {\n"
        "  %p = f32[12500000] parameter(0)\n"
        f"  ROOT %ag = {BIG} all-gather(%p), {BY_ROW}, dimensions={{0}}\n}}\n"
    )
    start = f"%s = ((f32[12500000]), {BIG}) call-start(%shard), to_apply=%offloaded"
    lines = (start, matmul("m"), f"%d = {BIG} call-done(%s)")
    found = read_schedule(program(SHARD, *lines, before=NOTHING + called), LAYOUT)
    assert found.transfers[0].asynchronous
    assert found.exposed == pytest.approx(GATHER - 1 * MS)


def test_started_collectives_follow_each_other_on_the_links():
    found = schedule(
        gather("a", start=True), gather("b", start=True),
        f"%b.done = {BIG} all-gather-done(%b)", f"%a.done = {BIG} all-gather-done(%a)",
    )  # fmt: skip
    assert found.exposed == pytest.approx(2 * GATHER)


def test_loops_count_as_often_as_they_run():
    # one all-reduce of 128 bytes per iteration takes its latency: 3 hops on the line, twice
    found = read_schedule(run_loop(loop(compare("LT"))), LAYOUT)
    assert found.exact
    assert found.transfers[0].count == 5
    assert found.exposed == pytest.approx(5 * 2 * 3e-6)
    fused = loop(compare("LT"), more=NOTHING).replace(
        "  ROOT %out", f"  {matmul('m', '%y')}\n  ROOT %out"
    )
    assert read_schedule(run_loop(fused), LAYOUT).compute >= 5 * MS
    carried = read_schedule(run_loop(loop(compare("LT", right="%cn")), carried=7), LAYOUT)
    assert carried.transfers[0].count == 7
    unknown = read_schedule(run_loop(loop(compare("LT"), step="multiply(%i, %i)")), LAYOUT)
    assert not unknown.exact


def test_instructions_without_an_estimate_take_their_bytes():
    found = schedule("%c = f32[50000000] copy(%big)".replace("%big", "%shard"))
    assert found.cycles == 0
    assert found.unestimated == found.compute == pytest.approx((200e6 + 50e6) / 2.8e12)


@pytest.mark.parametrize("target, free", [
    ("AllocateBuffer", True), ("ConcatBitcast", True), ("Sharding", False),
])  # fmt: skip
def test_calls_that_only_name_memory_take_no_time(target, free):
    """As XLA makes them of what a loop stacks, and of what it brings nearer in parts."""
    found = schedule(f'%c = {BIG} custom-call(%shard), custom_call_target="{target}"')
    assert (found.compute == 0) is free


FUSED = f"""
%begin (p: f32[12500000]) -> (f32[12500000], {BIG}) {{
  %p = f32[12500000] parameter(0)
  %ag.1 = {BIG} all-gather(%p), {BY_ROW}, dimensions={{0}}, frontend_attributes={{chain_id="0"}}
  ROOT %s = (f32[12500000], {BIG}) custom-call(%ag.1), custom_call_target="AsyncCollectiveStart"
}}

%goes_on (q: f32[12500000], y: f32[8,4]) -> f32[8,4] {{
  %q = f32[12500000] parameter(0)
  %ag.2 = {BIG} all-gather(%q), {BY_ROW}, dimensions={{0}}, frontend_attributes={{chain_id="0"}}
  ROOT %y = f32[8,4] parameter(1)
}}

%end (r: f32[12500000]) -> {BIG} {{
  %r = f32[12500000] parameter(0)
  %ag.3 = {BIG} all-gather(%r), {BY_ROW}, dimensions={{0}}, frontend_attributes={{chain_id="0"}}
  ROOT %d = {BIG} custom-call(%r, %ag.3), custom_call_target="AsyncCollectiveDone"
}}
"""


def test_a_collective_spread_over_fusions_runs_beside_them():
    lines = [
        f"%s = (f32[12500000], {BIG}) fusion(%shard), kind=kCustom, calls=%begin",
        f"%m = f32[8,4] fusion(%shard, %x), kind=kOutput, calls=%goes_on, {CYCLES}",
        f"%d = {BIG} fusion(%shard), kind=kCustom, calls=%end",
    ]
    found = read_schedule(program(SHARD, *lines, before=FUSED), LAYOUT)
    (transfer,) = found.transfers
    assert transfer.asynchronous and transfer.count == 1
    assert transfer.seconds == pytest.approx(GATHER)
    assert found.exposed == pytest.approx(GATHER - 1 * MS)


def test_the_dearest_branch_counts():
    branches = f"""
%cheap (p: f32[8,4]) -> f32[8,4] {{
  ROOT %p = f32[8,4] parameter(0)
}}

%dear (q: f32[8,4]) -> f32[8,4] {{
  %q = f32[8,4] parameter(0)
  ROOT %m = f32[8,4] fusion(%q), kind=kOutput, calls=%nothing, {CYCLES}
}}
"""
    for order in ("%dear, %cheap", "%cheap, %dear"):
        line = f"%c = f32[8,4] conditional(%i, %x, %x), branch_computations={{{order}}}"
        text = program("%i = s32[] constant(0)", line, before=NOTHING + branches)
        assert read_schedule(text, LAYOUT).compute == pytest.approx(1 * MS)


def test_lines_are_those_that_the_user_wrote():
    sources = Sources(TABLES)
    assert sources.of('metadata={op_name="a" stack_frame_id=1}') == "model.py:12 (__call__)"
    assert sources.of('metadata={op_name="a" stack_frame_id=2}') == "model.py:12 (__call__)"
    assert sources.of('metadata={source_file="/a/b.py" source_line=7}') == "b.py:7"
    assert sources.of("") == ""


ASSIGNMENT = """BufferAssignment:
allocation 0: size 4096, parameter 0, shape |f32[1024]| at ShapeIndex {}:
 value: <1 param.1 @0> (size=4096,offset=0): f32[1024]{0:T(1024)}
 value: <2 add.9 @0> (size=4096,offset=0): f32[1024]{0:T(1024)}
allocation 1: size 2048, maybe-live-out:
 value: <3 fusion.1 @0> (size=2048,offset=0): f32[512]{0:T(512)}
allocation 2: size 900, color 1, preallocated-temp:
 value: <4 vmem @0> (size=900,offset=0): f32[225]{0:T(128)}
allocation 3: size 6144, preallocated-temp:
 value: <5 while.3{2} (phi) @0> (size=4096,offset=0): bf16[2048]{0:T(1024)(2,1)}
 value: <6 dot.4 @0> (size=4096,offset=0): bf16[2048]{0:T(1024)(2,1)}
 value: <7 early.5 @0> (size=3000,offset=1000): f32[750]{0:T(128)}
 value: <8 other.6 @0> (size=2048,offset=4096): f32[512]{0:T(128)}
allocation 4: size 1024, thread-local:
 value: <9 tmp @0> (size=1024,offset=0): f32[256]{0:T(128)}
"""
MODULE = f"""HloModule m
{TABLES}
ENTRY %main (param.1: f32[1024]) -> f32[512] {{
  %param.1 = f32[1024]{{0}} parameter(0), metadata={{op_name="params['w']"}}
  %dot.4 = bf16[2048]{{0}} dot(%param.1), metadata={{op_name="jit(f)/dot" stack_frame_id=2}}
  ROOT %fusion.1 = f32[512]{{0}} fusion(%dot.4)
}}
"""


def test_buffers_take_disjoint_bytes_and_know_their_lines():
    found = parse_assignment(ASSIGNMENT, MODULE)
    assert found.total == 4096 + 2048 + 6144
    assert [str(b) for b in found.buffers] == [
        "0.0 MiB argument f32[1024] params['w']",
        "0.0 MiB temporary bf16[2048] dot at model.py:12 (__call__)",
        "0.0 MiB result f32[512] fusion.1",
        "0.0 MiB temporary f32[512] other.6",
    ]


@pytest.mark.parametrize(
    ("message", "needed", "available"),
    [
        (
            "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO "
            "temporaries (447.03G) exceeds available HBM (15.48G).",
            447.03, 15.48,
        ),
        (
            "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 21.30G of 15.48G "
            "hbm. Exceeded hbm capacity by 5.82G.",
            21.30, 15.48,
        ),
    ],
)  # fmt: skip
def test_the_error_of_a_program_too_large_is_read(message, needed, available):
    found = shortage(message)
    assert found is not None
    assert found.needed == pytest.approx(needed * 2**30)
    assert found.available == pytest.approx(available * 2**30)
    assert shortage("RESOURCE_EXHAUSTED: too many open files") is None


def test_without_libtpu_the_extra_is_named(monkeypatch):
    monkeypatch.setattr(libtpu.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(CompilerMissing) as error:
        check_installed("topology v5p:4x4x4")
    assert str(error.value) == (
        "topology v5p:4x4x4\n"
        "  why: the TPU compiler, libtpu, is not installed\n"
        '  fix: install the extra: pip install "spmd-compiler[tpu]"'
    )


def test_another_libtpu_is_named(monkeypatch):
    versions = {"libtpu": "0.0.7", "jax": "0.10.2"}
    monkeypatch.setattr(libtpu.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(libtpu.importlib.metadata, "version", lambda name: versions[name])
    monkeypatch.setattr(libtpu, "required_version", lambda: "0.0.42.*")
    with pytest.raises(CompilerMissing) as error:
        check_installed("topology v5p:4x4x4")
    assert str(error.value) == (
        "topology v5p:4x4x4\n"
        "  why: libtpu 0.0.7 is installed, and JAX 0.10.2 works with libtpu 0.0.42.*\n"
        "  fix: install the extra, which brings the right one: pip install "
        '"spmd-compiler[tpu]"'
    )
    versions["libtpu"] = "0.0.42.1"
    check_installed("topology v5p:4x4x4")
