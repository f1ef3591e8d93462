"""What a cut convolutional network has left, fitted and rounded in one pass: every layer, in the order they run, to what the whole network has there.

Whole and cut network run side by side, node by node. A layer's target is what the whole layer says, at the outputs that stay; where a sum reads it, what the *sum* then lacks: errors of what it is
added to are made good too, a residual block that went as a whole among them. Its weights are fitted in closed form on what the cut network reads (ridge towards the weights as they are, `compensate.refit`, with the damping that says most of pictures
left out), then rounded, and the bias takes the mean of what is left. Then the value is rounded, and the next layer reads that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor, nn

from sartor.model.graph import INPUT, LAYERS, Graph, Node
from sartor.model.network import clone
from sartor.numerics.compensate import refit, strength
from sartor.numerics.eight import best_grid, held, on_grid
from sartor.stages.eight import byte_grid, reading_bytes, round_, rounded_values

PLACES = 196  # of a map, at most, that a picture says something of
CHUNK = 8  # pictures whose windows are unfolded together
ROOM = 1 << 30  # bytes that the values of one network may take
SAMPLED = 200_000  # numbers of a value that its grid is chosen on


@dataclass(frozen=True)
class Seen:
    """What a network is fitted on: pictures, and how much each counts (the sum is 1)."""

    pixels: UInt8[Tensor, "n 3 s s"]
    weight: Float[Tensor, " n"]


def seen_of(own: Tensor, others: Tensor, rho: float, most: int) -> Seen:
    """The user's pictures, and generic ones that count for the share `rho` together; at most so many."""
    rho = rho if len(own) and len(others) else float(not len(own))
    count = min(most, len(own) + len(others))
    n = max(1, round(count * len(own) / max(1, len(own) + len(others)))) if len(own) else 0
    own, others = own[:n], others[: count - n]
    shares = [(1 - rho, len(own)), (rho, len(others))]
    weight = torch.cat([torch.full((k,), share / k) for share, k in shares if k])
    mixed = torch.randperm(len(weight), generator=torch.Generator().manual_seed(0))  # halves are alike
    return Seen(torch.cat([own, others])[mixed], weight[mixed])


