"""A convolutional network as safetensors and JSON: `graph.json` has the nodes, `model.safetensors` the weights of its layers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from sartor.errors import SourceError
from sartor.files import whole_file
from sartor.model.graph import INPUT, LAYERS, OPS, Graph, Node, conv_of, linear_of

FILE = "graph.json"
VERSION = 1
SIZES = ("stride", "padding", "dilation", "groups")  # of a convolution, that its weights do not tell


def is_graph(folder: Path) -> bool:
    return (folder / FILE).is_file()


def _tensors(graph: Graph) -> dict[str, Tensor]:
    """Weights and biases of all layers and the pixels' normalization, by name."""
    pixels = {f"pixels.{name}": graph.get_buffer(name) for name in ("scale", "shift")}
    return {n: p.detach().contiguous() for n, p in (dict(graph.named_parameters()) | pixels).items()}


def _described(graph: Graph) -> str:
    """Everything but the weights, as JSON; of eight bits the grids."""
    nodes = [
        {"name": n.name, "op": n.op, "inputs": n.inputs, "attributes": dict(n.attributes)} | _sizes(graph, n)
        for n in graph.nodes
    ]
    told: dict[str, Any] = {"version": VERSION, "size": graph.size, "nodes": nodes}
    return json.dumps(told | ({"grids": dict(graph.rounding.grids)} if graph.rounding else {}))


def _sizes(graph: Graph, node: Node) -> dict[str, Any]:
    layer = graph.layers[node.name] if node.op == "conv" else None
    return {} if layer is None else {"sizes": {k: getattr(layer, k) for k in SIZES}}


def save(graph: Graph, folder: Path) -> None:
    """Write what `load` reads."""
    from safetensors.torch import save_file

    with whole_file(folder / "model.safetensors") as part:
        save_file(_tensors(graph), part, {"format": "sartor-graph-1"})
    (folder / FILE).write_text(_described(graph))


def load(folder: Path) -> tuple[Graph, dict[str, tuple[float, int]]]:
    """(network in fp32, grids of its values, empty where it is not in eight bits) from a folder that `save` wrote.

    Raises:
        SourceError: something is missing or does not fit together.
    """
    from safetensors.torch import load_file

    try:
        raw = json.loads((folder / FILE).read_text())
        if raw["version"] != VERSION:
            raise ValueError(f"version {raw['version']}, {VERSION} was needed")
        state = load_file(folder / "model.safetensors")
        nodes = [_node(n) for n in raw["nodes"]]
        layers = {
            n.name: _layer(state, n, raw["nodes"][i].get("sizes", {})) for i, n in enumerate(nodes) if n.op in LAYERS
        }
        _check_order(nodes)
        graph = Graph(nodes, layers, int(raw["size"]), (1.0,) * 3, (0.0,) * 3)
        for name in ("scale", "shift"):
            graph.register_buffer(name, state[f"pixels.{name}"].reshape(3, 1, 1), persistent=False)
        grids = {str(name): (float(scale), int(zero)) for name, (scale, zero) in raw.get("grids", {}).items()}
    except Exception as error:
        raise SourceError(
            f"'{folder.name}' is damaged ({type(error).__name__}: {str(error)[:100]}): make it again"
        ) from error
    return graph.eval().requires_grad_(False), grids


def _node(raw: Mapping[str, Any]) -> Node:
    if raw["op"] not in (*OPS, *LAYERS):
        raise ValueError(f"there is no operator '{raw['op']}'")
    attributes = {k: tuple(v) if isinstance(v, list) else v for k, v in raw["attributes"].items()}
    return Node(str(raw["name"]), raw["op"], tuple(raw["inputs"]), attributes)


def _layer(state: Mapping[str, Tensor], node: Node, sizes: Mapping[str, Any]) -> Any:
    weight, bias = (state[f"layers.{node.name}.{k}"] for k in ("weight", "bias"))
    if node.op == "linear":
        return linear_of(weight, bias)
    stride, padding, dilation = (tuple(sizes[k]) for k in SIZES[:3])
    return conv_of(weight, bias, stride, padding, dilation, int(sizes["groups"]))


def _check_order(nodes: list[Node]) -> None:
    known = {INPUT}
    for node in nodes:
        if not set(node.inputs) <= known or node.name in known:
            raise ValueError(f"the node '{node.name}' stands in the wrong place")
        known.add(node.name)
