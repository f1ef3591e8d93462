"""The report on a network that sees: a table for the terminal, layers, and one self-contained page; as `text.py` and `html.py` are for text."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

from sartor.report import svg
from sartor.report.html import fine_print, layer_map, opening, stepped, tabled, training
from sartor.report.text import aligned, layer_lines, mb, step_lines

ACCURACY = "accuracy"
NAMES = {ACCURACY: "named as you do, your pictures", "feature agreement": "features alike, your pictures"}
STAGES = {
    "open": "opening model and pictures",
    "view": "choosing how it looks",
    "plan": "probing and planning",
    "adapt": "adapting to your pictures",
    "prune": "choosing what goes",
    "fit": "fitting what is left",
    "recover": "recovering",
    "export": "writing the file",
    "measure": "measuring",
    "controls": "control arms",
}
Bar = tuple[str, float, tuple[float, float] | None, str]  # as `svg.bars` wants it
LEAST_WORTH = 0.5  # rank correlation of foretold and measured damage below which nothing is said of whose a layer is


def worth(metric: str, x: float) -> str:
    """Shares of pictures as percent, likeness of features as it is."""
    return f"{x:.1%}" if metric == ACCURACY else f"{x:.3f}"


def moved(metric: str, change: float, ci95: Sequence[float]) -> str:
    if metric == ACCURACY:
        return f"{100 * change:+.1f} points [{100 * ci95[0]:+.1f}, {100 * ci95[1]:+.1f}]"
    return f"{change:+.3f} [{ci95[0]:+.3f}, {ci95[1]:+.3f}]"


def between(metric: str, ci95: Sequence[float]) -> str:
    return f"[{worth(metric, ci95[0])}, {worth(metric, ci95[1])}]"


def ms(seconds: float | None) -> str:
    return "-" if seconds is None else f"{1e3 * seconds:.1f} ms"


def rows(r: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    """(what, original, fitted, change): what a person wants to know first."""
    u, b, p = r["user"], r["bytes"], r["parameters"]
    return [
        (
            "size of the file",
            mb(b["original_fp16"]),
            mb(b["artifact"]),
            f"{b['artifact'] / b['original_fp16']:.1%} of fp16",
        ),
        (
            NAMES[u["metric"]],
            worth(u["metric"], u["dense"]),
            worth(u["metric"], u["artifact"]),
            moved(u["metric"], u["change"], u["change_ci95"]),
        ),
        ("same answer as the original", "", f"{u['agreement']:.1%}", ""),
        _generic_row(r["generic"]),
        *_speed_rows(r["speed"]),
        (
            f"peak memory in {r['runtime']}",
            mb(r["dense_peak_rss_bytes"]),
            mb(r["peak_rss_bytes"]),
            f"x{r['peak_rss_bytes'] / r['dense_peak_rss_bytes']:.2f}",
        ),
        ("parameters", f"{p['before'] / 1e6:.1f} M", f"{p['after'] / 1e6:.1f} M", ""),
        *((("time it took", "", f"{sum(r['seconds'].values()) / 60:.1f} min", ""),) if r["seconds"] else ()),
    ]


def _generic_row(g: dict[str, Any] | None) -> tuple[str, str, str, str]:
    name = "features alike, generic pictures"
    if g is None:
        return name, "", "not measured", "no generic pictures were given"
    return name, worth(g["metric"], 1.0), worth(g["metric"], g["artifact"]), between(g["metric"], g["ci95"])


def _speed_rows(s: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    """Beside the original as it is, and beside what anyone gets of it by rounding."""
    found, name = [], f"a picture takes, {s['threads']} threads"
    for kind, key in (("fp32", "dense_seconds"), ("8 bits", "dense_int8_seconds")):
        if s.get(key):
            found.append(
                (name, f"{ms(s[key])} ({kind})", ms(s["seconds"]), f"{s[key] / s['seconds']:.2f} times as fast")
            )
    return found


def measured(control: dict[str, Any]) -> bool:
    return control["accuracy"] is not None


def table(r: dict[str, Any]) -> str:
    """The summary as aligned text."""
    clusters = "" if r["data"]["labelled"] else " (clusters)"
    body = [("", "original", "fitted", "change"), *rows(r)]
    for c in r["controls"]:
        if measured(c):
            name = f"{c['name']}, {c['note']}" if c["note"] else c["name"]
            body.append((name, mb(c["bytes"]), f"{c['accuracy']:.1%}{clusters}", _against(c)))
        else:
            body.append((c["name"], "", "not measured", c["note"].removeprefix("not measured: ")))
    return aligned(body, [*warnings(r), *_noticed(r["data"]["dropped"])])


def _noticed(dropped: dict[str, int]) -> list[str]:
    """What of the user's files was left out, or taken otherwise than it may have been meant; the page has a table of it."""
    return [f"left out or noticed: {'; '.join(f'{n} {why}' for why, n in dropped.items())}"] if dropped else []


