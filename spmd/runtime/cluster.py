"""Which process this is, of how many, and where they meet: from flags, or from who started it.

Launchers and schedulers are recognised by JAX's own detection. Beyond it: processes of one node
meet on 127.0.0.1, process 0 listens on one address and never on all interfaces, a process that is
alone on its node takes all of its devices, and a launcher that JAX does not recognise is an error,
since each of its processes would train on its own.
"""

from __future__ import annotations

import ipaddress
import os
import re
import socket
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sharding._jax import distributed
from sharding.errors import Problem, SpmdError, did_you_mean, printable
from spmd.simulate import accelerators

__all__ = ["Asked", "Cluster", "ClusterError", "find_cluster"]

_LOOPBACK = "127.0.0.1"
_TPU_ENGINES = frozenset({"gketpu", "gcetpu"})
_BY_HAND = "give --coordinator HOST:PORT, --num-processes and --process-id"
_ALONE = "for a run of this process alone give --cluster none"


class ClusterError(SpmdError):
    """What was asked for, or what the launcher says, does not tell where the processes meet."""

    exit_code = 2


@dataclass(frozen=True)
class Asked:
    """What the user says about processes.

    Attributes:
      cluster: "auto", "none", or the name of one of JAX's cluster environments.
      coordinator: host:port, or "".
      num_processes: 0 if not said.
      process_id: -1 if not said.
      bind: the address on which process 0 listens, host or host:port; "" for the coordinator's.
    """

    cluster: str = "auto"
    coordinator: str = ""
    num_processes: int = 0
    process_id: int = -1
    bind: str = ""


@dataclass(frozen=True)
class Cluster:
    """One process among several.

    Attributes:
      engine: what started it: "flags", or JAX's name of the cluster environment.
      coordinator: host:port on which all processes meet.
      bind: host:port on which process 0 listens.
      processes, process: how many there are, and the number of this one.
      local_devices: numbers of the accelerators of the node that are this process'; None for all.
    """

    engine: str
    coordinator: str
    bind: str
    processes: int
    process: int
    local_devices: tuple[int, ...] | None = None


def find_cluster(asked: Asked, timeout_s: float) -> Cluster | None:
    """The cluster that this process is part of; None if it is alone.

    Args:
      timeout_s: seconds to wait for the coordinator's name, where it comes with its pod.

    Raises:
      ClusterError: all that is wrong.
    """
    if problems := _wrong(asked):
        raise ClusterError(*problems)
    if asked.cluster == "none":
        return None
    coordinator = asked.coordinator or os.environ.get("JAX_COORDINATOR_ADDRESS", "")
    name = "" if _complete(asked) and coordinator else _recognised(asked.cluster)
    if not name:
        if problem := _not_recognised(asked, coordinator):
            raise ClusterError(problem)
        if not _complete(asked) or asked.num_processes == 1:
            return None
        bind = _bind(asked, coordinator, local=False)
        return Cluster("flags", coordinator, bind, asked.num_processes, asked.process_id)
    return _from_engine(asked, coordinator, name, timeout_s)


def _from_engine(asked: Asked, coordinator: str, name: str, timeout_s: float) -> Cluster | None:
    engine = distributed.engines()[name]
    try:
        processes = asked.num_processes or engine.get_process_count()
        if processes == 1:
            return None
        process = asked.process_id if asked.process_id >= 0 else engine.get_process_id()
        found = not coordinator
        if found:
            port = os.environ.get("JAX_COORDINATOR_PORT")
            coordinator = engine.get_coordinator_address(
                timeout_secs=int(timeout_s), override_coordinator_port=port
            )
        local_process = engine.get_local_process_id()
    except (KeyError, ValueError, RuntimeError, OSError) as error:
        what = f"processes started by {name}"
        why = f"JAX cannot tell where they meet: {type(error).__name__}: {error}"
        raise ClusterError(Problem(what, why, f"{_BY_HAND}; {_ALONE}")) from error
    together = _on_this_node(os.environ)
    local = together == processes
    if local and found:
        coordinator = f"{_LOOPBACK}:{coordinator.rpartition(':')[2]}"
    bind = _bind(asked, coordinator, local) if process == 0 else coordinator
    devices = _local_devices(name, local_process, together, os.environ)
    return Cluster(name, coordinator, bind, processes, process, devices)


