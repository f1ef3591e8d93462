"""What probing found, in words and pictures: which parts of a model one user's text needs, beside generic text."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from sartor.report import svg
from sartor.report.html import STYLE

NAMES = {"attention": "attention", "mlp": "MLP"}
BAR = 24  # characters
TOLD = 5  # parts that are told in words
LEAST = 0.005  # shares below it count as this when two are compared


def _parts(r: dict[str, Any]) -> Iterator[tuple[int, str, list[float], list[float], str]]:
    """(layer, part, user, generic, verdict), layer by layer."""
    for n in range(len(r["verdicts"]["mlp"])):
        for k in NAMES:
            yield n, k, r["without"]["user"][k][n], r["without"]["generic"][k][n], r["verdicts"][k][n]


def sentences(r: dict[str, Any]) -> list[str]:
    """For a reader who does not know what a layer is made of."""
    parts = list(_parts(r))
    times = lambda p: max(p[2][0], LEAST) / max(p[3][0], LEAST)  # noqa: E731
    mine = sorted((p for p in parts if p[4] == "personalized"), key=times, reverse=True)
    counts = {v: sum(p[4] == v for p in parts) for v in ("personalized", "generic", "undecided")}
    out = [
        f"{len(parts)} parts were left out, one at a time: {counts['personalized']} matter to your texts otherwise than to generic text (the intervals do not meet), "
        f"{counts['generic']} alike, {counts['undecided']} cannot be told apart with this much text."
    ]
    for n, k, user, generic, _ in [*mine[:TOLD], *(p for p in mine[-TOLD:] if p[2][0] < p[3][0])]:
        than = "more" if user[0] > generic[0] else "less"
        out.append(
            f"Without the {NAMES[k]} of layer {n} each byte of your texts costs {_range(user)} more; of generic text {_range(generic)}: it matters {than} to you."
        )
    hurts = [f"{NAMES[k]} of layer {n}" for n, k, user, _, _ in parts if user[2] < 0]
    if hurts:
        out.append(f"Without these your texts cost less than with them: {', '.join(hurts)}.")
    w = r["worth"]
    out.append(
        f"Finer units (groups of heads, blocks of channels): their summed effects foretold the damage of {w['masks']} random cuts on other text of yours with rank "
        f"correlation {w['spearman']:.2f}; a cut costs {w['factor']:.1f} times the sum before it is repaired. {r['tokens']['user']:,} tokens of it told the order "
        f"of the units with reliability {r['known']:.2f}; generic text filled in what they left open."
    )
    if w["spearman"] < 0.5:
        out.append("That is too little to tell whose a part is; more text helps.")
    return out


def _range(x: list[float]) -> str:
    return f"{x[0]:.1%} [{x[1]:.1%}, {x[2]:.1%}]"


def text(r: dict[str, Any]) -> str:
    """For the terminal: a line a part, then the sentences."""
    top = max(max(u[0], g[0], 1e-9) for _, _, u, g, _ in _parts(r))
    lines = [
        f"{r['model']['spec']}: what each byte costs more without a part (bars on a square-root scale; # yours, o generic)",
        "",
    ]
    for n, k, user, generic, verdict in _parts(r):
        cells = [" "] * (BAR + 1)
        for x, mark in ((generic[0], "o"), (user[0], "#")):
            at = round(BAR * (max(x, 0.0) / top) ** 0.5)
            cells[at] = "@" if cells[at] == "o" else mark
        lines.append(
            f"{n:3d} {NAMES[k]:9s} |{''.join(cells)}| yours {_range(user):26s} generic {_range(generic):26s} {verdict}"
        )
    return "\n".join([*lines, "", *sentences(r)])


def page(r: dict[str, Any]) -> str:
    """The same as one HTML page with a picture."""
    rows = [
        (f"layer {n}, {NAMES[k]}", user, generic, verdict == "personalized")
        for n, k, user, generic, verdict in _parts(r)
    ]
    said = "".join(f"<p>{s}</p>" for s in sentences(r))
    return (
        f"<!doctype html><meta charset=utf-8><title>Sartor: probing</title><style>{STYLE}</style><h1>What your texts need of this model</h1>{said}"
        f"<p>What each byte costs more without a part, with 95% intervals over stretches of text: <b class=u>yours</b> and <b class=g>generic</b> (square-root scale; "
        f"personalized parts in bold).</p>{svg.intervals(rows, 'cost of a byte without each part')}"
    )
