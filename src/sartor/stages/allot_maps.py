"""The decision for convolutional networks: which blocks of channels go, so that the file fits its bytes and runs in its time, at one price for all.

As `allot.py`; but what a channel costs depends on how many there are of those it is mixed with, so prices are taken anew at every solution, a few times. A residual block goes as a whole with the last
of the channels that its last layer reads: its layers then take no time to start either.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from jaxtyping import Float

from sartor.model.graph import Graph, shapes
from sartor.model.graph_channels import channel_groups, ends_of
from sartor.numerics.allocate import Choice, Ladder, allocate
from sartor.plan import to_mask
from sartor.stages.allot import MIXES, UNIT, Allotment, just_enough, refuse
from sartor.stages.curves import Curves, bent
from sartor.stages.maps import block_of, blocks_of, ladder_of, summed_blocks
from sartor.stages.probe import Effects

LEAST = 0.1  # of a group's units, that stay: with fewer the sum of effects foretells nothing
ROUNDS = 3  # of prices
OUTPUT_BYTES = 9  # an output's scale, zero point and bias
Counts = Sequence[int]  # units, group by group


@dataclass(frozen=True)
class Layer:
    """Sizes of a layer: outputs, inputs that each reads, numbers that each of these has, places of its map; rows, columns: outputs and inputs that one unit of a group is, by the group's number. ends: {group: units}
    without any of which the layer is not there."""

    outputs: int
    inputs: int
    window: int
    places: int
    mixes: bool
    rows: Mapping[int, float]
    columns: Mapping[int, float]
    ends: Mapping[int, int] = field(default_factory=dict)

    def there(self, gone: Counts) -> bool:
        return all(gone[g] < units for g, units in self.ends.items())

    def weights(self, gone: Counts) -> tuple[float, float]:
        """(outputs, weights) that are left once so many units of every group are gone."""
        if not self.there(gone):
            return 0.0, 0.0
        outputs = self.outputs - sum(r * gone[g] for g, r in self.rows.items())
        return outputs, outputs * self.window * (self.inputs - sum(c * gone[g] for g, c in self.columns.items()))


def layers_of(graph: Graph) -> list[Layer]:
    """Of all layers, in the order they run."""
    groups, at, found = channel_groups(graph), shapes(graph), []
    ends = ends_of(graph, groups)
    share = lambda parts, name, units: len(parts[name].at) / units  # noqa: E731
    for name, layer in graph.layers.items():
        weight: Any = layer.weight
        window, places = (weight[0, 0].numel(), at[name][1] * at[name][2]) if weight.ndim == 4 else (1, 1)
        rows = {n: share(g.rows, name, g.units) for n, g in enumerate(groups) if name in g.rows}
        columns = {n: share(g.columns, name, g.units) for n, g in enumerate(groups) if name in g.columns}
        mixes = getattr(layer, "groups", 1) == 1
        out = {n: g.units for n, g in enumerate(groups) if g.name in ends and name in ends[g.name].inside}
        found.append(Layer(len(weight), weight.shape[1], window, places, mixes, rows, columns, out))
    return found


def read_by_head(graph: Graph) -> tuple[int, ...]:
    """Numbers of the groups that are features: what others compare, and read, stays as wide as it is."""
    last = graph.nodes[-1].name
    return tuple(n for n, g in enumerate(channel_groups(graph)) if graph.head is not None and last in g.columns)


@dataclass(frozen=True)
class MapCosts:
    """What may be spent.

    Attributes:
        layers: of the whole network. units: of every group. budget: bytes of the file; overhead: of them, what does not depend on sizes. prices: seconds a picture of a multiplication in a
        mixing layer, of one in a depthwise or grouped one, of a number made, and of a layer that is there; limit: seconds that all of them may take together. fixed: numbers of the groups that stay whole.
        curves: how the damage of each group runs beside the sum of effects (`map_curves.py`); none: as the sum.
    """

    layers: tuple[Layer, ...]
    units: tuple[int, ...]
    budget: int
    overhead: int
    prices: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)
    limit: float = float("inf")
    fixed: tuple[int, ...] = ()
    curves: Curves = field(default_factory=dict)

    def bytes_of(self, gone: Counts) -> int:
        return self.overhead + int(sum(w + OUTPUT_BYTES * o for o, w in (layer.weights(gone) for layer in self.layers)))

    def work(self, gone: Counts) -> Float[np.ndarray, " k"]:
        """Multiplications in mixing layers and in others, numbers made, and layers, for one picture."""
        total = np.zeros(4)
        for layer in self.layers:
            outputs, weights = layer.weights(gone)
            total[0 if layer.mixes else 1] += weights * layer.places
            total[2] += outputs * layer.places
            total[3] += layer.there(gone)
        return total

    def seconds(self, gone: Counts) -> float:
        return float(self.work(gone) @ np.array(self.prices))

    def met(self, gone: Counts) -> bool:
        return self.bytes_of(gone) <= self.budget and self.seconds(gone) <= self.limit

    @cached_property
    def ends(self) -> frozenset[int]:
        """Groups that a residual block ends with."""
        return frozenset(n for layer in self.layers for n in layer.ends)

    @cached_property
    def inside(self) -> dict[int, frozenset[int]]:
        """{group: groups without any of which it is not there, either}: that end a block which has all of its layers."""
        found = {}
        for n in range(len(self.units)):
            of = [frozenset(layer.ends) for layer in self.layers if n in layer.rows or n in layer.columns]
            found[n] = frozenset.intersection(*of) - {n} if of else frozenset()
        return found

    def there(self, n: int, gone: Counts) -> bool:
        return all(gone[g] < self.units[g] for g in self.inside[n])

    def levels(self, n: int) -> list[int]:
        """How many units of a group may go: some blocks of them, or all where a residual block goes with them."""
        units, block = self.units[n], block_of(self.units[n])
        if n in self.fixed:
            return [0]
        deepest = units - block * max(1, -(-round(LEAST * units) // block))
        return [*range(0, deepest + 1, block), *([units] if n in self.ends else [])]

    @property
    def most(self) -> tuple[int, ...]:
        """Units of each group that may go."""
        return tuple(self.levels(n)[-1] for n in range(len(self.units)))


def payload(costs: MapCosts) -> int:
    """Bytes of weights, scales and biases of the whole network."""
    return costs.bytes_of([0] * len(costs.units)) - costs.overhead


def refuse_impossible_maps(costs: MapCosts) -> None:
    """Raises BudgetError where even the smallest network is larger, or slower."""
    refuse(costs.budget, costs.limit, costs.bytes_of(costs.most), costs.seconds(costs.most), "channels")


def allot_maps(effects: Effects, costs: MapCosts) -> Allotment:
    """What stays, of least foretold damage within the costs; channels are masks of the groups' units.

    Raises:
        BudgetError: even the smallest is larger, or slower.
    """
    refuse_impossible_maps(costs)
    blocks, worth = blocks_of(effects)
    damage = [_damages(of, n, costs) for n, of in enumerate(worth)]
    found = [_least_damage(damage, costs, mix) for mix in (MIXES if costs.limit < float("inf") else MIXES[:1])]
    choice, price = min((f for f in found if costs.met(_gone(f[0], costs))), key=lambda f: _damage(f[0], damage, costs))
    gone = _gone(choice, costs)
    masks = []
    for kept, units, less in zip(blocks, costs.units, gone, strict=True):
        left = kept[less // block_of(units) :]
        masks.append(to_mask(sorted(torch.cat(left).tolist()) if left else [], units))
    return Allotment(
        tuple("0:0" for _ in masks),
        tuple(masks),
        costs.bytes_of(gone),
        _damage(choice, damage, costs),
        price,
        {ladder_of(n): costs.levels(n).index(less) for n, less in enumerate(gone)},
    )


def _damages(worth: Float[np.ndarray, " b"], n: int, costs: MapCosts) -> list[float]:
    """Of all levels of a group."""
    sums, block, levels = summed_blocks(worth), block_of(costs.units[n]), costs.levels(n)
    if not (curve := costs.curves.get(ladder_of(n))):
        return [sums[level // block] for level in levels]
    damage = bent(sums, curve)
    found = [damage[level // block] for level in levels]
    share, ratio = curve[-1]
    if levels[-1] == costs.units[n] and share == 1.0:
        found[-1] = sums[-1] * ratio  # as measured, be it less than a deep cut: then it is the better one
    return found


def _gone(choice: Choice, costs: MapCosts) -> list[int]:
    """Units of every group that go; of those that lie in a block which goes as a whole none are counted."""
    gone = [costs.levels(n)[choice.step[ladder_of(n)]] for n in range(len(costs.units))]
    return [less if costs.there(n, gone) else 0 for n, less in enumerate(gone)]


def _damage(choice: Choice, damage: Sequence[Sequence[float]], costs: MapCosts) -> float:
    return sum(damage[n][costs.levels(n).index(less)] for n, less in enumerate(_gone(choice, costs)))


def _least_damage(damage: Sequence[Sequence[float]], costs: MapCosts, mix: float) -> tuple[Choice, float]:
    """(the least that must be saved so that all costs are met, where time has `mix` of the weight; damage per byte of the last step)."""
    gone = [0] * len(costs.units)
    choice = allocate(_ladders(damage, costs, mix, gone), 0)
    if costs.met(gone):
        return choice, 0.0
    best: tuple[Choice, float] | None = None
    for _ in range(ROUNDS):
        ladders = _ladders(damage, costs, mix, gone)
        choice = just_enough(ladders, lambda c: costs.met(_gone(c, costs)), 2 * UNIT)
        gone = _gone(choice, costs)
        if costs.met(gone) and (best is None or _damage(choice, damage, costs) < _damage(best[0], damage, costs)):
            best = choice, choice.price * UNIT / payload(costs)
    return best or (choice, 0.0)


def _ladders(damage: Sequence[Sequence[float]], costs: MapCosts, mix: float, gone: Counts) -> list[Ladder]:
    """Ladders whose steps save shares of UNIT, which is all there is, at the prices that hold once `gone` are gone."""
    none = [0] * len(costs.units)
    whole = payload(costs), max(costs.seconds(none), 1e-12)

    def share(n: int, more: int, less: int) -> float:
        """Of UNIT, that group n saves from the one number of units gone to the other."""
        here, there = ([*gone[:n], count, *gone[n + 1 :]] for count in (less, more))
        saved = costs.bytes_of(here) - costs.bytes_of(there), costs.seconds(here) - costs.seconds(there)
        return UNIT * ((1 - mix) * saved[0] / whole[0] + mix * saved[1] / whole[1])

    found = []
    for n, units in enumerate(costs.units):
        levels, block = costs.levels(n), block_of(units)
        plain = [level for level in levels if level < units]
        at = min(gone[n], plain[-1])
        step = max(1, int(share(n, at, at - block) if at else share(n, block, 0))) if len(plain) > 1 else 0
        saved = [step * i for i in range(len(plain))]
        if levels[-1] == units:
            saved.append(saved[-1] + max(1, int(share(n, units, plain[-1]))))
        found.append(Ladder(ladder_of(n), tuple(saved), tuple(damage[n])))
    return found
