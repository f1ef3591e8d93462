"""A convolutional network that computes in eight bits, as its file will: which values are rounded, and to what."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from torch import Tensor

from sartor.model.graph import INPUT, Graph, Rounding
from sartor.numerics.eight import held, on_grid

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


def round_(graph: Graph, grids: Mapping[str, tuple[float, int]]) -> None:
    """From now on the network computes in eight bits, with these grids."""
    graph.rounding = Rounding(dict(grids), on_grid, straight)
