"""Small pictures as SVG text: bars with intervals, a map of layers, a curve."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from html import escape
from typing import Any

INK, SOFT, USER, GENERIC, GOOD = "#22303c", "#c9d3da", "#c2410c", "#0f766e", "#1d4ed8"
ROOM = 34  # pixels that a number needs in a cell


def written(x: float, y: float, s: str, anchor: str = "start", size: int = 12, fill: str = INK) -> str:
    """A line of text."""
    return f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" text-anchor="{anchor}" fill="{fill}">{escape(s)}</text>'


def drawing(width: int, height: int, body: Sequence[str], title: str) -> str:
    """The whole picture."""
    return f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(title)}" xmlns="http://www.w3.org/2000/svg">{"".join(body)}</svg>'


def _said(value: float, unit: str) -> str:
    return f"{value:.3f} {unit}" if value < 50 else f"{value:.0f} {unit}"


def bars(
    rows: Sequence[tuple[str, float, tuple[float, float] | None, str]],
    unit: str,
    title: str,
    said: Callable[[float, str], str] = _said,
) -> str:
    """Horizontal bars: (label, value, interval or None, colour); `said` puts a value and its unit in words."""
    longest = max((len(label) for label, *_ in rows), default=0)
    top = max([hi for _, v, ci, _ in rows for hi in (v, (ci or (0, 0))[1])] + [1e-9])
    out, left, right = [], min(430, max(230, 7 * longest)), 90
    for n, (label, value, ci, colour) in enumerate(rows):
        y, scale = 8 + n * 26, (720 - left - right) / top
        out += [
            written(left - 8, y + 14, label, "end"),
            f'<rect x="{left}" y="{y}" width="{value * scale:.1f}" height="18" fill="{colour}" rx="2"/>',
        ]
        end = value
        if ci:
            a, b = left + ci[0] * scale, left + ci[1] * scale
            out.append(
                f'<path d="M{a:.1f} {y + 9}H{b:.1f}M{a:.1f} {y + 5}v8M{b:.1f} {y + 5}v8" stroke="{INK}" fill="none"/>'
            )
            end = max(value, ci[1])
        out.append(written(left + end * scale + 6, y + 14, said(value, unit)))
    return drawing(720, 16 + 26 * len(rows), out, title)


def layer_map(layers: Sequence[dict[str, Any]], title: str) -> str:
    """One column a layer: above the line what share of each part is "kept", below it the effect on "user" and "generic" data."""
    parts = list(layers[0]["kept"])
    down = 50 * (len(parts) - 2)
    width = max(12.0, 640 / max(1, len(layers)))
    top = max([max(x["user"], x["generic"]) for x in layers] + [1e-9])
    out = [*(written(0, 40 + 50 * i, name) for i, name in enumerate(parts)), written(0, 150 + down, "effect")]
    for n, layer in enumerate(layers):
        x = 70 + n * width
        for i, name in enumerate(parts):
            y, h = 12 + 50 * i, 40 * layer["kept"][name]
            out += [
                f'<rect x="{x:.1f}" y="{y}" width="{width - 2:.1f}" height="40" fill="{SOFT}"/>',
                f'<rect x="{x:.1f}" y="{y + 40 - h:.1f}" width="{width - 2:.1f}" height="{h:.1f}" fill="{GOOD}"/>',
            ]
        for k, (key, colour) in enumerate((("user", USER), ("generic", GENERIC))):
            h = 70 * (layer[key] / top) ** 0.5
            out.append(
                f'<rect x="{x + k * (width - 2) / 2:.1f}" y="{190 + down - h:.1f}" width="{(width - 2) / 2:.1f}" height="{h:.1f}" fill="{colour}"/>'
            )
        if n % 5 == 0:
            out.append(written(x, 206 + down, str(n), size=10))
    return drawing(int(80 + width * len(layers)), 212 + down, out, title)


def intervals(rows: Sequence[tuple[str, Sequence[float], Sequence[float], bool]], title: str) -> str:
    """A line a thing: (label, user's [value, low, high], generic's, bold), as dots with intervals on a square-root scale of shares."""
    top = max([x for _, u, g, _ in rows for x in (*u, *g)] + [1e-9])

    def at(x: float) -> float:
        return 150 + 520 * (max(x, 0.0) / top) ** 0.5

    out = []
    for n, (label, user, generic, bold) in enumerate(rows):
        y = 14 + n * 20
        weight = ' font-weight="bold"' if bold else ""
        out.append(
            f'<text x="142" y="{y + 4}" font-size="12" text-anchor="end" fill="{INK}"{weight}>{escape(label)}</text>'
        )
        for up, (x, low, high), colour in ((-4, user, USER), (4, generic, GENERIC)):
            out.append(
                f'<path d="M{at(low):.1f} {y + up}H{at(high):.1f}" stroke="{colour}" stroke-width="2"/>'
                f'<circle cx="{at(x):.1f}" cy="{y + up}" r="3" fill="{colour}"/>'
            )
    ticks = [top * k * k / 16 for k in range(5)]
    foot = 20 * len(rows) + 18
    out += [written(at(x), foot, f"{x:.1%}", "middle", 10) for x in ticks]
    return drawing(720, foot + 6, out, title)


def ratios(rows: Sequence[tuple[str, Sequence[tuple[float, bool]]]], title: str) -> str:
    """A line a thing: (label, (ratio of the user's to the generic value, framed) of each of its parts), the deeper the colour the further from one."""
    out = []
    step = min(56.0, 560 / max(len(cells) for _, cells in rows))
    for n, (label, cells) in enumerate(rows):
        y = 8 + n * 20
        out.append(written(142, y + 12, label, "end"))
        for i, (ratio, framed) in enumerate(cells):
            x = 150 + step * i
            deep = min(abs(math.log2(max(ratio, 1e-9))) / 3, 1.0)  # eight times is as deep as it gets
            colour, edge = USER if ratio > 1 else GENERIC, INK if framed else "none"
            out.append(
                f'<rect x="{x:.1f}" y="{y}" width="{step - 4:.1f}" height="17" fill="{colour}" fill-opacity="{0.1 + 0.8 * deep:.2f}" stroke="{edge}"/>'
            )
            if step > ROOM:
                out.append(
                    written(x + step / 2 - 2, y + 12, f"{ratio:.1f}" if ratio < 100 else f"{ratio:.0f}", "middle", 10)
                )
    return drawing(720, 20 * len(rows) + 12, out, title)


def curve(points: Sequence[tuple[float, float]], level: float | None, xlabel: str, ylabel: str, title: str) -> str:
    """A line through points, and a dashed level to compare with."""
    xs, ys = [p[0] for p in points], [p[1] for p in points] + ([level] if level is not None else [])
    x0, x1, y0, y1 = min(xs), max(max(xs), min(xs) + 1e-9), min(ys), max(ys)
    pad = max(1e-9, 0.1 * (y1 - y0))
    y0, y1 = y0 - pad, y1 + pad

    def at(x: float, y: float) -> str:
        return f"{60 + 620 * (x - x0) / (x1 - x0):.1f} {170 - 150 * (y - y0) / (y1 - y0):.1f}"

    out = [
        f'<path d="M60 20V170H690" stroke="{SOFT}" fill="none"/>',
        f'<path d="M{"L".join(at(*p) for p in points)}" stroke="{USER}" stroke-width="2" fill="none"/>',
    ]
    out += [written(54, 170 - 150 * (y - y0) / (y1 - y0) + 4, f"{y:.3f}", "end", 11) for y in (min(ys), max(ys))]
    if level is not None:
        out.append(f'<path d="M{at(x0, level)}L{at(x1, level)}" stroke="{INK}" stroke-dasharray="4 4" fill="none"/>')
    out += [written(375, 192, f"{xlabel}, up to {x1:.0f}", "middle", 11), written(60, 12, ylabel, size=11)]
    return drawing(720, 200, out, title)
