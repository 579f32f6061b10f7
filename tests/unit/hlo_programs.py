"""HLO modules written by hand, for the tests of the collective counter."""

from spmd.reporting.hlo import collectives_in_hlo

HEADER = "HloModule m, is_scheduled=true, num_partitions=8\n"
ADD = """
%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}
"""
BY_ROW = "channel_id=1, replica_groups={{0,1,2,3},{4,5,6,7}}, use_global_device_ids=true"


def program(*lines: str, before: str = "") -> str:
    """A module whose entry has the parameter %x, f32[8,4] (128 bytes), and these lines."""
    body = "\n".join(f"  {line}" for line in lines)
    entry = "ENTRY %main (x: f32[8,4]) -> f32[8,4] {\n  %x = f32[8,4]{1,0} parameter(0)\n"
    return f"{HEADER}{ADD}{before}\n{entry}{body}\n}}\n"


def only(text: str):
    (collective,) = collectives_in_hlo(text)
    return collective


def loop(
    condition: str, step: str = "add(%i, %one)", one: int = 1, limit: int = 5, more: str = ""
) -> str:
    """Computations %cond and %body of a loop that reduces once per iteration.

    Its carried tuple is (counter, array, constant).
    """
    carried = "(s32[], f32[8,4], s32[])"
    return f"""
%cond (c: {carried}) -> pred[] {{
  %c = {carried} parameter(0)
  %ci = s32[] get-tuple-element(%c), index=0
  %cn = s32[] get-tuple-element(%c), index=2
  %limit = s32[] constant({limit})
  {condition}
}}
{more}
%body (b: {carried}) -> {carried} {{
  %b = {carried} parameter(0)
  %i = s32[] get-tuple-element(%b), index=0
  %y = f32[8,4] get-tuple-element(%b), index=1
  %n = s32[] get-tuple-element(%b), index=2
  %one = s32[] constant({one})
  %next = s32[] {step}
  %ar = f32[8,4] all-reduce(%y), {BY_ROW}, to_apply=%add
  ROOT %out = {carried} tuple(%next, %ar, %n)
}}
"""


def run_loop(computations: str, start: int = 0, carried: int = 7, config: str = "") -> str:
    kind = "(s32[], f32[8,4], s32[])"
    return program(
        f"%start = s32[] constant({start})",
        "%copy = s32[] copy(%start)",
        f"%carried = s32[] constant({carried})",
        f"%init = {kind} tuple(%copy, %x, %carried)",
        f"%w = {kind} while(%init), condition=%cond, body=%body{config}",
        before=computations,
    )


def compare(direction: str, left: str = "%ci", right: str = "%limit") -> str:
    return f"ROOT %lt = pred[] compare({left}, {right}), direction={direction}"