def _against(control: dict[str, Any]) -> str:
    """Our model against a control arm, where it was compared."""
    if control["change"] is None:
        return ""
    return f"{control.get('against', 'ours')} {moved(ACCURACY, control['change'], control['change_ci95'])}"


def warnings(r: dict[str, Any]) -> list[str]:
    """What weakens the report."""
    found = list(r["notes"])
    if r["generic"] is None:
        found.append("no generic pictures were given: what the model lost on pictures unlike yours was not measured")
    asked, got = r["speed"].get("asked"), r["speed"]["dense_seconds"] / r["speed"]["seconds"]
    if asked and got < asked:
        found.append(
            f"{asked:g} times as fast was asked for, {got:.2f} was measured in the end: other work on the machine, then or when its parts were timed, does this; sartor eval measures again"
        )
    if r["probing"]["spearman"] < LEAST_WORTH:
        found.append(
            f"the parts' effects foretold the damage of random cuts with rank correlation {r['probing']['spearman']:.2f}: too little to tell which layers are yours; more pictures help"
        )
    return found


def inspection(r: dict[str, Any]) -> str:
    """How large it is beside the original, and what was cut, layer by layer."""
    b, p, cut = r["bytes"], r["plan"], r["pruning"]
    lines = [
        f"{r['model']['spec']}: {mb(b['artifact'])} of {mb(b['original_fp16'])} fp16; budget {mb(b['budget'])}; the original in {r['runtime']}: "
        f"{mb(b['dense_fp32'])}, at 8 bits {mb(b['dense_int8'])}",
        "",
        *layer_lines(r["layers"], "heads", "pictures, nats a picture"),
        "",
        _read_at(r["head"]),
        f"cut: {_went(r)}; {_bits(r)}; {'; '.join(f'{name} {_judged(x)}' for name, x in _buffer(cut))}",
        f"predicted damage {p['predicted_damage']:.3f} nats a picture before recovery; price {p['price'] * 1e6:.4f} nats per MB",
        *step_lines(cut, "heads"),
    ]
    return "\n".join(lines)


def _went(r: dict[str, Any]) -> str:
    """How much of each part was cut."""
    cut = r["pruning"]
    heads = f"{cut.get('groups', 0)} heads and " if "groups" in r["layers"][0] else ""
    blocks = f", {n} residual blocks as a whole" if (n := cut.get("residual_blocks")) else ""
    return f"{heads}{cut.get('channels', 0)} channels{blocks}"


def _bits(r: dict[str, Any]) -> str:
    """How the matrices of the layers are held."""
    return {"int4": "4 bits a weight in the file, 8 in the machine"}.get(r.get("weights", ""), "8 bits a weight")


def _read_at(head: dict[str, Any]) -> str:
    most = max(map(int, head.get("keys") or [0]))
    fewer = (
        f"; heads compare patches by {head['key_dim']} of {most} dimensions"
        if most > (head.get("key_dim") or most)
        else ""
    )
    return (
        f"answers are read behind layer {head['depth']} of {head['of']}: {head['nats']:.3f} nats on pictures left out"
        + (f"; {head['own']} of its classes the model's own head knows by name" if head.get("own") else "")
        + (f"; pictures of {head['side']} pixels a side" if "side" in head else "")
        + fewer
    )


def _buffer(cut: dict[str, Any]) -> list[tuple[str, dict[str, float]]]:
    """What validation said on the way, for as far as it was asked."""
    names = {"whole": "adapted, whole", "cut": "after the cuts", "fitted": "after the fit"}
    return [(name, cut[f"validation_{key}"]) for key, name in names.items() if f"validation_{key}" in cut]


def _judged(x: dict[str, float]) -> str:
    return f"{x['accuracy']:.1%} ({x['nats']:.3f} nats)"


def page(r: dict[str, Any]) -> str:
    """HTML of a report: no script, no network, pictures as inline SVG."""
    parts = [
        opening(r),
        _lead(r),
        tabled(("", "original", "fitted", "change"), rows(r)),
        _warnings(r),
        _quality(r),
        _controls(r),
        _speed(r),
        _layers(r),
        _cuts(r),
        training(r, "nats a picture, validation"),
        _data(r),
        _times(r),
        _method(r),
    ]
    return "\n".join(parts)


