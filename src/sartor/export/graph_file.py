"""Writing a convolutional network as ONNX that plain ONNX Runtime loads.

    pixels -> normalized -> nodes -> features -> logits

In eight bits every rounded value stands between QuantizeLinear and DequantizeLinear, as ONNX Runtime wants it to compute with whole numbers from one to the next; the grids are those that the
network was trained on. Weights lie in the file as whole numbers with a scale a channel. What follows the last pooling is computed in fp32: there is little of it, and all answers pass through it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from sartor.export.onnx_parts import FLOAT, IR, OPSET, UINT8, node, onnx_package, save
from sartor.model.graph import INPUT, LAYERS, Graph, Node, shapes
from sartor.model.graph_onnx import PLAIN
from sartor.numerics.eight import rounded
from sartor.stages.eight import byte_grid

Made = tuple[str, Any, Any]  # operator, attributes, constants


def write(path: Path, graph: Graph) -> None:
    """One file that reads `pixels` (uint8) and says `features`, and `logits` where there is a head; the same network makes the same bytes. In eight bits where the network is (`Graph.rounding`).

    Raises:
        MissingExtra: onnx is not installed.
    """
    save(path, build(graph))


class _File:
    """A file in the making: its nodes and constants, and what readers call a node's value."""

    def __init__(self, graph: Graph) -> None:
        self.graph, self.nodes, self.held = graph, list[Any](), dict[str, Any]()
        self.grids = graph.rounding.grids if graph.rounding else {}
        self.named = {INPUT: "pixels.normal", graph.nodes[graph.ends - 1].name: "features"}
        self.named |= {graph.nodes[-1].name: "logits"} if graph.head is not None else {}

    def add(self, op: str, inputs: list[str], output: str, name: str = "", **attributes: Any) -> None:
        self.nodes.append(node(op, inputs, [output], name=name or output, **attributes))

    def read(self, name: str) -> str:
        """What readers of a value read: where it has a grid, what is left of it there."""
        return f"{name}.rounded" if name in self.grids else self.named.get(name, name)

    def rounded(self, name: str, whole: str = "") -> None:
        """A value on its grid, where it has one. whole: what is on it already."""
        if name not in self.grids:
            return
        scale, zero = self.grids[name]
        grid = [f"{name}.step", f"{name}.zero"]
        self.held |= {grid[0]: np.float32(scale), grid[1]: np.uint8(zero)}
        if not whole:
            self.add("QuantizeLinear", [self.named.get(name, name), *grid], f"{name}.whole")
        self.add("DequantizeLinear", [whole or f"{name}.whole", *grid], f"{name}.rounded")

    def pixels(self) -> None:
        """What stands in front of the network: nothing but a grid where it reads bytes, else the pixels' normalization."""
        if INPUT in self.grids and byte_grid(self.graph):
            return self.rounded(INPUT, INPUT)
        scale, shift = (self.graph.get_buffer(name)[None] for name in ("scale", "shift"))
        self.held |= {"pixels.scale": scale, "pixels.shift": shift}
        for op, inputs, output, attributes in FRONT:
            self.add(op, inputs, output, **attributes)
        self.rounded(INPUT)

    def weight(self, name: str, weight: Tensor) -> str:
        """The name of a layer's weights as its operator reads them."""
        if not self.graph.rounding:
            self.held[f"{name}.weight"] = weight
            return f"{name}.weight"
        numbers, scales = rounded(weight)
        # zeros are what is meant where there are none, but ONNX Runtime changes weights to unsigned ones where it must, and only zero points that are there with them
        stored = {"int8": numbers, "scales": scales, "zeros": np.zeros(len(scales), np.int8)}
        self.held |= {f"{name}.{part}": value for part, value in stored.items()}
        self.add("DequantizeLinear", [f"{name}.{part}" for part in stored], f"{name}.weight", axis=0)
        return f"{name}.weight"

    def step(self, at: Node) -> None:
        """A node of the network."""
        layer: Any = self.graph.layers[at.name] if at.op in LAYERS else None
        op, attributes, constants = _written(at, layer)
        inputs = [self.read(i) for i in at.inputs]
        if layer is not None:
            inputs += [self.weight(at.name, layer.weight), f"{at.name}.bias"]
            constants = {"bias": layer.bias}
        else:
            inputs += [f"{at.name}.{k}" for k in constants]
        self.held |= {f"{at.name}.{k}": v for k, v in constants.items()}
        self.add(op, inputs, self.named.get(at.name, at.name), at.name, **attributes)
        self.rounded(at.name)


