"""Writing a vision transformer as ONNX that plain ONNX Runtime loads, and knowing its size before it is written.

    pixels -> [patches] -> [attention -> mlp] x layers -> [pooled features -> head]

The graph is our own, of the parts in brackets; ONNX Runtime's fused operators are taken where they are faster on a CPU, measured on a ViT-S with 257 tokens.
What differs from the network's formulas: the normalization of pixels is folded into the patches' matrix and a bias, so that they read whole numbers as they are;
the stream is added by `Sum`: ONNX Runtime may fuse `Add` and the layer norm behind it into SkipLayerNormalization, which takes eight times as long.
int8 activations are quantized per tensor while the file runs, so what it says of a picture moves a little with the pictures it shares a batch with.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from sartor.errors import InputError
from sartor.export.onnx_kinds import KINDS, product32, tables_of
from sartor.export.onnx_parts import (
    CONTRIB,
    FLOAT,
    HALF,
    INT64,
    UINT8,
    Part,
    Spec,
    framed,
    node,
    onnx_package,
    save,
    store,
)
from sartor.model.network import Anatomy, anatomy, has_attention, has_mlp, linear, linears_of, parameter
from sartor.model.vision import FEATURES, Vision, VisionConfig
from sartor.numerics.four import nearest_scales

MATRICES = {  # of a layer; those of one row are stored as one
    "a.qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "a.out": ("self_attn.o_proj",),
    "m.up": ("mlp.up_proj",),
    "m.down": ("mlp.down_proj",),
}
ACTIVATIONS: dict[str, tuple[str, str, dict[str, float]]] = {
    "gelu": ("Gelu", CONTRIB, {}),
    "gelu_tanh": ("FastGelu", CONTRIB, {}),
    "quick_gelu": ("QuickGelu", CONTRIB, {"alpha": 1.702}),
    "relu": ("Relu", "", {}),
}


WEIGHTS = {"fp32": ("fp32", "fp32"), "int8": ("int8", "int8"), "int4": ("int4", "int8")}  # layers; patches and head


def _linear(kind: str, name: str, x: str, y: str, o: int, i: int) -> Part:
    stored = {f"{name}.{end}": spec for end, spec in KINDS[kind].specs(o, i).items()}
    return KINDS[kind].nodes(name, x, y, o, i), stored | {f"{name}.bias": (FLOAT, (o,))}


def _norm(c: VisionConfig, name: str, x: str, y: str) -> Part:
    names = [f"{name}.weight", f"{name}.bias"]
    normed = node("LayerNormalization", [x, *names], [y], epsilon=c.eps)
    return [normed], dict.fromkeys(names, (FLOAT, (c.hidden_size,)))


def _joined(*parts: Part) -> Part:
    return [n for nodes, _ in parts for n in nodes], {k: v for _, tensors in parts for k, v in tensors.items()}


def _patches(c: VisionConfig, kind: str) -> Part:
    """From pixels to the stream that is called 000.e.x."""
    side, inside, w = c.size // c.patch, 3 * c.patch**2, c.hidden_size
    table = FLOAT if kind == "fp32" else HALF
    tensors: dict[str, Spec] = {"patches.cut": (INT64, (6,)), "patches.rows": (INT64, (3,))}
    tensors |= {f"patches.{end}": spec for end, spec in KINDS[kind].specs(w, inside).items()}
    tensors |= {"patches.bias": (FLOAT, (w,)), "position": (table, (side * side, w))}
    nodes = [
        node("Reshape", ["pixels", "patches.cut"], ["cut"]),
        node("Transpose", ["cut"], ["turned"], perm=[0, 2, 4, 1, 3, 5]),
        node("Reshape", ["turned", "patches.rows"], ["rows"]),
    ]
    if kind == "fp32":
        nodes += [node("Cast", ["rows"], ["whole"], to=FLOAT), *product32("patches", "whole", "patches", w, inside)]
    else:  # pixels are whole numbers already
        inputs = ["rows", "patches.weight", "one", "patches.scale", "", "", "patches.bias"]
        nodes += [node("MatMulIntegerToFloat", inputs, ["patches"], CONTRIB)]
        tensors["one"] = (FLOAT, ())
    nodes += [node("Cast", ["position"], ["place"], to=FLOAT), node("Add", ["patches", "place"], ["placed"])]
    part: Part = nodes, tensors
    part = _joined(part, _prefix(c, table)) if c.prefix else part
    last = "prefixed" if c.prefix else "placed"
    named: Part = [node("Identity", [last], ["000.e.x"])], {}
    return _joined(part, _norm(c, "first_norm", last, "000.e.x") if c.first_norm else named)


def _prefix(c: VisionConfig, table: int) -> Part:
    """The prefix in front of the patches of every picture."""
    nodes = [
        node("Shape", ["pixels"], ["pictures"], start=0, end=1),
        node("Concat", ["pictures", "ones"], ["each"], axis=0),
        node("Cast", ["prefix"], ["front"], to=FLOAT),
        node("Expand", ["front", "each"], ["fronts"]),
        node("Concat", ["fronts", "placed"], ["prefixed"], axis=1),
    ]
    return nodes, {"ones": (INT64, (2,)), "prefix": (table, (1, c.prefix, c.hidden_size))}


def _attention(c: VisionConfig, kind: str, name: str, x: str, heads: int) -> Part:
    """From the stream `x` to the stream `name`.x; q, k and v are one matrix, so that their input is quantized once."""
    w, inside = c.hidden_size, heads * c.head_dim
    q, parts = [f"{name}.{letter}" for letter in "qkv"], [f"{name}.parts"] if c.keys else []
    read = [
        node("Split", [f"{name}.all", *parts], q, axis=2),
        node("MultiHeadAttention", q, [f"{name}.read"], CONTRIB, num_heads=heads),
    ]
    return _joined(
        _norm(c, f"{name}.norm", x, f"{name}.n"),
        _linear(kind, f"{name}.qkv", f"{name}.n", f"{name}.all", sum(_parts(c, heads)), w),
        (read, dict.fromkeys(parts, (INT64, (3,)))),
        _linear(kind, f"{name}.out", f"{name}.read", f"{name}.y", w, inside),
        ([node("Sum", [x, f"{name}.y"], [f"{name}.x"])], {}),
    )


def _parts(c: VisionConfig, heads: int) -> list[int]:
    """Dimensions of all queries, keys and values of an attention."""
    return [heads * c.key_dim, heads * c.key_dim, heads * c.head_dim]


def _mlp(c: VisionConfig, kind: str, name: str, x: str, channels: int) -> Part:
    """From the stream `x` to the stream `name`.x."""
    op, domain, attributes = ACTIVATIONS[c.activation]
    return _joined(
        _norm(c, f"{name}.norm", x, f"{name}.n"),
        _linear(kind, f"{name}.up", f"{name}.n", f"{name}.u", channels, c.hidden_size),
        ([node(op, [f"{name}.u"], [f"{name}.a"], domain, **attributes)], {}),
        _linear(kind, f"{name}.down", f"{name}.a", f"{name}.y", c.hidden_size, channels),
        ([node("Sum", [x, f"{name}.y"], [f"{name}.x"])], {}),
    )


def _end(c: VisionConfig, kind: str, x: str, classes: int) -> Part:
    """From the stream to features and logits."""
    pooled = [
        node("Gather", ["normed", "zero"], ["first"], axis=1),
        node("Slice", ["normed", "patches.first", "patches.last", "axis"], ["others"]),
        node("ReduceMean", ["others"], ["mean"], axes=[1], keepdims=0),
        node("Concat", ["first", "mean"], ["features"], axis=1),
    ]
    tensors: dict[str, Spec] = dict.fromkeys(["patches.first", "patches.last", "axis"], (INT64, (1,)))
    part = _joined(_norm(c, "norm", x, "normed"), (pooled, tensors | {"zero": (INT64, ())}))
    width = FEATURES * c.hidden_size
    return _joined(part, _linear(kind, "head", "features", "logits", classes, width)) if classes else part


PARTS: dict[str, Callable[[VisionConfig, str, str, str, int], Part]] = {
    "tables": lambda c, kind, name, x, size: tables_of(kind),
    "patches": lambda c, kind, name, x, size: _patches(c, kind),
    "attention": _attention,
    "mlp": _mlp,
    "end": lambda c, kind, name, x, size: _end(c, kind, x, size),
}


def _row(weights: str) -> tuple[str, str]:
    if weights not in WEIGHTS:
        raise InputError(f"there are no '{weights}' weights in ONNX files: take one of {', '.join(WEIGHTS)}")
    return WEIGHTS[weights]


def _plan(a: Anatomy, weights: str) -> Iterator[tuple[str, str, str, int]]:
    """(row of PARTS, kind, name, size) of every part. All names are equally long, so that equal parts take equal bytes."""
    layers, rest = _row(weights)
    yield "tables", layers, "tables", 0
    yield "patches", rest, "000.e", 0
    for n in range(a.layers):
        if a.groups[n]:
            yield "attention", layers, f"{n:03d}.a", a.groups[n]
        if a.ffn[n]:
            yield "mlp", layers, f"{n:03d}.m", a.ffn[n]
    yield "end", rest, "norm", a.vocab


def _frame(c: VisionConfig, classes: int) -> Any:
    """A file without nodes and tensors."""
    outputs: dict[str, tuple[int, list[Any]]] = {"logits": (FLOAT, ["n", classes])} if classes else {}
    outputs |= {"features": (FLOAT, ["n", FEATURES * c.hidden_size])}
    return framed({"pixels": (UINT8, ["n", 3, c.size, c.size])}, outputs)


def _arrays(model: Vision, weights: str) -> Iterator[tuple[str, np.ndarray]]:
    """Every tensor of the file by name."""
    layers, rest = _row(weights)
    body = model.model
    yield from (_fixed(model.config) | dict(KINDS[layers].tables)).items()
    yield from _read_patches(model, rest)
    yield from _two("first_norm", body.first_norm) if model.config.first_norm else ()
    for n, layer in enumerate(body.layers):
        block: Any = layer
        yield from _two(f"{n:03d}.a.norm", block.input_layernorm)
        yield from _two(f"{n:03d}.m.norm", block.post_attention_layernorm)
        yield f"{n:03d}.a.parts", np.array(_parts(model.config, anatomy(model).groups[n]), np.int64)
        for end, names in MATRICES.items():
            if has_attention(model, n) if end.startswith("a") else has_mlp(model, n):
                scales = [model.block_scales.get(parameter(n, name)) for name in names]
                yield from _matrix(layers, f"{n:03d}.{end}", [linear(model, n, name) for name in names], scales)
    yield from _two("norm", body.norm)
    if model.head is not None:
        yield from _matrix(rest, "head", [model.head], [None])


def _fixed(c: VisionConfig) -> dict[str, np.ndarray]:
    side, p = c.size // c.patch, c.patch
    fixed = {"patches.cut": [0, 3, side, p, side, p], "patches.rows": [0, side * side, 3 * p * p], "ones": [1, 1]}
    fixed |= {"patches.first": [c.prefix], "patches.last": [c.tokens], "axis": [1]}
    numbers: dict[str, Any] = fixed | {"zero": 0, "one": 1}
    return {k: np.array(v, np.float32 if k == "one" else np.int64) for k, v in numbers.items()}


def _two(name: str, module: Any) -> Iterator[tuple[str, np.ndarray]]:
    yield from ((f"{name}.{end}", getattr(module, end).detach().float().numpy()) for end in ("weight", "bias"))


def _matrix(
    kind: str, name: str, linears: Sequence[nn.Linear], scales: Sequence[Tensor | None]
) -> Iterator[tuple[str, np.ndarray]]:
    """One matrix of these, one below the other."""
    weight, bias = torch.cat([p.weight for p in linears]), torch.cat([p.bias for p in linears])
    known = [s for s in scales if s is not None]
    packed = KINDS[kind].pack(weight, torch.cat(known) if len(known) == len(linears) else None)
    yield from ((f"{name}.{end}", array) for end, array in packed.items())
    yield f"{name}.bias", bias.detach().float().numpy()


def _folded(model: Vision) -> Float[Tensor, "w i"]:
    """The patches' matrix as it reads pixels from 0 to 255."""
    scale: Any = model.scale
    return (model.model.patches.weight.detach().float() * scale.float()).flatten(1)