def _lead(r: dict[str, Any]) -> str:
    b, s, g = r["bytes"], r["speed"], r["generic"]
    others = (
        "What it does to pictures unlike yours was not measured: no generic pictures were given."
        if g is None
        else f"Pictures unlike yours look {worth(g['metric'], g['artifact'])} alike to it and to the original (1 is equal)."
    )
    return (
        f"<p class=lead>The fitted model has {b['artifact'] / b['original_fp16']:.1%} of the original's size, is {s['dense_seconds'] / s['seconds']:.1f} times as fast as the original in fp32, "
        f"and {_verdict(r['user'])}. {others}</p>"
    )


def _verdict(u: dict[str, Any]) -> str:
    change, (low, high) = 100 * u["change"], u["change_ci95"]
    if u["metric"] != ACCURACY:
        return f"your pictures look <b>{worth(u['metric'], u['artifact'])} alike</b> to it and to the original (1 is equal)"
    named = f"names {u['artifact']:.1%} of your pictures as you do"
    if low > 0:
        return f"{named}: <b>{change:.1f} points more</b> than the original"
    if high < 0:
        return f"{named}: <b>{-change:.1f} points fewer</b> than the original"
    return f"{named}: about as many as the original ({change:+.1f} points, not distinguishable)"


def _warnings(r: dict[str, Any]) -> str:
    items = "".join(f"<li>{escape(w)}</li>" for w in warnings(r))
    return f"<h2>Read this with care</h2><ul>{items}</ul>" if items else ""


def _quality(r: dict[str, Any]) -> str:
    u, metric = r["user"], r["user"]["metric"]
    bars: list[Bar] = [
        ("original", u["dense"], tuple(u["dense_ci95"]), svg.SOFT),
        ("fitted", u["artifact"], tuple(u["ci95"]), svg.USER),
    ]
    if metric == ACCURACY:
        told, bars = "Pictures named as you do; the original has a head for your classes too", bars + _control_bars(r)
    else:
        told = "Cosine of the features to the original's: 1 is equal"
    nats = (
        f" Nats a picture: {u['dense_nats']:.3f} before, {u['nats']:.3f} now (lower is better)." if "nats" in u else ""
    )
    return (
        f"<h2>Quality</h2><p>{told}. Measured in {escape(r['runtime'])} on the files themselves, on {u['pictures']} held-out pictures of yours that shaped nothing; "
        f"whiskers are 95% intervals.{nats}</p>{svg.bars(bars, '', 'quality with 95% intervals', lambda x, _: worth(metric, x))}{_classes(u)}"
    )


def _classes(u: dict[str, Any]) -> str:
    """Class by class: of few pictures little is known, and the intervals say so."""
    body = [
        (
            str(n),
            str(c["pictures"]),
            str(c["dense_right"]),
            str(c["right"]),
            f"{c['ci95'][0]:.0%} to {c['ci95'][1]:.0%}",
        )
        for n, c in enumerate(u.get("by_class", ()), 1)
    ]
    head = ("class", "held out", "right, original", "right, fitted", "share, 95% interval")
    return (
        f"<details><summary>every class (names in this order in classes.json)</summary>{tabled(head, body)}</details>"
        if body
        else ""
    )


def _control_bars(r: dict[str, Any]) -> list[Bar]:
    return [(c["name"], c["accuracy"], tuple(c["ci95"]), svg.GENERIC) for c in r["controls"] if measured(c)]


def _controls(r: dict[str, Any]) -> str:
    heading, labelled = "<h2>What else you could have picked</h2>", r["data"]["labelled"]
    if not r["controls"]:
        return heading + "<p>Not measured: the job ran with <code>--controls none</code>.</p>"
    body = [
        (
            c["name"],
            mb(c["bytes"]),
            f"{c['accuracy']:.1%} {between(ACCURACY, c['ci95'])}" if measured(c) else "not measured",
            _against(c),
            "" if c["seconds"] is None else f"{c['seconds']:.0f} s",
            c["note"],
        )
        for c in r["controls"]
    ]
    head = ("control arm", "bytes", _answers(labelled), "against it", "made in", "note")
    bars = [] if labelled else _control_bars(r)  # with labels they stand beside ours
    drawn = svg.bars(bars, "", "clusters with 95% intervals", lambda x, _: f"{x:.1%}") if bars else ""
    return heading + tabled(head, body) + drawn


def _answers(labelled: bool) -> str:
    return "named as you do" if labelled else "put into their cluster"


