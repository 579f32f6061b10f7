"""The processes of one run: how they come together, and what they must agree on before a step."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import platform
from math import prod
from pathlib import Path
from typing import Any

import jax

import models
import sharding
import spmd
from sharding.errors import Problem
from spmd.golden import without_sources
from spmd.mesh_text import read_across
from spmd.runtime import processes
from spmd.runtime.cluster import Asked, ClusterError, find_cluster
from spmd.runtime.start import Limits, start
from spmd.simulate import accelerators, simulate
from training.config import ProcessConfig, RunConfig
from training.data import Corpus
from training.errors import ConfigError
from training.mesh_text import read_mesh
from training.program import Plan
from training.validate import MOST_DEVICES

__all__ = ["agree_on_plan", "join"]

AGREE_S = 120.0  # until the slowest has read its text and made its plan
_PACKAGES = ("jax", "jaxlib", "numpy", "flax", "optax", "orbax-checkpoint", "spmd-compiler")
# Hosts may have the text in different places: it is compared by what is in it.
_FREE = frozenset({"data", *(field.name for field in dataclasses.fields(ProcessConfig))})


def join(run: RunConfig, problems: list[Problem]) -> list[Problem]:
    """Makes this process one of its run, before JAX starts its backend.

    Args:
      problems: what is wrong with the options so far.

    Returns:
      What is wrong with the processes. Without several processes nothing else happens than that
      devices are simulated where there are none.

    Raises:
      ConfigError: several processes came together, and one has `problems`.
      AgreementError: they have different options or packages.
      BarrierError: not all came in time.
    """
    asked, limits, wrong = run.processes, _limits(run.processes), []
    try:
        cluster = find_cluster(
            Asked(
                asked.cluster, asked.coordinator, asked.num_processes, asked.process_id,
                asked.coordinator_bind,
            ),
            limits.start_s,
        )  # fmt: skip
    except ClusterError as error:
        cluster, wrong = None, list(error.problems)
    count = cluster.processes if cluster else 1
    devices = min(max(run.mesh.devices, 1), MOST_DEVICES)
    mesh, _ = read_mesh(run.mesh.mesh, devices)
    nodes = prod(size for size in read_across(run.mesh.mesh, mesh).values() if size > 1)
    simulate(max(devices // count, 1), nodes)
    if cluster is None:
        return wrong
    start(cluster, limits)
    # First of all: what is wrong with one number of processes is not with another.
    processes.agree("start", {"the number of processes": str(count)}, AGREE_S)
    if devices % count and not accelerators():
        why = f"{count} processes simulate the same number each, and {devices} = "
        why += f"{devices // count} x {count} + {devices % count}"
        fix = f"use --devices {-(-devices // count) * count}, or another --num-processes"
        problems = [*problems, Problem(f"--devices {devices}", why, fix)]
    if problems:
        raise ConfigError(*problems)
    processes.agree("start", {**_options(run), **_versions()}, AGREE_S)
    return []


def agree_on_plan(planned: Plan, corpus: Corpus, resumed: int | None) -> None:
    """Compares what the processes are about to run.

    Args:
      resumed: the step that they start from, None for a new run.

    Raises:
      AgreementError: it is not the same.
      BarrierError: not all came in time.
    """
    if processes.count() == 1:
        return
    mesh = planned.mesh
    shardings = [str(sharding.spec) for sharding in jax.tree.leaves(planned.state_shardings)]
    values = {
        "the text (its digest)": corpus.fingerprint,
        "the order of the devices (its digest)": _digest(str([d.id for d in mesh.devices.flat])),
        "the shardings of the state (their digest)": _digest("\n".join(shardings)),
        "the plan (its digest)": _digest(_without_sources(str(planned.partitioned))),
        "the step to start from": "none" if resumed is None else str(resumed),
    }
    processes.agree("before the first step", values, AGREE_S)


def _limits(config: ProcessConfig) -> Limits:
    """In range even where the configuration is not, which is told later."""
    default = Limits()
    given = (config.start_timeout, config.peer_timeout, config.exit_timeout)
    usual = (default.start_s, default.peer_s, default.end_s)
    return Limits(*(g if 1 <= g <= 86_400 else u for g, u in zip(given, usual, strict=True)))


def _options(run: RunConfig) -> dict[str, str]:
    return {
        f"--{field.name.replace('_', '-')}": repr(getattr(getattr(run, component.name), field.name))
        for component in dataclasses.fields(run)
        for field in dataclasses.fields(getattr(run, component.name))
        if field.name not in _FREE
    }


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:  # run from a checkout
            found[package] = "not installed"
    return {**found, "the source of this program (its digest)": _source()}


def _source() -> str:
    """A digest of all that a step is made of: checkouts differ without their versions doing so."""
    digest = hashlib.sha256()
    for package in (sharding, spmd, models):
        assert package.__file__ is not None
        _add(digest, Path(package.__file__).parent)
    _add(digest, Path(__file__).parent)
    return digest.hexdigest()[:16]


def _add(digest: Any, folder: Path) -> None:
    for file in sorted(folder.rglob("*.py")):
        digest.update(file.relative_to(folder).as_posix().encode() + b"\0" + file.read_bytes())


def _without_sources(text: str) -> str:
    return "\n".join(map(without_sources, text.splitlines()))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
