"""What notebooks show: tables without scripts, and where it is small enough the whole page.

The page is in a sandboxed frame that can reach neither the notebook nor the network. Notebooks
that take frames out of outputs that are not trusted leave the tables.
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from spmd.reporting import terminal
from spmd.reporting.units import flops, percent, seconds, size

if TYPE_CHECKING:
    from spmd.reporting.diff import ReportDiff
    from spmd.reporting.model import Report

_LARGEST = 2_000_000  # characters of a page that is put into a notebook
_ROWS, _LINES = 8, 500  # that are shown
_CELL = "padding:1px 14px 1px 0;text-align:{};border:0"


def summary(report: Report) -> str:
    """The report as HTML without scripts, with its page in a frame."""
    memory = report.memory
    kinds = report.totals(terminal.collective)
    total = report.flops.total or 1.0
    parts = [
        _title(f"{report.name}: {terminal.headline(report)}"),
        _table("operations", ((k, flops(n), percent(n / total)) for k, n in
                              report.flops._asdict().items())),
        _table("memory at the peak", ((k, size(n), percent(n / max(memory.peak, 1)))
                                      for k, n in memory.by_kind.items())),
        _table("communication", ((k, f"x{v[0]:,}", size(v[1]), *_times(report, v[2:]))
                                 for k, v in kinds.items())),
        _table("findings", ((f.kind, f.value, f.text) for f in report.findings)),
    ]  # fmt: skip
    return _framed("".join(parts), report.to_html(), "report.save")


def diff_summary(diff: ReportDiff) -> str:
    """The same for a difference."""
    parts = [_title(f"from {diff.before}"), _title(f"to {diff.after}")]
    for group in ("summary", "operations", "memory", "communication"):
        found = diff.group(group, only_different=group == "communication")
        parts.append(_table(group, ((c.name, *c.texts()) for c in found)))
    return _framed("".join(parts), diff.to_html(), "diff.save")


def preformatted(text: str) -> str:
    """Text as it is, up to `_LINES` lines."""
    lines = text.split("\n")
    if len(lines) > _LINES:
        lines = [*lines[:_LINES], f"... {len(lines) - _LINES:,} more lines: print it"]
    shown = html.escape("\n".join(lines))
    return f'<pre style="line-height:1.3">{shown}</pre>'


def _times(report: Report, found: Sequence[float]) -> tuple[str, ...]:
    if not report.machine:
        return ()
    return seconds(found[0]), f"exposed {seconds(found[1])}"


def _title(text: str) -> str:
    return f'<p style="margin:0 0 4px;font-weight:600">{html.escape(text)}</p>'


def _table(title: str, rows: Iterable[Sequence[str]]) -> str:
    found = list(rows)
    if not found:
        return ""
    cells = ("".join(map(_cell, range(len(row)), row)) for row in found[:_ROWS])
    lines = "".join(f"<tr>{row}</tr>" for row in cells)
    more = len(found) - _ROWS
    note = f"<tr><td>... {more:,} more</td></tr>" if more > 0 else ""
    style = "border-collapse:collapse;margin:0 0 8px;font-variant-numeric:tabular-nums"
    caption = f'<caption style="text-align:left;opacity:.7">{html.escape(title)}</caption>'
    return f'<table style="{style}">{caption}{lines}{note}</table>'


def _cell(column: int, text: str) -> str:
    side = "right" if text[:1].isdigit() and column else "left"
    return f'<td style="{_CELL.format(side)}">{html.escape(text)}</td>'


def _framed(tables: str, page: str, save: str) -> str:
    if len(page) > _LARGEST:
        more = f"<p>The whole page is {size(len(page))}: <code>{save}('report.html')</code></p>"
        return f"<div>{tables}{more}</div>"
    frame = (
        f'<iframe sandbox="allow-scripts" srcdoc="{html.escape(page)}" '
        'style="width:100%;height:720px;border:1px solid #8884"></iframe>'
    )
    return f"<div>{tables}<details><summary>The whole report</summary>{frame}</details></div>"
