"""Convolutional networks from ONNX files.

Operators are taken as they are, a batch norm or a constant factor goes into the layer in front of it, and what an exporter computes of shapes is computed here, once, for one picture of
the file's size. Nothing is run but that, and nothing outside the file is opened. What cannot be read is named.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sartor.errors import MissingExtra, SourceError
from sartor.model.graph import INPUT, MEAN, STD, Draft, Graph, Triple, normalization
from sartor.model.onnx_weights import _array, _parsed

OPSET = 17
SAME = ("Identity", "Dropout", "Cast")
SIZE, UINT8, FLOATS = 224, 2, (1, 10, 11, 16)  # pixels of a side, where nobody says; onnx.TensorProto.DataType
ROOM = 1 << 28  # numbers, of all constants that are made of others
LARGEST = 2048  # pixels of a side, and numbers that shape arithmetic may make
NEEDED = "give a network of convolutions, batch norms, ReLU and its kind, sums, products, poolings, concatenations and linear layers"


def read_graph(path: Path, mean: Triple = MEAN, std: Triple = STD, size: int | None = None) -> Graph:
    """The network inside an ONNX file.

    Args:
        mean, std: what its floating-point pixels, taken between 0 and 1, are normalized with before they are given to it; a file that reads uint8 normalizes them itself.
        size: pixels of a side, where the file does not say.
    Raises:
        SourceError: damaged, too large, with weights in other files, or an operator that Sartor does not know. MissingExtra: onnx is not installed.
    """
    raw, values = _parsed(path)
    try:
        return _Reading(raw, values, path.name, size).graph(mean, std)
    except (LookupError, ValueError, TypeError, RuntimeError, ArithmeticError) as error:
        why = str(error.args[0] if error.args else type(error).__name__).splitlines()[0][:100]
        raise SourceError(f"'{path.name}' is not a network that Sartor reads ({why}): {NEEDED}") from error


class _Reading:
    """A file as far as it is read.

    known: constants by name. name: the node of the draft that makes a value. readers: how many nodes read a value, under any of its names.
    """

    def __init__(self, raw: Any, values: Mapping[str, Any], file: str, size: int | None) -> None:
        self.raw, self.file, self.readers = raw, file, _readers(raw)
        self.known: dict[str, np.ndarray] = {name: _array(v) for name, v in values.items()}
        self.room = ROOM
        inputs = [i for i in raw.input if i.name not in self.known]
        if len(inputs) != 1:
            raise ValueError(f"{len(inputs)} inputs, one was needed")
        self.name, tensor = {inputs[0].name: INPUT}, inputs[0].type.tensor_type
        self.whole = tensor.elem_type == UINT8
        sides = [d.dim_value for d in tensor.shape.dim]
        if len(sides) != 4 or sides[1] not in (0, 3) or len({s for s in sides[2:] if s}) > 1:
            raise ValueError(f"an input of {sides}, square pictures (n, 3, side, side) were needed")
        self.size = sides[2] or sides[3] or size or SIZE
        if self.size > LARGEST:
            raise ValueError(f"pictures of {self.size} pixels a side, at most {LARGEST} were needed")

    def graph(self, mean: Triple, std: Triple) -> Graph:
        self.draft = Draft(self.size, *(() if self.whole else normalization(mean, std)))
        named = [o.name for o in self.raw.output]
        end = "logits" if "logits" in named else named[0]
        for node in self.raw.node:
            if node.op_type != "Constant":
                self.node(node, end)
            elif node.output[0] not in self.known:
                self.known[node.output[0]] = np.array(next(iter(_attributes(node).values())))
        return self.draft.graph(self.name[end])

    def node(self, node: Any, end: str) -> None:
        """One step of the file: a constant, something known, or SourceError."""
        inputs, attributes = list(node.input), _attributes(node)
        op = node.op_type if node.domain in ("", "ai.onnx") else ""
        fed = any(i in self.name for i in inputs)
        if op == "Softmax" and node.output[0] == end:  # classes are told by their logits
            self.name[end] = self.name[inputs[0]]
        elif fed and op == "Shape":
            sizes = np.array([1, *self.shape(inputs[0])], np.int64)
            self.known[node.output[0]] = sizes[attributes.get("start", 0) : attributes.get("end")]
        elif not fed and op in FOLDED:
            made = _folded(node, {i: self.known[i] for i in inputs if i})
            self.room -= made.size
            if self.room < 0:
                raise ValueError(f"constants made of constants, of more than {ROOM} numbers")
            self.known[node.output[0]] = made
        elif fed and op in READERS:
            self.name[node.output[0]] = READERS[op](self, node, attributes, inputs)
        else:
            raise SourceError(f"'{self.file}' has the operator '{node.op_type}', which is not read here: {NEEDED}")

    def shape(self, value: str) -> tuple[int, ...]:
        """(channels, height, width) or (features,)."""
        return self.draft.shape[self.name[value]]

    def put(self, op: str, node: Any, *inputs: str, **attributes: Any) -> str:
        return self.draft.add(op, *inputs, name=node.name, **attributes)

    def number(self, inputs: Sequence[str], at: int, default: Any) -> Any:
        """A constant input, or its default where it is left out."""
        return self.known[inputs[at]] if len(inputs) > at and inputs[at] else default

    def affine(self, node: Any, x: str, scale: Any, shift: Any) -> str:
        return self.draft.affine(self.name[x], scale, shift, self.readers[x] == 1, node.name)


def _readers(raw: Any) -> Counter[str]:
    """How many nodes read a value, under any of its names; whoever reads the file's outputs is one."""
    first: dict[str, str] = {}
    for node in raw.node:
        if node.op_type in SAME:
            first[node.output[0]] = first.get(node.input[0], node.input[0])
    read = [i for n in raw.node if n.op_type not in (*SAME, "Shape") for i in n.input] + [o.name for o in raw.output]
    counted = Counter(first.get(i, i) for i in read)
    return counted + Counter({name: counted[origin] for name, origin in first.items()})


