"""The collective counter on HLO text written by hand, the arithmetic beside it."""

import pytest

from sharding.errors import ArgumentError
from spmd.reporting.hlo import KindTotal, collectives_in_hlo, summarize, wire_bytes
from spmd.reporting.hlo_text import bytes_of, parse_module, split_top_level
from tests.unit.hlo_programs import ADD, BY_ROW, HEADER, only, program

# --- bytes by kind -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "kind", "payload", "sent"),
    [
        # 2 * 3/4 * 128
        (f"%r = f32[8,4] all-reduce(%x), {BY_ROW}, to_apply=%add", "all-reduce", 128, 192),
        # the output has 4 * 128 bytes, of which 3/4 come from others
        (f"%r = f32[32,4] all-gather(%x), {BY_ROW}, dimensions={{0}}", "all-gather", 512, 384),
        # 3/4 of the input
        (
            f"%r = f32[2,4] reduce-scatter(%x), {BY_ROW}, dimensions={{0}}",
            "reduce-scatter",
            128,
            96,
        ),
        (f"%r = f32[8,4] all-to-all(%x), {BY_ROW}, dimensions={{0}}", "all-to-all", 128, 96),
        (
            "%r = f32[8,4] collective-permute(%x), source_target_pairs={{0,1},{1,0}}",
            "collective-permute",
            128,
            128,
        ),
    ],
)
def test_bytes_of_each_kind(line, kind, payload, sent):
    found = only(program(line))
    assert (found.kind, found.payload_bytes, found.count) == (kind, payload, 1)
    assert found.wire_bytes == sent
    assert summarize([found]) == {kind: KindTotal(1, sent)}


def test_several_operands_are_one_collective():
    line = f"%r = (f32[8,4], f32[8,4]) all-reduce(%x, %x), {BY_ROW}, to_apply=%add"
    found = only(program(line))
    # 2 * 3/4 * (128 + 128)
    assert (found.payload_bytes, found.wire_bytes) == (256, 384)
    assert found.dtypes == ("f32", "f32")


def test_all_to_all_of_one_operand_per_peer():
    lines = ["%s = f32[2,4] slice(%x), slice={[0:2], [0:4]}"]
    lines += [f"%r = (f32[2,4], f32[2,4], f32[2,4], f32[2,4]) all-to-all(%s, %s, %s, %s), {BY_ROW}"]
    # four pieces of 32 bytes, three of them go to others
    assert only(program(*lines)).wire_bytes == 96


def test_groups_of_one_device_move_nothing():
    line = "%r = f32[8,4] all-reduce(%x), replica_groups=[8,1]<=[8], to_apply=%add"
    found = only(program(line))
    assert (found.group_size, found.wire_bytes) == (1, 0)
    assert summarize([found]) == {}


def test_no_collective_at_all():
    text = program("ROOT %r = f32[8,4] add(%x, %x)")
    assert collectives_in_hlo(text) == ()
    assert wire_bytes(text) == 0


def test_types_printed_with_the_operands():
    line = "r = f32[8,4]{1,0} all-reduce(f32[8,4]{1,0} x), replica_groups={}, to_apply=add"
    text = f"HloModule m, replica_count=2, num_partitions=4\n\nENTRY main {{\n  {line}\n}}\n"
    # {} means all devices: 2 * 7/8 * 128
    assert only(text).wire_bytes == 224
    assert only(text).groups == (tuple(range(8)),)


def test_bf16_promoted_to_f32_counts_as_executed():
    lines = ["%c = f32[8,4] convert(%h)", f"%r = f32[8,4] all-reduce(%c), {BY_ROW}, to_apply=%add"]
    found = only(program("%h = bf16[8,4] convert(%x)", *lines))
    assert (found.dtypes, found.payload_bytes) == (("f32",), 128)


# --- asynchronous pairs --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "start_type", "attributes", "sent"),
    [
        ("all-reduce", "f32[8,4]", BY_ROW + ", to_apply=%add", 192),
        ("all-gather", "(f32[8,4], f32[32,4])", BY_ROW + ", dimensions={0}", 384),
        ("reduce-scatter", "((f32[8,4]), f32[2,4])", BY_ROW + ", to_apply=%add", 96),
        (
            "collective-permute",
            "(f32[8,4]{1,0}, f32[8,4]{1,0}, u32[]{:S(2)}, u32[]{:S(2)})",
            "source_target_pairs={{0,1},{1,0}}",
            128,
        ),
    ],
)
def test_start_and_done_count_once(kind, start_type, attributes, sent):
    start = f"%s = {start_type} {kind}-start(%x), {attributes}"
    found = only(program(start, f"%d = f32[8,4] {kind}-done(%s)"))
    assert (found.kind, found.wire_bytes) == (kind, sent)


