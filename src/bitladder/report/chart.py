"""Loss against size (or speed) as SVG markup: log scale for KL, intervals as bars, the pair marked, the cliff named.

The page's ``chart.js`` draws the same, name by name in the same places (``placement.py``).

Colours come from the page's CSS through classes, so that light and dark are one drawing. Shapes differ as well as
colours: the quality tier is a square, the speed tier a diamond, every other level a dot.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from bitladder.report.placement import BESIDE, BOLD, CHARACTER, LINE, Box, Place, first_free, place_of, places_around

FLOOR = 1e-5
"""Nats. What is smaller is drawn at the floor: on a log scale zero is infinitely far down."""
TICK_ROOM = 48
"""Units that the number under a tick takes."""


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
    """Whether the levels follow one another along it: then a line joins them, there may be a cliff, and the axis is
    logarithmic: levels differ by factors, most crowd at the small end, and the source may be far off."""


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
    x_log: bool
    y_range: tuple[float, float]
    left: float = 50
    right: float = 18
    top: float = 22
    bottom: float = 44

    def x(self, value: float) -> float:
        low, high = self.x_range
        share = math.log(value / low) / math.log(high / low) if self.x_log else (value - low) / (high - low)
        return self.left + share * (self.width - self.left - self.right)

    def y(self, value: float) -> float:
        low, high = self.y_range
        share = math.log(max(value, low) / low) / math.log(high / low)
        return self.height - self.bottom - share * (self.height - self.top - self.bottom)

    @property
    def area(self) -> Box:
        """Where names may stand."""
        return (self.left, self.top - 4, self.width, self.height - self.bottom)


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
    height: float = 380,
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
    frame = _frame(known, limit, width, height, log=axis.ladder and known[0].x > 0)
    cliff = find_cliff(known) if axis.ladder else None
    taken = [box for point in known for box in _covered(frame, point)]
    if limit and frame.y_range[0] <= limit <= frame.y_range[1]:
        taken.append((frame.left, frame.y(limit) - 2, frame.width - frame.right, frame.y(limit) + 2))
    parts = [
        f'<svg class="chart" viewBox="0 0 {width:g} {height:g}" role="img" aria-labelledby="{name}-t {name}-d">',
        f'<title id="{name}-t">Loss against {escape(axis.title)}</title>',
        f'<desc id="{name}-d">{escape(_described(known, axis, cliff))}</desc>',
        *_grid(frame, axis),
        *_limit_line(frame, limit, taken, at_right=axis.ladder),
        *_cliff_band(frame, known, cliff, taken),
        _curve(frame, known) if axis.ladder else "",
        *(_whisker(frame, p) for p in known),
        *(_dot(frame, p) for p in known),
        *_labels(frame, known, taken),
        "</svg>",
    ]
    return "\n".join(part for part in parts if part)


def _frame(points: Sequence[Point], limit: float | None, width: float, height: float, *, log: bool) -> _Frame:
    """Ranges with some air."""
    least, most = points[0].x, points[-1].x
    if log:
        factor = (most / least) ** 0.1 if most > least else 1.1
        x_range = (least / factor, most * factor * 1.02)
    else:
        room = (most - least) or abs(least) or 1.0
        x_range = (least - 0.07 * room, most + 0.12 * room)
    losses = [max(FLOOR, value) for p in points for value in (p.low, p.loss, p.high) if math.isfinite(value)]
    if limit and min(losses) / 30 <= limit <= max(losses) * 30:  # a bar far off would squeeze the levels together
        losses.append(limit)
    low, high = min(losses) / 1.6, max(losses) * 1.6
    if high / low < 30:
        low, high = low / 3, high * 3
    return _Frame(width, height, x_range, log, (low, high))


def _covered(frame: _Frame, point: Point) -> list[Box]:
    """The boxes of a level's mark and of its interval."""
    x, y = frame.x(point.x), frame.y(point.loss)
    around = 8 if point.mark else 6
    boxes = [(x - around, y - around, x + around, y + around)]
    if math.isfinite(point.low) and math.isfinite(point.high):
        boxes.append((x - 5, frame.y(point.high) - 1, x + 5, frame.y(point.low) + 1))
    return boxes


