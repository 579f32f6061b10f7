"""Partitioned programs as golden files: text without source lines, and its difference with them."""

import difflib
import os
import pathlib
import re
from typing import Any

from sharding.errors import Problem
from spmd.caller import caller

# `  # model.py:12 (loss)` at the end of a line, and `at model.py:12 (loss)` inside of one.
_COMMENT = re.compile(r"  # .*$")
_SOURCE = re.compile(r"(?:\bat )?\S+\.py:\d+ \([^)]*\)")

# Set by the pytest plugin from its option; None: by the environment.
update_by_default: bool | None = None


def without_sources(line: str) -> str:
    return _SOURCE.sub("", _COMMENT.sub("", line)).rstrip()


def assert_same_text(text: str, path: Any, update: bool | None = None) -> Problem | None:
    """Compares a text with a golden file, source lines aside, or writes the file.

    Args:
      path: relative ones are from the folder of the first caller outside of this package.

    Returns:
      What differs, or None.
    """
    path = pathlib.Path(path)
    if not path.is_absolute():
        path = _calling_folder() / path
    sourced = text.rstrip("\n").splitlines()
    lines = [without_sources(line) for line in sourced]
    if _updating() if update is None else update:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(lines) + "\n")
        return None
    hint = "if the new program is right, write it with --update-golden and review the difference"
    if not path.exists():
        return Problem(f"{path.name} does not exist", f"looked for {path}", hint)
    expected = path.read_text().splitlines()
    if expected == lines:
        return None
    rows = _difference(expected, lines, sourced)
    return Problem(f"the program is not that of {path.name}", "\n       ".join(rows), hint)


def _difference(expected: list[str], lines: list[str], sourced: list[str]) -> list[str]:
    """Unified difference; lines of the program at hand come with their source."""
    rows = []
    matcher = difflib.SequenceMatcher(None, expected, lines, autojunk=False)
    for group in matcher.get_grouped_opcodes(2):
        for tag, i1, i2, j1, j2 in group:
            if tag == "equal":
                rows += [f"  {line}" for line in expected[i1:i2]]
                continue
            rows += [f"- {line}" for line in expected[i1:i2]]
            rows += [f"+ {line}" for line in sourced[j1:j2]]
    return rows


def _updating() -> bool:
    if update_by_default is not None:
        return update_by_default
    return os.environ.get("SPMD_UPDATE_GOLDEN", "") not in ("", "0")


def _calling_folder() -> pathlib.Path:
    frame, _ = caller()
    return pathlib.Path(frame.f_code.co_filename).parent if frame else pathlib.Path.cwd()
