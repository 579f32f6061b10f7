"""Starts `jax.distributed`, so that no later wait is without a limit."""

from __future__ import annotations

import logging
import os
import socket
import threading
from dataclasses import dataclass

import jax

from sharding.errors import Problem
from spmd.runtime import end
from spmd.runtime.cluster import Cluster, ClusterError

__all__ = ["Limits", "start"]

_PEER_LOST = 6
_PROXIES = ("grpc_proxy", "https_proxy", "http_proxy")
_SPARE_S = 60  # JAX's own limit comes later than ours: it aborts, and a core dump tells nobody why


@dataclass(frozen=True)
class Limits:
    """How long processes wait for each other, in seconds.

    Attributes:
      start_s: for all to come.
      peer_s: for a sign of life, before a process counts as lost.
      end_s: for all to end.
    """

    start_s: float = 120.0
    peer_s: float = 20.0
    end_s: float = 20.0


def start(cluster: Cluster, limits: Limits) -> None:
    """Meets the other processes; must run before JAX starts its backend.

    From here on an uncaught exception ends all processes, see `spmd.runtime.end`. Where they do
    not all come in time, this process ends with exit code 6.

    Raises:
      ClusterError: process 0 cannot listen where it was told to.
    """
    _connect_directly(cluster.coordinator)
    alarm = threading.Timer(limits.start_s, _not_all_came, (cluster, limits))
    alarm.daemon = True
    alarm.start()
    devices = cluster.local_devices
    try:
        jax.distributed.initialize(
            cluster.coordinator,
            cluster.processes,
            cluster.process,
            local_device_ids=None if devices is None else list(devices),
            cluster_detection_method="deactivate",
            coordinator_bind_address=cluster.bind,
            initialization_timeout=int(limits.start_s + _SPARE_S),
            heartbeat_timeout_seconds=int(limits.peer_s),
            shutdown_timeout_seconds=int(limits.end_s),
        )
    except RuntimeError as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        what, why = f"process {cluster.process} of {cluster.processes}", f"JAX says: {reason}"
        fix = "see that the address is one of this node's, with a free port: --coordinator-bind"
        if cluster.process == 0:
            what += f", listening on {cluster.bind}"
        raise ClusterError(Problem(what, why, fix)) from error
    finally:
        alarm.cancel()
    end.watch(limits.end_s)


def _connect_directly(coordinator: str) -> None:
    """Keeps gRPC from asking an HTTP proxy for the coordinator, which JAX warns of."""
    if not any(os.environ.get(name) for name in _PROXIES):
        return
    logging.getLogger("jax._src.distributed").setLevel(logging.ERROR)
    host = coordinator.rpartition(":")[0].strip("[]")
    known = os.environ.get("no_grpc_proxy", os.environ.get("no_proxy", ""))
    os.environ["no_grpc_proxy"] = ",".join(filter(None, (known, host)))


def _not_all_came(cluster: Cluster, limits: Limits) -> None:
    answers = _answers(cluster.coordinator)
    why = "some did not come, or two have the same number"
    if not answers:
        why = f"nobody answers on {cluster.coordinator}: process 0 is not there, or a firewall is"
    problem = Problem(
        f"process {cluster.process} waited {limits.start_s:g} s for {cluster.processes} processes"
        f" at {cluster.coordinator} ({cluster.engine})",
        why,
        "start all processes, each with a number of its own; --start-timeout waits longer",
    )
    # With a coordinator there is a process 0, which prints this for all.
    if cluster.process == 0 or not answers:
        end.write(f"error: {problem}")
    os._exit(_PEER_LOST)


def _answers(coordinator: str) -> bool:
    host, _, port = coordinator.rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=5):
            return True
    except OSError:
        return False
