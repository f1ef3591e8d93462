"""What a convolutional network feels of its own channels: backward probes, as in `sensitivity.py`, for the units of `graph_channels`.

A unit is gone when the layers that mix it with others read zero. So what it did is felt there: r_u = sum over those layers and all places of (z_u - its mean) . dL/dz_u, as the bias of a layer that
reads it takes the mean over (`refit.py`). Every picture sends several random directions of what the network foretells back (`recognition.signed`); half the mean square of r_u is
KL(whole || without u) to second order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor, nn

from sartor.model.graph import Graph
from sartor.model.graph_channels import Group, channel_groups, masked
from sartor.model.hooks import removed_after
from sartor.numerics.metrics import student_interval
from sartor.stages.medium import PICTURES
from sartor.stages.probe import Effects, Worth, worth_of_masks
from sartor.stages.recognition import kl_of, said_of, signed
from sartor.stages.sensitivity import BATCH, Felt

PART = "channels"
BLOCKS = (16, 8, 4, 2, 1)  # units that go together: the largest that leaves a group LEAST_BLOCKS to choose among
LEAST_BLOCKS = 4
MEAN_PICTURES = 32
Pixels = UInt8[Tensor, "n 3 s s"]


def block_of(units: int) -> int:
    """How many units of a group go at once: runtimes compute 8 or 16 channels at a time, and counts between take as long (docs/log.md)."""
    return next((b for b in BLOCKS if units % b == 0 and units // b >= LEAST_BLOCKS), 1)


def feel_maps(graph: Graph, pixels: Pixels, seed: int = 0, tell: Callable[[float], None] = lambda share: None) -> Felt:
    """A forward pass over the pictures, and a backward pass for each direction; sites are (number of the group, PART), inputs their units."""
    groups, generator = channel_groups(graph), torch.Generator().manual_seed(seed)
    means = _means(graph, pixels[:: max(1, len(pixels) // MEAN_PICTURES)])
    sketch: list[list[Tensor]] = [[] for _ in groups]
    for at in range(0, len(pixels), BATCH):
        with torch.enable_grad(), reading(graph) as read:
            logits = graph(_wanting(graph, pixels[at : at + BATCH]))
        found: list[list[Tensor]] = [[] for _ in groups]
        for left in reversed(range(PICTURES.directions)):
            logits.backward(signed(logits, generator), retain_graph=left > 0)
            by_layer = {name: _felt(z, means[name]) for name, z in read.items()}
            for n, group in enumerate(groups):
                found[n].append(_of_units(group, by_layer))
        for n, directions in enumerate(found):
            sketch[n].append(torch.stack(directions, 1).flatten(0, 1))
        tell(min(1.0, (at + BATCH) / len(pixels)))
    share = 2 * len(pixels) * PICTURES.directions
    felt = {(n, PART): torch.cat(rows) / share**0.5 for n, rows in enumerate(sketch)}
    alone = {site: rows.square().sum(0) for site, rows in felt.items()}
    return Felt(felt, alone, len(pixels), PICTURES.directions)


def _wanting(graph: Graph, pixels: Pixels) -> Float[Tensor, "n 3 s s"]:
    """Pixels that want gradients, so that everything made of them has some."""
    return pixels.to(graph.get_buffer("scale").dtype).requires_grad_(True)


@contextmanager
def reading(graph: Graph) -> Iterator[dict[str, Tensor]]:
    """What every layer reads, each a tensor of its own: its gradient is what went through this layer alone."""
    read: dict[str, Tensor] = {}

    def note(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], tuple[Tensor, ...]]:
        def keep(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            own = args[0].view_as(args[0])
            if own.requires_grad:
                own.retain_grad()
            read[name] = own
            return (own,)

        return keep

    with removed_after([layer.register_forward_pre_hook(note(name)) for name, layer in graph.layers.items()]):
        yield read


@torch.no_grad()
def _means(graph: Graph, pixels: Pixels) -> dict[str, Float[Tensor, " c"]]:
    """Of every input of every layer, over pictures and places."""
    total: dict[str, Tensor] = {}
    for part in pixels.split(BATCH):
        with reading(graph) as read:
            graph(part)
        for name, z in read.items():
            total[name] = total.get(name, 0) + (z.flatten(2).mean(2) if z.ndim > 2 else z).sum(0)
    return {name: x / len(pixels) for name, x in total.items()}


def _felt(z: Tensor, mean: Float[Tensor, " c"]) -> Float[Tensor, "n c"]:
    """Inner products of each input, less its mean, with its gradient, over places; the gradient is used up."""
    gradient, z.grad = z.grad, None
    assert gradient is not None
    centred = (z.detach() - mean.view(-1, *[1] * (z.ndim - 2))) * gradient
    return centred.flatten(2).sum(2) if z.ndim > 2 else centred


def _of_units(group: Group, by_layer: Mapping[str, Float[Tensor, "n c"]]) -> Float[Tensor, "n u"]:
    rows = len(next(iter(by_layer.values())))
    felt = torch.zeros(rows, group.units)
    for name, part in group.columns.items():
        felt.index_add_(1, part.unit, by_layer[name][:, part.at])
    return felt


def map_effects(felt: Felt) -> Effects:
    """Effects of all units, group by group, and of all units of a group together."""
    channel, parts, rows = dict[int, Tensor](), list[list[float]](), 0
    for site, sketch in felt.sketch.items():
        channel[site[0]] = felt.effect(site)
        by_picture = felt.by_row(sketch).sum(1)
        parts.append(student_interval(by_picture))
        rows = len(by_picture)
    return Effects(channel, {}, {PART: parts}, felt.tokens, 0.0, rows)


def check_maps(
    graph: Graph,
    effects: Effects,
    pixels: Pixels,
    masks: int,
    seed: int = 0,
    tell: Callable[[float, str], None] = lambda share, note: None,
) -> Worth:
    """`probe.check` for blocks of channels."""
    groups, said = channel_groups(graph), said_of(graph, pixels)
    blocks, worth = blocks_of(effects)
    ends = np.cumsum([len(found) for found in blocks])[:-1]

    def cost(mask: np.ndarray) -> float:
        with masked(graph, _kept(groups, blocks, np.split(mask, ends))):
            return kl_of(graph, pixels, said)

    return worth_of_masks(np.concatenate(worth), cost, masks, PICTURES.unit, seed, tell)


def ladder_of(n: int) -> str:
    """What the ladder of the group with this number is called."""
    return f"{PART}.{n}"


def summed_blocks(worth: Float[np.ndarray, " b"]) -> tuple[float, ...]:
    """The damage of a group's first 0, 1, 2, ... blocks, as the sum of their effects."""
    return (0.0, *np.cumsum(np.maximum(worth, 0)).tolist())


def blocks_of(effects: Effects) -> tuple[list[list[Tensor]], list[Float[np.ndarray, " b"]]]:
    """(units of every group in blocks that go together, the cheapest first; the effects of these blocks)."""
    groups = effects.channel.values()
    blocks = [list(e.argsort().split(block_of(len(e)))) for e in groups]
    return blocks, [np.array([float(e[b].sum()) for b in found]) for e, found in zip(groups, blocks, strict=True)]


def _kept(
    groups: Sequence[Group], blocks: Sequence[Sequence[Tensor]], masks: Sequence[np.ndarray]
) -> dict[str, Bool[Tensor, " units"]]:
    """What stays of every group that loses anything; one block at least of each."""
    keep = {}
    for group, found, mask in zip(groups, blocks, masks, strict=True):
        gone = np.flatnonzero(mask)[: len(found) - 1]
        if len(gone):
            keep[group.name] = torch.ones(group.units, dtype=torch.bool)
            keep[group.name][torch.cat([found[i] for i in gone])] = False
    return keep
