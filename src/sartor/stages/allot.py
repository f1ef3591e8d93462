"""The decision for pictures: which channels and heads go, so that the file fits its bytes and runs in its time, at one price for all.

Eight bits a weight are nearly free here and the fastest that phones run; four of them take half the bytes and no time (`numerics/four.py`), at a damage that is measured. With either, FFN blocks
and heads of every layer compete for the rest, and a layer may lose all of either; what damages less is taken. For its bytes a head takes twice the time of an FFN block: where time is asked for
too, what both cost is weighed so that the damage is least.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from sartor.errors import BudgetError
from sartor.model.network import BLOCK, Anatomy
from sartor.numerics.allocate import Choice, Ladder, allocate
from sartor.plan import to_mask
from sartor.stages.curves import Curves, foretold
from sartor.stages.probe import Effects, Units, kept_groups, order_units

Bytes = Callable[[Anatomy], int]
MIXES = tuple(i / 10 for i in range(11))  # weights of time against bytes that are tried
UNIT = 1 << 40  # allocation counts in whole numbers: this many are all that must be saved
STEPS = 24  # of the bisection for how much must be saved
LEAST = 0.08  # of all channels, that no file goes below: with fewer the sum of effects foretells nothing


@dataclass(frozen=True)
class Four:
    """What four bits a weight would mean: exact bytes of a file of given sizes, and the damage when nothing else is changed, in nats a picture."""

    bytes_of: Bytes
    damage: float


@dataclass(frozen=True)
class Costs:
    """What may be spent.

    Attributes:
        bytes_of: exact bytes of a file of given sizes at eight bits; four: the same at four, where that may be taken. budget: bytes it may have. block_seconds, head_seconds: of a picture's time, that a block of channels and a head take, as
        measured in the runtime; limit: seconds that all of them together may take. curves: how the damage of each part runs beside the sum of effects (`curves.measured_curves`); none: as the sum.
    """

    bytes_of: Bytes
    budget: int
    block_seconds: float = 0.0
    head_seconds: float = 0.0
    limit: float = float("inf")
    four: Four | None = None
    curves: Curves = field(default_factory=dict)

    def seconds(self, a: Anatomy) -> float:
        return self.head_seconds * sum(a.groups) + self.block_seconds * sum(a.ffn) / BLOCK

    def at(self, four: bool) -> Costs:
        """The same with the number of bits decided."""
        return replace(self, bytes_of=self.four.bytes_of if four and self.four else self.bytes_of, four=None)

    def met(self, a: Anatomy) -> bool:
        return self.bytes_of(a) <= self.budget and self.seconds(a) <= self.limit


@dataclass(frozen=True)
class Allotment:
    """Masks of the heads and channels that stay, layer by layer, the bytes of the file and the damage foretold, in nats a picture; price: of the last step, per byte of all that could go.
    four: the matrices lie on the grid of four bits."""

    groups: tuple[str, ...]
    channels: tuple[str, ...]
    size: int
    damage: float
    price: float
    steps: Mapping[str, int]
    four: bool = False

    @property
    def whole(self) -> bool:
        """Whether everything stays."""
        return not any(self.steps.values())


def smallest(a: Anatomy) -> Anatomy:
    """The smallest network: every layer with the least channels and one head."""
    blocks = tuple(BLOCK * max(1, round(LEAST * f / BLOCK)) if f else 0 for f in a.ffn)
    return replace(a, groups=tuple(min(1, g) for g in a.groups), ffn=blocks)


def allot(a: Anatomy, effects: Effects, costs: Costs) -> Allotment:
    """What stays, of least foretold damage within the costs.

    Raises:
        BudgetError: even the smallest is larger, or slower.
    """
    refuse_impossible(a, costs)
    units = order_units(effects)
    found = [_allotted(a, units, costs)] if costs.met(smallest(a)) else []
    if costs.four is not None and costs.bytes_of(a) > costs.budget:
        four = _allotted(a, units, costs.at(four=True))
        found.append(replace(four, damage=four.damage + costs.four.damage, four=True))
    return min(found, key=lambda f: f.damage)


def _allotted(a: Anatomy, units: Units, costs: Costs) -> Allotment:
    """The same with one number of bits."""
    found = [_least_damage(a, units, costs, mix) for mix in (MIXES if costs.limit < float("inf") else MIXES[:1])]
    choice = min((c for c in found if costs.met(left(a, c.step))), key=lambda c: c.damage)
    return _allotment(a, units, choice, costs)


def refuse_impossible(a: Anatomy, costs: Costs) -> None:
    """Raises BudgetError where even the smallest network is larger, or slower."""
    least, bytes_of = smallest(a), costs.four.bytes_of if costs.four else costs.bytes_of
    refuse(costs.budget, costs.limit, bytes_of(least), costs.seconds(least), "heads and channels")


def refuse(budget: int, limit: float, size: int, seconds: float, parts: str) -> None:
    """Raises BudgetError where the smallest network, of `size` bytes and so many seconds for its `parts`, is beyond the budget or the limit."""
    if budget < size:
        raise BudgetError(
            f"a budget of {budget:,} bytes cannot be reached: the smallest model Sartor would make of this one has {size:,} bytes; ask for that or more",
            size,
        )
    if limit < seconds:
        raise BudgetError(
            f"{1000 * limit:.2f} ms a picture for all {parts} cannot be reached: the smallest model Sartor would make takes {1000 * seconds:.2f} ms; ask for less with --faster"
        )


def _least_damage(a: Anatomy, units: Units, costs: Costs, mix: float) -> Choice:
    """The least that must be saved so that all costs are met, where time has `mix` of the weight."""
    ladders = _ladders(a, units, costs, mix)
    return allocate(ladders, 0) if costs.met(a) else just_enough(ladders, lambda c: costs.met(left(a, c.step)), UNIT)


def just_enough(ladders: Sequence[Ladder], met: Callable[[Choice], bool], most: int) -> Choice:
    """The choice that saves the least, up to `most`, so that it is `met`."""
    low, high = 0, most
    for _ in range(STEPS):
        middle = (low + high) // 2
        low, high = (low, middle) if met(allocate(ladders, middle)) else (middle, high)
    return allocate(ladders, high)


def _ladders(a: Anatomy, units: Units, costs: Costs, mix: float) -> list[Ladder]:
    """Ladders whose steps save shares of UNIT, which is all there is."""
    block, head = _bytes_of_units(a, costs.bytes_of)
    blocks, heads = sum(a.ffn) // BLOCK, sum(a.groups)
    whole = (blocks * block + heads * head, max(costs.seconds(a), 1e-12))
    shares = [
        int(UNIT * ((1 - mix) * size / whole[0] + mix * time / whole[1]))
        for size, time in ((block, costs.block_seconds), (head, costs.head_seconds))
    ]
    found = []
    for n in range(a.layers):
        for kind, share in zip(("mlp", "attention"), shares, strict=True):
            damage = foretold(units, n, kind, costs.curves)
            found.append(Ladder(f"{kind}.{n}", tuple(share * i for i in range(len(damage))), damage))
    return found


def _bytes_of_units(a: Anatomy, bytes_of: Bytes) -> tuple[int, int]:
    """Bytes of a block of channels and of a head, as the file has them."""
    n = int(np.argmax(a.ffn))
    fewer = lambda sizes, by: tuple(s - by * (i == n) for i, s in enumerate(sizes))  # noqa: E731
    block = bytes_of(a) - bytes_of(replace(a, ffn=fewer(a.ffn, BLOCK)))
    n = int(np.argmax(a.groups))
    return block, bytes_of(a) - bytes_of(replace(a, groups=fewer(a.groups, 1)))


def left(a: Anatomy, steps: Mapping[str, int]) -> Anatomy:
    """Sizes of what so many steps on each ladder leave."""
    groups = tuple(g - steps[f"attention.{n}"] for n, g in enumerate(a.groups))
    return replace(a, groups=groups, ffn=tuple(f - BLOCK * steps[f"mlp.{n}"] for n, f in enumerate(a.ffn)))


def _allotment(a: Anatomy, units: Units, choice: Choice, costs: Costs) -> Allotment:
    groups, channels = [], []
    for n in range(a.layers):
        groups.append(to_mask(kept_groups(units.of(n, "attention"), choice.step[f"attention.{n}"]), a.groups[n]))
        order = units.order[n].tolist() if a.ffn[n] else []
        channels.append(to_mask(sorted(order[choice.step[f"mlp.{n}"] * units.size :]), a.ffn[n]))
    block, head = _bytes_of_units(a, costs.bytes_of)
    price = choice.price * UNIT / (block * sum(a.ffn) / BLOCK + head * sum(a.groups))
    size = costs.bytes_of(left(a, choice.step))
    return Allotment(tuple(groups), tuple(channels), size, choice.damage, price, choice.step)