def _read_patches(model: Vision, kind: str) -> Iterator[tuple[str, np.ndarray]]:
    """Patches, position and prefix; the bias is of the rounded weights, so that a grey picture stays grey."""
    folded, shift = _folded(model), -255 * torch.tensor(model.config.mean, dtype=torch.float64)
    stored = KINDS[kind].hold(folded, None).double().unflatten(1, (3, -1)).sum(2)
    yield from ((f"patches.{end}", array) for end, array in KINDS[kind].pack(folded, None).items())
    yield "patches.bias", (stored @ shift).float().numpy()
    table = torch.float32 if kind == "fp32" else torch.float16
    yield "position", model.model.position.detach().to(table).numpy()
    yield "prefix", model.model.prefix.detach().to(table).numpy()[None]


def build(model: Vision, weights: str) -> Any:
    """The onnx.ModelProto of the network: pixels (n, 3, s, s) from 0 to 255 -> features (n, 2w), and logits (n, classes) where it has a head.

    Raises:
        MissingExtra: onnx is not installed. InputError: `weights` are no row of WEIGHTS.
    """
    c, a, x = model.config, anatomy(model), ""
    arrays, file = dict(_arrays(model, weights)), _frame(c, a.vocab)
    for part, kind, name, size in _plan(a, weights):
        nodes, tensors = PARTS[part](c, kind, name, x, size)
        x = f"{name}.x"
        file.graph.node.extend(nodes)
        for key, spec in tensors.items():
            store(file, key, arrays[key], spec)
    return file


