"""Coding length of held-out windows under a PyTorch model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from sartor.numerics.metrics import Score
from sartor.stages.likelihood import nats_of
from sartor.stages.tokens import Window, batches, pad


def token_nats(model: Any, windows: Sequence[Window]) -> list[Float[Tensor, " t"]]:
    """-log p of tokens 1, 2, ... of every window, in nats."""
    out: list[Tensor] = [torch.empty(0)] * len(windows)
    for batch in batches(windows):
        nats = nats_of(model, pad([windows[i] for i in batch]))
        for row, i in enumerate(batch):
            out[i] = nats[row, : len(windows[i].ids) - 1]
    return out


def score_of(windows: Sequence[Window], nats: Sequence[Float[Tensor, " t"]]) -> Score:
    """Nats and bytes per document; separators are context, never counted."""
    total: dict[int, list[float]] = {}
    for window, n in zip(windows, nats, strict=True):
        for piece in window.pieces:
            sums = total.setdefault(piece.document, [0.0, 0.0])
            sums[0] += float(n[piece.start - 1 : piece.end - 1].double().sum())
            sums[1] += piece.size
    documents = sorted(total)
    return Score(tuple(total[d][0] for d in documents), tuple(int(total[d][1]) for d in documents))


def score(model: Any, windows: Sequence[Window]) -> Score:
    """Bits per byte of the windows, by document."""
    return score_of(windows, token_nats(model, windows))
