"""What the benchmark found: a table a user, the geometric means over users, results.json and a page of Pareto plots."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from cells import FAILED
from pareto import Axis, Mark, pareto

from sartor.report.html import STYLE, tabled

HEAD = (
    "contender", "kind", "MB", "user bpb", "to dense [95%]", "generic bpb", "to dense [95%]",
    "tokens/s, x Q8_0", "prompt, x Q8_0", "peak, x Q8_0", "of bandwidth", "made in, s",
)  # fmt: skip
MEANS = ("contender", "kind", "users", "MB", "user bpb to dense", "generic bpb to dense", "tokens/s, x Q8_0")
BYTES = Axis("bytes of the file, MB", "{:.0f}", less=True)
USER = Axis("bits per byte, user", "{:.3f}", less=True)
GENERIC = Axis("bits per byte, generic text", "{:.3f}", less=True)
SPEED = Axis("tokens per second to Q8_0 of the original", "{:.2f}", less=False)
TO_DENSE = Axis("bits per byte to the dense original, user", "{:.3f}", less=True)
GENERIC_TO_DENSE = Axis("bits per byte to the dense original, generic text", "{:.3f}", less=True)
Cell = dict[str, Any]


def done(cells: Sequence[Cell]) -> list[Cell]:
    return [c for c in cells if FAILED not in c]


def speed_ratio(cell: Cell, what: str) -> float:
    """To llama.cpp's Q8_0 of the original in the same run."""
    return float(cell["speed"][what] / cell["speed"][f"dense_{what}"])


def row(cell: Cell) -> tuple[str, ...]:
    """A cell as HEAD says."""

    def side(name: str) -> tuple[str, str]:
        low, high = cell[name]["change_ci95"]
        return f"{cell[name]['artifact']:.3f}", f"{cell[name]['change']:+.1%} [{low:+.1%}, {high:+.1%}]"

    return (
        cell["contender"], cell["kind"], f"{cell['bytes'] / 1e6:.1f}", *side("user"), *side("generic"),
        *(f"{speed_ratio(cell, k):.2f}" for k in ("generate_tokens_per_s", "prompt_tokens_per_s", "peak_rss_bytes")),
        f"{cell['share_of_bandwidth']:.0%}", f"{cell['seconds']:.0f}",
    )  # fmt: skip


def missing(cells: Sequence[Cell]) -> list[str]:
    """A line for every reason: whose, which kinds, why."""
    why: dict[tuple[str, str], list[str]] = {}
    for c in cells:
        if FAILED in c:
            why.setdefault((c["contender"], c[FAILED]), []).append(c["kind"])
    return [f"failed: {name} ({', '.join(kinds)}): {reason}" for (name, reason), kinds in why.items()]


def geometric(values: Sequence[float]) -> float:
    """exp(mean log), of positive numbers."""
    return math.exp(sum(map(math.log, values)) / len(values))


def means(cells: Sequence[Cell]) -> list[dict[str, Any]]:
    """Over users, for every contender and kind: geometric means of what the artifact takes to what the original takes; bytes are the arithmetic mean."""
    groups: dict[tuple[str, str], list[Cell]] = {}
    for c in done(cells):
        groups.setdefault((c["contender"], c["kind"]), []).append(c)
    return [
        {
            "contender": name,
            "kind": kind,
            "users": len(some),
            "bytes": sum(c["bytes"] for c in some) / len(some),
            "user": geometric([c["user"]["artifact"] / c["user"]["dense"] for c in some]),
            "generic": geometric([c["generic"]["artifact"] / c["generic"]["dense"] for c in some]),
            "speed": geometric([speed_ratio(c, "generate_tokens_per_s") for c in some]),
        }
        for (name, kind), some in groups.items()
    ]


def mean_row(m: Mapping[str, Any], users: int) -> tuple[str, ...]:
    """A mean as MEANS says."""
    return (
        m["contender"], m["kind"], f"{m['users']} of {users}", f"{m['bytes'] / 1e6:.1f}",
        f"{m['user'] - 1:+.1%}", f"{m['generic'] - 1:+.1%}", f"{m['speed']:.2f}",
    )  # fmt: skip


