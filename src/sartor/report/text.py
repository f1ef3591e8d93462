"""The report as a table for the terminal, from the same JSON as the page."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sartor.report.layers import STEPS, parts_of, step_rows


def mb(n: float | None) -> str:
    return "-" if n is None else f"{n / 1e6:.1f} MB"


def signed(x: float) -> str:
    return f"{100 * x:+.1f}%"


def rows(r: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    """(what, original, fitted, change): what a person wants to know first."""
    u, g, s, b = r["user"], r["generic"], r["speed"], r["bytes"]
    out = [
        (
            "size of the file",
            mb(b["original_fp16"]),
            mb(b["artifact"]),
            f"{b['artifact'] / b['original_fp16']:.1%} of fp16",
        )
    ]
    for name, side in (("your text", u), ("generic text", g)):
        low, high = side["change_ci95"]
        out.append(
            (
                f"bits per byte, {name}",
                f"{side['dense']:.3f}",
                f"{side['artifact']:.3f}",
                f"{signed(side['change'])} [{signed(low)}, {signed(high)}]",
            )
        )
    for name, key in (("generation", "generate_tokens_per_s"), ("prompt", "prompt_tokens_per_s")):
        old, new = s[f"dense_{key}"], s[key]
        out.append((f"{name}, tokens/s", f"{old:.0f} (Q8_0)", f"{new:.0f}", f"x{new / old:.2f}"))
    out.append(
        (
            "peak memory in llama.cpp",
            mb(s["dense_peak_rss_bytes"]) + " (Q8_0)",
            mb(r["peak_rss_bytes"]),
            f"x{r['peak_rss_bytes'] / s['dense_peak_rss_bytes']:.2f}",
        )
    )
    out.append(
        ("parameters", f"{r['parameters']['before'] / 1e6:.1f} M", f"{r['parameters']['after'] / 1e6:.1f} M", "")
    )
    if r["seconds"]:  # there are none where an artifact is measured again
        out.append(("time it took", "", f"{sum(r['seconds'].values()) / 60:.1f} min", ""))
    return out


def against(control: dict[str, Any]) -> str:
    """Our model against a control arm on the user's text, where it was compared."""
    if control.get("change") is None:
        return f"generic {control['generic']:.3f}"
    low, high = control["change_ci95"]
    return f"generic {control['generic']:.3f}; ours {control['change']:+.1%} [{low:+.1%}, {high:+.1%}]"


def table(r: dict[str, Any]) -> str:
    """The summary as aligned text; lower bits per byte is better."""
    body = [("", "original", "fitted", "change"), *rows(r)]
    for control in r["controls"]:
        if control["user"] is None:
            body.append((control["name"], "", "not measured", control["note"].removeprefix("not measured: ")))
        else:
            body.append((control["name"], mb(control["bytes"]), f"{control['user']:.3f}", against(control)))
    return aligned(body, r["notes"])


def aligned(body: Sequence[tuple[str, str, str, str]], notes: Sequence[str]) -> str:
    """Rows as columns, the first above a line; the last column is as wide as it likes."""
    widths = [max(len(row[i]) for row in body) for i in range(3)]
    lines = [
        "  ".join([row[0].ljust(widths[0]), row[1].rjust(widths[1]), row[2].rjust(widths[2]), row[3]]).rstrip()
        for row in body
    ]
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]] + [f"note: {n}" for n in notes])


def inspection(r: dict[str, Any]) -> str:
    """Where every byte went and what was cut, layer by layer."""
    total = r["bytes"]["artifact"]
    lines = [
        f"{r['model']['spec']}: {mb(total)} of {mb(r['bytes']['original_fp16'])} fp16; budget {mb(r['bytes']['budget'])}",
        "",
    ]
    kinds = r["bytes"]["by_kind"] | {"tokenizer and header": total - sum(r["bytes"]["by_kind"].values())}
    lines += [
        f"  {name:24s} {size / 1e6:8.2f} MB  {100 * size / total:5.1f}%"
        for name, size in sorted(kinds.items(), key=lambda x: -x[1])
    ]
    lines += ["", *layer_lines(r["layers"], "query groups", "text, nats per token")]
    p = r["plan"]
    lines += [
        "",
        f"vocabulary {p['vocabulary']} tokens; grids {', '.join(p['grids'])}; predicted damage {p['predicted_damage']:.3f} nats per token before recovery; price {p['price'] * 1e6:.4f} nats per MB",
        *step_lines(r["pruning"], "query groups"),
    ]
    return "\n".join(lines)


def step_lines(pruning: dict[str, Any], groups: str) -> list[str]:
    """What every step of a cut cost, where it was made in steps."""
    steps = step_rows(pruning, groups)
    return ["", *("  ".join(cell.rjust(14) for cell in row) for row in (STEPS, *steps))] if steps else []


def generic_effect(layer: dict[str, Any], part: str) -> str:
    """Of a part of a layer, where there was generic data."""
    return f"{layer['generic'][part][0]:.3f}" if part in layer["generic"] else "-"


def layer_lines(layers: Sequence[dict[str, Any]], groups: str, on: str) -> list[str]:
    """What was kept of every layer, and the effects of its parts.

    Args:
        groups: what heads are called. on: "text, nats per token": what the effects were measured on, and their unit.
    """
    parts = parts_of(layers[0])
    counts = "  ".join(f"{groups if p.counted == 'groups' else p.counted:12s}" for p in parts)
    lines = [f"layer  {counts}  {'  '.join(f'{p.name:24s}' for p in parts)}  (effect on your / generic {on})"]
    for n, x in enumerate(layers):
        kept = "  ".join(f"{x[f'{p.counted}_kept']:5d}/{x[p.counted]:<6d}" for p in parts)
        cells = "  ".join(
            f"{x['user'][p.felt][0]:.3f}/{generic_effect(x, p.felt)} {x['verdict'].get(p.felt, ''):12s}"[:24]
            for p in parts
        )
        lines.append(f"{n:5d}  {kept}  {cells}  {x.get('name', '')}".rstrip())
    return lines