def _complete(asked: Asked) -> bool:
    return asked.num_processes > 0 and asked.process_id >= 0


def _wrong(asked: Asked) -> list[Problem]:
    problems: list[Problem] = []
    known = ("auto", "none", *distributed.engines())
    if asked.cluster not in known:
        why = f"JAX knows no such cluster{did_you_mean(asked.cluster, known)}"
        what, fix = f"--cluster {printable(asked.cluster)}", f"the choices are {', '.join(known)}"
        problems.append(Problem(what, why, fix))
    for flag, text in (("coordinator", asked.coordinator), ("coordinator-bind", asked.bind)):
        if text and not _is_address(text, port_needed=flag == "coordinator"):
            fix = "write it like node0:8476, 10.0.0.1:8476 or [fd00::1]:8476"
            what = f"--{flag} {printable(text)}"
            problems.append(Problem(what, "it is not a host and a port", fix))
    if asked.num_processes < 0:
        what = f"--num-processes {asked.num_processes}"
        problems.append(Problem(what, "a run has at least one process", "use 1 or more"))
    if asked.num_processes > 0 and asked.process_id >= asked.num_processes:
        what = f"--process-id {asked.process_id}"
        why = f"--num-processes {asked.num_processes} are numbered from 0"
        problems.append(Problem(what, why, f"use 0 to {asked.num_processes - 1}"))
    return problems


def _is_address(text: str, port_needed: bool) -> bool:
    host, _, port = text.rpartition(":") if port_needed or _has_port(text) else (text, "", "1")
    if host.startswith("[") and host.endswith("]"):
        return _literal(host) is not None and port.isdigit() and 0 < int(port) < 2**16
    if not re.fullmatch(r"[A-Za-z0-9_](?:[A-Za-z0-9._-]{0,253})", host):
        return False
    return port.isascii() and port.isdigit() and 0 < int(port) < 2**16


def _has_port(text: str) -> bool:
    return re.search(r":\d+$", text) is not None and (text.count(":") == 1 or "]:" in text)


def _literal(host: str) -> Any:
    try:
        return ipaddress.ip_address(host.strip("[]"))
    except ValueError:
        return None


def _recognised(asked: str) -> str:
    """The name of JAX's cluster environment that was asked for, or of the first that is there; ""
    for none."""
    for name, engine in distributed.engines().items():
        if asked == "auto" and (engine.opt_in_only_method or _is_elsewhere(name)):
            continue
        if asked not in ("auto", name):
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # `_not_recognised` tells what it means for a run
            try:
                there = engine.is_env_present()
            except Exception as error:  # it asks servers, through packages that raise their own
                what = f"cluster environment {name}"
                why = f"it is here and does not answer: {type(error).__name__}: {error}"
                raise ClusterError(Problem(what, why, f"{_BY_HAND}; {_ALONE}")) from error
        if there:
            return name
    return ""


def _is_elsewhere(name: str) -> bool:
    return name in _TPU_ENGINES and accelerators() != "tpu"


def _not_recognised(asked: Asked, coordinator: str) -> Problem | None:
    """What is wrong when no cluster was recognised."""
    if asked.cluster != "auto":
        why = "this process was not started there, or a package that is needed is missing"
        return Problem(f"--cluster {asked.cluster}", why, f"leave it out, or {_BY_HAND}")
    given = {
        "--coordinator": bool(coordinator),
        "--num-processes": asked.num_processes > 0,
        "--process-id": asked.process_id >= 0,
    }
    if asked.num_processes == 1:
        return None
    if any(given.values()) and not all(given.values()):
        missing = ", ".join(flag for flag, is_given in given.items() if not is_given)
        what = " ".join(flag for flag, is_given in given.items() if is_given)
        why = "no launcher is recognised that would say the rest"
        return Problem(what, why, f"give {missing} too")
    return None if all(given.values()) else _unknown_launcher(os.environ)


