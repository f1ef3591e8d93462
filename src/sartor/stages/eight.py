"""A convolutional network that computes in eight bits, as its file will: which values are rounded, and to what."""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
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
            same = node.op in SAME_GRID and node.attributes.get("value") in (
                None,
                0,
                -math.inf,
            )  # the lowest is the grid's own
            found[node.name] = found.get(node.inputs[0], node.name) if same else node.name
    return found


def reading_bytes(graph: Graph) -> Graph:
    """The same network on pixels less one whole number: the runtime reads bytes as they are, on a grid of their own, and computes nothing in front of the first convolution.

    Padding then stands for that number, where it stood for each colour's mean, a few of 255 steps away. A network whose pixels are read by anything but convolutions is given back as it is.
    """
    readers = [n for n in graph.nodes if INPUT in n.inputs]
    if any(n.op != "conv" for n in readers):
        return graph
    scale, shift = (graph.get_buffer(name).flatten().double() for name in ("scale", "shift"))
    zero = min(max(round(float((-shift / scale).mean())), 0), STEPS)
    layers: dict[str, Any] = copy.deepcopy(dict(graph.layers))
    for node in readers:
        layer = layers[node.name]
        wide, rows = layer.groups > 1, layer.weight.double()
        if wide or rows.shape[1] != len(scale):
            return graph
        layer.bias.data = (layer.bias.double() + rows.sum((2, 3)) @ (shift + zero * scale)).float()
        layer.weight.data = (rows * scale[None, :, None, None]).float()
    new = again(graph, graph.nodes, layers)
    new.register_buffer("scale", torch.ones(3, 1, 1), persistent=False)
    new.register_buffer("shift", torch.full((3, 1, 1), -float(zero)), persistent=False)
    return new


def byte_grid(graph: Graph) -> tuple[float, int] | None:
    """The grid of pixels that are bytes less one whole number; None where they are anything else."""
    scale, shift = graph.get_buffer("scale").flatten(), graph.get_buffer("shift").flatten()
    zero = -float(shift[0])
    plain = bool((scale == 1).all() and (shift == shift[0]).all()) and zero.is_integer() and 0 <= zero <= STEPS
    return (1.0, int(zero)) if plain else None


def straight(weight: Tensor) -> Tensor:
    """Rounded weights; gradients go straight through (Bengio et al. 2013, arXiv:1308.3432)."""
    return weight + (held(weight) - weight).detach() if weight.requires_grad else held(weight)


def unrounded(graph: Graph) -> Graph:
    """The same network in floating-point numbers: its weights are what eight bits hold, and values are cut off where their grids end, since what was trained on a grid relies on it."""
    if graph.rounding is None:
        return graph
    grids, nodes, named = graph.rounding.grids, list[Node](), dict[str, str]()
    ends = {name: (-zero * scale, (STEPS - zero) * scale) for name, (scale, zero) in grids.items()}
    if INPUT in ends and byte_grid(graph) is None:
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
