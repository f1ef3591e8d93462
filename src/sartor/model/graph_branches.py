"""Residual blocks of a convolutional network, that can go as a whole: what a sum adds to what it passes on."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from sartor.model.graph import INPUT, LAYERS, Graph, Node, shapes

IDEMPOTENT = ("relu", "clip")  # the same twice is the same once


@dataclass(frozen=True)
class Branch:
    """What lies between a value and the sum that adds to it.

    Attributes:
        add: the sum. skip: what is left of it when the branch goes. last: the layer whose outputs it adds. inside: names of all nodes of the branch, the sum not among them.
    """

    add: str
    skip: str
    last: str
    inside: frozenset[str]


def branches(graph: Graph) -> list[Branch]:
    """All of them, in the order they run: those that end in a layer, read nothing but what the sum passes on, have its shape, and are read by nobody else. A sum that is the network's end has none."""
    nodes, sizes = {n.name: n for n in graph.nodes}, shapes(graph)
    readers: dict[str, set[str]] = {}
    for node in graph.nodes:
        for name in node.inputs:
            readers.setdefault(name, set()).add(node.name)
    found = []
    for node in graph.nodes[:-1]:
        if node.op != "add" or len(node.inputs) != 2:
            continue
        for skip, last in (node.inputs, node.inputs[::-1]):
            inside = _between(nodes, skip, last)
            alone = all(readers[name] <= inside | {node.name} for name in inside)
            if inside and alone and nodes[last].op in LAYERS and sizes[skip] == sizes[last]:
                found.append(Branch(node.name, skip, last, frozenset(inside)))
                break
    return found


def _between(nodes: dict[str, Node], skip: str, last: str) -> set[str]:
    """Nodes that make `last` out of `skip` alone; none where it needs anything else."""
    inside, todo = set[str](), [last]
    while todo:
        name = todo.pop()
        if name == skip or name in inside:
            continue
        if name == INPUT:
            return set()
        inside.add(name)
        todo += nodes[name].inputs
    return inside


def without(nodes: Iterable[Node], gone: Sequence[Branch]) -> list[Node]:
    """The nodes that are left: who read a sum reads what it passed on, and what was cut off there already is not cut off again."""
    inside, passed = set[str]().union(*(b.inside for b in gone)), {b.add: b.skip for b in gone}
    left: dict[str, Node] = {}
    for node in nodes:
        if node.name in inside:
            continue
        inputs = tuple(passed.get(name, name) for name in node.inputs)
        if node.name in passed:
            passed[node.name] = passed.get(passed[node.name], passed[node.name])
            continue
        front = left.get(inputs[0]) if inputs != node.inputs else None
        if front and node.op in IDEMPOTENT and (front.op, front.attributes) == (node.op, node.attributes):
            passed[node.name] = front.name
            continue
        left[node.name] = replace(node, inputs=inputs)
    return list(left.values())
