"""A convolutional network that computes in eight bits, as its file will: which values are rounded, and to what."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from sartor.model.graph import INPUT, Graph, Node, Rounding
from sartor.model.graph_channels import again
from sartor.numerics.eight import STEPS, held, on_grid

FUSED = ("relu", "clip")  # runtimes compute them with the layer in front
SAME_GRID = ("max_pool", "pad")  # what they make lies on the grid of what they read


def rounded_values(graph: Graph) -> dict[str, str]:
    """{value: the value whose grid it has}, of all that are rounded: up to the last pooling, behind an activation and not in front of it."""
    readers = Counter(i for node in graph.nodes for i in node.inputs)
    fused = {n.inputs[0] for n in graph.nodes if n.op in FUSED and readers[n.inputs[0]] == 1}
    found = {INPUT: INPUT}
    for node in graph.nodes[: graph.before_pool]:
        if node.name not in fused:
            same = node.op in SAME_GRID and not node.attributes.get("value")
            found[node.name] = found.get(node.inputs[0], node.name) if same else node.name
    return found


def straight(weight: Tensor) -> Tensor:
    """Rounded weights; gradients go straight through (Bengio et al. 2013, arXiv:1308.3432)."""
    return weight + (held(weight) - weight).detach() if weight.requires_grad else held(weight)


def unrounded(graph: Graph) -> Graph:
    """The same network in floating-point numbers: its weights are what eight bits hold, and values are cut off where their grids end, since what was trained on a grid relies on it."""
    if graph.rounding is None:
        return graph
    grids, nodes, named = graph.rounding.grids, list[Node](), dict[str, str]()
    ends = {name: (-zero * scale, (STEPS - zero) * scale) for name, (scale, zero) in grids.items()}
    if INPUT in ends:
        nodes.append(_cut_off(INPUT, ends[INPUT]))
        named[INPUT] = nodes[-1].name
    for node in graph.nodes:
        nodes.append(Node(node.name, node.op, tuple(named.get(i, i) for i in node.inputs), node.attributes))
        if node.name in ends:
            nodes.append(_cut_off(node.name, ends[node.name]))
            named[node.name] = nodes[-1].name
    layers: dict[str, Any] = copy.deepcopy(dict(graph.layers))
    for layer in layers.values():
        layer.weight.data = held(layer.weight)
    return again(graph, nodes, layers)


def _cut_off(name: str, ends: tuple[float, float]) -> Node:
    return Node(f"{name}_range", "clip", (name,), {"low": ends[0], "high": ends[1]})


def round_(graph: Graph, grids: Mapping[str, tuple[float, int]]) -> None:
    """From now on the network computes in eight bits, with these grids."""
    graph.rounding = Rounding(dict(grids), on_grid, straight)
