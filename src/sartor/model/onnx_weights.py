"""The weights of a vision transformer inside an ONNX graph, under the names that transformers' checkpoints give them.

Both of torch's exporters keep the names of parameters, but those of linear weights: these are anonymous, transposed, and known by the MatMul node that reads them.
A position table that the graph resizes is anonymous too, the class token's row apart from the others. The newer exporter calls nodes by numbers and says beside them in which module they
are; there the tokens that are joined to the patches are anonymous, too.

    backbone.encoder.layer.0.norm1.weight                                     as it stands, without what all names begin with
    node /backbone/encoder/layer.0/attention/attention/query/MatMul           encoder.layer.0.attention.attention.query.weight, transposed

Nothing is run and nothing outside the file is opened. What follows the last layer norm, a decoder say, is left out. That the graph computes with these weights what the
family does is taken for granted: a graph with the names of a family and the arithmetic of another is read wrongly.
"""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sartor.errors import MissingExtra, SourceError
from sartor.model.families import QKV, VISION, VisionFamily

LIMIT = 2**31  # bytes of a file: protobuf's own
NODES = 100_000
# an ending that only one family has -> the family; the first that is found
MARKS = {
    "embeddings.distillation_token": "deit",
    "embeddings.register_tokens": "dinov2_with_registers",
    "layer_scale1.lambda1": "dinov2",
    "layernorm_before.weight": "vit",
}
# transformers 5 calls its modules otherwise than its checkpoints
_NEW = {
    f"attention.{a}_proj.": f"attention.attention.{b}." for a, b in zip("qkv", ("query", "key", "value"), strict=True)
}
_NEW |= {"attention.o_proj.": "attention.output.dense."}
_NEW_VIT = _NEW | {"layers.": "encoder.layer.", "mlp.fc1.": "intermediate.dense.", "mlp.fc2.": "output.dense."}
RENAMED = {"vit": _NEW_VIT, "deit": _NEW_VIT, "dinov2": _NEW, "dinov2_with_registers": _NEW}
OPERATORS = {"Erf": "gelu", "Tanh": "gelu_pytorch_tanh", "Relu": "relu", "Gelu": "gelu"}


@dataclass(frozen=True)
class Graph:
    """values: constants by name. makers: the node that writes a name. readers: the nodes that read it. scoped: (name with dots, node)."""

    values: dict[str, Any]
    makers: dict[str, Any]
    readers: dict[str, list[Any]]
    scoped: list[tuple[str, Any]]


