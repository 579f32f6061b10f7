"""Wire bytes of the suite's programs from their plans alone."""

from benchmarks.suite import planned, registry
from benchmarks.suite.case import RUNS


def test_plans_are_counted_like_what_is_written_by_hand() -> None:
    (decode,) = registry.matching("^decode$")
    case = decode.make(RUNS)
    assert planned.sent(case) == planned.by_hand(case) > 0
    (muon,) = registry.matching("^muon$")
    case = muon.make(RUNS)
    assert planned.sent(case, ["loop_sums"]) > 1.4 * planned.sent(case)
