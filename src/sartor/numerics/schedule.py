"""Schedules: pure functions step -> number."""

from __future__ import annotations

import math


def warm_then_cosine(share: float, warm: float = 0.06, floor: float = 0.05) -> float:
    """Learning-rate factor at `share` (0..1) of the training: linear up to 1 at `warm`, then a cosine to `floor`."""
    if share < warm:
        return (share + 0.01) / (warm + 0.01)
    t = min(1.0, (share - warm) / (1 - warm))
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * t))


def affordable_batch(least: int, most: int, steps: int, rows_per_s: float, seconds: float) -> int:
    """Rows a step: as many as leave time for so many steps at this speed, from `least` to `most`.

    A training that is short is made of steps: the same rows in more of them teach more (docs/log.md, twelfth session).
    """
    return max(least, min(most, round(rows_per_s * seconds / steps)))
