"""What it costs to cut a group of channels once the layers that read it are fitted, measured, beside what the sum of its units' effects foretells: `curves.py` for convolutional networks.

Every group is cut alone, to two depths, and all of it where a residual block would go with it; each layer that reads it is fitted in closed form to what it said (its mean alone, where nothing is left to
read), and KL(whole || cut) is measured on other pictures.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from sartor.model.graph import Graph, macs
from sartor.model.graph_channels import Group, channel_groups, ends_of
from sartor.numerics.compensate import refit, strength
from sartor.stages.curves import Curves, curve_of, holding, not_all
from sartor.stages.maps import Pixels, blocks_of, ladder_of, reading, summed_blocks
from sartor.stages.probe import Effects
from sartor.stages.recognition import kl_of, said_of
from sartor.stages.refit import CHUNK, PLACES, unfolded

CUTS = 3  # of a group, at most
WORK = 2 * 10**13  # multiplications that judging may take in all: minutes on two cores
FEWEST = 8  # pictures that judge, at least
ROOM = 1 << 31  # bytes that the moments of all layers may take
Moment = tuple[Tensor, Tensor]  # (covariance, mean) of what a layer reads
Moments = tuple[Moment, Moment]  # over either half of the pictures


@torch.no_grad()
def measured_map_curves(
    graph: Graph,
    effects: Effects,
    own: Pixels,
    judged: Pixels,
    fixed: Sequence[int] = (),
    tell: Callable[[float, str], None] = lambda share, note: None,
) -> Curves:
    """A curve for every group of channels that may go, by the name of its ladder; none for those whose readers are too wide.

    Args:
        graph: in the precision to run in; as it was afterwards. own: pictures that what is left is fitted on. judged: others; damage is measured on them. fixed: numbers of groups that stay whole.
    """
    groups = channel_groups(graph)
    judged = judged[: max(FEWEST, WORK // (CUTS * len(groups) * sum(macs(graph).values()) + 1))]
    said = said_of(graph, judged)
    ends, moments = ends_of(graph, groups), _moments(graph, groups, own)
    found = Curves()
    for n, (group, blocks, worth) in enumerate(zip(groups, *blocks_of(effects), strict=True)):
        if n in fixed or not set(group.columns) <= set(moments):
            continue

        def cost(gone: int, group: Group = group, blocks: Sequence[Tensor] = blocks) -> float:
            keep = torch.zeros(group.units, dtype=torch.bool)
            for block in blocks[gone:]:
                keep[block] = True
            with _reading_less(graph, group, keep, moments):
                return kl_of(graph, judged, said)

        deep = _with_all if group.name in ends else not_all
        if points := curve_of(summed_blocks(np.asarray(worth)), deep, cost):
            found[ladder_of(n)] = points
        tell((n + 1) / len(groups), f"group {n + 1} of {len(groups)}: what fewer channels cost")
    return found


def _with_all(blocks: int) -> list[int]:
    return [*not_all(blocks), blocks]


def _moments(graph: Graph, groups: Sequence[Group], pixels: Pixels) -> dict[str, Moments]:
    """What every layer reads that mixes channels of any group, at some places of every picture; as many layers as there is ROOM for, the narrowest first."""
    read_by = {name for group in groups for name in group.columns}
    layers: dict[str, Any] = dict(graph.layers.items())
    wide = {name: layers[name].weight[0].numel() for name in layers if name in read_by}
    room, wanted = ROOM, list[str]()
    for name in sorted(wide, key=lambda name: wide[name]):
        room -= 2 * 4 * wide[name] ** 2
        wanted += [name] if room >= 0 else []
    halves = {name: (_Half(), _Half()) for name in wanted}
    generator = torch.Generator().manual_seed(0)
    for n, part in enumerate(pixels.split(CHUNK)):
        with reading(graph) as read:
            graph(part)
        for name in [name for name in read if name in halves]:
            halves[name][n % 2].add(_inputs(graph.layers[name], read[name].float(), generator))
    return {name: (one.moment(), other.moment()) for name, (one, other) in halves.items()}


@dataclass
class _Half:
    """Sums of what a layer reads, over one half of the pictures."""

    squares: Any = 0.0
    sums: Any = 0.0
    count: int = 0

    def add(self, z: Float[Tensor, "f s"]) -> None:
        self.squares, self.sums, self.count = self.squares + z @ z.T, self.sums + z.sum(1), self.count + z.shape[1]

    def moment(self) -> Moment:
        """(covariance, mean); of nothing, where there was one part of pictures only, nothing."""
        if not self.count:
            return torch.zeros(0, 0), torch.zeros(0)
        mean = self.sums / self.count
        return self.squares / self.count - mean[:, None] * mean, mean


def _inputs(layer: Any, x: Tensor, generator: torch.Generator) -> Float[Tensor, "f s"]:
    if isinstance(layer, nn.Linear):
        return x.T
    z = unfolded(layer, x)
    return z[:, :, torch.randperm(z.shape[-1], generator=generator)[:PLACES]].transpose(0, 1).flatten(1)


@contextmanager
def _reading_less(
    graph: Graph, group: Group, keep: Bool[Tensor, " units"], moments: Mapping[str, Moments]
) -> Iterator[None]:
    """Layers read these units of a group alone while the body runs, each fitted to what it said."""
    with ExitStack() as stack:
        for name, part in group.columns.items():
            layer: Any = graph.layers[name]
            each = layer.weight[0, 0].numel() if layer.weight.ndim == 4 else 1
            inputs = torch.ones(layer.weight.shape[1], dtype=torch.bool)
            inputs[part.at] = keep[part.unit]
            stack.enter_context(_fitted(layer, moments[name], inputs.repeat_interleave(each)))
        yield


@contextmanager
def _fitted(layer: Any, moments: Moments, stays: Bool[Tensor, " i"]) -> Iterator[None]:
    """The layer reads these inputs alone; the damping is the one that says most of the half that it was not fitted on, and the bias takes all of the mean."""
    w = layer.weight.detach().flatten(1).float()
    seen = [(c, mean) for c, mean in moments if len(c)]
    both, mean = (sum(x) / len(seen) for x in zip(*seen, strict=True))
    wide = torch.zeros_like(w)
    if stays.any():
        pairs = [((w @ c)[:, stays], c[stays][:, stays]) for c, _ in seen]
        lam = strength(w[:, stays], pairs[0], pairs[-1])
        wide[:, stays] = refit(w[:, stays], (w @ both)[:, stays], both[stays][:, stays], lam)
    bias = layer.bias.detach().float() + (w - wide) @ mean
    with holding(layer, wide.reshape(layer.weight.shape), bias):
        yield