def room_for(graph: Graph, shapes: Mapping[str, tuple[int, ...]]) -> int:
    """How many pictures fit in ROOM, both networks' values at once."""
    largest = max(torch.Size(s).numel() for s in shapes.values())
    return max(2 * CHUNK, ROOM // (4 * largest * 3))


@dataclass
class _Sums:
    """Second moments of what a layer reads (b) and of that with what it should say (a), and the means, group by group."""

    a: Any = 0.0
    b: Any = 0.0
    t: Any = 0.0
    z: Any = 0.0
    weight: float = 0.0

    def add(self, t: Float[Tensor, "g o s"], z: Float[Tensor, "g i s"], w: Float[Tensor, " s"]) -> None:
        weighted = z * w
        self.a, self.b = self.a + t @ weighted.mT, self.b + z @ weighted.mT
        self.t, self.z, self.weight = self.t + (t * w).sum(-1), self.z + weighted.sum(-1), self.weight + float(w.sum())

    def __add__(self, other: _Sums) -> _Sums:
        return _Sums(*(getattr(self, k) + getattr(other, k) for k in ("a", "b", "t", "z", "weight")))

    def centred(self) -> tuple[Tensor, Tensor]:
        t, z = self.t / self.weight, self.z / self.weight
        return self.a / self.weight - t[..., None] * z[..., None, :], self.b / self.weight - z[..., None] * z[
            ..., None, :
        ]


@torch.no_grad()
def refit_maps(
    cut: Graph,
    whole: Graph,
    outputs: Mapping[str, Bool[Tensor, " c"]],
    seen: Seen,
    eight: bool = True,
    tell: Callable[[float], None] = lambda share: None,
) -> Graph:
    """A fitted copy of `cut`, in eight bits unless told otherwise.

    Args:
        cut, whole: of the same nodes, but for residual blocks that the cut one lacks. outputs: which of a whole layer's outputs the cut one has (`kept_channels`).
    """
    new: Graph = clone(cut)
    new = reading_bytes(new) if eight else new
    grids, rounded = dict[str, tuple[float, int]](), rounded_values(new) if eight else {}
    values = {graph: {INPUT: graph.embed(seen.pixels)} for graph in (whole, new)}
    generator = torch.Generator().manual_seed(0)
    if eight:
        grids[INPUT] = byte_grid(new) or best_grid(_some(values[new][INPUT], generator))
        values[new][INPUT] = on_grid(values[new][INPUT], *grids[INPUT])
    ours = {node.name: node for node in new.nodes}
    last = {graph: _last_read(whole, {node.name: node for node in graph.nodes}) for graph in (whole, new)}
    for i, node in enumerate(whole.nodes):
        values[whole][node.name] = theirs = _made(whole, node, values[whole])
        if mine := ours.get(node.name):
            if node.op in LAYERS:
                kept = outputs[node.name]
                target = theirs[:, kept] + _lacking(whole, new, node, values[whole], values[new], kept)
                _fit_(new, mine, values[new][mine.inputs[0]], target, seen.weight, eight, generator)
            made = _made(new, mine, values[new])
            if node.name in rounded:
                origin = rounded[node.name]
                grids[node.name] = grids[origin] if origin != node.name else best_grid(_some(made, generator))
                made = on_grid(made, *grids[node.name])
            values[new][node.name] = made
        for graph, kept_values in values.items():
            for name in [name for name in kept_values if last[graph].get(name, i) <= i and name != node.name]:
                kept_values.pop(name)
        tell((i + 1) / len(whole.nodes))
    if eight:
        round_(new, grids)
    return new


def _made(graph: Graph, node: Node, values: Mapping[str, Tensor]) -> Tensor:
    inputs = [values[i] for i in node.inputs]
    return torch.cat([graph.made(node, *parts) for parts in zip(*(x.split(CHUNK) for x in inputs), strict=True)])


def _last_read(whole: Graph, nodes: Mapping[str, Node]) -> dict[str, int]:
    """At which node of the whole network a value of these nodes is read last."""
    run = ((i, nodes.get(node.name)) for i, node in enumerate(whole.nodes))
    return {name: i for i, node in run if node for name in node.inputs}


def _lacking(
    whole: Graph,
    cut: Graph,
    node: Node,
    theirs: Mapping[str, Tensor],
    ours: Mapping[str, Tensor],
    kept: Bool[Tensor, " c"],
) -> Any:
    """What the values that this layer's output is added to lack, where nothing but that sum reads it and they are known already."""
    readers = [n for n in cut.nodes if node.name in n.inputs]
    if len(readers) != 1 or readers[0].op != "add":
        return 0.0
    same = next(n for n in whole.nodes if n.name == readers[0].name)  # it may add to what a block made that went
    others = [pair for pair in zip(same.inputs, readers[0].inputs, strict=True) if node.name not in pair]
    if any(i not in ours or ours[i].shape[1] != int(kept.sum()) or w not in theirs for w, i in others):
        return 0.0
    return sum(theirs[w][:, kept] - ours[i] for w, i in others)


def _fit_(
    graph: Graph, node: Node, x: Tensor, target: Tensor, weight: Float[Tensor, " n"], eight: bool, generator: Any
) -> None:
    """New weights and bias of a layer, in place."""
    layer: Any = graph.layers[node.name]
    groups = getattr(layer, "groups", 1)
    halves = _Sums(), _Sums()
    for n, (t, z, w) in enumerate(_windows(layer, x, target, weight, generator)):
        halves[n % 2].add(t.unflatten(0, (groups, -1)), z.unflatten(0, (groups, -1)), w)
    both = halves[0] + halves[1]
    w = layer.weight.data.flatten(1).unflatten(0, (groups, -1))
    lam = strength(w, halves[0].centred(), halves[1].centred())
    w = refit(w, *both.centred(), lam)
    fitted = w.flatten(0, 1).reshape(layer.weight.shape)
    layer.weight.data = held(fitted) if eight else fitted
    w = layer.weight.data.flatten(1).unflatten(0, (groups, -1))
    layer.bias.data = ((both.t - (w @ both.z[..., None])[..., 0]) / both.weight).flatten()


def _windows(
    layer: Any, x: Tensor, target: Tensor, weight: Float[Tensor, " n"], generator: Any
) -> Iterator[tuple[Float[Tensor, "o s"], Float[Tensor, "i s"], Float[Tensor, " s"]]]:
    """(targets, inputs, how much each counts) at some places of some pictures at a time; a channel's inputs lie side by side, as in the weights."""
    size = min(CHUNK, -(-len(x) // 2))  # two parts at least, one to fit on and one to choose by
    for t, part, w in zip(target.split(size), x.split(size), weight.split(size), strict=True):
        if isinstance(layer, nn.Linear):
            yield t.T, part.T, w
            continue
        z, t = unfolded(layer, part), t.flatten(2)
        at = torch.randperm(z.shape[-1], generator=generator)[:PLACES]
        count = (w / len(at))[:, None].expand(-1, len(at))
        yield t[:, :, at].transpose(0, 1).flatten(1), z[:, :, at].transpose(0, 1).flatten(1), count.flatten()


def unfolded(layer: Any, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n i p"]:
    """What each output of a convolution reads, place by place; a channel's inputs lie side by side, as in the weights."""
    sizes = {k: getattr(layer, k) for k in ("kernel_size", "dilation", "padding", "stride")}
    return nn.functional.unfold(x, **sizes)


def _some(x: Tensor, generator: Any) -> Float[Tensor, " n"]:
    flat = x.flatten()
    return flat if len(flat) <= SAMPLED else flat[torch.randint(len(flat), (SAMPLED,), generator=generator)]
