"""What Orbax is told beyond its options."""

from __future__ import annotations

import sys
from asyncio import base_events
from typing import Any

import jax
import orbax.checkpoint as ocp

__all__ = ["hide_orphaned_writes", "save_small_arrays_whole"]

_SMALL_BYTES = 2**20


def hide_orphaned_writes() -> None:
    """The writes of a save go on when one of them has failed, and each that ends later prints a
    trace: nobody waits for it any more. The failure itself is told by `Checkpoints.poll`. Storage
    that is no Python calls the closed loop, so that nothing of Python is before it in the trace."""
    before = sys.unraisablehook

    def hook(found: Any) -> None:
        trace = found.exc_traceback
        orphaned = (
            isinstance(found.exc_value, RuntimeError)
            and trace is not None
            and trace.tb_frame.f_code is base_events.BaseEventLoop.call_soon_threadsafe.__code__
        )
        if not orphaned:
            before(found)

    if getattr(before, "__qualname__", "") != hook.__qualname__:
        sys.unraisablehook = hook


def save_small_arrays_whole() -> None:
    """Of an array that several devices hold, one writes all, unless parts have a MiB or more.

    Orbax has each device cut off a part, by a program that is compiled for each shape and device
    while the first save blocks training; for small arrays that is all cost.
    """
    handlers = ocp.type_handlers
    # Registering anew is the only public way; what else the registered one has is kept.
    store = getattr(handlers.get_type_handler(jax.Array), "_array_metadata_store", None)
    handler = handlers.ArrayHandler(
        array_metadata_store=store, min_slice_bytes_for_replica_parallel=_SMALL_BYTES
    )
    handlers.register_type_handler(jax.Array, handler, override=True)
