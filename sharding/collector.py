"""Python's garbage collector, while a program is made."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def uncollected() -> Iterator[None]:
    """Without searches for garbage: what is made here lives on, in a heap of some 10^6 objects that
    each search goes through. Cycles made inside are found by the first search after it.

    A collector that is off, by a caller's or the user's wish, is left off.
    """
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