def build(graph: Graph) -> Any:
    """The file as onnx has it in memory."""
    onnx, file = onnx_package(), _File(graph)
    info = onnx.helper.make_tensor_value_info
    file.pixels()
    for at in graph.nodes:
        file.step(at)
    said = [graph.nodes[graph.ends - 1].name, *([graph.nodes[-1].name] if graph.head is not None else [])]
    sizes = shapes(graph)
    outputs = [info(file.named[n], FLOAT, ["n", *sizes[n]]) for n in said]
    arrays = {k: v.detach().numpy() if isinstance(v, Tensor) else np.asarray(v) for k, v in file.held.items()}
    tensors = [onnx.numpy_helper.from_array(np.asarray(array, order="C"), name) for name, array in arrays.items()]
    pixels = info("pixels", UINT8, ["n", 3, graph.size, graph.size])
    made = onnx.helper.make_graph(file.nodes, "sartor", [pixels], outputs, tensors)
    opsets = [onnx.helper.make_opsetid("", OPSET)]
    return onnx.helper.make_model(made, ir_version=IR, producer_name="sartor", opset_imports=opsets)


def _written(node: Node, layer: Any) -> Made:
    if node.op in BARE:
        return BARE[node.op], {}, {}
    return WRITERS[node.op](node.attributes if layer is None else layer)


def _pool(op: str, a: Mapping[str, Any], **more: Any) -> Made:
    sizes = {"kernel_shape": a["kernel"], "strides": a["stride"], "pads": a["padding"] * 2, "ceil_mode": int(a["ceil"])}
    return op, sizes | more, {}


def _around(a: Mapping[str, Any]) -> dict[str, Any]:
    top, left, bottom, right = a["pads"]
    return {"pads": [0, 0, top, left, 0, 0, bottom, right], "value": np.float32(a["value"])}


def _conv(layer: Any) -> Made:
    sizes = {"kernel_shape": layer.kernel_size, "strides": layer.stride, "pads": layer.padding * 2}
    return "Conv", sizes | {"dilations": layer.dilation, "group": layer.groups}, {}


BARE = {ours: op for op, ours in PLAIN.items()} | {"add": "Add", "mul": "Mul", "flatten": "Flatten"}
# what a node is written as, from its layer or its attributes
WRITERS: dict[str, Callable[[Any], Made]] = {
    "conv": _conv,
    "linear": lambda layer: ("Gemm", {"transB": 1}, {}),
    "clip": lambda a: ("Clip", {}, {"low": np.float32(a["low"]), "high": np.float32(a["high"])}),
    "hard_sigmoid": lambda a: ("HardSigmoid", {"alpha": a["scale"], "beta": a["shift"]}, {}),
    "concat": lambda a: ("Concat", {"axis": 1}, {}),
    "pad": lambda a: ("Pad", {}, _around(a)),
    "max_pool": lambda a: _pool("MaxPool", a, dilations=a["dilation"]),
    "average_pool": lambda a: _pool("AveragePool", a, count_include_pad=int(a["count_padding"])),
}
FRONT: tuple[Any, ...] = (
    ("Cast", ["pixels"], "pixels.float", {"to": FLOAT}),
    ("Mul", ["pixels.float", "pixels.scale"], "pixels.scaled", {}),
    ("Add", ["pixels.scaled", "pixels.shift"], "pixels.normal", {}),
)
