"""What one artifact becomes in every runtime, as one self-contained page."""

from __future__ import annotations

import json
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from sartor.files import write_whole
from sartor.report import svg
from sartor.report.html import document, tabled

DRAWN = (("bytes", 1e-6, "MB", "Size of the file"), ("seconds", 1e3, "ms", "Time of a picture, two threads"), ("generate_tokens_per_s", 1.0, "", "Tokens a second"))  # fmt: skip


def write(folder: Path, spec: str, about: str, head: Sequence[str], cells: Sequence[Sequence[str]], rows: Any) -> None:
    """exports.json and exports.html.

    Args:
        spec: of the model. about: what the figures are of, in words. head, cells: the table. rows: what it was made from, a dictionary a row.
    """
    write_whole(folder / "exports.json", json.dumps({"model": spec, "about": about, "rows": rows}, indent=1))
    drawn = [_drawn(rows, *how) for how in DRAWN]
    body = f"<p>{escape(about)}</p>{tabled(tuple(head), cells)}{''.join(drawn)}"
    write_whole(folder / "exports.html", document(f"{spec}, in every runtime", body))


def _drawn(rows: Sequence[dict[str, Any]], key: str, scale: float, unit: str, title: str) -> str:
    found = [
        (" ".join(filter(None, (r["runtime"], r.get("weights")))), scale * r[key], None, svg.USER)
        for r in rows
        if r.get(key) is not None
    ]
    return f"<h2>{title}</h2>{svg.bars(found, unit, title)}" if found else ""