def write(path: Path, model: Vision, weights: str) -> None:
    """Write the file, beside its place first: what is there is whole."""
    save(path, build(model, weights))


def dequantized(model: Vision, weights: str) -> Vision:
    """A copy whose weights, in fp32, are those that the file stands for."""
    layers, rest = _row(weights)
    new = copy.deepcopy(model).float()
    known, new.block_scales = new.block_scales, {}
    for n, name, module in linears_of(new):
        scales = known.get(parameter(n, name))
        if layers == "int4":
            scales = new.block_scales[parameter(n, name)] = nearest_scales(module.weight) if scales is None else scales
        module.weight.data = KINDS[layers].hold(module.weight, scales)
    if new.head is not None:
        new.head.weight.data = KINDS[rest].hold(new.head.weight, None)
    if rest != "fp32":
        scale: Any = new.scale
        new.model.patches.weight.data = (
            KINDS[rest].hold(_folded(new), None).reshape(new.model.patches.weight.shape) / scale
        )
        for table in (new.model.position, new.model.prefix):
            table.data = table.data.half().float()
    return new


def _field(size: int) -> int:
    """Bytes of a field of `size` bytes inside a message: a tag and a length of 7 bits a byte in front of it."""
    return 1 + max(1, -(-size.bit_length() // 7)) + size


@cache
def _part_bytes(c: VisionConfig, part: str, kind: str, name: str, size: int) -> int:
    onnx, (nodes, tensors) = onnx_package(), PARTS[part](c, kind, name, "000.e.x", size)
    total = sum(_field(n.ByteSize()) for n in nodes)
    for key, (dtype, shape) in tensors.items():
        data = onnx.helper.tensor_dtype_to_np_dtype(dtype).itemsize * math.prod(shape)
        total += _field(onnx.TensorProto(dims=shape, data_type=dtype, name=key).ByteSize() + _field(data))
    return total


@cache
def _frame_bytes(c: VisionConfig, classes: int) -> tuple[int, int]:
    """Of the graph, and of what is around it."""
    file = _frame(c, classes)
    return file.graph.ByteSize(), file.ByteSize() - _field(file.graph.ByteSize())


def file_bytes(config: VisionConfig, a: Anatomy, weights: str) -> int:
    """Exact bytes of the file that `write` makes of a network of these sizes."""
    graph, file = _frame_bytes(config, a.vocab)
    for part, kind, name, size in _plan(a, weights):
        graph += _part_bytes(config, part, kind, f"000{name[3:]}" if name[0].isdigit() else name, size)
    return file + _field(graph)
