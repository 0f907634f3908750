"""Loss against size (or speed) as SVG markup: log scale for KL, intervals as bars, the pair marked, the cliff named.

Colours come from the page's CSS through classes, so that light and dark are one drawing. Shapes differ as well as
colours: the quality tier is a square, the speed tier a diamond, every other level a dot.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import NamedTuple

FLOOR = 1e-5
"""Nats. What is smaller is drawn at the floor: on a log scale zero is infinitely far down."""
CHARACTER = 6.7
"""Width of a label's character, in the drawing's units, at 12 units type size."""


@dataclass(frozen=True)
class Point:
    """One level: ``x`` in the axis' unit, loss in nats with its interval, and its mark (a tier, or empty)."""

    label: str
    x: float
    loss: float
    low: float
    high: float
    mark: str = ""


@dataclass(frozen=True)
class Axis:
    """The horizontal axis: its title and the unit of its values."""

    title: str
    unit: str
    ladder: bool = True
    """Whether the levels follow one another along it: then a line joins them, and there may be a cliff."""


@dataclass(frozen=True)
class Cliff:
    """The steepest step between neighbours: from ``upper`` to ``lower`` the loss grows ``times``-fold."""

    upper: str
    lower: str
    times: float


@dataclass(frozen=True)
class _Frame:
    """The drawing's area and its scales."""

    width: float
    height: float
    x_range: tuple[float, float]
    y_range: tuple[float, float]
    left: float = 52
    right: float = 20
    top: float = 18
    bottom: float = 46

    def x(self, value: float) -> float:
        low, high = self.x_range
        return self.left + (value - low) / (high - low) * (self.width - self.left - self.right)

    def y(self, value: float) -> float:
        low, high = map(math.log10, self.y_range)
        place = (math.log10(max(value, self.y_range[0])) - low) / (high - low)
        return self.height - self.bottom - place * (self.height - self.top - self.bottom)


def find_cliff(points: Sequence[Point]) -> Cliff | None:
    """Where a step down costs most: the largest growth of log loss per unit of x among losses that matter.

    Steps below 0.02 nats are left out (growing from nothing to next to nothing is no cliff), and so are
    drawings where no step is at least twice as steep as the whole curve.
    """
    known = sorted((p for p in points if math.isfinite(p.loss) and p.loss > 0), key=lambda p: -p.x)
    if len(known) < 3 or known[0].x == known[-1].x:
        return None
    overall = math.log(known[-1].loss / known[0].loss) / (known[0].x - known[-1].x)
    steps = [
        (math.log(below.loss / above.loss) / (above.x - below.x), above, below)
        for above, below in itertools.pairwise(known)
        if above.x > below.x and below.loss >= 0.02 and below.loss >= 2 * above.loss
    ]
    if not steps:
        return None
    slope, above, below = max(steps, key=lambda step: step[0])
    return Cliff(above.label, below.label, below.loss / above.loss) if slope >= 1.5 * overall > 0 else None


def loss_chart(
    points: Sequence[Point],
    axis: Axis,
    *,
    limit: float | None = None,
    width: float = 720,
    height: float = 400,
    name: str = "chart",
) -> str:
    """An ``<svg>`` element, or an empty text when nothing was measured.

    Args:
        points: the levels; those without a finite loss are left out.
        axis: what ``x`` is.
        limit: the bar's limit on the loss, drawn as a line.
        width: of the drawing, in its own units; text is 12 units high.
        height: likewise.
        name: prefix of the ids inside, unique on the page.
    """
    known = sorted((p for p in points if math.isfinite(p.loss) and math.isfinite(p.x)), key=lambda p: p.x)
    if not known:
        return ""
    frame = _frame(known, limit, width, height)
    cliff = find_cliff(known) if axis.ladder else None
    parts = [
        f'<svg class="chart" viewBox="0 0 {width:g} {height:g}" role="img" aria-labelledby="{name}-t {name}-d">',
        f'<title id="{name}-t">Loss against {escape(axis.title)}</title>',
        f'<desc id="{name}-d">{escape(_described(known, axis, cliff))}</desc>',
        *_grid(frame, axis),
        *_limit_line(frame, limit, at_right=axis.ladder),
        *_cliff_band(frame, known, cliff),
        _curve(frame, known) if axis.ladder else "",
        *(_whisker(frame, p) for p in known),
        *(_dot(frame, p) for p in known),
        *_labels(frame, known),
        "</svg>",
    ]
    return "\n".join(part for part in parts if part)


