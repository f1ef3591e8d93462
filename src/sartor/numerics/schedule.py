"""Schedules: pure functions step -> number."""

from __future__ import annotations

import math


def progress(step: int, steps: int) -> float:
    """0 at step 0, 1 at the last step, never falling."""
    return min(1.0, step / max(1, steps - 1))


def cubic(step: int, steps: int) -> float:
    """Zhu and Gupta 2017 (arXiv:1710.01878): 1 - (1 - t)^3; 0 at step 0, 1 at the last step, never falling."""
    return 1.0 - (1.0 - progress(step, steps)) ** 3


def warm_then_cosine(share: float, warm: float = 0.06, floor: float = 0.05) -> float:
    """Learning-rate factor at `share` (0..1) of the training: linear up to 1 at `warm`, then a cosine to `floor`."""
    if share < warm:
        return (share + 0.01) / (warm + 0.01)
    t = min(1.0, (share - warm) / (1 - warm))
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * t))
