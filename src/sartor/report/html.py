"""The report as one self-contained page: no script, no network, pictures as inline SVG."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

from sartor.report import svg
from sartor.report.layers import STEPS, parts_of, step_rows
from sartor.report.text import generic_effect, mb, rows

STYLE = """
:root{color-scheme:light}body{font:16px/1.5 system-ui,sans-serif;color:#22303c;max-width:780px;margin:2rem auto;padding:0 1rem}
h1{font-size:1.6rem}h2{font-size:1.15rem;margin-top:2rem}table{border-collapse:collapse;width:100%;font-size:.92rem}
td,th{padding:.35rem .5rem;border-bottom:1px solid #dfe6ea;text-align:right}td:first-child,th:first-child{text-align:left}
.lead{font-size:1.1rem}.note{color:#566875;font-size:.9rem}svg{width:100%;height:auto}.u{color:#c2410c}.g{color:#0f766e}
"""


def page(r: dict[str, Any]) -> str:
    """HTML of a report."""
    parts = [
        opening(r),
        _lead(r),
        tabled(("", "original", "fitted", "change"), rows(r)),
        _quality(r),
        _layers(r),
        _bytes(r),
        _controls(r),
        training(r, "bits per byte, validation"),
        _method(r),
    ]
    return "\n".join(parts)


def opening(r: dict[str, Any]) -> str:
    """Head of the page, and its title."""
    return document(f"{r['model']['spec']}, fitted", "")


def document(title: str, body: str) -> str:
    """A page under a title; `body` is HTML."""
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'><title>Sartor report</title><style>{STYLE}</style>"
        f"\n<h1>{escape(title)}</h1>{body}"
    )


def _lead(r: dict[str, Any]) -> str:
    u, b = r["user"], r["bytes"]
    share, change = b["artifact"] / b["original_fp16"], u["change"]
    low, high = u["change_ci95"]
    if high < 0:
        verdict = f"reads your text <b>{-change:.1%} better</b> than the original"
    elif low > 0:
        verdict = f"reads your text <b>{change:.1%} worse</b> than the original"
    else:
        verdict = f"reads your text about as well as the original ({change:+.1%}, not distinguishable)"
    return f"<p class=lead>The fitted model has {share:.1%} of the original's size, {verdict}, and generic text {r['generic']['change']:+.1%} in coding length (lower is better).</p>"


def tabled(head: tuple[str, ...], body: Any) -> str:
    """Rows under a head."""
    top = "".join(f"<th>{escape(h)}</th>" for h in head)
    return (
        f"<table><tr>{top}</tr>"
        + "".join("<tr>" + "".join(f"<td>{escape(str(c))}</td>" for c in row) + "</tr>" for row in body)
        + "</table>"
    )


def _quality(r: dict[str, Any]) -> str:
    u, g = r["user"], r["generic"]
    picture = svg.bars(
        [
            ("your text, original", u["dense"], tuple(u["dense_ci95"]), svg.SOFT),
            ("your text, fitted", u["artifact"], tuple(u["ci95"]), svg.USER),
            ("generic text, original", g["dense"], tuple(g["dense_ci95"]), svg.SOFT),
            ("generic text, fitted", g["artifact"], tuple(g["ci95"]), svg.GENERIC),
        ],
        "",
        "bits per byte with 95% intervals",
    )
    return (
        f"<h2>Quality</h2><p>Bits per byte of held-out documents, measured in llama.cpp on the files themselves; whiskers are 95% bootstrap intervals over documents "
        f"({u['documents']} of yours, {g['documents']} generic).</p>{picture}"
    )


def _layers(r: dict[str, Any]) -> str:
    p = r["probing"]
    worth = (
        f"Summed effects foretold the damage of {p['masks']:.0f} random cuts on other text of yours with rank correlation {p['spearman']:.2f} "
        f"(R² {p['r2']:.2f} of its logarithm; before repair a cut costs {p['factor']:.1f} times the sum; order of the units known from {p['user_tokens']:,.0f} tokens of yours, beside the generic profile, with reliability {p['known']:.2f})."
    )
    return (
        f"<h2>Layers</h2><p>Blue: what was kept. Below: what the removal of a layer's parts would cost on <b class=u>your</b> and on <b class=g>generic</b> text (nats per token, square-root scale). {worth} "
        f"A layer is called personalized where the two differ by more than chance would have it, all layers judged together.</p>"
        + layer_map(r["layers"], "query groups")
        + stepped(r["pruning"], "query groups")
    )


def stepped(pruning: dict[str, Any], groups: str) -> str:
    """What every step of a cut cost, where it was made in steps."""
    steps = step_rows(pruning, groups)
    return f"<p>The cuts were made in steps, each healed before the next:</p>{tabled(STEPS, steps)}" if steps else ""


def layer_map(layers: Sequence[dict[str, Any]], groups: str) -> str:
    """What was kept of every layer and what its parts are worth, as a picture and in figures; `groups` is what heads are called."""
    parts = parts_of(layers[0])
    picture = svg.layer_map(
        [
            {
                "kept": {p.name: x[f"{p.counted}_kept"] / max(1, x[p.counted]) for p in parts},
                "user": sum(v[0] for v in x["user"].values()),
                "generic": sum(v[0] for v in x["generic"].values()),
            }
            for x in layers
        ],
        "layers: kept parts and effects",
    )
    words = [
        (
            x.get("name", str(n)),
            *(f"{x[f'{p.counted}_kept']}/{x[p.counted]}" for p in parts),
            *(
                f"{x['user'][p.felt][0]:.3f} / {generic_effect(x, p.felt)} {x['verdict'].get(p.felt, '')}"
                for p in parts
            ),
        )
        for n, x in enumerate(layers)
    ]
    counted = (groups if p.counted == "groups" else p.counted for p in parts)
    head = ("layer", *counted, *(f"{p.name}: yours / generic" for p in parts))
    return f"{picture}<details><summary>every layer</summary>{tabled(head, words)}</details>"


def _bytes(r: dict[str, Any]) -> str:
    return "<h2>Where every byte went</h2>" + svg.bars(
        [(k, v / 1e6, None, svg.GOOD) for k, v in r["bytes"]["by_kind"].items()], "MB", "bytes by kind"
    )


def _controls(r: dict[str, Any]) -> str:
    heading = "<h2>What else you could have picked</h2>"
    if not r["controls"]:
        return heading + "<p>Not measured: the job ran with <code>--controls none</code>.</p>"
    body = [
        (
            c["name"],
            mb(c["bytes"]),
            "not measured" if c["user"] is None else f"{c['user']:.3f}",
            "" if c["generic"] is None else f"{c['generic']:.3f}",
            ""
            if c["change"] is None
            else f"{c['change']:+.1%} [{c['change_ci95'][0]:+.1%}, {c['change_ci95'][1]:+.1%}]",
            c["note"],
        )
        for c in r["controls"]
    ]
    return heading + tabled(
        ("control arm", "bytes", "your text", "generic text", "ours against it, your text", "note"), body
    )


def training(r: dict[str, Any], measured: str) -> str:
    """How adaptation and recovery went; `measured` is what they were watched by."""
    charts = [
        f"<h3>{title}</h3>" + svg.curve([tuple(p) for p in course["curve"]], None, "seconds", measured, title)
        for title, course in (
            ("Adaptation of the whole model", r["adaptation"]),
            ("Recovery after the cuts", r["recovery"]),
        )
        if len(course.get("curve", ())) > 1
    ]
    return "<h2>Training</h2>" + "".join(charts) if charts else ""


def _method(r: dict[str, Any]) -> str:
    d = r["data"]
    dropped = ", ".join(f"{n} {why}" for why, n in d["dropped"].items()) or "nothing"
    items = [
        f"Data: {sum(d['documents'].values())} documents ({', '.join(f'{k} {v}' for k, v in d['documents'].items())}), {d['tokens']} tokens for training; dropped: {dropped}.",
        f"The split is {'by time, the test set being the latest part' if d['ordered_by_time'] else 'by document'}; test documents shaped nothing.",
        f"Parity with PyTorch: {r['parity']['mean_absolute']:.4f} nats per token on {r['parity']['tokens']} tokens (mean {r['parity']['mean_difference']:+.4f}; allowed {r['parity']['tolerance']} and {r['parity']['tolerance_mean']}); {r['parity']['same_tokens']:.1%} of the test texts are cut into the same tokens.",
        f"Times: {', '.join(f'{k} {v:.0f} s' for k, v in r['seconds'].items())}; peak memory of the job {mb(r['job_peak_rss_bytes'])}.",
        *(
            [
                "Cuts were chosen by the two-rate rule of arXiv:2408.08684, in our reading of it (--method paper), a baseline."
            ]
            if r["plan"].get("method") == "paper"
            else []
        ),
        f"Seed {r['seed']}; share of general text in what shaped it {r.get('keep_general', 0.0):.0%}; {', '.join(f'{k} {v}' for k, v in r['versions'].items())}; model sha256 {r['model']['sha256'][:16]}...",
        *r["notes"],
    ]
    return fine_print(items)


def fine_print(items: Sequence[str]) -> str:
    return "<h2>Fine print</h2><ul class=note>" + "".join(f"<li>{escape(i)}</li>" for i in items) + "</ul>"
