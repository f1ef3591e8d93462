"""Where to save bytes: equal marginal damage per byte over ladders of cuts.

A *ladder* is a list of ever stronger cuts of one thing (the channels of one layer, the vocabulary, the bits of one kind of
tensor) with the bytes each step saves and the damage it does. On the lower convex hull of every ladder the greedy
choice of the cheapest damage per byte is the Lagrangian optimum: one multiplier for the whole model (Shoham and Gersho
1988).
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Ladder:
    """Cumulative bytes saved and damage after steps 0, 1, 2, ...; entry 0 is (0, 0)."""

    name: str
    saved: tuple[int, ...]
    damage: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.saved) != len(self.damage) or self.saved[0] != 0 or self.damage[0] != 0:
            raise ValueError(f"ladder {self.name} must start at (0, 0) and be of one length")


@dataclass(frozen=True)
class Choice:
    """The step taken on every ladder, the bytes saved and the summed damage, and the last multiplier."""

    step: dict[str, int]
    saved: int
    damage: float
    price: float


def hull(ladder: Ladder) -> list[int]:
    """Steps on the lower convex hull of damage over bytes saved, 0 first."""
    kept = [0]
    for n in range(1, len(ladder.saved)):
        if ladder.saved[n] <= ladder.saved[kept[-1]]:
            continue
        while len(kept) > 1 and _slope(ladder, kept[-2], kept[-1]) >= _slope(ladder, kept[-2], n):
            kept.pop()
        kept.append(n)
    return kept


def _slope(ladder: Ladder, a: int, b: int) -> float:
    return (ladder.damage[b] - ladder.damage[a]) / (ladder.saved[b] - ladder.saved[a])


def allocate(ladders: Sequence[Ladder], need: int) -> Choice:
    """Save at least `need` bytes at the least damage.

    Hull steps are taken in order of damage per byte until enough is saved. When even the end of every ladder is not
    enough, the choice holds all of them; the caller compares `saved` with `need`.
    """
    steps = {ladder.name: 0 for ladder in ladders}
    saved, damage, price = 0, 0.0, 0.0
    heap: list[tuple[float, int, int]] = []
    hulls = [hull(ladder) for ladder in ladders]
    for n, ladder in enumerate(ladders):
        if len(hulls[n]) > 1:
            heapq.heappush(heap, (_slope(ladder, 0, hulls[n][1]), n, 1))
    while heap and saved < need:
        price, n, at = heapq.heappop(heap)
        ladder, points = ladders[n], hulls[n]
        saved += ladder.saved[points[at]] - ladder.saved[points[at - 1]]
        damage += ladder.damage[points[at]] - ladder.damage[points[at - 1]]
        steps[ladder.name] = points[at]
        if at + 1 < len(points):
            heapq.heappush(heap, (_slope(ladder, points[at], points[at + 1]), n, at + 1))
    return Choice(steps, saved, damage, price)
