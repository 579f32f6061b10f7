"""The code that called this package, for warnings and files that belong to it."""

import inspect
import os
from types import FrameType

_PACKAGE = os.path.dirname(__file__)


def caller() -> tuple[FrameType | None, int]:
    """The first frame outside of this package, and its number as `warnings.warn` counts
    (`stacklevel`) where the asking function warns."""
    frame, level = inspect.currentframe(), 0
    while frame is not None and frame.f_code.co_filename.startswith(_PACKAGE):
        frame, level = frame.f_back, level + 1
    return frame, level
