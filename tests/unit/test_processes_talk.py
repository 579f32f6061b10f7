"""Barriers, agreement and broadcasts, over a coordination service in this process."""

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from sharding._jax import distributed
from sharding._jax.distributed import Service, ServiceError
from spmd.runtime import processes
from spmd.runtime.processes import AgreementError, BarrierError, agree, barrier, broadcast


class FakeClient:
    """What `Service` uses of JAX's client, shared by threads that stand for processes."""

    def __init__(self, processes: int):
        self.processes = processes
        self.store: dict[str, str] = {}
        self._barriers: dict[str, int] = {}
        self._changed = threading.Condition()

    def key_value_set(self, key: str, value: str, allow_overwrite: bool = False) -> None:
        with self._changed:
            self.store[key] = value
            self._changed.notify_all()

    def key_value_delete(self, key: str) -> None:
        with self._changed:
            del self.store[key]

    def key_value_dir_get(self, folder: str) -> list[tuple[str, str]]:
        with self._changed:
            return [(k, v) for k, v in self.store.items() if k.startswith(folder)]

    def blocking_key_value_get(self, key: str, timeout_in_ms: int) -> str:
        self._wait_for(lambda: key in self.store, timeout_in_ms)
        return self.store[key]

    def wait_at_barrier(self, barrier_id: str, timeout_in_ms: int) -> None:
        with self._changed:
            self._barriers[barrier_id] = self._barriers.get(barrier_id, 0) + 1
            assert self._barriers[barrier_id] <= self.processes, "a barrier is used once"
            self._changed.notify_all()
        self._wait_for(lambda: self._barriers[barrier_id] == self.processes, timeout_in_ms)

    def _wait_for(self, condition: Callable[[], bool], timeout_in_ms: int) -> None:
        with self._changed:
            if not self._changed.wait_for(condition, timeout_in_ms / 1000):
                raise ServiceError("DEADLINE_EXCEEDED: timed out\nmore")


@pytest.fixture
def together(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[list[Any], FakeClient]]:
    """Runs functions side by side, each as one process: what each returned or raised."""
    me = threading.local()
    monkeypatch.setattr(distributed, "service", lambda: getattr(me, "service", None))

    def run(*functions: Callable[[], Any]) -> tuple[list[Any], FakeClient]:
        client = FakeClient(len(functions))

        def one(process: int) -> Any:
            me.service = Service(client, process, len(functions))
            try:
                return functions[process]()
            except ValueError as error:
                return error

        with ThreadPoolExecutor(len(functions)) as pool:
            return list(pool.map(one, range(len(functions)))), client

    return run


def test_one_process_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "service", lambda: None)
    barrier("end", 0.0)
    agree("start", {"mesh": "data=8"}, 0.0)
    assert broadcast("folder", "runs/a", 0.0) == "runs/a"
    assert (processes.is_primary(), processes.index(), processes.count()) == (True, 0, 1)


def test_a_barrier_holds_until_all_are_there_and_leaves_nothing(together: Any) -> None:
    order: list[str] = []

    def late() -> None:
        time.sleep(0.1)
        order.append("late came")
        barrier("save", 10)
        barrier("save", 10)

    def early() -> None:
        barrier("save", 10)
        order.append("early went on")
        barrier("save", 10)

    found, client = together(early, late)
    assert found == [None, None] and order == ["late came", "early went on"]
    assert client.store == {}


def test_a_barrier_names_who_is_missing(together: Any) -> None:
    found, _ = together(lambda: barrier("save", 0.2), *(lambda: None,) * 2)
    assert isinstance(found[0], BarrierError) and found[0].exit_code == 6
    assert str(found[0]) == (
        "waited 0.2 s for all processes (save)\n"
        "  why: processes 1, 2 did not come\n"
        "  fix: see what that process printed last; start all processes again, the run goes on from"
        " its newest checkpoint"
    )


def test_equal_values_agree_and_leave_nothing(together: Any) -> None:
    found, client = together(*(lambda: agree("start", {"mesh": "data=8"}, 10),) * 3)
    assert found == [None] * 3 and client.store == {}


def test_every_process_names_every_difference(together: Any) -> None:
    def start(**values: str) -> Callable[[], None]:
        return lambda: agree("start", values, 10)

    found, client = together(
        start(mesh="data=8", jax="0.10.2", seed="0"),
        start(mesh="data=4", jax="0.10.2", seed="0", plan="p" * 100),
        start(mesh="data=8", jax="0.11.0", seed="0"),
    )
    assert all(isinstance(e, AgreementError) and e.exit_code == 2 for e in found)
    assert {str(e) for e in found} == {
        "3 problems\n"
        "(1) mesh differs between processes (start)\n"
        "  why: data=8 in processes 0, 2; data=4 in process 1: they would run different programs,"
        " and wait for each other\n"
        "  fix: start all processes with the same command, files and packages\n"
        "(2) jax differs between processes (start)\n"
        "  why: 0.10.2 in processes 0, 1; 0.11.0 in process 2: they would run different programs,"
        " and wait for each other\n"
        "  fix: start all processes with the same command, files and packages\n"
        "(3) plan differs between processes (start)\n"
        f"  why: (nothing) in processes 0, 2; {'p' * 77}... in process 1: they would run different"
        " programs, and wait for each other\n"
        "  fix: start all processes with the same command, files and packages"
    }
    assert client.store == {}


def test_processes_that_count_differently_can_tell(together: Any) -> None:
    def counting(count: int) -> Callable[[], None]:
        def run() -> None:
            service = distributed.service()
            assert service is not None
            service.processes = count
            agree("start", {"processes": str(count)}, 10)

        return run

    found, _ = together(counting(2), counting(3))
    assert {str(e).splitlines()[1] for e in found} == {
        "  why: 2 in process 0; 3 in process 1: they would run different programs, and wait for"
        " each other"
    }


def test_process_0_has_the_value(together: Any) -> None:
    def twice(*values: str | None) -> Callable[[], list[str]]:
        return lambda: [broadcast("folder", value, 10) for value in values]

    found, client = together(twice("a", "b"), twice(None, "x"), twice("y", None))
    assert found == [["a", "b"]] * 3 and client.store == {}


def test_a_broadcast_names_who_is_missing(together: Any) -> None:
    found, _ = together(lambda: None, lambda: broadcast("folder", None, 0.1), lambda: None)
    assert str(found[1]).splitlines()[1] == "  why: process 0 did not come"
    found, _ = together(lambda: broadcast("folder", "a", 0.1), lambda: None, lambda: None)
    assert str(found[0]).splitlines()[1] == "  why: processes 1, 2 did not come"
    found, _ = together(lambda: broadcast("folder", None, 0.1))
    assert str(found[0]) == "broadcast('folder'): process 0 has to give a value"


def test_many_missing_are_counted(together: Any) -> None:
    found, _ = together(lambda: barrier("save", 0.1), *(lambda: None,) * 11)
    assert "processes 1, 2, 3, 4, 5, 6, 7, 8 and 3 more did not come" in str(found[0])
