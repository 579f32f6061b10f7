"""Several processes with a part of the devices each: as one process that has all of them."""

from typing import Any

import pytest

from tests.multihost.launch import run
from tests.multihost.program import CASES
from tests.oracle import assert_close

LIMIT_S = 240
SAME = ("uneven", "placed", "stages", "donation", "random", "callbacks")
IDS = {2: "0, 1, 2, 3, 2048, 2049, 2050, 2051", 4: "0, 1, 2048, 2049, 4096, 4097, 6144, 6145"}


@pytest.fixture(scope="module", params=[2, 4], ids="{}-processes".format)
def found(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    """What each process says of each case."""
    return run(list(CASES), request.param, LIMIT_S)


def as_json(x: Any) -> Any:
    return [as_json(a) for a in x] if isinstance(x, (list, tuple)) else x


@pytest.mark.parametrize("name", SAME)
def test_the_same_as_in_one_process(found: list[dict[str, Any]], name: str) -> None:
    want = as_json(CASES[name]())
    assert [process[name] for process in found] == [want] * len(found)


def test_training_has_the_same_losses(found: list[dict[str, Any]]) -> None:
    losses, row, _ = CASES["training"]()
    for process in found:
        got, weights, addressable = process["training"]
        assert not addressable
        assert_losses(got, losses)
        assert_losses(weights, row)
        assert_losses(process["across"], losses)
        assert process["training"] == found[0]["training"], "processes agree bit for bit"


def assert_losses(got: Any, want: Any) -> None:
    import numpy as np

    assert_close(np.array(got), np.array(want), 1e-6, "sums are in another order")


def test_a_process_runs_programs_of_its_own(found: list[dict[str, Any]]) -> None:
    for me, process in enumerate(found):
        more, total, refused = process["local"]
        assert (more, total) == ([me + 1.0] * 8, 8.0 * me)
        count = 8 // len(found)
        mine = ", ".join(str(2048 * me + i) for i in range(count))
        assert refused.splitlines()[:2] == [
            f"x lies on devices {mine}, committed",
            f"  why: the mesh data=8 has the devices {IDS[len(found)]}",
        ]


def test_errors_are_raised_in_every_process(found: list[dict[str, Any]]) -> None:
    ids = IDS[len(found)]
    elsewhere, moved, unknown = found[0]["errors"]
    assert elsewhere == (
        f"x lies on devices {ids} in another order, committed\n"
        f"  why: the mesh data=2, tensor=4 has the devices {ids} in its own order\n"
        "  fix: put x on the mesh with jax.device_put(x, NamedSharding(mesh, P(...))), or make the "
        "mesh from the devices of the arguments"
    )
    assert moved.startswith("x lies on P(None, 'tensor'), committed\n  why: in_shardings says ")
    assert unknown.startswith("x names axis 'rows'\n  why: the mesh has the axes data=2, tensor=4")
    assert all(process["errors"] == found[0]["errors"] for process in found)


def test_processes_talk_without_devices(found: list[dict[str, Any]]) -> None:
    numbers = "; ".join(f"{i} in process {i}" for i in range(len(found)))
    for me, process in enumerate(found):
        count, knows_itself, differ, told, late = process["talk"]
        assert (count, knows_itself, told) == (len(found), True, ["a", "b"])
        assert differ.splitlines()[1].startswith(f"  why: {numbers}: they would run different")
        others = "process 1" if len(found) == 2 else "processes 1, 2, 3"
        assert (f"  why: {others} did not come" in late) == (me == 0)
