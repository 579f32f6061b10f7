"""What a run prints before it compiles anything: options, mesh, parameters, traffic, memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from math import prod
from typing import Any

import flax.linen as nn
import jax
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from sharding.mesh import MeshShape
from spmd import cost
from spmd.collectives import Collective
from training.config import RunConfig
from training.data import Corpus
from training.program import Plan

__all__ = ["human_bytes", "print_config", "print_plan", "sharding_text"]


def print_config(console: Console, run: RunConfig, corpus: Corpus | None = None) -> None:
    """Every option with its resolved value, those that are not the default marked; and the text,
    if one is read."""
    defaults = RunConfig()
    table = _table("configuration", "component", "options (* = not the default)")
    for component in dataclasses.fields(run):
        part, default = getattr(run, component.name), getattr(defaults, component.name)
        entries = [
            f"{field.name}={getattr(part, field.name)!r}"
            + ("*" if getattr(part, field.name) != getattr(default, field.name) else "")
            for field in dataclasses.fields(part)
        ]
        table.add_row(component.name, escape("  ".join(entries)))
    console.print(table)
    if corpus is None:
        return
    console.print(
        f"data: {len(corpus.train):,} {corpus.unit} to train on,"
        f" {len(corpus.validation):,} held out,"
        f" from {corpus.num_files:,} files of {corpus.source}",
        highlight=False,
    )


def print_plan(console: Console, plan: Plan) -> None:
    """The mesh, the sharding of each parameter, the collectives of a step, and its memory."""
    sizes = plan.partitioned.plan.mesh.placed_text()
    kind = plan.mesh.devices.flat[0].device_kind
    console.print(f"mesh: {sizes} ({plan.mesh.devices.size} x {kind})", highlight=False)
    console.print(_parameters(plan))
    console.print(_collectives(plan.partitioned.collectives, plan.partitioned.plan.mesh))
    peak = plan.partitioned.peak_memory
    console.print(f"predicted memory: {human_bytes(peak)} per device", highlight=False)


def human_bytes(count: float) -> str:
    """`count` bytes with a binary unit: 1536 is "1.5 KiB"."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def _parameters(plan: Plan) -> Table:
    table = _table("parameters", "name", "shape", "sharding", "bytes per device")
    leaves = jax.tree_util.tree_leaves_with_path(nn.unbox(plan.state.params))
    shardings = jax.tree.leaves(plan.state_shardings.params)
    total = local_total = 0
    for (path, leaf), sharding in zip(leaves, shardings, strict=True):
        name = "/".join(str(getattr(key, "key", key)) for key in path)
        local = prod(sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        total, local_total = total + leaf.size, local_total + local
        shape = f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]"
        spec = sharding_text(sharding, len(leaf.shape))
        table.add_row(name, escape(shape), escape(spec), human_bytes(local))
    table.add_row("total", f"{total:,} parameters", "", human_bytes(local_total))
    return table


def sharding_text(sharding: Any, rank: int) -> str:
    """One entry per dim, `-` where it is not sharded."""
    entries = [*sharding.spec, *(None,) * (rank - len(sharding.spec))]
    texts = ["+".join(e) if isinstance(e, tuple) else e for e in entries]
    return f"[{', '.join(text or '-' for text in texts)}]"


def _collectives(found: Iterable[Collective], mesh: MeshShape) -> Table:
    """By kind and axes; what goes over the network between slices or nodes in a column of its own,
    where axes cross one."""
    across = ("over dcn",) if mesh.across else ()
    columns = ("kind", "axes", "count", "bytes sent per device", *across)
    table = _table("collectives per step", *columns)
    groups: dict[tuple[str, str], list[float]] = {}
    for record in found:
        far = cost.network_bytes(record.kind, record.axes, record.bytes, mesh)
        # `count` and `bytes` cover all runs of the collective in a step.
        for key in ((record.kind, ", ".join(record.axes)), ("total", "")):
            group = groups.setdefault(key, [0, 0, 0])
            for i, value in enumerate((record.count, record.bytes, far)):
                group[i] += value
    ordered = sorted(groups.items(), key=lambda item: (item[0][0] == "total", -item[1][1]))
    for (kind, axes), (count, *sizes) in ordered:
        shown = map(human_bytes, sizes if across else sizes[:1])
        table.add_row(kind, axes, f"{count:,.0f}", *shown)
    return table


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for column in columns:
        number = column.startswith(("bytes", "count", "over"))
        table.add_column(column, justify="right" if number else "left", overflow="fold")
    return table