def test_all_gather_start_of_two_operands():
    types = "((f32[8,4], f32[8,4]), (f32[32,4], f32[32,4]))"
    start = f"%s = {types} all-gather-start(%x, %x), {BY_ROW}, dimensions={{0}}"
    found = only(program(start, "%d = (f32[32,4], f32[32,4]) all-gather-done(%s)"))
    assert found.payload_bytes == 1024


def test_async_start_of_a_wrapped_computation():
    wrapped = f"""
%wrapped (p: f32[8,4]) -> f32[2,4] {{
  %p = f32[8,4] parameter(0)
  ROOT %rs = f32[2,4] reduce-scatter(%p), {BY_ROW}, dimensions={{0}}, to_apply=%add
}}
"""
    start = "%s = ((f32[8,4]), f32[2,4], u32[]) async-start(%x), calls=%wrapped"
    update = "%u = ((f32[8,4]), f32[2,4], u32[]) async-update(%s), calls=%wrapped"
    done = "%d = f32[2,4] async-done(%u), calls=%wrapped"
    assert only(program(start, update, done, before=wrapped)).wire_bytes == 96


# From a TPU v5e compilation, names shortened: one all-gather in three fusions.
CHAIN = """
%fused_start (p: bf16[1024,1024]) -> (bf16[1024,1024], bf16[4096,1024], s32[2], u32[]) {
  %p = bf16[1024,1024]{1,0:T(8,128)(2,1)S(1)} parameter(0)
  %all-gather.5 = bf16[4096,1024]{1,0:T(8,128)(2,1)} all-gather(%p), GROUPS, dimensions={0}, frontend_attributes={chain_id="0"}
  ROOT %custom-call.1 = (bf16[1024,1024]{1,0:T(8,128)(2,1)S(1)}, bf16[4096,1024]{1,0:T(8,128)(2,1)S(1)}, s32[2]{0:S(4)}, /*index=3*/u32[]{:S(2)}) custom-call(%all-gather.5), custom_call_target="AsyncCollectiveStart"
}

%async_collective_fusion (q: bf16[1024,1024], o: bf16[4096,1024]) -> (bf16[1024,1024], bf16[4096,1024]) {
  %q = bf16[1024,1024]{1,0:T(8,128)(2,1)S(1)} parameter(0)
  %o = bf16[4096,1024]{1,0:T(8,128)(2,1)S(1)} parameter(1)
  %all-gather.7 = bf16[4096,1024]{1,0:T(8,128)(2,1)S(1)} all-gather(%q), GROUPS, dimensions={0}, frontend_attributes={chain_id="0"}
  ROOT %tuple.24 = (bf16[1024,1024]{1,0}, bf16[4096,1024]{1,0}) tuple(%q, %all-gather.7)
}

%fused_done (r: bf16[1024,1024], t: bf16[4096,1024]) -> bf16[4096,1024] {
  %r = bf16[1024,1024]{1,0:T(8,128)(2,1)S(1)} parameter(0)
  %t = bf16[4096,1024]{1,0:T(8,128)(2,1)S(1)} parameter(1)
  %all-gather.11 = bf16[4096,1024]{1,0:T(8,128)(2,1)} all-gather(%r), GROUPS, dimensions={0}, frontend_attributes={chain_id="0"}
  ROOT %custom-call.3 = bf16[4096,1024]{1,0} custom-call(%r, %t, %all-gather.11), custom_call_target="AsyncCollectiveDone"
}
""".replace("GROUPS", BY_ROW)
MIDDLE = "%m = (bf16[1024,1024], bf16[4096,1024]) fusion(%x), calls=%async_collective_fusion"


def test_asynchronous_fusions_of_a_tpu_count_once():
    start = "%s = (bf16[1024,1024], bf16[4096,1024]) fusion(%x), kind=kCustom, calls=%fused_start"
    done = "%d = bf16[4096,1024] fusion(%s, %m), kind=kCustom, calls=%fused_done"
    found = only(program(start, MIDDLE, done, before=CHAIN))
    # output 4096 * 1024 * 2 bytes, 3/4 of it from others
    assert (found.name, found.wire_bytes) == ("all-gather.5", 6291456)


def test_asynchronous_fusions_without_a_start_count_once():
    without = CHAIN.replace("AsyncCollectiveStart", "SomethingElse")
    start = "%s = (bf16[1024,1024], bf16[4096,1024]) fusion(%x), kind=kCustom, calls=%fused_start"
    assert len(collectives_in_hlo(program(start, MIDDLE, before=without))) == 1


# From a TPU v5p compilation: an asynchronous call to the sparse cores.
SPARSECORE = f"""
%fused (p: f32[8,4]) -> f32[8,4] {{
  %p = f32[8,4]{{1,0:T(8,128)}} parameter(0)
  ROOT %all-reduce.2 = f32[8,4]{{1,0:T(8,128)}} all-reduce(%p), {BY_ROW}, to_apply=%add
}}

%called_computation (q: f32[8,4]) -> f32[8,4] {{
  %q = f32[8,4]{{1,0:T(8,128)}} parameter(0)
  ROOT %f = f32[8,4]{{1,0:T(8,128)}} fusion(%q), kind=kCustom, calls=%fused
}}, execution_thread="sparsecore"
"""


