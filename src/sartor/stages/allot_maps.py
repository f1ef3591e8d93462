"""The decision for convolutional networks: which blocks of channels go, so that the file fits its bytes and runs in its time, at one price for all.

As `allot.py`; but what a channel costs depends on how many there are of those it is mixed with, so prices are taken anew at every solution, a few times.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float

from sartor.model.graph import Graph, shapes
from sartor.model.graph_channels import channel_groups
from sartor.numerics.allocate import Choice, Ladder, allocate
from sartor.plan import to_mask
from sartor.stages.allot import MIXES, UNIT, Allotment, just_enough, refuse
from sartor.stages.maps import block_of, blocks_of
from sartor.stages.probe import Effects

LEAST = 0.1  # of a group's units, that stay: with fewer the sum of effects foretells nothing
ROUNDS = 3  # of prices
OUTPUT_BYTES = 9  # an output's scale, zero point and bias
Counts = Sequence[int]  # units, group by group


@dataclass(frozen=True)
class Layer:
    """Sizes of a layer: outputs, inputs that each reads, numbers that each of these has, places of its map; rows, columns: outputs and inputs that one unit of a group is, by the group's number."""

    outputs: int
    inputs: int
    window: int
    places: int
    mixes: bool
    rows: Mapping[int, float]
    columns: Mapping[int, float]

    def weights(self, gone: Counts) -> tuple[float, float]:
        """(outputs, weights) that are left once so many units of every group are gone."""
        outputs = self.outputs - sum(r * gone[g] for g, r in self.rows.items())
        return outputs, outputs * self.window * (self.inputs - sum(c * gone[g] for g, c in self.columns.items()))


def layers_of(graph: Graph) -> list[Layer]:
    """Of all layers, in the order they run."""
    groups, at, found = channel_groups(graph), shapes(graph), []
    share = lambda parts, name, units: len(parts[name].at) / units  # noqa: E731
    for name, layer in graph.layers.items():
        weight: Any = layer.weight
        window, places = (weight[0, 0].numel(), at[name][1] * at[name][2]) if weight.ndim == 4 else (1, 1)
        rows = {n: share(g.rows, name, g.units) for n, g in enumerate(groups) if name in g.rows}
        columns = {n: share(g.columns, name, g.units) for n, g in enumerate(groups) if name in g.columns}
        mixes = getattr(layer, "groups", 1) == 1
        found.append(Layer(len(weight), weight.shape[1], window, places, mixes, rows, columns))
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
        mixing layer, of one in a depthwise or grouped one, and of a number made; limit: seconds that all of them may take together. fixed: numbers of the groups that stay whole.
    """

    layers: tuple[Layer, ...]
    units: tuple[int, ...]
    budget: int
    overhead: int
    prices: tuple[float, float, float] = (0.0, 0.0, 0.0)
    limit: float = float("inf")
    fixed: tuple[int, ...] = ()

    def bytes_of(self, gone: Counts) -> int:
        return self.overhead + int(sum(w + OUTPUT_BYTES * o for o, w in (layer.weights(gone) for layer in self.layers)))

    def work(self, gone: Counts) -> Float[np.ndarray, " k"]:
        """Multiplications in mixing layers and in others, and numbers made, for one picture."""
        total = np.zeros(3)
        for layer in self.layers:
            outputs, weights = layer.weights(gone)
            total[0 if layer.mixes else 1] += weights * layer.places
            total[2] += outputs * layer.places
        return total

    def seconds(self, gone: Counts) -> float:
        return float(self.work(gone) @ np.array(self.prices))

    def met(self, gone: Counts) -> bool:
        return self.bytes_of(gone) <= self.budget and self.seconds(gone) <= self.limit

    @property
    def most(self) -> tuple[int, ...]:
        """Units of each group that may go."""
        found = []
        for n, units in enumerate(self.units):
            block = block_of(units)
            found.append(0 if n in self.fixed else units - block * max(1, -(-round(LEAST * units) // block)))
        return tuple(found)


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
    damage = [(0.0, *np.cumsum(np.maximum(of, 0)).tolist()) for of in worth]
    found = [_least_damage(damage, costs, mix) for mix in (MIXES if costs.limit < float("inf") else MIXES[:1])]
    choice, price = min((f for f in found if costs.met(_gone(f[0], costs))), key=lambda f: f[0].damage)
    masks = [
        to_mask(sorted(torch.cat([*kept[choice.step[str(n)] :]]).tolist()), costs.units[n])
        for n, kept in enumerate(blocks)
    ]
    return Allotment(
        tuple("0:0" for _ in masks),
        tuple(masks),
        costs.bytes_of(_gone(choice, costs)),
        choice.damage,
        price,
        choice.step,
    )


def _gone(choice: Choice, costs: MapCosts) -> list[int]:
    return [choice.step[str(n)] * block_of(units) for n, units in enumerate(costs.units)]


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
        if costs.met(gone) and (best is None or choice.damage < best[0].damage):
            best = choice, choice.price * UNIT / payload(costs)
    return best or (choice, 0.0)


def _ladders(damage: Sequence[Sequence[float]], costs: MapCosts, mix: float, gone: Counts) -> list[Ladder]:
    """Ladders whose steps save shares of UNIT, which is all there is, at the prices that hold once `gone` are gone."""
    none = [0] * len(costs.units)
    whole = payload(costs), max(costs.seconds(none), 1e-12)
    found = []
    for n, units in enumerate(costs.units):
        block = block_of(units)
        less = list(gone)
        less[n] += block if gone[n] + block < units else -block
        saved = abs(costs.bytes_of(gone) - costs.bytes_of(less)), abs(costs.seconds(gone) - costs.seconds(less))
        share = max(1, int(UNIT * ((1 - mix) * saved[0] / whole[0] + mix * saved[1] / whole[1])))
        steps = range(1 + costs.most[n] // block)
        found.append(Ladder(str(n), tuple(share * i for i in steps), tuple(damage[n][i] for i in steps)))
    return found