def by_user(cells: Sequence[Cell]) -> dict[str, list[Cell]]:
    """In the order in which they came."""
    out: dict[str, list[Cell]] = {}
    for c in cells:
        out.setdefault(c["user_name"], []).append(c)
    return out


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Aligned text: the first two columns to the left, figures to the right."""
    body = [head, *rows]
    widths = [max(len(r[i]) for r in body) for i in range(len(head))]
    lines = [
        "  ".join(x.ljust(w) if i < 2 else x.rjust(w) for i, (x, w) in enumerate(zip(r, widths, strict=True))).rstrip()
        for r in body
    ]
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])


def text(cells: Sequence[Cell]) -> str:
    """All tables, for the terminal."""
    users = by_user(cells)
    parts = []
    for name, some in users.items():
        parts += [f"{name}", table(HEAD, [row(c) for c in done(some)]), *missing(some), ""]
    found = [mean_row(m, len(users)) for m in means(cells)]
    return "\n".join([*parts, "geometric mean over users", table(MEANS, found)])


def plots(cells: Sequence[Cell], names: Sequence[str]) -> list[tuple[str, list[str]]]:
    """(heading, its plots) of every user, and of the means where there are several users."""
    found = []
    for user, some in by_user(cells).items():
        at = [
            (c["contender"], c["kind"], c["bytes"] / 1e6, c["user"]["artifact"], c["generic"]["artifact"],
             speed_ratio(c, "generate_tokens_per_s"))
            for c in done(some)
        ]  # fmt: skip
        found.append((user, _three(at, (USER, GENERIC), names, user)))
    if len(found) > 1:
        at = [
            (m["contender"], m["kind"], m["bytes"] / 1e6, m["user"], m["generic"], m["speed"])
            for m in means(cells)
            if m["users"] == len(found)
        ]
        found.append(("geometric mean over users", _three(at, (TO_DENSE, GENERIC_TO_DENSE), names, "mean")))
    return found


def _three(at: Sequence[tuple[Any, ...]], quality: tuple[Axis, Axis], names: Sequence[str], who: str) -> list[str]:
    """User text against bytes, user against generic text, speed against bytes; at: (contender, kind, MB, user, generic, speed)."""
    if not at:
        return []
    shown = ((2, 3, BYTES, quality[0]), (4, 3, quality[1], quality[0]), (2, 5, BYTES, SPEED))
    return [
        pareto([Mark(p[0], p[1], p[x], p[y]) for p in at], across, up, names, f"{who}: {up.name} against {across.name}")
        for x, y, across, up in shown
    ]


def page(cells: Sequence[Cell], about: Mapping[str, Any], what: Mapping[str, str]) -> str:
    """One page without script or network; what: every contender's description."""
    users = by_user(cells)
    parts = [
        f"<!doctype html><html lang=en><meta charset=utf-8><title>Sartor beside its rivals</title><style>{STYLE}body{{max-width:1100px}}</style>",
        f"<h1>{escape(about['model'])} beside its rivals</h1>",
        "<p class=note>Held-out documents; intervals are 95% bootstrap intervals over documents, paired with the dense original's. Speed and memory are ratios to llama.cpp's Q8_0 of the "
        "original, taken in turns in the same run. Bandwidth: weights that a token reads, times tokens per second, of what a plain copy moves (read and written); only reading can be a little faster.</p>",
        *(f"<h2>{escape(user)}</h2>" + "".join(drawn) for user, drawn in plots(cells, list(what))),
        "<h2>Geometric means over users</h2>" + tabled(MEANS, [mean_row(m, len(users)) for m in means(cells)]),
    ]
    for user, some in users.items():
        notes = "".join(f"<li>{escape(line)}</li>" for line in missing(some))
        parts.append(
            f"<h2>{escape(user)}, every cell</h2>{tabled(HEAD, [row(c) for c in done(some)])}<ul class=note>{notes}</ul>"
        )
    listed = "".join(f"<li>{escape(name)}: {escape(said)}</li>" for name, said in what.items())
    return "\n".join([*parts, f"<h2>Contenders</h2><ul class=note>{listed}</ul>"])


def write(cells: Sequence[Cell], about: Mapping[str, Any], what: Mapping[str, str], out: Path) -> None:
    """results.json (without the documents' own figures) and results.html."""
    out.mkdir(parents=True, exist_ok=True)
    told = [{k: v for k, v in c.items() if k != "scores"} for c in cells]
    found = {**about, "contenders": dict(what), "cells": told, "means": means(cells)}
    (out / "results.json").write_text(json.dumps(found, indent=1))
    (out / "results.html").write_text(page(cells, about, what))