def test_asynchronous_calls_to_sparse_cores_count_once():
    prepare = '%t = token[] custom-call(), custom_call_target="PrepareAsyncCallDone"'
    start = (
        "%s = ((f32[8,4]{1,0:T(8,128)}, token[]), f32[8,4]{1,0:T(8,128)}) call-start(%x, %t),"
        ' async_execution_thread="sparsecore", to_apply=%called_computation'
    )
    done = "%d = f32[8,4]{1,0:T(8,128)} call-done(%s)"
    assert only(program(prepare, start, done, before=SPARSECORE)).wire_bytes == 192


# --- called computations -------------------------------------------------------------------------

# From a TPU v5p compilation: the all-reduce of which every device keeps one slice.
ALL_REDUCE_SCATTER = f"""
%all-reduce-scatter.1 (input: f32[8,4]) -> f32[2,4] {{
  %input = f32[8,4]{{1,0:T(8,128)}} parameter(0)
  %all-reduce.18 = f32[8,4]{{1,0:T(8,128)}} all-reduce(%input), {BY_ROW}, to_apply=%add
  %zero = u32[] constant(0)
  ROOT %slice = f32[2,4]{{1,0}} dynamic-slice(%all-reduce.18, %zero, %zero), dynamic_slice_sizes={{2,4}}
}}
"""


def test_a_fused_all_reduce_scatter_is_a_reduce_scatter():
    call = "%r = f32[2,4] fusion(%x), kind=kCustom, calls=%all-reduce-scatter.1"
    found = only(program(call, before=ALL_REDUCE_SCATTER))
    assert (found.kind, found.wire_bytes) == ("reduce-scatter", 96)


REDUCE = f"""
%reduce (p: f32[8,4]) -> f32[8,4] {{
  %p = f32[8,4] parameter(0)
  ROOT %ar = f32[8,4] all-reduce(%p), {BY_ROW}, to_apply=%add
}}

%gather (g: f32[8,4]) -> f32[8,4] {{
  %g = f32[8,4] parameter(0)
  %ag = f32[32,4] all-gather(%g), {BY_ROW}, dimensions={{0}}
  ROOT %cut = f32[8,4] slice(%ag), slice={{[0:8], [0:4]}}
}}

%nothing (n: f32[8,4]) -> f32[8,4] {{
  ROOT %n = f32[8,4] parameter(0)
}}
"""


def test_each_call_of_a_computation_counts():
    calls = ["%a = f32[8,4] call(%x), to_apply=%reduce", "%b = f32[8,4] call(%a), to_apply=%reduce"]
    assert summarize(collectives_in_hlo(program(*calls, before=REDUCE))) == {
        "all-reduce": KindTotal(2, 384)
    }


def test_of_a_conditional_the_branch_that_moves_most_counts():
    line = (
        "%r = f32[8,4] conditional(%i, %x, %x, %x),"
        " branch_computations={%nothing, %reduce, %gather}"
    )
    # nothing 0, reduce 192, gather 384
    assert only(program("%i = s32[] constant(1)", line, before=REDUCE)).kind == "all-gather"


def test_conditional_on_a_predicate():
    line = (
        "%r = f32[8,4] conditional(%p, %x, %x),"
        " true_computation=%reduce, false_computation=%nothing"
    )
    assert wire_bytes(program("%p = pred[] constant(true)", line, before=REDUCE)) == 192


# --- text ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("hlo_type", "size"),
    [
        ("f32[]", 4),
        ("bf16[1024,1024]{1,0:T(8,128)(2,1)S(1)}", 2097152),
        ("(f32[8,4]{1,0}, s32[2]{0:S(4)}, token[])", 136),
        ("pred[3]", 3),
        ("s4[5]", 3),  # packed two to a byte
        ("f8e4m3fn[16]", 16),
        ("c64[2]", 16),
        ("f32[<=8,2]", 64),
        ("()", 0),
    ],
)
def test_bytes_of_types(hlo_type, size):
    assert bytes_of(hlo_type) == size


def test_unknown_element_types_are_an_error():
    with pytest.raises(ArgumentError, match="an array of element type `q7`"):
        bytes_of("q7[2]")


def test_commas_inside_brackets_do_not_split():
    assert split_top_level("f32[2,4]{1,0} %a, (s32[], f32[2]) %b, ") == (
        "f32[2,4]{1,0} %a",
        "(s32[], f32[2]) %b",
    )


def test_text_without_an_entry_is_an_error():
    with pytest.raises(ArgumentError, match="1 HLO computations, none of them marked ENTRY"):
        parse_module(HEADER + ADD)
