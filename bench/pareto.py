"""Pareto plots: every contender's files as marks, the best of all joined by a line, a legend that names every contender."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from sartor.report import svg

WIDTH, HEIGHT, LEFT, TOP = 720, 300, 64, 24
LEGEND, COLUMNS = 16, 3  # pixels a line; names beside each other
TICKS = 5
ROOM = 0.05  # of the span, left free around the marks


@dataclass(frozen=True)
class Mark:
    """One file: whose, which kind, and where it lies."""

    series: str
    kind: str
    x: float
    y: float


@dataclass(frozen=True)
class Axis:
    """What an axis shows: its name, how a number is written, and whether less is better."""

    name: str
    form: str
    less: bool


def colours(names: Sequence[str]) -> dict[str, str]:
    """One a contender, evenly around the wheel, light and dark in turns; all that is Sartor in the colour of the user's text."""
    out = {}
    for n, name in enumerate(names):
        r, g, b = colorsys.hls_to_rgb(n / len(names), 0.35 + 0.2 * (n % 2), 0.65)
        out[name] = f"#{round(255 * r):02x}{round(255 * g):02x}{round(255 * b):02x}"
    return out | ({"sartor": svg.USER} if "sartor" in out else {})


def front(marks: Sequence[Mark], across: Axis, up: Axis) -> list[Mark]:
    """Those that none beats in both, from left to right."""
    sign = 1 if up.less else -1
    best: list[Mark] = []
    for mark in sorted(marks, key=lambda m: (m.x if across.less else -m.x, sign * m.y)):
        if not best or sign * mark.y < sign * best[-1].y:
            best.append(mark)
    return sorted(best, key=lambda m: m.x)


def pareto(marks: Sequence[Mark], across: Axis, up: Axis, names: Sequence[str], title: str) -> str:
    """The plot as SVG; every mark says its name, kind and figures when it is pointed at.

    Args:
        names: of all contenders, in the order of the legend; those without any mark are told so.
    """
    xs, ys = _span([m.x for m in marks]), _span([m.y for m in marks])
    paint = colours(names)

    def at(m: Mark) -> tuple[float, float]:
        wide, high = (m.x - xs[0]) / (xs[1] - xs[0]), (m.y - ys[0]) / (ys[1] - ys[0])
        return LEFT + (WIDTH - LEFT - 20) * wide, TOP + HEIGHT * (1 - high)

    line = "L".join(f"{x:.1f} {y:.1f}" for x, y in map(at, front(marks, across, up)))
    out = [*_frame(xs, ys, across, up), f'<path d="M{line}" stroke="{svg.SOFT}" stroke-width="2" fill="none"/>']
    for m in marks:
        x, y = at(m)
        said = escape(f"{m.series} {m.kind}: {across.form.format(m.x)}, {up.form.format(m.y)}")
        size = 6 if m.series == "sartor" else 4
        out.append(
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{size}" fill="{paint[m.series]}" fill-opacity=".8"><title>{said}</title></circle>'
        )
    there = {m.series for m in marks}
    foot = TOP + HEIGHT + 52
    for n, name in enumerate(names):
        x, y = LEFT + n % COLUMNS * (WIDTH - LEFT) / COLUMNS, foot + n // COLUMNS * LEGEND
        out.append(f'<circle cx="{x:.1f}" cy="{y - 4:.1f}" r="4" fill="{paint[name]}"/>')
        out.append(svg.written(x + 9, y, name if name in there else f"{name} (not measured)", size=11))
    return svg.drawing(WIDTH, foot + -(-len(names) // COLUMNS) * LEGEND, out, title)


def _span(values: Sequence[float]) -> tuple[float, float]:
    """Least and most with some room; where there is one value, room around it."""
    low, high = min(values), max(values)
    room = ROOM * (high - low) or ROOM * abs(high) or 1.0
    return low - room, high + room


def _frame(xs: tuple[float, float], ys: tuple[float, float], across: Axis, up: Axis) -> list[str]:
    """Axes, ticks and their names."""
    right, bottom = WIDTH - 20, TOP + HEIGHT
    out = [f'<path d="M{LEFT} {TOP}V{bottom}H{right}" stroke="{svg.SOFT}" fill="none"/>']
    for t in range(TICKS):
        share = t / (TICKS - 1)
        x, y = xs[0] + share * (xs[1] - xs[0]), ys[0] + share * (ys[1] - ys[0])
        out.append(svg.written(LEFT + (right - LEFT) * share, bottom + 16, across.form.format(x), "middle", 10))
        out.append(svg.written(LEFT - 6, bottom - HEIGHT * share + 4, up.form.format(y), "end", 10))
    better = {True: "less is better", False: "more is better"}
    out.append(svg.written(right, bottom + 30, f"{across.name} ({better[across.less]})", "end", 11))
    return [*out, svg.written(LEFT, TOP - 10, f"{up.name} ({better[up.less]})", size=11)]
