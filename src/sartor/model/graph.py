"""A convolutional network as data: nodes in the order they run, and the layers that hold their weights.

    pixels -> normalized -> nodes -> map -> pooled features -> head

Every node makes one value, called as the node is. Convolutions and linear layers are torch's own modules, under `layers.<node>`, so that hooks work on them; all other nodes have
no weights. Batch norms are folded into what they follow when a network is read (`Draft.affine`). A last linear layer is the head; a network that ends otherwise has none, and says its features.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from torch.func import functional_call

from sartor.errors import InputError

INPUT = "pixels"  # the value that nobody makes: normalized pixels
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's pixels, between 0 and 1
Triple = tuple[float, float, float]


def _max_pool(a: Mapping[str, Any], x: Tensor) -> Tensor:
    return nn.functional.max_pool2d(x, a["kernel"], a["stride"], a["padding"], a["dilation"], a["ceil"])


def _average_pool(a: Mapping[str, Any], x: Tensor) -> Tensor:
    return nn.functional.avg_pool2d(x, a["kernel"], a["stride"], a["padding"], a["ceil"], a["count_padding"])


def _pad(a: Mapping[str, Any], x: Tensor) -> Tensor:
    top, left, bottom, right = a["pads"]
    return nn.functional.pad(x, (left, right, top, bottom), value=a["value"])


# what a node without weights makes of its attributes and inputs
OPS: dict[str, Callable[..., Tensor]] = {
    "relu": lambda a, x: nn.functional.relu(x),
    "clip": lambda a, x: nn.functional.hardtanh(x, a["low"], a["high"]),  # clamp's backward pass takes four steps
    "sigmoid": lambda a, x: torch.sigmoid(x),
    "hard_sigmoid": lambda a, x: (a["scale"] * x + a["shift"]).clamp(0, 1),
    "hard_swish": lambda a, x: nn.functional.hardswish(x),
    "add": lambda a, x, y: x + y,
    "mul": lambda a, x, y: x * y,
    "concat": lambda a, *x: torch.cat(x, 1),
    "pad": _pad,
    "max_pool": _max_pool,
    "average_pool": _average_pool,
    "global_average_pool": lambda a, x: x.mean((2, 3), keepdim=True),
    "flatten": lambda a, x: x.flatten(1),
}
LAYERS = ("conv", "linear")
MOST = 2**27  # numbers of a map
WIDEST = 2**13  # numbers of a row that have a factor each


@dataclass(frozen=True)
class Node:
    """One step. op: a row of OPS, or of LAYERS. inputs: names of earlier nodes, or INPUT. attributes: what the row reads."""

    name: str
    op: str
    inputs: tuple[str, ...]
    attributes: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Rounding:
    """How a network computes in eight bits; the values and weights themselves stay floating-point numbers here.

    Attributes:
        grids: (scale, zero point) of every value that is rounded, by the name of its node, or INPUT. value: rounds to such a grid. weight: rounds a layer's weights. Both let gradients through.
    """

    grids: Mapping[str, tuple[float, int]]
    value: Callable[[Tensor, float, int], Tensor]
    weight: Callable[[Tensor], Tensor]


def normalization(mean: Triple = MEAN, std: Triple = STD) -> tuple[Triple, Triple]:
    """(scale, shift) of pixels from 0 to 255 that give them this mean and deviation between 0 and 1."""
    m, s = torch.tensor(mean, dtype=torch.float64), torch.tensor(std, dtype=torch.float64)
    return _triple(1 / (255 * s)), _triple(-m / s)


def _triple(x: Tensor) -> Any:
    return tuple(x.float().tolist())


class Graph(nn.Module):
    """A network of these nodes on pictures of 3 x size x size.

    Args:
        layers: the module of every node whose op is in LAYERS. scale, shift: of the three colours of pixels from 0 to 255, in front of everything.
    """

    family = "convolutional"

    def __init__(
        self, nodes: Iterable[Node], layers: Mapping[str, nn.Module], size: int, scale: Triple, shift: Triple
    ) -> None:
        super().__init__()
        self.nodes, self.size = tuple(nodes), size
        self.layers = nn.ModuleDict({n.name: layers[n.name] for n in self.nodes if n.op in LAYERS})
        self.seen = nn.Identity()  # of the features: masks reach them here
        self.rounding: Rounding | None = None
        self.ends = len(self.nodes) - (self.nodes[-1].op == "linear")  # nodes in front of the head
        self.register_buffer("scale", torch.tensor(scale)[:, None, None], persistent=False)
        self.register_buffer("shift", torch.tensor(shift)[:, None, None], persistent=False)

    @property
    def head(self) -> Any:
        """What the last linear layer makes of features, or None where there is none."""
        return partial(self.layer, self.nodes[-1].name) if self.ends < len(self.nodes) else None

    @property
    def before_pool(self) -> int:
        """How many nodes run before the last pooling, which reads nothing but the map that they make; all in front of the head where there is none."""
        for op in ("global_average_pool", "flatten"):
            for n in range(self.ends - 1, 0, -1):
                if self.nodes[n].op == op:
                    own = {self.nodes[n - 1].name, *(m.name for m in self.nodes[n : self.ends])}
                    if all(set(m.inputs) <= own for m in self.nodes[n : self.ends]):
                        return n
        return self.ends

    def embed(self, pixels: UInt8[Tensor, "n 3 s s"] | Float[Tensor, "n 3 s s"]) -> Float[Tensor, "n 3 s s"]:
        """What the first node reads of pixels from 0 to 255."""
        scale: Any = self.scale
        return self._rounded(INPUT, pixels.to(scale.dtype) * scale + self.shift)

    def _rounded(self, name: str, x: Tensor) -> Tensor:
        r = self.rounding
        return r.value(x, *r.grids[name]) if r and name in r.grids else x

    def layer(self, name: str, x: Tensor) -> Tensor:
        """What a layer makes of x, with its weights rounded where the network is."""
        layer: Any = self.layers[name]
        if not self.rounding:
            return layer(x)
        return functional_call(layer, {"weight": self.rounding.weight(layer.weight)}, (x,))

    def made(self, node: Node, *inputs: Tensor) -> Tensor:
        """What a node makes of its inputs."""
        return self.layer(node.name, *inputs) if node.op in LAYERS else OPS[node.op](node.attributes, *inputs)

    def run(self, x: Tensor, first: int, end: int, tell: Callable[[str, Tensor], None] | None = None) -> Tensor:
        """What nodes `first` to `end` make of `x`, which is the value of the node before them. `tell` is told every value."""
        values = {self.nodes[first - 1].name if first else INPUT: x}
        last = {name: i for i, node in enumerate(self.nodes[first:end], first) for name in node.inputs}
        for i, node in enumerate(self.nodes[first:end], first):
            inputs = [values[name] for name in node.inputs]
            for name in node.inputs:
                if last[name] == i:  # nobody reads it again: its memory is free
                    values.pop(name, None)
            values[node.name] = x = self._rounded(node.name, self.made(node, *inputs))
            if tell is not None:
                tell(node.name, x)
        return x

    def hidden(self, pixels: UInt8[Tensor, "n 3 s s"]) -> Float[Tensor, "n c h w"]:
        """The last map, which `pool` reads."""
        return self.run(self.embed(pixels), 0, self.before_pool)

    def pool(self, hidden: Float[Tensor, "n c h w"]) -> Float[Tensor, "n f"]:
        return self.seen(self.run(hidden, self.before_pool, self.ends))

    def features(self, pixels: UInt8[Tensor, "n 3 s s"]) -> Float[Tensor, "n f"]:
        """What the head reads."""
        return self.pool(self.hidden(pixels))

    def forward(self, pixels: UInt8[Tensor, "n 3 s s"]) -> Float[Tensor, "n c"]:
        """Logits of the classes, or features where there is no head."""
        features = self.features(pixels)
        return features if self.head is None else self.head(features)


class Draft:
    """A graph in the making, on pictures of `size` pixels a side.

    names are made fit for modules, and unique. shape: of every value of one picture.
    """

    def __init__(self, size: int, scale: Triple = (1.0,) * 3, shift: Triple = (0.0,) * 3) -> None:
        self.nodes: dict[str, Node] = {}
        self.layers: dict[str, nn.Module] = {}
        self.shape: dict[str, tuple[int, ...]] = {INPUT: (3, size, size)}
        self.scale, self.shift = (torch.tensor(x, dtype=torch.float64) for x in (scale, shift))
        self.taken = {INPUT, "features", "logits", *dir(nn.ModuleDict())}

    def add(self, op: str, *inputs: str, name: str = "", layer: nn.Module | None = None, **attributes: Any) -> str:
        """Name of the new node."""
        plain = re.sub(r"\W+", "_", name).strip("_") or f"{op}_{len(self.nodes)}"
        unique, count = plain, 2
        while unique in self.taken:
            unique, count = f"{plain}_{count}", count + 1
        if (least := self._least(op, inputs, layer)) > MOST:  # before it is made
            raise ValueError(f"a map of {least} numbers, at most {MOST} were needed")
        zeros = [torch.zeros(1).expand(1, *self.shape[i]) for i in inputs]
        made = OPS[op](attributes, *zeros) if layer is None else layer(*zeros)
        if made.numel() > MOST:
            raise ValueError(f"a map of {made.numel()} numbers, at most {MOST} were needed")
        self.taken.add(unique)
        self.nodes[unique], self.shape[unique] = Node(unique, op, inputs, attributes), tuple(made.shape[1:])
        if layer is not None:
            self.layers[unique] = layer
        return unique

    def _least(self, op: str, inputs: Sequence[str], layer: Any) -> int:
        """Numbers that an operator makes at least, told without running it."""
        if op == "conv":
            height, width = self.shape[inputs[0]][1:]
            reach = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
            sides = ((n - r) // s for n, r, s in zip((height, width), reach, layer.stride, strict=True))
            return int(layer.out_channels * math.prod(max(0, side) for side in sides))
        return sum(math.prod(self.shape[i]) for i in inputs) if op == "concat" else 0

    def conv(self, x: str, weight: Tensor, bias: Tensor | None = None, name: str = "", **sizes: Any) -> str:
        return self.add("conv", x, name=name, layer=conv_of(weight, bias, **sizes))

    def linear(self, x: str, weight: Tensor, bias: Tensor | None = None, name: str = "") -> str:
        return self.add("linear", x, name=name, layer=linear_of(weight, bias))

    def affine(self, x: str, scale: Any, shift: Any, alone: bool = True, name: str = "") -> str:
        """scale * x + shift, as numpy broadcasts them, one number or one a channel: where it is the only reader (`alone`), in the layer that makes x or in the pixels' normalization; else a step of its own."""
        shape = self.shape[x]
        a, b = (_each(v, shape) for v in (scale, shift))
        if alone and x == INPUT:
            self.scale, self.shift = self.scale * a, self.shift * a + b
        elif alone and x in self.layers:
            layer: Any = self.layers[x]
            rows = a.view(-1, *[1] * (layer.weight.ndim - 1))
            layer.weight.data = (layer.weight.data.double() * rows).float()
            layer.bias.data = (layer.bias.data.double() * a + b).float()
        elif len(shape) == 1 and len(a) > WIDEST:
            raise ValueError(f"a factor for each of {len(a)} numbers, at most {WIDEST} were needed")
        elif len(shape) == 1:
            return self.linear(x, torch.diag(a).float(), b.float(), name)
        else:
            return self.conv(x, a.float()[:, None, None, None], b.float(), name, groups=len(a))
        return x

    def same(
        self, x: str, kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int], upper: bool
    ) -> list[int]:
        """Pads (top, left, bottom, right) that make a window over x as many numbers as there are strides in it; an odd one is at the end (`upper`), or at the beginning."""
        total = [
            max(0, (-(-n // s) - 1) * s + (k - 1) * d + 1 - n)
            for n, s, k, d in zip(self.shape[x][1:], stride, kernel, dilation, strict=True)
        ]
        small, large = [t // 2 for t in total], [t - t // 2 for t in total]
        return small + large if upper else large + small

    def padded(self, x: str, pads: Sequence[int], kernel: Sequence[int], value: float) -> tuple[str, tuple[int, int]]:
        """(what to read, the padding left to the reader); torch pads both sides alike, and no maximum by more than half a window."""
        top, left, bottom, right = pads
        if (top, left) == (bottom, right) and (
            not value or all(2 * p <= k for p, k in zip(pads, kernel, strict=False))
        ):
            return x, (top, left)
        return self.add("pad", x, pads=(top, left, bottom, right), value=value), (0, 0)

    def graph(self, output: str) -> Graph:
        """The network that makes the value `output`; nodes that it does not need are left out."""
        needed, nodes = {output}, []
        for node in reversed(list(self.nodes.values())):
            if node.name in needed:
                needed |= set(node.inputs)
                nodes.append(node)
        if not nodes:
            raise InputError(f"there is no node '{output}' in the network: take one of its nodes")
        triples = _triple(self.scale), _triple(self.shift)
        return Graph(nodes[::-1], self.layers, self.shape[INPUT][1], *triples).eval().requires_grad_(False)


def _each(value: Any, shape: tuple[int, ...]) -> Float[Tensor, " c"]:
    """One number a channel of what is broadcast over (n, *shape)."""
    given = torch.as_tensor(value, dtype=torch.float64)
    wide = given.view(*[1] * (1 + len(shape) - given.ndim), *given.shape)
    if wide.ndim != 1 + len(shape) or wide.numel() not in (1, shape[0]) or wide.shape[1] != wide.numel():
        raise ValueError(
            f"a constant of shape {list(given.shape)} for values of {list(shape)}, one number a channel was needed"
        )
    return wide.flatten().expand(shape[0])


def conv_of(
    weight: Float[Tensor, "o i h w"],
    bias: Tensor | None = None,
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    groups: int = 1,
) -> nn.Conv2d:
    """A convolution with this weight; it always has a bias."""
    out, inside, *kernel = weight.shape
    sizes: Any = {"kernel_size": kernel, "stride": stride, "padding": padding, "dilation": dilation}
    sizes = {name: tuple(two) for name, two in sizes.items()} | {"groups": groups}
    return _filled(nn.Conv2d(inside * groups, out, **sizes, device="meta"), weight, bias)


def linear_of(weight: Float[Tensor, "o i"], bias: Tensor | None = None) -> nn.Linear:
    """A linear layer with this weight; it always has a bias."""
    return _filled(nn.Linear(weight.shape[1], weight.shape[0], device="meta"), weight, bias)


def _filled(layer: Any, weight: Tensor, bias: Tensor | None) -> Any:
    bias = torch.zeros(len(weight), dtype=weight.dtype, device=weight.device) if bias is None else bias.detach().clone()
    layer.weight = nn.Parameter(weight.detach().clone().contiguous(), requires_grad=False)
    layer.bias = nn.Parameter(bias, requires_grad=False)
    return layer


@torch.no_grad()
def shapes(graph: Graph) -> dict[str, tuple[int, ...]]:
    """Of every value of one picture: (channels, height, width), or (features,)."""
    scale: Any = graph.scale
    x = torch.zeros(1, 3, graph.size, graph.size, dtype=scale.dtype)
    found = {INPUT: tuple(x.shape[1:])}
    graph.run(x, 0, len(graph.nodes), lambda name, value: found.update({name: tuple(value.shape[1:])}))
    return found


def macs(graph: Graph) -> dict[str, int]:
    """Multiplications with an addition that every layer takes for one picture, those on padding counted."""
    found, at = {}, shapes(graph)
    for name, layer in graph.layers.items():
        weight: Any = layer.weight
        places = at[name][1] * at[name][2] if weight.ndim == 4 else 1
        found[name] = weight.numel() * places
    return found
