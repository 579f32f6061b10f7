"""What Orbax is told beyond its options."""

from __future__ import annotations

import jax
import orbax.checkpoint as ocp

__all__ = ["save_small_arrays_whole"]

_SMALL_BYTES = 2**20


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
