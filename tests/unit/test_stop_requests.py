"""Ctrl-C and termination: told by `poll`, the same in all processes; a second request exits."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from training import signals
from training.signals import StopRequest

ROOT = Path(__file__).parents[2]
LIMIT_S = 30

# The main thread never comes back from C, as in a collective of which a peer is lost.
STUCK = """
import ctypes
from training.signals import StopRequest
mutex = (ctypes.c_char * 64)()
with StopRequest():
    print("ready", flush=True)
    libc = ctypes.CDLL(None)
    libc.pthread_mutex_lock(mutex)
    libc.pthread_mutex_lock(mutex)
"""


def until(condition):
    deadline = time.monotonic() + LIMIT_S
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    return condition()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 75)])
def test_the_first_request_is_told_by_poll(number, code, capfd):
    with StopRequest() as stop:
        assert stop.poll() is None
        os.kill(os.getpid(), number)
        assert until(lambda: stop.poll() == code)
    said = f"\n{number.name}: saves after this step, then ends; again: ends at once\n"
    assert capfd.readouterr().err == said


def test_handlers_and_threads_are_gone_afterwards():
    before = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    with StopRequest():
        assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] != before
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == before
    assert signal.set_wakeup_fd(-1) == -1
    assert "signals" not in {thread.name for thread in threading.enumerate()}


def test_a_second_request_exits_while_the_main_thread_hangs():
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        [sys.executable, "-c", STUCK], env=environ, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    ) as process:  # fmt: skip
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGTERM)
        assert process.stderr.readline() == "\n"
        assert process.stderr.readline().startswith("SIGTERM: saves after this step")
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        assert process.wait(LIMIT_S) == 130
        assert process.stderr.read() == "\nSIGINT again: ends at once, without saving\n"


@pytest.fixture
def several(monkeypatch):
    """Two processes, of which the other was asked for an exit code; the service makes them stop at
    the third poll."""
    asked = {"other": "0"}
    monkeypatch.setattr(signals.processes, "count", lambda: 2)
    monkeypatch.setattr(
        signals.multihost_utils, "reached_preemption_sync_point", lambda poll: poll == 3
    )
    monkeypatch.setattr(
        signals.processes, "gather", lambda name, mine, timeout_s: [mine, asked["other"]]
    )
    return asked


@pytest.mark.parametrize(("other", "code"), [("0", 75), ("75", 75), ("130", 130)])
def test_several_processes_stop_where_the_service_says_with_one_code(several, other, code):
    several["other"] = other
    with StopRequest() as stop:
        assert [stop.poll() for _ in range(5)] == [None, None, code, code, code]


def test_a_ctrl_c_is_handed_to_the_service_which_keeps_its_signal(several, monkeypatch):
    sent = []
    kill = os.kill
    monkeypatch.setattr(os, "kill", lambda pid, number: sent.append((pid, number)))
    before = signal.getsignal(signal.SIGTERM)
    with StopRequest() as stop:
        assert signal.getsignal(signal.SIGTERM) is before
        kill(os.getpid(), signal.SIGINT)
        assert until(lambda: sent == [(os.getpid(), signal.SIGTERM)])
        assert [stop.poll() for _ in range(3)] == [None, None, 130]
