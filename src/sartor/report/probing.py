"""What probing found, in words and pictures: which parts of a model one user's text needs, beside generic text."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from sartor.report import svg
from sartor.report.html import STYLE

NAMES = {"attention": "attention", "mlp": "MLP"}
BAR = 24  # characters
TOLD = 5  # parts that are told in words
LEAST = 0.005  # shares below it count as this when two are compared
TINY = 1e-12  # nats, likewise


@dataclass(frozen=True)
class Words:
    """How one kind of data is spoken of. most, without: `format` strings of what is told of the parts that matter most and of one part; worse: what is drawn; read: of how much was looked at. heads, head: units of attention."""

    parts: str
    yours: str
    generic: str
    most: str
    without: str
    worse: str
    stretches: str
    read: str
    heads: str
    head: str
    share: str
    much: str
    others: str
    little: str
    title: str


WORDS = {
    "texts": Words(
        parts="A layer has two parts: attention, which looks back at earlier words, and an MLP, which works on every word by itself. Each was left out alone.",
        yours="your texts",
        generic="generic text",
        most="{}: by so much a byte of them costs more without it.",
        without="Without the {part} of layer {n} each byte of your texts costs {user} more; of generic text {generic}",
        worse="what each byte costs more without a part",
        stretches="stretches of text",
        read="{:,} tokens of yours",
        heads="groups of heads",
        head="group",
        share="{:+.0%}",
        much="this much text",
        others="other text of yours",
        little="That is too little to tell whose a group of heads is; more text helps.",
        title="cost of a byte without each part",
    ),
    "pictures": Words(
        parts="A layer has two parts: attention, by which patches of a picture look at each other, and an MLP, which works on every patch by itself. Each was left out alone.",
        yours="your photos",
        generic="generic pictures",
        most="{}: so many of them are named otherwise without it.",
        without="Without the {part} of layer {n}, {user} of your photos are named otherwise; of generic pictures {generic}",
        worse="what share of pictures is named otherwise without a part",
        stretches="pictures",
        read="{:,} photos of yours",
        heads="heads",
        head="head",
        share="{:.0%}",
        much="these photos",
        others="other photos of yours",
        little="That is too little to tell whose a head is; more photos help.",
        title="share of pictures named otherwise without each part",
    ),
}
Part = tuple[int, str, list[float], list[float], str]


def words_of(r: dict[str, Any]) -> Words:
    return WORDS[r.get("kind", "texts")]


def _parts(r: dict[str, Any]) -> Iterator[Part]:
    """(layer, part, user, generic, verdict), layer by layer."""
    for n in range(len(r["verdicts"]["mlp"])):
        for k in NAMES:
            yield n, k, r["without"]["user"][k][n], r["without"]["generic"][k][n], r["verdicts"][k][n]


def sentences(r: dict[str, Any]) -> list[str]:
    """For a reader who does not know what a layer is made of."""
    parts, w = list(_parts(r)), words_of(r)
    most = sorted(parts, key=lambda p: p[2][0], reverse=True)[:TOLD]
    counts = _counts(p[4] for p in parts)
    out = [
        w.parts,
        f"What {w.yours} need most: "
        + w.most.format(", ".join(f"{NAMES[k]} of layer {n} ({w.share.format(user[0])})" for n, k, user, *_ in most)),
        f"Of {len(parts)} parts {counts['personalized']} matter to {w.yours} otherwise than to {w.generic}, {counts['generic']} alike, {counts['undecided']} cannot be told apart with {w.much}.",
    ]
    for n, k, user, generic, _ in _told(parts):
        than = "more" if user[0] > generic[0] else "less"
        out.append(
            w.without.format(part=NAMES[k], n=n, user=_range(user), generic=_range(generic))
            + f": it matters {than} to you."
        )
    several = r["without"]["user"]["rows"] > 1
    hurts = [f"{NAMES[k]} of layer {n}" for n, k, user, _, _ in parts if user[2] < 0 and several]
    if hurts:
        out.append(f"Without these your texts cost less than with them: {', '.join(hurts)}.")
    return [*out, *_finer(r), *r.get("notes", [])]


def _told(parts: list[Part]) -> list[Part]:
    """Of the personalized parts those that matter to the user the most and the least times as much as to generic text."""
    times = lambda p: max(p[2][0], LEAST) / max(p[3][0], LEAST)  # noqa: E731
    mine = sorted((p for p in parts if p[4] == "personalized"), key=times, reverse=True)
    return [*mine[:TOLD], *(p for p in mine[TOLD:][-TOLD:] if p[2][0] < p[3][0])]


def _counts(verdicts: Iterable[str]) -> dict[str, int]:
    found = list(verdicts)
    return {v: found.count(v) for v in ("personalized", "generic", "undecided")}


def _heads(r: dict[str, Any]) -> Iterator[tuple[int, int, list[float], list[float], str]]:
    """(layer, group, user, generic, verdict) of every group of heads."""
    g = r["groups"]
    for n, said in g["verdicts"].items():
        for i, verdict in enumerate(said):
            yield int(n), i, g["user"][n][i], g["generic"][n][i], verdict


def _finer(r: dict[str, Any]) -> list[str]:
    """Groups of heads, channels, and how far to believe it."""
    heads, w, say = list(_heads(r)), r["worth"], words_of(r)
    out = []
    if heads:
        counts = _counts(h[4] for h in heads)
        mine = sorted((h for h in heads if h[4] == "personalized"), key=lambda h: _times(h[2], h[3]), reverse=True)
        first = ", ".join(
            f"{say.head} {i} of layer {n} ({_times(u, g):.1f} times)" for n, i, u, g, _ in mine[:TOLD] if u[0] > g[0]
        )
        out.append(
            f"Inside attention, of {len(heads)} {say.heads} {counts['personalized']} are worth another amount to {say.yours} than to {say.generic}, {counts['generic']} the same, {counts['undecided']} cannot be told apart"
            + (f"; worth more to you: {first}." if first else ".")
        )
    if r["alike"]:
        low, high = (pick(r["alike"].items(), key=lambda x: x[1]) for pick in (min, max))
        out.append(
            f"Inside the MLPs {say.yours} order the channels most unlike {say.generic} in layer {low[0]} (rank correlation {low[1]:.2f}; 1 is the same order, 0 an unrelated one), most alike in layer {high[0]} ({high[1]:.2f})."
        )
    out.append(
        f"How far to believe that: summed effects of such fine units foretold the damage of {w['masks']} random cuts on {say.others} with rank correlation {w['spearman']:.2f}; a cut costs {w['factor']:.1f} times the sum before it is repaired. "
        f"{say.read.format(r['tokens']['user'])} told the order of the units with reliability {r['known']:.2f} by themselves."
    )
    if w["spearman"] < 0.5:
        out.append(say.little)
    return out


def _times(user: list[float], generic: list[float]) -> float:
    return max(user[0], TINY) / max(generic[0], TINY)


def _range(x: list[float]) -> str:
    return f"{x[0]:.1%} [{x[1]:.1%}, {x[2]:.1%}]"


def text(r: dict[str, Any]) -> str:
    """For the terminal: a line a part, then the sentences."""
    top = max(max(u[0], g[0], 1e-9) for _, _, u, g, _ in _parts(r))
    lines = [
        f"{r['model']['spec']}: {words_of(r).worse} (bars on a square-root scale; # yours, o generic)",
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
    said, w = "".join(f"<p>{s}</p>" for s in sentences(r)), words_of(r)
    cells: dict[str, list[tuple[float, bool]]] = {}
    for n, _, user, generic, verdict in _heads(r):
        cells.setdefault(f"layer {n}", []).append((_times(user, generic), verdict == "personalized"))
    picture = (
        f"<p>{w.heads.capitalize()}, layer by layer: how many times as much they are worth to <b class=u>{w.yours}</b> as to <b class=g>{w.generic}</b>; framed where the difference stands out.</p>"
        f"{svg.ratios(list(cells.items()), f'{w.heads}, yours beside generic')}"
        if cells
        else ""
    )
    return (
        f"<!doctype html><meta charset=utf-8><title>Sartor: probing</title><style>{STYLE}</style><h1>What {w.yours} need of this model</h1>{said}"
        f"<p>{w.worse.capitalize()}, with 95% intervals over {w.stretches}: <b class=u>yours</b> and <b class=g>generic</b> (square-root scale; "
        f"personalized parts in bold).</p>{svg.intervals(rows, w.title)}{picture}"
    )
