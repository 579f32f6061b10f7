"""Which line of the user's program an instruction of a compiled module comes from.

XLA prints tables of files, functions, locations and stack frames before the computations; an
instruction names a frame (`stack_frame_id`), or, in older compilers, the line itself.
"""

from __future__ import annotations

import os
import re

_ENTRY = re.compile(r'^(\d+) (?:"(.*)"|\{(.*)\})$')
_FIELD = re.compile(r"(\w+)=(\d+)")
_FRAME = re.compile(r"stack_frame_id=(\d+)")
_LINE = re.compile(r'source_file="([^"]*)" source_line=(\d+)')
_OP_NAME = re.compile(r'op_name="([^"]*)"')
_TABLES = ("FileNames", "FunctionNames", "FileLocations", "StackFrames")
# Not what a user wrote: this project's own frames, and installed packages.
_PACKAGES = tuple(
    os.path.join(os.path.dirname(os.path.dirname(os.path.dirname(__file__))), name) + os.sep
    for name in ("sharding", "spmd")
)


class Sources:
    """The tables of one module; reads lines from the attributes of its instructions."""

    def __init__(self, text: str):
        self._tables = _tables(text)

    def of(self, attributes: str) -> str:
        """`file.py:12 (function)`, the innermost line that the user wrote; "" if none is told."""
        if found := _LINE.search(attributes):
            return f"{os.path.basename(found[1])}:{found[2]}"
        found = _FRAME.search(attributes)
        frame = int(found[1]) if found else 0
        first = ""
        while frame:
            entry = self._tables["StackFrames"].get(frame, {})
            path, line = self._location(entry.get("file_location_id", 0))
            first = first or line
            if path and "site-packages" not in path and not path.startswith(_PACKAGES):
                return line
            frame = entry.get("parent_frame_id", 1) - 1  # printed plus one; 1 is none
        return first

    def _location(self, number: int) -> tuple[str, str]:
        entry = self._tables["FileLocations"].get(number, {})
        path = self._tables["FileNames"].get(entry.get("file_name_id", 0), "")
        function = self._tables["FunctionNames"].get(entry.get("function_name_id", 0), "")
        if not path:
            return "", ""
        name = function.rpartition(".")[2]
        return path, f"{os.path.basename(path)}:{entry.get('line', 0)} ({name})"


def op_name(attributes: str) -> str:
    """The path of an instruction in the JAX program, or ""."""
    found = _OP_NAME.search(attributes)
    return found[1] if found else ""


def _tables(text: str) -> dict[str, dict]:
    tables: dict[str, dict] = {name: {} for name in _TABLES}
    current = ""
    for line in text.splitlines():
        if line in _TABLES:
            current = line
        elif line.startswith(("%", "ENTRY")):
            break
        elif current and (entry := _ENTRY.match(line)):
            number = int(entry[1])
            fields = {key: int(value) for key, value in _FIELD.findall(entry[3] or "")}
            tables[current][number] = fields if entry[3] else entry[2]
    return tables
