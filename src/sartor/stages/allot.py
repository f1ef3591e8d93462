"""The decision for pictures: which channels and heads go, so that the file fits the budget, at one price for every byte.

Eight bits a weight are nearly free here and the fastest that phones run, so bytes are saved by structure alone: FFN blocks and heads of every layer compete, and a
layer may lose all of either.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np

from sartor.errors import BudgetError
from sartor.model.network import BLOCK, Anatomy
from sartor.numerics.allocate import Choice, Ladder, allocate
from sartor.plan import to_mask
from sartor.stages.decide import kept_groups
from sartor.stages.probe import Effects, Units, order_units

Bytes = Callable[[Anatomy], int]
LEAST = 0.08  # of all channels, that no file goes below: with fewer the sum of effects foretells nothing


@dataclass(frozen=True)
class Allotment:
    """Masks of the heads and channels that stay, layer by layer, the bytes of the file and the damage foretold, in nats a picture."""

    groups: tuple[str, ...]
    channels: tuple[str, ...]
    size: int
    damage: float
    price: float
    steps: Mapping[str, int]


def smallest(a: Anatomy, bytes_of: Bytes) -> int:
    """Bytes of the smallest file: every layer with the least channels and one head."""
    return bytes_of(_least(a))


def _least(a: Anatomy) -> Anatomy:
    blocks = tuple(BLOCK * max(1, round(LEAST * f / BLOCK)) if f else 0 for f in a.ffn)
    return replace(a, groups=tuple(min(1, g) for g in a.groups), ffn=blocks)


def allot(a: Anatomy, effects: Effects, budget: int, bytes_of: Bytes) -> Allotment:
    """What stays, of least foretold damage within `budget` bytes.

    Raises:
        BudgetError: even the smallest is larger.
    """
    if budget < (least := smallest(a, bytes_of)):
        raise BudgetError(
            f"a budget of {budget:,} bytes cannot be reached: the smallest model Sartor would make of this one has {least:,} bytes; ask for that or more",
            least,
        )
    units = order_units(effects)
    ladders = _ladders(a, units, bytes_of)
    need = bytes_of(a) - budget
    while True:  # headers make the file's size a little uneven: what is still missing is saved too
        choice = allocate(ladders, need)
        cut = _cut(a, choice)
        if (over := bytes_of(cut) - budget) <= 0:
            return _allotment(a, units, choice, bytes_of(cut))
        need = max(need, choice.saved) + over


def _ladders(a: Anatomy, units: Units, bytes_of: Bytes) -> list[Ladder]:
    block, head = _costs(a, bytes_of)
    found = []
    for n in range(a.layers):
        for kind, cost in (("mlp", block), ("attention", head)):
            effects = units.of(n, kind)
            ordered = effects if kind == "mlp" else np.sort(effects)
            damage = (0.0, *np.cumsum(np.maximum(ordered, 0)).tolist())
            found.append(Ladder(f"{kind}.{n}", tuple(cost * i for i in range(len(damage))), damage))
    return found


def _costs(a: Anatomy, bytes_of: Bytes) -> tuple[int, int]:
    """Bytes of a block of channels and of a head, as the file has them."""
    n = int(np.argmax(a.ffn))
    fewer = lambda sizes, by: tuple(s - by * (i == n) for i, s in enumerate(sizes))  # noqa: E731
    block = bytes_of(a) - bytes_of(replace(a, ffn=fewer(a.ffn, BLOCK)))
    n = int(np.argmax(a.groups))
    return block, bytes_of(a) - bytes_of(replace(a, groups=fewer(a.groups, 1)))


def _cut(a: Anatomy, choice: Choice) -> Anatomy:
    groups = tuple(g - choice.step[f"attention.{n}"] for n, g in enumerate(a.groups))
    return replace(a, groups=groups, ffn=tuple(f - BLOCK * choice.step[f"mlp.{n}"] for n, f in enumerate(a.ffn)))


def _allotment(a: Anatomy, units: Units, choice: Choice, size: int) -> Allotment:
    groups, channels = [], []
    for n in range(a.layers):
        groups.append(to_mask(kept_groups(units.of(n, "attention"), choice.step[f"attention.{n}"]), a.groups[n]))
        order = units.order[n].tolist() if a.ffn[n] else []
        channels.append(to_mask(sorted(order[choice.step[f"mlp.{n}"] * units.size :]), a.ffn[n]))
    return Allotment(tuple(groups), tuple(channels), size, choice.damage, choice.price, choice.step)