def _unknown_launcher(environ: Mapping[str, str]) -> Problem | None:
    """Whether somebody started several processes that do not know of each other."""
    for name, launcher in (("OMPI_COMM_WORLD_SIZE", "Open MPI"), ("PMI_SIZE", "MPI")):
        if _number(environ.get(name)) > 1:
            why = f"{launcher} started {environ[name]} processes, and JAX does not recognise it"
            fix = f"install mpi4py and give --cluster mpi4py, or {_BY_HAND}; {_ALONE}"
            return Problem(f"{name}={environ[name]}", why, fix)
    if "SLURM_JOB_ID" in environ and _number(environ.get("SLURM_NTASKS")) > 1:
        why = "the job has several tasks, and this process is none of them"
        what = f"SLURM_NTASKS={environ['SLURM_NTASKS']}"
        return Problem(what, why, f"start it with srun; {_ALONE}")
    if "KUBERNETES_SERVICE_HOST" in environ and "JOB_COMPLETION_INDEX" in environ:
        what = f"JOB_COMPLETION_INDEX={environ['JOB_COMPLETION_INDEX']}"
        why = "this pod is one of an indexed job, and the package kubernetes is not installed"
        fix = f'pip install "jax[k8s]", or {_BY_HAND}; {_ALONE}'
        return Problem(what, why, fix)
    return None


def _on_this_node(environ: Mapping[str, str]) -> int:
    """How many processes of the run are on this node; 0 if nobody says."""
    if found := _number(environ.get("OMPI_COMM_WORLD_LOCAL_SIZE")):
        return found
    nodes: list[int] = []  # "4(x2),3": two nodes with 4 tasks and one with 3
    for part in environ.get("SLURM_STEP_TASKS_PER_NODE", "").split(","):
        if match := re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part):
            nodes += [int(match[1])] * int(match[2] or 1)
    node = _number(environ.get("SLURM_NODEID"))
    return nodes[node] if node < len(nodes) else 0


def _local_devices(
    engine: str, local_process: int | None, together: int, environ: Mapping[str, str]
) -> tuple[int, ...] | None:
    """One accelerator for each process of a node, as JAX has it; all of them for one that is alone
    there, and all that are visible where the launcher has shared them out."""
    if local_process is None or engine in _TPU_ENGINES or together == 1:
        return None
    if "JAX_LOCAL_DEVICE_IDS" in environ:  # JAX reads it itself
        return None
    visible = environ.get("CUDA_VISIBLE_DEVICES", environ.get("ROCR_VISIBLE_DEVICES", ""))
    if visible and len(visible.split(",")) < max(together, 2):
        return None
    return (local_process,)


def _bind(asked: Asked, coordinator: str, local: bool) -> str:
    """host:port on which process 0 listens: an address of the coordinator's name on this node."""
    host, _, port = coordinator.rpartition(":")
    if asked.bind:
        return asked.bind if _has_port(asked.bind) else f"{asked.bind}:{port}"
    if local or host == "localhost" or _literal(host) is not None:
        return coordinator if _literal(host) is not None else f"{_LOOPBACK}:{port}"
    try:
        found = socket.getaddrinfo(host, int(port), type=socket.SOCK_STREAM)
    except OSError:
        return coordinator  # whoever connects to it says more
    addresses = [str(entry[4][0]) for entry in found]
    outward = [a for a in addresses if not ipaddress.ip_address(a.partition("%")[0]).is_loopback]
    # Debian's /etc/hosts gives 127.0.1.1 for the own name, where other nodes would find nobody.
    address = outward[0] if outward else _own_address() or addresses[0]
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


def _own_address() -> str:
    """The address with which this node reaches others; "" if it reaches none."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # of documentation; connecting sends nothing
            return probe.getsockname()[0]
        except OSError:
            return ""


def _number(text: str | None) -> int:
    return int(text) if text and text.isascii() and text.isdigit() else 0