def _frame(points: Sequence[Point], limit: float | None, width: float, height: float) -> _Frame:
    """Ranges with some air."""
    xs = [p.x for p in points]
    span = (max(xs) - min(xs)) or max(abs(xs[0]), 1.0)
    losses = [max(FLOOR, value) for p in points for value in (p.low, p.loss, p.high) if math.isfinite(value)]
    if limit and min(losses) / 30 <= limit <= max(losses) * 30:  # a bar far off would squeeze the levels together
        losses.append(limit)
    low, high = min(losses) / 1.6, max(losses) * 1.6
    if high / low < 30:
        low, high = low / 3, high * 3
    return _Frame(width, height, (min(xs) - 0.07 * span, max(xs) + 0.1 * span), (low, high))


def _grid(frame: _Frame, axis: Axis) -> list[str]:
    """Axes, ticks and titles."""
    left, right, bottom = frame.left, frame.width - frame.right, frame.height - frame.bottom
    across = f'x1="{left:g}" x2="{right:g}"'
    parts = []
    for value in _log_ticks(*frame.y_range):
        y = frame.y(value)
        parts.append(f'<line class="grid" {across} y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(_text("tick", left - 8, y + 4, f"{value:g}", "end"))
    for value in _linear_ticks(*frame.x_range, count=max(3, int(frame.width // 110))):
        parts.append(_text("tick", frame.x(value), bottom + 18, f"{value:,g}", "middle"))
    parts.append(f'<line class="axis" {across} y1="{bottom:g}" y2="{bottom:g}"/>')
    parts.append(_text("title", (left + right) / 2, frame.height - 6, f"{axis.title}, {axis.unit}", "middle"))
    parts.append(_text("title", 4, 10, "mean KL, nats per token (log scale)", "start"))
    return parts


def _text(kind: str, x: float, y: float, text: str, anchor: str) -> str:
    """A ``<text>`` element; the text is escaped."""
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _limit_line(frame: _Frame, limit: float | None, *, at_right: bool) -> list[str]:
    """The bar, named at the end where few levels are."""
    if not limit or not frame.y_range[0] <= limit <= frame.y_range[1]:
        return []
    y = frame.y(limit)
    right = frame.width - frame.right
    return [
        f'<line class="limit" x1="{frame.left:g}" x2="{right:g}" y1="{y:.1f}" y2="{y:.1f}"/>',
        _text(
            "limit-label",
            right if at_right else frame.left,
            y - 6,
            f"bar: {limit:g}",
            "end" if at_right else "start",
        ),
    ]


def _cliff_band(frame: _Frame, points: Sequence[Point], cliff: Cliff | None) -> list[str]:
    """A quiet band over the steepest step."""
    if cliff is None:
        return []
    ends = sorted(frame.x(p.x) for p in points if p.label in (cliff.upper, cliff.lower))
    top, bottom = frame.top, frame.height - frame.bottom
    place = f'x="{ends[0]:.1f}" y="{top:g}" width="{ends[1] - ends[0]:.1f}" height="{bottom - top:g}"'
    return [
        f'<rect class="cliff" {place}/>',
        _text("cliff-label", ends[1] + 6, top + 14, f"the cliff: ×{cliff.times:.1f}", "start"),
    ]


def _curve(frame: _Frame, points: Sequence[Point]) -> str:
    path = " ".join(f"{frame.x(p.x):.1f},{frame.y(p.loss):.1f}" for p in points)
    return f'<polyline class="curve" points="{path}"/>' if len(points) > 1 else ""


def _whisker(frame: _Frame, point: Point) -> str:
    """The interval."""
    if not (math.isfinite(point.low) and math.isfinite(point.high)):
        return ""
    x, low, high = frame.x(point.x), frame.y(point.low), frame.y(point.high)
    path = f"M{x:.1f} {low:.1f}V{high:.1f}M{x - 4:.1f} {low:.1f}h8M{x - 4:.1f} {high:.1f}h8"
    return f'<path class="whisker {point.mark}" d="{path}"/>'


def _dot(frame: _Frame, point: Point) -> str:
    """The mark of a level, with its numbers as a tooltip."""
    x, y = frame.x(point.x), frame.y(point.loss)
    tip = f"<title>{escape(point.label)}: KL {point.loss:.3g} ({point.low:.3g} to {point.high:.3g})</title>"
    if point.mark in ("quality", "both"):
        place = f'x="{x - 6:.1f}" y="{y - 6:.1f}" width="12" height="12" rx="2"'
        return f'<rect class="dot {point.mark}" {place}>{tip}</rect>'
    if point.mark == "speed":
        return f'<path class="dot speed" d="M{x:.1f} {y - 8:.1f}l8 8l-8 8l-8 -8z">{tip}</path>'
    return f'<circle class="dot" cx="{x:.1f}" cy="{y:.1f}" r="4.5">{tip}</circle>'


def _labels(frame: _Frame, points: Sequence[Point]) -> list[str]:
    """Names beside the dots: each takes the first place that is free, the chosen levels first."""
    taken = [(frame.x(p.x) - 6, frame.y(p.loss) - 6, frame.x(p.x) + 6, frame.y(p.loss) + 6) for p in points]
    parts = []
    for point in sorted(points, key=lambda p: not p.mark):
        text = f"{point.label} · {point.mark}" if point.mark else point.label
        text = f"{point.label} · both tiers" if point.mark == "both" else text
        place = _free_place(frame, point, len(text) * CHARACTER, taken)
        taken.append(place.box)
        parts.append(_text(f"label {point.mark}".rstrip(), *place.at, text, place.anchor))
    return parts


_Box = tuple[float, float, float, float]


class _Place(NamedTuple):
    """Where a label may stand."""

    cost: float
    """How much it would overlap."""
    box: _Box
    anchor: str
    at: tuple[float, float]


def _free_place(frame: _Frame, point: Point, wide: float, taken: Sequence[_Box]) -> _Place:
    """Where a label goes: right, left, or further up and down, whatever overlaps least."""
    x, y = frame.x(point.x), frame.y(point.loss)
    best: _Place | None = None
    for rise in (0, -14, 14, -26, 26, -38, 38):
        for side in (1, -1):
            at = (x + side * 11, y + 4 + rise)
            left = at[0] if side > 0 else at[0] - wide
            box = (left, at[1] - 11, left + wide, at[1] + 3)
            outside = max(0.0, frame.left - box[0]) + max(0.0, box[2] - frame.width) + max(0.0, frame.top - box[1])
            cost = sum(_overlap(box, other) for other in taken) + 50 * outside + abs(rise) * 0.5
            if best is None or cost < best.cost:
                best = _Place(cost, box, "start" if side > 0 else "end", at)
    assert best is not None  # the loops run
    return best


def _overlap(one: _Box, other: _Box) -> float:
    wide = min(one[2], other[2]) - max(one[0], other[0])
    tall = min(one[3], other[3]) - max(one[1], other[1])
    return wide * tall if wide > 0 and tall > 0 else 0.0


def _log_ticks(low: float, high: float) -> list[float]:
    """1 and 3 of every decade, or the decades alone when there are many."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    steps = (1, 3) if len(decades) <= 5 else (1,)
    ticks = [float(f"{step}e{decade}") for decade in decades for step in steps]
    return [tick for tick in ticks if low <= tick <= high]


def _linear_ticks(low: float, high: float, *, count: int) -> list[float]:
    """Round numbers, about ``count`` of them."""
    raw = (high - low) / count
    unit = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * unit for factor in (1, 2, 2.5, 5, 10) if factor * unit >= raw)
    return [round(step * n, 10) for n in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _described(points: Sequence[Point], axis: Axis, cliff: Cliff | None) -> str:
    """The drawing in words, for those who hear it."""
    listed = "; ".join(f"{p.label} {p.x:.4g} {axis.unit}, KL {p.loss:.3g}" for p in sorted(points, key=lambda p: -p.x))
    fall = (
        f" The steepest step is from {cliff.upper} to {cliff.lower}: {cliff.times:.1f} times the loss." if cliff else ""
    )
    return f"{listed}.{fall}"
