"""Reports as one HTML file: the files of `page/` and the report as JSON, put together.

The page asks for nothing: its policy allows the scripts and styles whose hashes it names, and no
other source. The report is data in it, never markup: scripts write it as text.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import html
import json
from importlib import resources
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from spmd.reporting.diff import ReportDiff
    from spmd.reporting.model import Report

_SHARED = ("dom.js", "units.js")
_REPORT = (
    "layout.js", "table.js", "tree.js", "program.js", "overview.js", "bars.js", "memory.js",
    "communication.js", "mesh.js", "tensors.js", "report.js",
)  # fmt: skip
_DIFF = ("table.js", "diff.js")
FILES = tuple(dict.fromkeys((*_SHARED, *_REPORT, *_DIFF)))  # the scripts of `page/`


def page(report: Report) -> str:
    """The page of a report."""
    return _page(report.name, "report", report.to_json(), (*_SHARED, *_REPORT))


def diff_page(diff: ReportDiff) -> str:
    """The page of the difference of two reports."""
    data = json.loads(diff.to_json())
    data["texts"] = [c.texts() for c in diff.changes]
    return _page("Difference of two reports", "diff", json.dumps(data), (*_SHARED, *_DIFF))


def _page(title: str, kind: str, data: str, scripts: tuple[str, ...]) -> str:
    script = '"use strict";\n' + "\n".join(map(_file, scripts))
    style = _file("page.css")
    policy = "; ".join((
        "default-src 'none'", "img-src data:",
        f"script-src '{_digest(script)}'", f"style-src '{_digest(style)}'",
        "base-uri 'none'", "form-action 'none'",
    ))  # fmt: skip
    parts = {
        "TITLE": html.escape(title), "POLICY": html.escape(policy), "STYLE": style,
        "SCRIPT": script, "KIND": kind, "DATA": _inert(data),
    }  # fmt: skip
    pieces = _file("page.html").split("%%")  # text and names in turn
    return "".join(parts[piece] if i % 2 else piece for i, piece in enumerate(pieces))


def _inert(data: str) -> str:
    """JSON that cannot end the element it is in, or open a comment there."""
    return data.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _digest(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


@functools.cache
def _file(name: str) -> str:
    return (resources.files("spmd.reporting") / "page" / name).read_text(encoding="utf-8")
