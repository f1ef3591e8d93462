"""A convolutional network that computes in eight bits, as a program whose values and weights stand on their grids, the way torch's own quantizer writes it (PT2E) and ExecuTorch's backends know it.

    pixels -> normalized -> [to whole numbers -> back] -> conv on whole weights, back -> [to whole numbers -> back] -> ... -> features, logits

The grids are those that the network was trained on: nothing is calibrated again. torch counts from -128 where ONNX counts from 0.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.ao.quantization.fx._decomposed  # the operators on whole numbers, which programs name
from jaxtyping import Float
from torch import Tensor, nn

from sartor.model.graph import INPUT, LAYERS, Graph
from sartor.model.network import clone
from sartor.numerics.eight import rounded

LOW, HIGH, HALF = -128, 127, 128
ON_GRID = torch.ops.quantized_decomposed


class WholeLayer(nn.Module):
    """A convolution or linear layer whose weights are kept as whole numbers with a scale a row."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        codes, scales = rounded(layer.weight)
        self.layer = layer
        del layer.weight
        for name, value in (
            ("codes", codes),
            ("scales", scales),
            ("zeros", torch.zeros_like(scales, dtype=torch.int64)),
        ):
            self.register_buffer(name, value)

    def forward(self, x: Tensor) -> Tensor:
        grid = self.get_buffer("scales"), self.get_buffer("zeros"), 0, -HIGH, HIGH, torch.int8
        weight = ON_GRID.dequantize_per_channel(self.get_buffer("codes"), *grid)
        if isinstance(self.layer, nn.Conv2d):
            return self.layer._conv_forward(x, weight, self.layer.bias)
        return nn.functional.linear(x, weight, self.layer.bias)


class OnGrids(nn.Module):
    """Logits, where there is a head, and features, of pixels from 0 to 255."""

    def __init__(self, graph: Graph) -> None:
        """Args: graph: one that computes in eight bits (`Graph.rounding`)."""
        super().__init__()
        self.network = clone(graph, torch.float32)
        assert self.network.rounding is not None
        self.grids = self.network.rounding.grids
        self.network.rounding = None
        self.layers = nn.ModuleDict({name: WholeLayer(layer) for name, layer in self.network.layers.items()})
        self.network.layers = nn.ModuleDict()  # each has one place

    def _grid(self, name: str) -> tuple[Any, ...]:
        scale, zero = self.grids[name]
        return scale, zero - HALF, LOW, HIGH, torch.int8

    def kept(self, name: str, x: Tensor) -> Tensor:
        """A value as its readers find it: whole numbers where it has a grid."""
        return ON_GRID.quantize_per_tensor(x, *self._grid(name)) if name in self.grids else x

    def read(self, name: str, x: Tensor) -> Tensor:
        """By each reader for itself: backends look for what belongs to one operator, and no two may share it."""
        return ON_GRID.dequantize_per_tensor(x, *self._grid(name)) if name in self.grids else x

    def forward(self, pixels: Tensor) -> tuple[Float[Tensor, "n c"], ...]:
        graph, values = self.network, {INPUT: self.kept(INPUT, self.network.embed(pixels))}
        for node in graph.nodes:
            read = [self.read(name, values[name]) for name in node.inputs]
            made = self.layers[node.name](*read) if node.op in LAYERS else graph.made(node, *read)
            values[node.name] = self.kept(node.name, made)
        last = graph.nodes[graph.ends - 1].name
        features = self.read(last, values[last])
        return (features,) if graph.head is None else (values[graph.nodes[-1].name], features)
