"""Every primitive against the unsharded program: a sample by default, all with `-m conformance`."""

from collections.abc import Iterator

import pytest

from tests.conformance import harnesses
from tests.conformance.cases import MESHES, mesh_text
from tests.conformance.pool import Task, Worker
from tests.conformance.run import FAILURES

COUNT = 190  # harnesses in the sample, on two meshes each
SECONDS = 120.0  # per batch


@pytest.fixture(scope="module")
def worker() -> Iterator[Worker]:
    """The process that runs the cases; what kills it is a failure of one case."""
    worker = Worker(SECONDS)
    yield worker
    worker.close()


def sampled(group: str) -> list[Task]:
    meshes = [mesh_text(sizes) for sizes in MESHES]
    chosen = harnesses.sample(harnesses.every(), COUNT)
    places = [i for i, h in enumerate(chosen) if h.group == group]
    return [
        Task(chosen[i].name, group, meshes[mesh % len(meshes)])
        for i in places
        for mesh in (i, i + 2)
    ]


def whole(group: str) -> list[Task]:
    chosen = [h for h in harnesses.every() if h.group == group]
    return [Task(h.name, group, mesh_text(sizes)) for h in chosen for sizes in MESHES]


def check(worker: Worker, tasks: list[Task]) -> None:
    """Every case is right, or there is no rule yet for its primitive."""
    wrong, missing = [], set()
    count = 0
    for task in tasks:
        for record in worker.run(task).records:
            count += 1
            if record["status"] in FAILURES:
                where = f"{task.harness} mesh {task.mesh} {record['case']}"
                wrong.append(f"{record['status']}: {where}\n  {record['detail']}")
            missing.update(record.get("missing", ()))
    assert not wrong, f"{len(wrong)} of {count}\n" + "\n".join(wrong[:10])
    if not count:
        pytest.skip("scalars, or one dim on two axes")
    if missing:
        pytest.skip(f"no rule for {', '.join(sorted(missing))}")


@pytest.mark.parametrize("group", harnesses.groups())
def test_a_sample_is_right(group: str, worker: Worker) -> None:
    check(worker, sampled(group))


@pytest.mark.conformance
@pytest.mark.parametrize("group", harnesses.groups())
def test_everything_is_right(group: str, worker: Worker) -> None:
    check(worker, whole(group))


def test_the_sample_has_every_group() -> None:
    assert {h.group for h in harnesses.sample(harnesses.every(), COUNT)} == set(harnesses.groups())


def test_a_larger_sample_contains_a_smaller() -> None:
    small, large = (harnesses.sample(harnesses.every(), n) for n in (50, 300))
    assert len(small) == 50 and len(large) == 300 and {h.name for h in small} <= {
        h.name for h in large
    }