def read_onnx(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(config.json of transformers, its checkpoint's tensors in fp32).

    Raises:
        SourceError: damaged, too large, with weights in other files, or not a ViT, DeiT or DINOv2 of transformers.
        MissingExtra: onnx is not installed.
    """
    try:
        graph = _linked(*_parsed(path))
        row, start = _family(graph, path.name)
        tensors = _tensors(graph, row, start)
        return _config(graph, row, start, tensors), tensors
    except (LookupError, ValueError, TypeError, RuntimeError, ArithmeticError) as error:
        why = str(error.args[0] if error.args else "its sizes").splitlines()[0][:100]
        raise _refused(path.name, f"its graph does not tell {why}") from error


def is_transformer(path: Path) -> bool:
    """Whether the file is to be read by the names of a vision transformer: it has its patches, or attention and layer norms.

    Raises:
        SourceError: damaged, too large, or with weights in other files.
    """
    raw, values = _parsed(path)
    ops = Counter(node.op_type for node in raw.node)
    named = any(name.endswith(f"{VISION['vit'].patches}.weight") for name in values)
    return (
        named or ops["Softmax"] > 1 or any(ops[op] for op in ("LayerNormalization", "Attention", "MultiHeadAttention"))
    )


def _refused(name: str, why: str) -> SourceError:
    return SourceError(
        f"'{name}' is not a vision transformer that Sartor reads ({why}): give an ONNX file of transformers' ViT, DeiT or DINOv2, or the checkpoint itself"
    )


def _parsed(path: Path) -> tuple[Any, dict[str, Any]]:
    """(graph, constants by name), all inside the one file."""
    try:
        import onnx
    except ImportError as error:
        raise MissingExtra("onnx, which reads ONNX files, is not installed: pip install onnx") from error
    if path.stat().st_size >= LIMIT:
        raise SourceError(f"'{path.name}' has {path.stat().st_size} bytes, under {LIMIT} were needed: give safetensors")
    try:
        raw = onnx.load(str(path), load_external_data=False).graph
    except Exception as error:
        raise SourceError(f"'{path.name}' is a damaged ONNX file ({type(error).__name__}): fetch it again") from error
    if len(raw.node) > NODES:
        raise SourceError(f"'{path.name}' has {len(raw.node)} nodes, at most {NODES} were needed: give safetensors")
    values = {t.name: t for t in raw.initializer}
    for node in raw.node:
        held = [a.t for a in node.attribute if a.name == "value" and a.HasField("t")]
        if node.op_type == "Constant" and held:
            values[node.output[0]] = held[0]
    inside = [t for node in raw.node for a in node.attribute for t in (a.t, *a.tensors)]
    sparse = [t for s in raw.sparse_initializer for t in (s.values, s.indices)]
    held = [*values.values(), *inside, *sparse]
    if any(t.data_location == onnx.TensorProto.EXTERNAL or t.external_data for t in held):
        raise SourceError(
            f"'{path.name}' keeps its weights in other files, which Sartor does not open: save it as one file (onnx.save_model without external data)"
        )
    return raw, values


def _linked(raw: Any, values: dict[str, Any]) -> Graph:
    makers: dict[str, Any] = {}
    readers: dict[str, list[Any]] = defaultdict(list)
    for node in raw.node:
        makers |= dict.fromkeys(node.output, node)
        for name in node.input:
            readers[name].append(node)
        if node.op_type == "Identity" and node.input[0] in values:  # equal weights are stored once
            values[node.output[0]] = values[node.input[0]]
    return Graph(values, makers, readers, [(_scope(n), n) for n in raw.node])


def _scope(node: Any) -> str:
    """The module that a node is in, with dots, and what it is there."""
    told: str = next((p.value for p in node.metadata_props if p.key == "namespace"), "")
    modules = [part.partition(":")[0] for part in told.split("/")[:-1]]
    return f"{modules[-1]}.{node.op_type}" if modules else str(node.name.strip("/").replace("/", "."))


def _array(value: Any) -> Any:
    import onnx

    try:
        return onnx.numpy_helper.to_array(value)
    except Exception as error:
        raise SourceError(
            f"a constant of the ONNX graph is damaged ({type(error).__name__}): fetch the file again"
        ) from error


def _float(value: Any) -> Tensor:
    return torch.from_numpy(np.array(_array(value), dtype=np.float32))


def _family(graph: Graph, name: str) -> tuple[VisionFamily, str]:
    """(row, what all names begin with)."""
    end = VISION["vit"].patches + ".weight"
    start = [n.removesuffix(end) for n in graph.values if n == end or n.endswith("." + end)]
    if len(start) != 1:
        raise _refused(name, f"{len(start)} of its constants are called '{end}', one was needed")
    kinds = [
        kind for mark, kind in MARKS.items() if any(n.startswith(start[0]) and n.endswith(mark) for n in graph.values)
    ]
    told = (p.value for _, node in graph.scoped for p in node.metadata_props if p.key == "namespace")
    modules = next((m[1] for m in map(re.compile(r"transformers\.models\.(\w+)\.").search, told) if m), "")
    kinds = [modules] if modules in RENAMED else kinds
    if not kinds:
        raise _refused(name, "none of its layers has the names of ViT, DeiT or DINOv2")
    return VISION[kinds[0]], start[0]


def _renamed(row: VisionFamily, name: str) -> str:
    for new, old in RENAMED[row.name].items():
        if name.startswith(new) or "." + new in name:
            name = name.replace(new, old, 1)
    return name


def _linears(graph: Graph, row: VisionFamily, start: str) -> Iterator[tuple[str, Any]]:
    """(checkpoint name, node) of every multiplication by a constant inside the transformer."""
    for scoped, node in graph.scoped:
        if node.op_type == "MatMul" and scoped.startswith(start) and node.input[1] in graph.values:
            yield _renamed(row, scoped.removeprefix(start).removesuffix("MatMul")).removesuffix("."), node


def _tensors(graph: Graph, row: VisionFamily, start: str) -> dict[str, Tensor]:
    outside = (f"{row.patches}.", row.position, *row.prefix, f"{row.norm}.")
    inside = row.layer.split("{")[0]
    found: dict[str, Tensor] = {}
    for name, value in graph.values.items():
        short = _renamed(row, name.removeprefix(start))
        # in a layer everything is taken: what does not belong there is then noticed
        if name.startswith(start) and short.startswith((inside, *outside)):
            if sum(t.numel() for t in found.values()) > LIMIT // 2:  # one constant under very many names
                raise ValueError("weights of a size that such a file can hold")
            found[short] = _float(value)
    for name, node in _linears(graph, row, start):
        if name.startswith(inside):
            found[name + ".weight"] = _float(graph.values[node.input[1]]).T.contiguous()
    lacking = [name for name in row.prefix if name not in found]
    found |= dict(zip(lacking, _joined(graph, len(found[f"{row.patches}.weight"]), len(lacking)), strict=True))
    if row.position not in found:
        table = _table(graph, found[row.prefix[0]].shape[-1])
        found |= {row.position: table} if table is not None else {}
    return found


def _joined(graph: Graph, width: int, count: int) -> list[Tensor]:
    """The anonymous constants, `count` of them, that are joined to the patches, in the order of the graph."""
    nodes = (node for _, node in graph.scoped if node.op_type == "Concat")
    read = (graph.values[name] for node in nodes for name in node.input if name in graph.values) if count else ()
    found = [_float(v)[:1] for v in read if len(v.dims) == 3 and v.dims[2] == width]
    if len(found) != count:
        raise ValueError("its tokens in front of the patches")
    return found


def _table(graph: Graph, width: int) -> Tensor | None:
    """An anonymous position table: rows of prefix tokens, if they lie apart, in front of those of the patches."""
    parts = [
        v for n, v in graph.values.items() if "::" in n and len(v.dims) == 3 and (v.dims[0], v.dims[2]) == (1, width)
    ]
    parts.sort(key=lambda v: v.dims[1])
    return torch.cat([_float(v) for v in parts], 1) if 1 <= len(parts) <= 2 else None


def _config(graph: Graph, row: VisionFamily, start: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Sizes from the tensors; heads, epsilon and activation from the graph. KeyError or ValueError names what cannot be told."""
    patches = tensors[row.patches + ".weight"]
    width, patch = int(patches.shape[0]), int(patches.shape[-1])
    rows = tensors[row.position].shape[1]
    ffn = len(tensors[row.layer.format(0) + row.inside["mlp.up_proj"] + ".bias"])
    query = row.layer.format(0) + row.inside[QKV[0]]
    dino = row.name.startswith("dinov2")
    if dino and ffn % width:
        raise ValueError("a whole ratio of its MLPs' width")
    registers = tensors[row.prefix[1]].shape[1] if row.name == "dinov2_with_registers" else 0
    return {
        "model_type": row.name,
        "hidden_size": width,
        "num_hidden_layers": len({n.split(".")[2] for n in tensors if n.startswith("encoder.layer.")}),
        "num_attention_heads": width // _head_width(graph, row, start, query),
        "image_size": math.isqrt(rows) * patch,
        "patch_size": patch,
        "hidden_act": _activation(graph, row, start),
        "layer_norm_eps": _epsilon(graph, start),
        "qkv_bias": query + ".bias" in tensors,
        **({"mlp_ratio": ffn // width, "use_mask_token": False} if dino else {"intermediate_size": ffn}),
        **({"num_register_tokens": registers} if registers else {}),
    }


def _head_width(graph: Graph, row: VisionFamily, start: str, query: str) -> int:
    """The last number of the shape that the first layer's queries are brought into."""
    node = dict(_linears(graph, row, start))[query]
    for op in ("Add", "Reshape"):
        node = next((n for n in graph.readers[node.output[0]] if n.op_type == op), node)
    shape = node.input[1] if node.op_type == "Reshape" else ""
    maker = graph.makers.get(shape)
    if shape not in graph.values and maker is not None and maker.op_type == "Concat":
        shape = maker.input[-1]
    if shape not in graph.values:
        raise ValueError("its heads")
    return int(_array(graph.values[shape]).reshape(-1)[-1])


def _activation(graph: Graph, row: VisionFamily, start: str) -> str:
    first = [
        n
        for s, n in graph.scoped
        if s.startswith(start) and _renamed(row, s.removeprefix(start)).startswith(row.layer.format(0))
    ]
    found = {OPERATORS[n.op_type] for n in first if n.op_type in OPERATORS}
    tanh = any(a.s == b"tanh" for n in first if n.op_type == "Gelu" for a in n.attribute)
    if len(found) != 1:
        raise ValueError("its activation")
    return "gelu_pytorch_tanh" if tanh else found.pop()


def _epsilon(graph: Graph, start: str) -> float:
    """Of the layer norms, whether they are one node or spelled out: ... -> Add(epsilon) -> Sqrt -> ..."""
    found = set()
    for scoped, node in graph.scoped:
        if scoped.startswith(start) and node.op_type == "LayerNormalization":
            found |= {a.f for a in node.attribute if a.name == "epsilon"} or {1e-5}
        elif scoped.startswith(start) and node.op_type == "Sqrt":
            maker = graph.makers.get(node.input[0])
            inputs = maker.input if maker is not None and maker.op_type == "Add" else ()
            found |= {float(_array(graph.values[i]).reshape(-1)[0]) for i in inputs if i in graph.values}
    if len(found) != 1:
        raise ValueError("the epsilon of its layer norms")
    return float(f"{found.pop():.6g}")