def _onnx() -> Any:
    try:
        import onnx
    except ImportError as error:
        raise MissingExtra("onnx is not installed: pip install onnx==1.23.2") from error
    return onnx


def _attributes(node: Any) -> dict[str, Any]:
    return {a.name: _onnx().helper.get_attribute_value(a) for a in node.attribute}


def _stem(node: Any, weight: str) -> str:
    """What a layer is called: as its weight where that has a name, as its node otherwise."""
    return weight.removesuffix(".weight") if weight.endswith(".weight") else node.name


def _window(r: _Reading, a: Mapping[str, Any], x: str, kernel: Sequence[int], outside: float) -> tuple[str, Any]:
    """(what a convolution or pooling reads, its sizes)."""
    sizes = {"stride": tuple(a.get("strides", [1, 1])), "dilation": tuple(a.get("dilations", [1, 1]))}
    auto, pads = a.get("auto_pad", b"").decode(), a.get("pads", [0] * 4)
    if len(r.shape(x)) != 3 or len(kernel) != 2:
        raise ValueError("a convolution or pooling that is not over two dimensions")
    if auto.startswith("SAME"):
        pads = r.draft.same(r.name[x], kernel, **sizes, upper=auto == "SAME_UPPER")
    if min(pads) < 0 or max(*pads, *kernel) > LARGEST:
        raise ValueError(f"pads {pads} around a window of {list(kernel)}")
    name, padding = r.draft.padded(r.name[x], [0] * 4 if auto == "VALID" else pads, kernel, outside)
    return name, sizes | {"padding": padding}


def _conv(r: _Reading, node: Any, a: Mapping[str, Any], inputs: Sequence[str]) -> str:
    weight, bias = _float(r.known[inputs[1]]), r.number(inputs, 2, None)
    x, sizes = _window(r, a, inputs[0], weight.shape[2:], 0.0)
    sizes |= {"groups": a.get("group", 1), "name": _stem(node, inputs[1])}
    return r.draft.conv(x, weight, None if bias is None else _float(bias), **sizes)


def _float(value: Any) -> Tensor:
    return torch.tensor(np.asarray(value), dtype=torch.float32)


def _max_pool(r: _Reading, node: Any, a: Mapping[str, Any], inputs: Sequence[str]) -> str:
    x, sizes = _window(r, a, inputs[0], a["kernel_shape"], -float("inf"))
    return r.put("max_pool", node, x, kernel=tuple(a["kernel_shape"]), ceil=bool(a.get("ceil_mode", 0)), **sizes)