def _speed(r: dict[str, Any]) -> str:
    s = r["speed"]
    bars = [
        ("original, fp32", s["dense_seconds"], None, svg.SOFT),
        ("original, fp32, only layers that are read", s.get("dense_read_seconds"), None, svg.SOFT),
        ("original, 8 bits", s["dense_int8_seconds"], None, svg.SOFT),
        ("fitted", s["seconds"], (s["low"], s["high"]), svg.USER),
    ]
    return (
        f"<h2>Speed</h2><p>Time for one picture in {escape(r['runtime'])}, {s['threads']} threads, the files in turns; the whiskers are quartiles. The original at 8 bits is "
        f"what the same exporter makes of it with nothing cut.</p>"
        + svg.bars([b for b in bars if b[1]], "", "time a picture", lambda x, _: ms(x))
    )


def _layers(r: dict[str, Any]) -> str:
    p = r["probing"]
    foretold = (
        f"Summed effects foretold the damage of {p['masks']:.0f} random cuts on other pictures of yours with rank correlation {p['spearman']:.2f} (R² {p['r2']:.2f} of its logarithm; "
        f"before repair a cut costs {p['factor']:.1f} times the sum; order of the units known from {p['user_pictures']:,.0f} pictures with reliability {p['known']:.2f})."
    )
    return (
        f"<h2>Layers</h2><p>Blue: {_drawn(r)} that were kept. Below: what the removal of a layer's parts would cost on <b class=u>your</b> and on "
        f"<b class=g>generic</b> pictures (nats a picture, square-root scale). {foretold} A layer is called personalized where the two differ by more than chance would have it, all layers judged together. {_read_at(r['head']).capitalize()}.</p>"
        + layer_map(r["layers"], "heads")
    )


def _drawn(r: dict[str, Any]) -> str:
    if "groups" in r["layers"][0]:
        return "the heads of attention and the channels of MLPs"
    return "the channels of every group, which is what layers make together,"


def _cuts(r: dict[str, Any]) -> str:
    """What validation said of the network on its way, before recovery."""
    cut = r["pruning"]
    if not (stops := _buffer(cut)):
        return ""
    bars = [(name, x["accuracy"], None, svg.GOOD) for name, x in stops]
    nats = ", ".join(f"{x['nats']:.3f} {name}" for name, x in stops)
    return (
        f"<h2>What the cuts did</h2><p>{_went(r)} went; {_bits(r)}. Validation pictures {_answers(r['data']['labelled'])}, before recovery "
        f"(nats a picture: {nats}):</p>{svg.bars(bars, '', 'validation, step by step', lambda x, _: f'{x:.1%}')}{stepped(cut, 'heads')}"
    )


def _data(r: dict[str, Any]) -> str:
    d = r["data"]
    split = ", ".join(f"{n} {name}" for name, n in d["pictures"].items())
    classes = (
        f"{d['classes']} classes that you named" if d["labelled"] else f"no labels, {d['classes']} clusters instead"
    )
    mirrored = {
        True: " Views to learn from were mirrored too.",
        False: " Views to learn from were not mirrored: your classes mind.",
    }.get(d.get("mirrored"), "")
    dropped = (
        tabled(("left out or noticed", "how many"), [(why, str(n)) for why, n in d["dropped"].items()])
        if d["dropped"]
        else "<p>Nothing was left out.</p>"
    )
    return (
        f"<h2>Your pictures</h2><p>{sum(d['pictures'].values())} pictures ({split}); {classes}.{mirrored}</p>{dropped}"
    )


def _times(r: dict[str, Any]) -> str:
    bars = [(STAGES.get(k, k), s, None, svg.GOOD) for k, s in r["seconds"].items()]
    memory = ", ".join(f"{k} {mb(n)}" for k, n in r["peak_rss_bytes_by_stage"].items())
    told = f"<p>Peak memory of the job {mb(r['job_peak_rss_bytes'])}{f' (up to each stage: {memory})' if memory else ''}.</p>"
    return f"<h2>Where the time went</h2>{told}{svg.bars(bars, '', 'seconds by stage', lambda x, _: f'{x:.0f} s')}"


def _method(r: dict[str, Any]) -> str:
    b, p = r["bytes"], r["parity"]
    items = [
        f"Bytes: {b['artifact']:,} of a budget of {b['budget']:,}; shares are of the original at two bytes a parameter ({mb(b['original_fp16'])}); in {r['runtime']} the original takes "
        f"{mb(b['dense_fp32'])}, at 8 bits {mb(b['dense_int8'])}.",
        f"Parity with PyTorch on {p['pictures']} pictures: features alike to {p['cosine']:.4f} at worst, {p['same_answers']:.1%} of the answers the same.",
        f"Seed {r['seed']}, effort {r['effort']}; {', '.join(f'{k} {v}' for k, v in r['versions'].items())}; model sha256 {r['model']['sha256'][:16]}...",
    ]
    return fine_print(items)
