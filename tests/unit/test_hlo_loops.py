"""Trip counts of loops, derived from their conditions and bodies."""

import pytest

from spmd.reporting.hlo import collectives_in_hlo
from tests.unit.hlo_programs import BY_ROW, compare, loop, only, run_loop


@pytest.mark.parametrize(
    ("direction", "start", "limit", "step", "times"),
    [
        ("LT", 0, 5, "add(%i, %one)", 5),
        ("LT", 0, 5, "add(%one, %i)", 5),
        ("LT", 3, 5, "add(%i, %one)", 2),
        ("LE", 0, 5, "add(%i, %one)", 6),
        ("NE", 0, 5, "add(%i, %one)", 5),
        ("GT", 5, 0, "subtract(%i, %one)", 5),
        ("GE", 5, 0, "subtract(%i, %one)", 6),
        ("LT", 5, 5, "add(%i, %one)", 0),
    ],
)
def test_trip_count_from_the_condition(direction, start, limit, step, times):
    text = run_loop(loop(compare(direction), step=step, limit=limit), start=start)
    found = only(text)
    assert (found.count, found.exact) == (times, True)
    assert found.wire_bytes == times * 192


@pytest.mark.parametrize(
    ("direction", "one", "start", "limit", "times"),
    [
        ("LT", 2, 0, 5, 3),  # 0 2 4
        ("LE", 2, 0, 4, 3),  # 0 2 4
        ("LT", 3, 1, 8, 3),  # 1 4 7
        ("GT", -2, 7, 0, 4),  # 7 5 3 1
        ("NE", 5, 0, 15, 3),  # 0 5 10
    ],
)
def test_counters_that_move_by_more_than_one(direction, one, start, limit, times):
    assert (
        only(run_loop(loop(compare(direction), one=one, limit=limit), start=start)).count == times
    )


def test_limit_and_step_carried_through_the_loop_unchanged():
    # element 2 of the carried tuple is the limit first, then the step
    assert only(run_loop(loop(compare("LT", "%ci", "%cn")), carried=7)).count == 7
    text = run_loop(loop(compare("LT"), step="add(%i, %n)", limit=9), carried=3)
    assert only(text).count == 3  # 0 3 6


def test_counter_on_the_right_of_the_comparison():
    assert only(run_loop(loop(compare("GT", "%limit", "%ci")))).count == 5


def test_condition_and_increment_inside_fusions():
    fused = """
%fused_compare (p0: s32[], p1: s32[]) -> pred[] {
  %p0 = s32[] parameter(0)
  %p1 = s32[] parameter(1)
  ROOT %c2 = pred[] compare(%p0, %p1), direction=LT
}

%fused_add (p2: s32[]) -> s32[] {
  %p2 = s32[] parameter(0)
  %two = s32[] constant(2)
  ROOT %a2 = s32[] add(%p2, %two)
}
"""
    condition = "ROOT %f = pred[] fusion(%ci, %limit), kind=kLoop, calls=%fused_compare"
    step = "fusion(%i), kind=kLoop, calls=%fused_add"
    assert only(run_loop(loop(condition, step=step, more=fused))).count == 3  # 0 2 4


def test_a_trip_count_that_xla_states_wins():
    config = ', backend_config={"known_trip_count":{"n":"8"},"known_init_step":{"init":"0"}}'
    assert only(run_loop(loop(compare("LT")), config=config)).count == 8


@pytest.mark.parametrize("step", ["multiply(%i, %one)", "subtract(%i, %one)"])
def test_unknown_trip_counts_count_once_and_say_so(step):
    found = only(run_loop(loop(compare("LT"), step=step)))
    assert (found.count, found.exact) == (1, False)


def test_nested_loops_multiply():
    inner = loop(compare("LT"), limit=3)
    kind = "(s32[], f32[8,4], s32[])"
    outer = f"""
%outer_cond (oc: {kind}) -> pred[] {{
  %oc = {kind} parameter(0)
  %oci = s32[] get-tuple-element(%oc), index=0
  %ol = s32[] constant(4)
  ROOT %olt = pred[] compare(%oci, %ol), direction=LT
}}

%outer_body (ob: {kind}) -> {kind} {{
  %ob = {kind} parameter(0)
  %oi = s32[] get-tuple-element(%ob), index=0
  %oy = f32[8,4] get-tuple-element(%ob), index=1
  %zero = s32[] constant(0)
  %u = s32[] constant(1)
  %in = {kind} tuple(%zero, %oy, %u)
  %iw = {kind} while(%in), condition=%cond, body=%body
  %iy = f32[8,4] get-tuple-element(%iw), index=1
  %on = s32[] add(%oi, %u)
  ROOT %oo = {kind} tuple(%on, %iy, %u)
}}
"""
    text = run_loop(inner + outer).replace(
        "condition=%cond, body=%body\n}\n", "condition=%outer_cond, body=%outer_body\n}\n"
    )
    assert only(text).count == 12


def test_a_collective_in_the_condition_runs_once_more():
    condition = f"%v = s32[] all-reduce(%ci), {BY_ROW}, to_apply=%add\n  " + compare("LT")
    counts = {each.name: each.count for each in collectives_in_hlo(run_loop(loop(condition)))}
    assert counts == {"v": 6, "ar": 5}