def _grid(frame: _Frame, axis: Axis) -> list[str]:
    """Axes, ticks and titles."""
    left, right, bottom = frame.left, frame.width - frame.right, frame.height - frame.bottom
    across = f'x1="{left:g}" x2="{right:g}"'
    parts = []
    for value in _log_ticks(*frame.y_range):
        y = frame.y(value)
        parts.append(f'<line class="grid" {across} y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(_text("tick", left - 8, y + 4, _shortly(value), "end"))
    for value in _apart(_linear_ticks(*frame.x_range, count=max(4, int(frame.width // 90))), frame):
        parts.append(_text("tick", frame.x(value), bottom + 18, f"{value:,g}", "middle"))
    parts.append(f'<line class="axis" {across} y1="{bottom:g}" y2="{bottom:g}"/>')
    parts.append(_text("title", (left + right) / 2, frame.height - 6, f"{axis.title}, {axis.unit}", "middle"))
    parts.append(_text("title", 2, 11, "mean KL, nats per token (log scale)", "start"))
    return parts


def _shortly(value: float) -> str:
    """0.01, but 1e-5: what fits left of the axis."""
    return f"{value:.0e}".replace("e-0", "e-") if value < 1e-3 else f"{value:g}"


def _text(kind: str, x: float, y: float, text: str, anchor: str) -> str:
    """A ``<text>`` element; the text is escaped."""
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _limit_line(frame: _Frame, limit: float | None, taken: list[Box], *, at_right: bool) -> list[str]:
    """The bar, named where it is free, first on the line at the end where few levels are."""
    if not limit or not frame.y_range[0] <= limit <= frame.y_range[1]:
        return []
    y, right = frame.y(limit), frame.width - frame.right
    text = f"bar: {limit:g}"
    wide = len(text) * CHARACTER
    steps = [40.0 * step for step in range(int((right - frame.left - wide) // 40) + 1)]
    ends = [(right - step, "end") if at_right else (frame.left + step, "start") for step in steps]
    heights = (-6, 15, -20, 29, -34, 43)
    place, _ = first_free((place_of(x, y + dy, end, wide) for dy in heights for x, end in ends), taken, frame.area)
    taken.append(place.box)
    line = f'<line class="limit" x1="{frame.left:g}" x2="{right:g}" y1="{y:.1f}" y2="{y:.1f}"/>'
    return [line, _placed("limit-label", place, text)]


def _cliff_band(frame: _Frame, points: Sequence[Point], cliff: Cliff | None, taken: list[Box]) -> list[str]:
    """A quiet band over the steepest step, named beside it or in it."""
    if cliff is None:
        return []
    left, right = sorted(frame.x(p.x) for p in points if p.label in (cliff.upper, cliff.lower))
    top, bottom = frame.top, frame.height - frame.bottom
    text = f"the cliff: \u00d7{cliff.times:.1f}"
    wide = len(text) * CHARACTER
    heights = [top + 12 + 16 * step for step in range(int((bottom - top) // 16))]
    sides = [(right + 6, "start"), (left - 6, "end"), ((left + right) / 2, "middle")]
    place, _ = first_free((place_of(x, y, end, wide) for y in heights for x, end in sides), taken, frame.area)
    taken.append(place.box)
    band = f'x="{left:.1f}" y="{top:g}" width="{right - left:.1f}" height="{bottom - top:g}"'
    return [f'<rect class="cliff" {band}/>', _placed("cliff-label", place, text)]


def _placed(kind: str, place: Place, text: str) -> str:
    return _text(kind, place.x, place.y, text, place.anchor)


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


def _labels(frame: _Frame, points: Sequence[Point], taken: list[Box]) -> list[str]:
    """Names beside the dots, the chosen levels' first; one that stands further off is joined to its dot by a line.

    A name that finds no free place is left out: the table below has it, and so has the dot's own title.
    """
    parts = []
    for point in sorted(points, key=lambda p: not p.mark):
        text = (
            f"{point.label} \u00b7 {'both tiers' if point.mark == 'both' else point.mark}"
            if point.mark
            else point.label
        )
        x, y = frame.x(point.x), frame.y(point.loss)
        wide = len(text) * (BOLD if point.mark else CHARACTER)
        place, free = first_free(places_around(x, y, wide), taken, frame.area)
        if free or point.mark:
            taken.append(place.box)
            parts += [*_leader(x, y, place), _placed(f"label {point.mark}".rstrip(), place, text)]
    return parts


def _leader(x: float, y: float, place: Place) -> list[str]:
    """A line from a dot to a name that does not touch it."""
    rise = place.y - 4 - y
    if abs(rise) < LINE + 1 and abs(place.x - x) < BESIDE + 1:
        return []
    end = place.box[3] - 1 if rise < 0 else place.box[1] + 1 if rise > 0 else y
    start = y + math.copysign(8, rise) if rise else y
    return [f'<line class="leader" x1="{x:.1f}" y1="{start:.1f}" x2="{place.x:.1f}" y2="{end:.1f}"/>']


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


def _apart(ticks: Sequence[float], frame: _Frame) -> list[float]:
    """Ticks that leave room for their numbers."""
    kept: list[float] = []
    for tick in ticks:
        if not kept or frame.x(tick) - frame.x(kept[-1]) >= TICK_ROOM:
            kept.append(tick)
    return kept


def _described(points: Sequence[Point], axis: Axis, cliff: Cliff | None) -> str:
    """The drawing in words, for screen readers."""
    listed = "; ".join(f"{p.label} {p.x:.4g} {axis.unit}, KL {p.loss:.3g}" for p in sorted(points, key=lambda p: -p.x))
    fall = (
        f" The steepest step is from {cliff.upper} to {cliff.lower}: {cliff.times:.1f} times the loss." if cliff else ""
    )
    return f"{listed}.{fall}"