def _average_pool(r: _Reading, node: Any, a: Mapping[str, Any], inputs: Sequence[str]) -> str:
    x, sizes = _window(r, a, inputs[0], a["kernel_shape"], 0.0)
    counted = bool(a.get("count_include_pad", 0))
    if (x != r.name[inputs[0]] and not counted) or sizes.pop("dilation") != (1, 1):
        raise ValueError("an AveragePool with unequal padding, or dilated")
    sizes |= {"ceil": bool(a.get("ceil_mode", 0)), "count_padding": counted}
    return r.put("average_pool", node, x, kernel=tuple(a["kernel_shape"]), **sizes)


def _mean(r: _Reading, node: Any, a: Mapping[str, Any], inputs: Sequence[str]) -> str:
    axes = a.get("axes", r.number(inputs, 1, []))
    if len(r.shape(inputs[0])) != 3 or sorted(int(i) % 4 for i in axes) != [2, 3]:
        raise ValueError("a ReduceMean that is not over height and width")
    pooled = r.put("global_average_pool", node, r.name[inputs[0]])
    return pooled if a.get("keepdims", 1) else r.put("flatten", node, pooled)


def _flat(r: _Reading, node: Any, a: Mapping[str, Any], inputs: Sequence[str]) -> str:
    """Flatten, Reshape and Squeeze, if they make one row of numbers of a picture."""
    shape = [1, *r.shape(inputs[0])]
    if node.op_type == "Flatten":
        flat = a.get("axis", 1) % len(shape) == 1
    elif node.op_type == "Reshape":
        wanted = [shape[i] if n == 0 else int(n) for i, n in enumerate(r.known[inputs[1]].tolist())]
        flat = len(wanted) == 2 and wanted[0] in (1, -1) and wanted[1] in (-1, math.prod(shape))
    else:
        axes = [int(i) % 4 for i in a.get("axes", r.number(inputs, 1, []))]
        flat = sorted(axes) == [2, 3] and shape[2:] == [1, 1]
    if not flat:
        raise ValueError(f"a {node.op_type} that does not make one row of a picture")
    same = len(shape) == 2 and r.readers[inputs[0]] == 1  # else a factor behind it would be everyone's
    return r.name[inputs[0]] if same else r.put("flatten", node, r.name[inputs[0]])


def _gemm(r: _Reading, node: Any, a: Mapping[str, Any], inputs: Sequence[str]) -> str:
    """Gemm, and MatMul with a constant."""
    weight = _float(r.known[inputs[1]])
    if len(r.shape(inputs[0])) != 1 or a.get("transA", 0):
        raise ValueError(f"a {node.op_type} that does not read one row a picture")
    weight = (weight if a.get("transB", 0) else weight.T) * a.get("alpha", 1.0)
    bias = _float(r.number(inputs, 2, 0.0)).reshape(-1).expand(len(weight)) * a.get("beta", 1.0)
    return r.draft.linear(r.name[inputs[0]], weight, bias, _stem(node, inputs[1]))


def _batch_norm(r: _Reading, node: Any, a: Mapping[str, Any], inputs: Sequence[str]) -> str:
    if a.get("training_mode", 0):
        raise ValueError("a BatchNormalization that is still training: export the network in evaluation mode")
    gamma, beta, mean, variance = (np.asarray(r.known[i], np.float64) for i in inputs[1:5])
    scale = gamma / np.sqrt(variance + a.get("epsilon", 1e-5))
    shape = (-1, *[1] * (len(r.shape(inputs[0])) - 1))
    return r.affine(node, inputs[0], scale.reshape(shape), (beta - mean * scale).reshape(shape))


def _arithmetic(r: _Reading, node: Any, a: Mapping[str, Any], inputs: Sequence[str]) -> str:
    """Add, Sub, Mul and Div, of two values or with a constant."""
    op = node.op_type
    if inputs[0] in r.name and inputs[1] in r.name:
        sizes = [r.shape(i) for i in inputs]
        if op not in ("Add", "Mul") or len(sizes[0]) != len(sizes[1]):
            raise ValueError(f"{op} of {sizes[0]} and {sizes[1]}")
        return r.put(op.lower(), node, *(r.name[i] for i in inputs))
    first = inputs[0] in r.name
    x, number = (inputs[0], inputs[1]) if first else (inputs[1], inputs[0])
    value = np.asarray(r.known[number], np.float64)
    if op == "Div" and not first:
        raise ValueError("Div of a constant by a value")
    scale, shift = {
        "Add": (1.0, value),
        "Sub": (1.0, -value) if first else (-1.0, value),
        "Mul": (value, 0.0),
        "Div": (1 / value, 0.0),
    }[op]
    return r.affine(node, x, scale, shift)


