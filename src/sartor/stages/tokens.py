"""From texts to tokens: windows to measure on, rows to train on.

A *window* is a stretch of whole text of at most WINDOW_CHARS characters behind a separator token: the same text and
the same context for every tokenizer, so that bits per byte can be compared between a trimmed and a whole vocabulary.
Short documents are packed into one window, long ones cut at white space.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from sartor.model.vocabulary import separator

WINDOW_CHARS = 1024
ROW_TOKENS = 256


@dataclass(frozen=True)
class Piece:
    """Part of document `document` at tokens start..end (exclusive) of its window; `size` bytes of UTF-8."""

    document: int
    start: int
    end: int
    size: int


@dataclass(frozen=True)
class Window:
    """Token ids (first one a separator) and the pieces of text they spell."""

    ids: tuple[int, ...]
    pieces: tuple[Piece, ...]


def cut_windows(texts: Sequence[str], max_bytes: int | None = None) -> list[list[tuple[int, str]]]:
    """Texts to windows of (document, text) pieces, at most `max_bytes` in all, spread evenly over the texts."""
    windows: list[list[tuple[int, str]]] = []
    room = 0
    for n, text in enumerate(texts):
        for piece in _cut(text):
            if len(piece) > room or not windows:
                windows.append([])
                room = WINDOW_CHARS
            windows[-1].append((n, piece))
            room -= len(piece)
    return _thin(windows, max_bytes)


def _thin(windows: list[list[tuple[int, str]]], max_bytes: int | None) -> list[list[tuple[int, str]]]:
    total = sum(len(t.encode()) for w in windows for _, t in w)
    if max_bytes is None or total <= max_bytes:
        return windows
    count = max(1, int(len(windows) * max_bytes / total))
    return [windows[i] for i in np.linspace(0, len(windows) - 1, count).round().astype(int)]


def _cut(text: str) -> list[str]:
    pieces = []
    while len(text) > WINDOW_CHARS:
        at = max(text.rfind("\n", WINDOW_CHARS // 2, WINDOW_CHARS), text.rfind(" ", WINDOW_CHARS // 2, WINDOW_CHARS))
        at = at if at > 0 else WINDOW_CHARS
        pieces.append(text[:at])
        text = text[at:]
    return [*pieces, text] if text else pieces


def encode_windows(windows: Sequence[Sequence[tuple[int, str]]], tokenizer: Any) -> list[Window]:
    """Tokens of every window: separator, text, separator, text, ..."""
    sep = separator(tokenizer)
    flat = [text for w in windows for _, text in w]
    encoded = iter(tokenizer.backend_tokenizer.encode_batch(flat, add_special_tokens=False))
    out = []
    for w in windows:
        ids: list[int] = []
        pieces = []
        for document, text in w:
            ids.append(sep)
            start = len(ids)
            ids.extend(next(encoded).ids)
            pieces.append(Piece(document, start, len(ids), len(text.encode())))
        out.append(Window(tuple(ids), tuple(pieces)))
    return out


def training_rows(texts: Sequence[str], tokenizer: Any, length: int = ROW_TOKENS) -> Int[Tensor, "rows length"]:
    """All texts as one stream with separators, cut into rows; the rest that fills no row is dropped (under one row)."""
    sep = separator(tokenizer)
    stream: list[int] = []
    for encoding in tokenizer.backend_tokenizer.encode_batch(list(texts), add_special_tokens=False):
        stream.append(sep)
        stream.extend(encoding.ids)
    if len(stream) < length:
        stream = (stream * (length // max(1, len(stream)) + 1))[:length]
    rows = len(stream) // length
    return torch.tensor(stream[: rows * length]).reshape(rows, length)


def sample(rows: Tensor, n: int, seed: int) -> Tensor:
    """n rows drawn without replacement, always the same ones for a seed."""
    generator = torch.Generator().manual_seed(seed)
    return rows[torch.randperm(len(rows), generator=generator)[:n]]


def batches(windows: Sequence[Window], tokens: int = 2048) -> list[list[int]]:
    """Indices of windows of like length, about `tokens` tokens a batch."""
    order = sorted(range(len(windows)), key=lambda i: len(windows[i].ids))
    out: list[list[int]] = []
    for i in order:
        if out and (len(out[-1]) + 1) * len(windows[i].ids) <= tokens:
            out[-1].append(i)
        else:
            out.append([i])
    return out


def pad(windows: Sequence[Window]) -> Int[Tensor, "n length"]:
    """Token ids, padded at the end with the separator (a causal model never looks there)."""
    longest = max(len(w.ids) for w in windows)
    return torch.tensor([list(w.ids) + [w.ids[0]] * (longest - len(w.ids)) for w in windows])
