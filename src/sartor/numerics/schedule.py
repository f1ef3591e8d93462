"""Schedules: pure functions step -> number."""

from __future__ import annotations

import math


def warm_then_cosine(share: float, warm: float = 0.06, floor: float = 0.05) -> float:
    """Learning-rate factor at `share` (0..1) of the training: linear up to 1 at `warm`, then a cosine to `floor`."""
    if share < warm:
        return (share + 0.01) / (warm + 0.01)
    t = min(1.0, (share - warm) / (1 - warm))
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * t))