def _concat(r: _Reading, node: Any, a: Mapping[str, Any], inputs: Sequence[str]) -> str:
    if a["axis"] % (1 + len(r.shape(inputs[0]))) != 1:
        raise ValueError("a Concat that is not over channels")
    return r.put("concat", node, *(r.name[i] for i in inputs))


def _clip(r: _Reading, node: Any, a: Mapping[str, Any], inputs: Sequence[str]) -> str:
    ends = (("min", 1, -np.inf), ("max", 2, np.inf))
    low, high = (float(a.get(name, r.number(inputs, at, default))) for name, at, default in ends)
    return r.put("clip", node, r.name[inputs[0]], low=low, high=high)


def _pad(r: _Reading, node: Any, a: Mapping[str, Any], inputs: Sequence[str]) -> str:
    pads = [int(p) for p in a.get("pads", r.number(inputs, 1, []))]
    around = len(pads) == 8 and len(inputs) <= 3 and not any(pads[i] for i in (0, 1, 4, 5))
    if not around or a.get("mode", b"constant") != b"constant" or not 0 <= min(pads) <= max(pads) <= LARGEST:
        raise ValueError("a Pad that is not of constants around height and width")
    value = float(a.get("value", r.number(inputs, 2, 0.0)))
    return r.put("pad", node, r.name[inputs[0]], pads=(pads[2], pads[3], pads[6], pads[7]), value=value)


def _hard_sigmoid(r: _Reading, node: Any, a: Mapping[str, Any], inputs: Sequence[str]) -> str:
    return r.put("hard_sigmoid", node, r.name[inputs[0]], scale=a.get("alpha", 0.2), shift=a.get("beta", 0.5))


def _same(r: _Reading, node: Any, a: Mapping[str, Any], inputs: Sequence[str]) -> str:
    if a.get("to", 1) not in FLOATS:
        raise ValueError("a Cast of a value to whole numbers")
    return r.name[inputs[0]]


# operators without attributes: what they are called here
PLAIN = {"Relu": "relu", "Sigmoid": "sigmoid", "HardSwish": "hard_swish", "GlobalAveragePool": "global_average_pool"}
READERS: dict[str, Callable[..., str]] = {
    "Conv": _conv,
    "BatchNormalization": _batch_norm,
    "Clip": _clip,
    "HardSigmoid": _hard_sigmoid,
    "MaxPool": _max_pool,
    "AveragePool": _average_pool,
    "ReduceMean": _mean,
    "Concat": _concat,
    "Pad": _pad,
    **dict.fromkeys(PLAIN, lambda r, node, a, inputs: r.put(PLAIN[node.op_type], node, r.name[inputs[0]])),
    **dict.fromkeys(SAME, _same),
    **dict.fromkeys(("Add", "Sub", "Mul", "Div"), _arithmetic),
    **dict.fromkeys(("Gemm", "MatMul"), _gemm),
    **dict.fromkeys(("Flatten", "Reshape", "Squeeze"), _flat),
}


# what exporters compute of shapes and of weights
LAID = ("Reshape", "Transpose", "Cast", "Identity")
SMALL = ("Shape", "ConstantOfShape", "Gather", "Unsqueeze", "Squeeze", "Concat", "Slice", "Add", "Sub", "Mul", "Div")
FOLDED = (*LAID, *SMALL)


def _folded(node: Any, inputs: Mapping[str, np.ndarray]) -> np.ndarray:
    """What the node makes of constants, by onnx's own definition of it."""
    from onnx.reference import ReferenceEvaluator

    sizes = [int(v.prod()) if node.op_type == "ConstantOfShape" else v.size for v in inputs.values()]
    if sum(sizes) > LARGEST and node.op_type in SMALL:
        raise ValueError(f"{node.op_type} of constants of more than {LARGEST} numbers")
    old = {"axes", "starts"} & {a.name for a in node.attribute}  # they became inputs later
    made: Any = ReferenceEvaluator(node, opsets={"": 9 if old else OPSET}).run(None, dict(inputs))
    return np.asarray(made[0])
