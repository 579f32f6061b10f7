"""The losses of a run as one SVG file that needs nothing else: `loss.svg`."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from sharding.errors import Problem
from training.metrics import FILE, read_metrics

__all__ = ["PLOT", "draw", "write_plot"]

PLOT = "loss.svg"

_WIDTH, _HEIGHT = 860, 440
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 24, 64, 56
_POINTS = 1500  # more are not told apart on the width of a screen
_STYLE = """
text { font: 12px system-ui, sans-serif; fill: #52606d; }
.title { font-size: 15px; font-weight: 600; fill: #1f2933; }
.page { fill: #ffffff; }
.grid { stroke: #e4e7eb; }
.axis { stroke: #9aa5b1; }
.train { stroke: #2680c2; }
.raw { stroke: #2680c2; opacity: 0.3; }
.validation { stroke: #d64545; }
.dot { fill: #d64545; }
.point { fill: #2680c2; }
.skipped { stroke: #cb6e17; stroke-width: 2; }
.resumed { stroke: #7b8794; stroke-dasharray: 4 4; }
path { fill: none; stroke-width: 1.75; stroke-linejoin: round; }
.raw { stroke-width: 1; }
@media (prefers-color-scheme: dark) {
  text { fill: #cbd2d9; }
  .title { fill: #f5f7fa; }
  .page { fill: #1f2933; }
  .grid { stroke: #323f4b; }
  .axis { stroke: #7b8794; }
}
"""

Points = Sequence[tuple[int, float]]


def write_plot(folder: Path) -> Problem | None:
    """Draws the metrics of a run into its folder; nothing where none has a loss.

    Returns:
      The problem when the file cannot be written.
    """
    try:
        text = draw(read_metrics(folder / FILE), folder.name)
        if text:
            (folder / PLOT).write_text(text, encoding="utf-8")
    except OSError as error:
        fix = "make room on the disk, or make the folder writable"
        return Problem(f"{folder / PLOT} cannot be written", str(error.strerror), fix)
    return None


def draw(lines: Sequence[Mapping[str, Any]], title: str) -> str:
    """The SVG of metrics, as `read_metrics` gives them; empty where none has a loss."""
    train, validation = _series(lines, "loss"), _series(lines, "validation_loss")
    skipped = [line["step"] for line in lines if line.get("skipped")]
    resumed = [line["resumed"] for line in lines if "resumed" in line]
    if not train and not validation:
        return ""
    smooth = _smoothed(train)
    frame = _Frame([*train, *validation, *((step, math.nan) for step in skipped)])
    parts = [
        *frame.axes(),
        *(frame.vertical(step, "resumed", f"resumed after step {step}") for step in resumed),
        frame.path(train, "raw"),
        frame.path(smooth, "train"),
        frame.path(validation, "validation"),
        *(frame.dot(step, loss, "point") for step, loss in (train if len(train) == 1 else ())),
        *(frame.dot(step, loss, "dot") for step, loss in validation),
        *(frame.tick(step, f"step {step} was skipped") for step in skipped),
        *_legend(train, validation, skipped, resumed),
    ]
    body = "\n".join(part for part in parts if part)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}"'
        f' width="{_WIDTH}" height="{_HEIGHT}" role="img">\n'
        f"<title>{_escaped(title)}: losses</title>\n<style>{_STYLE}</style>\n"
        f'<rect class="page" width="{_WIDTH}" height="{_HEIGHT}"/>\n'
        f'<text class="title" x="{_LEFT}" y="26">{_escaped(_short(title))}</text>\n{body}\n</svg>\n'
    )


class _Frame:
    """The scales of the picture: steps to the right, nats upwards."""

    def __init__(self, points: Points):
        steps = [step for step, _ in points]
        losses = [loss for _, loss in points if math.isfinite(loss)]
        self.x_ticks = _ticks(min(0, *steps), max(steps), whole=True)
        self.y_ticks = _ticks(min(losses), max(losses))
        self._first, self._last = self.x_ticks[0], max(max(steps), self.x_ticks[0] + 1)
        self._low, self._high = self.y_ticks[0], self.y_ticks[-1]

    def x(self, step: float) -> float:
        share = (step - self._first) / (self._last - self._first)
        return _LEFT + share * (_WIDTH - _LEFT - _RIGHT)

    def y(self, loss: float) -> float:
        share = (loss - self._low) / (self._high - self._low)
        return _HEIGHT - _BOTTOM - share * (_HEIGHT - _TOP - _BOTTOM)

    def axes(self) -> Iterable[str]:
        left, right, bottom = _LEFT, _WIDTH - _RIGHT, _HEIGHT - _BOTTOM
        for tick in self.y_ticks:
            y = f"{self.y(tick):.1f}"
            yield f'<line class="grid" x1="{left}" x2="{right}" y1="{y}" y2="{y}"/>'
            yield f'<text x="{left - 8}" y="{y}" dy="4" text-anchor="end">{tick:g}</text>'
        for tick in self.x_ticks:
            if tick <= self._last:
                x = f"{self.x(tick):.1f}"
                yield f'<line class="axis" x1="{x}" x2="{x}" y1="{bottom}" y2="{bottom + 5}"/>'
                yield f'<text x="{x}" y="{bottom + 20}" text-anchor="middle">{tick:,.0f}</text>'
        yield f'<line class="axis" x1="{left}" x2="{right}" y1="{bottom}" y2="{bottom}"/>'
        middle = (left + right) / 2
        yield f'<text x="{middle}" y="{_HEIGHT - 12}" text-anchor="middle">step</text>'
        middle = (_TOP + bottom) / 2
        yield (
            f'<text transform="translate(16 {middle:.1f}) rotate(-90)"'
            ' text-anchor="middle">nats per token</text>'
        )

    def path(self, points: Points, name: str) -> str:
        if len(points) < 2:
            return ""
        places = (f"{self.x(step):.1f} {self.y(loss):.1f}" for step, loss in _thinned(points))
        return f'<path class="{name}" d="M{" L".join(places)}"/>'

    def dot(self, step: int, loss: float, name: str) -> str:
        return (
            f'<circle class="{name}" cx="{self.x(step):.1f}" cy="{self.y(loss):.1f}" r="3">'
            f"<title>step {step}: {loss:.4f}</title></circle>"
        )

    def vertical(self, step: int, name: str, text: str) -> str:
        x = f"{self.x(step):.1f}"
        return (
            f'<line class="{name}" x1="{x}" x2="{x}" y1="{_TOP}" y2="{_HEIGHT - _BOTTOM}">'
            f"<title>{text}</title></line>"
        )

    def tick(self, step: int, text: str) -> str:
        x, bottom = f"{self.x(step):.1f}", _HEIGHT - _BOTTOM
        return (
            f'<line class="skipped" x1="{x}" x2="{x}" y1="{bottom - 10}" y2="{bottom}">'
            f"<title>{text}</title></line>"
        )


def _series(lines: Sequence[Mapping[str, Any]], name: str) -> list[tuple[int, float]]:
    return [(line["step"], float(line[name])) for line in lines if line.get(name) is not None]


def _smoothed(points: Points) -> list[tuple[int, float]]:
    """The mean of a fiftieth of the points around each; of fewer at the ends, as many on both
    sides, so that the curve does not lag."""
    steps, losses = np.array([p[0] for p in points], int), np.array([p[1] for p in points])
    at = np.arange(len(points))
    reach = np.minimum(len(points) // 100, np.minimum(at, len(points) - 1 - at))
    sums = np.concatenate([[0.0], np.cumsum(losses)])
    means = (sums[at + reach + 1] - sums[at - reach]) / (2 * reach + 1)
    return list(zip(steps.tolist(), means.tolist(), strict=True))


def _thinned(points: Points) -> Points:
    """At most `_POINTS` of them, the smallest and the largest of each stretch among them."""
    if len(points) <= _POINTS:
        return points
    size = math.ceil(2 * len(points) / _POINTS)
    found: list[tuple[int, float]] = []
    for start in range(0, len(points), size):
        part = points[start : start + size]
        ends = {min(part, key=lambda p: p[1]), max(part, key=lambda p: p[1])}
        found += sorted(ends)
    return found


def _ticks(low: float, high: float, whole: bool = False) -> list[float]:
    """Four to nine round numbers around a range."""
    span = (high - low) or max(abs(high), 1.0)
    power = 10 ** math.floor(math.log10(span / 4))
    unit = next(power * factor for factor in (1, 2, 5, 10) if span / (power * factor) <= 7)
    unit = max(unit, 1) if whole else unit
    first, last = math.floor(low / unit), math.ceil(high / unit)
    last = max(last, first + 1)
    return [number * unit for number in range(first, last + 1)]


def _legend(
    train: Points, validation: Points, skipped: Sequence[int], resumed: Sequence[int]
) -> Iterable[str]:
    entries = [("train", f"training, last {train[-1][1]:.4f}")] if train else []
    entries += [("validation", f"validation, last {validation[-1][1]:.4f}")] if validation else []
    entries += [("skipped", f"skipped steps: {len(skipped)}")] if skipped else []
    entries += [("resumed", f"resumed: {len(resumed)}")] if resumed else []
    x = _LEFT
    for name, text in entries:
        yield f'<line class="{name}" x1="{x}" x2="{x + 18}" y1="44" y2="44" stroke-width="2"/>'
        yield f'<text x="{x + 24}" y="48">{text}</text>'
        x += 48 + 6.6 * len(text)


def _short(title: str) -> str:
    return title if len(title) <= 80 else f"{title[:79]}…"


def _escaped(text: str) -> str:
    # XML has no characters for what does not print.
    return escape("".join(c if c.isprintable() else "?" for c in text))
