"""Which channels of a convolutional network must go together, and a network without them.

A channel is followed from the layer that makes it to the layers that read it. On its way it meets other layers' channels: a sum, a product with a squeeze-excite gate and a depthwise
convolution tie channels one to one, a grouped convolution ties all channels of one of its groups, a concatenation lays channels side by side, and flattening spreads a channel over its pixels.
Channels tied together are a *unit*, that stays or goes; units made by the same layers are a *group*.

    rows      convolutions and linear layers that make a unit's channels: their outputs (a depthwise or grouped convolution is here alone)
    columns   those that read them and mix them with others: their inputs

Between rows and columns nothing mixes channels. So a unit that reads as zero at its columns might as well not be there, whatever it holds until then, and that is the law:
`shrink(graph, keep)` says what `graph` says inside `masked(graph, keep)`. A residual block whose last layer has nothing left to read goes as a whole, its bias with it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor, nn

from sartor.errors import InputError
from sartor.model.graph import INPUT, LAYERS, Draft, Graph, Node, conv_of, linear_of, shapes
from sartor.model.graph_branches import Branch, branches, without
from sartor.model.hooks import removed_after

Ids = Int[np.ndarray, " c"]  # of a value's channels


@dataclass(frozen=True)
class Part:
    """Outputs, or inputs, of one layer that belong to a group: output `at[j]` is of the group's unit `unit[j]`."""

    at: Int[Tensor, " k"]
    unit: Int[Tensor, " k"]


@dataclass(frozen=True)
class Group:
    """Units made by the same layers. name: of the first of these layers, with a number behind it where another group begins there. rows, columns: parts of layers by name."""

    name: str
    units: int
    rows: Mapping[str, Part]
    columns: Mapping[str, Part]


class _Ties:
    """Channels, and which of them are tied."""

    def __init__(self) -> None:
        self.count, self.pairs = 0, list[np.ndarray]()

    def new(self, count: int) -> Ids:
        self.count += count
        return np.arange(self.count - count, self.count)

    def tie(self, a: Ids, b: Ids) -> None:
        self.pairs.append(np.stack([a, b]))

    def units(self) -> Ids:
        """Of every channel the number of its unit; units are numbered by their first channels."""
        a, b = np.concatenate(self.pairs, 1) if self.pairs else np.zeros((2, 0), np.int64)
        graph = coo_array((np.ones(len(a), bool), (a, b)), shape=(self.count, self.count))
        unit: Ids = connected_components(graph, directed=False)[1].astype(np.int64)
        return unit


def _mixes(layer: Any) -> bool:
    """Whether each output reads all inputs."""
    return getattr(layer, "groups", 1) == 1


def _layer(ties: _Ties, layer: Any, x: Ids) -> Ids:
    """Channels that a layer makes of channels `x`."""
    made = ties.new(len(layer.weight))
    if not _mixes(layer):
        for inside, outside in zip(np.split(x, layer.groups), np.split(made, layer.groups), strict=True):
            both = np.concatenate([inside, outside])
            ties.tie(both[1:], both[:-1])
    return made


def _met(ties: _Ties, pinned: list[Ids], *inputs: Ids) -> Ids:
    """Channels of a sum or product; a single channel that meets many stays."""
    wide = max(inputs, key=len)
    for other in inputs:
        if len(other) == len(wide):
            ties.tie(wide, other)
        else:
            pinned.append(other)
    return wide


def _followed(graph: Graph) -> tuple[dict[str, Ids], Ids]:
    """(the units of every value's channels, units that must stay)."""
    ties, sizes = _Ties(), shapes(graph)
    ids = {INPUT: ties.new(3)}
    pinned = [ids[INPUT]]
    special: dict[str, Callable[[Node, list[Ids]], Ids]] = {
        "add": lambda node, x: _met(ties, pinned, *x),
        "mul": lambda node, x: _met(ties, pinned, *x),
        "concat": lambda node, x: np.concatenate(x),
        "flatten": lambda node, x: np.repeat(x[0], sizes[node.name][0] // len(x[0])),
    } | dict.fromkeys(LAYERS, lambda node, x: _layer(ties, graph.layers[node.name], x[0]))
    for node in graph.nodes:
        inputs = [ids[name] for name in node.inputs]
        ids[node.name] = special[node.op](node, inputs) if node.op in special else inputs[0]
    unit = ties.units()
    return {name: unit[x] for name, x in ids.items()}, unit[np.concatenate([*pinned, ids[graph.nodes[-1].name]])]


def channel_groups(graph: Graph) -> list[Group]:
    """Groups of units that may go, in the order of the network; what touches the pixels, or the network's output, is in none of them."""
    unit, stay = _followed(graph)
    pinned = set(stay.tolist())
    layers = [n for n in graph.nodes if n.op in LAYERS]
    rows = {n.name: unit[n.name] for n in layers}
    columns = {n.name: unit[n.inputs[0]] for n in layers if _mixes(graph.layers[n.name])}
    makers: dict[int, list[str]] = {}
    for name, roots in rows.items():
        for root in dict.fromkeys(roots.tolist()):
            makers.setdefault(root, []).append(name)
    groups: dict[tuple[str, ...], list[int]] = {}
    for root, names in makers.items():
        if root not in pinned:
            groups.setdefault(tuple(names), []).append(root)
    found: dict[str, Group] = {}
    for made, units in groups.items():
        count = sum(made[0] == g.name.split(".")[0] for g in found.values())
        name = f"{made[0]}.{count + 1}" if count else made[0]
        found[name] = Group(name, len(units), _parts(rows, units), _parts(columns, units))
    return list(found.values())


def _parts(layers: Mapping[str, Ids], units: list[int]) -> dict[str, Part]:
    order = np.argsort(units)
    ordered = np.asarray(units)[order]
    found = {}
    for name, roots in layers.items():
        at = np.flatnonzero(np.isin(roots, ordered))
        if len(at):
            unit = order[np.searchsorted(ordered, roots[at])]
            found[name] = Part(torch.from_numpy(at), torch.from_numpy(unit))
    return found


def ends_of(graph: Graph, groups: Iterable[Group]) -> dict[str, Branch]:
    """{name of a group: the residual block that goes when none of its units stays}: they lie inside, and are all that its last layer reads."""
    found, every = {}, branches(graph)  # a forward pass tells their shapes
    for group in groups:
        layers = {*group.rows, *group.columns}
        for branch in every:
            part = group.columns.get(branch.last)
            if layers <= branch.inside and part is not None and len(part.at) == _inputs(graph.layers[branch.last]):
                found[group.name] = branch
    return found


Keep = Mapping[str, Bool[Tensor, " units"]]
Masks = dict[str, Bool[Tensor, " c"]]


def kept_channels(graph: Graph, keep: Keep) -> tuple[Masks, Masks]:
    """(outputs, inputs) that stay of every layer. `keep` has the units that stay (True) of groups by name; other groups stay.

    Raises:
        InputError: there is no such group, it has another number of units, or none of them stays where no residual block ends with it (`ends_of`).
    """
    return _kept(graph, keep)[:2]


def gone_branches(graph: Graph, keep: Keep) -> list[Branch]:
    """Residual blocks that nothing is left of."""
    return _kept(graph, keep)[2]


def _kept(graph: Graph, keep: Keep) -> tuple[Masks, Masks, list[Branch]]:
    groups = {g.name: g for g in channel_groups(graph)}
    ends = ends_of(graph, groups.values())
    outputs = {n: torch.ones(len(layer.weight), dtype=torch.bool) for n, layer in _layers(graph)}
    inputs = {n: torch.ones(_inputs(layer), dtype=torch.bool) for n, layer in _layers(graph)}
    for name, mask in keep.items():
        if name not in groups or len(mask) != groups[name].units or not (mask.any() or name in ends):
            units = f"it has {groups[name].units} units" if name in groups else "there is no such group"
            raise InputError(
                f"group '{name}' is to keep {int(mask.sum())} of {len(mask)} units, but {units}: keep one at least of a group that channel_groups names, or none where a residual block ends with it"
            )
        for masks, parts in ((outputs, groups[name].rows), (inputs, groups[name].columns)):
            for layer, part in parts.items():
                masks[layer][part.at] = mask.cpu()[part.unit]
    return outputs, inputs, [branch for name, branch in ends.items() if name in keep and not keep[name].any()]


def _layers(graph: Graph) -> Iterator[tuple[str, Any]]:
    yield from graph.layers.items()


def _inputs(layer: Any) -> int:
    return layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels


@contextmanager
def masked(graph: Graph, keep: Keep) -> Iterator[None]:
    """The network with only the kept (True) units, undone on the way out: the others read as zero, in the features too, and blocks that nothing is left of add zeros.

    Raises:
        InputError: as `kept_channels`.
    """
    _, inputs, gone = _kept(graph, keep)
    handles: list[Any] = [graph.layers[n].register_forward_pre_hook(_gate(m)) for n, m in inputs.items() if not m.all()]
    handles += [graph.layers[b.last].register_forward_hook(_silence) for b in gone]
    if graph.head is not None:
        handles.append(graph.seen.register_forward_pre_hook(_gate(inputs[graph.nodes[-1].name])))
    with removed_after(handles):
        yield


def _gate(keep: Tensor) -> Any:
    def hook(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        x = args[0]
        return (x * keep.to(x).view(-1, *[1] * (x.ndim - 2)), *args[1:])

    return hook


def _silence(module: nn.Module, args: Any, made: Tensor) -> Tensor:
    return torch.zeros_like(made)


def shrink(graph: Graph, keep: Keep) -> Graph:
    """A smaller network with only the kept (True) units of these groups; it shares nothing with `graph`.

    Raises:
        InputError: as `kept_channels`.
    """
    outputs, inputs, gone = _kept(graph, keep)
    nodes = without(graph.nodes, gone)
    left = [n.name for n in nodes if n.op in LAYERS]
    return again(graph, nodes, {n: _smaller(graph.layers[n], outputs[n], inputs[n]) for n in left})


def _smaller(layer: Any, outputs: Tensor, inputs: Tensor) -> nn.Module:
    weight, bias = layer.weight.data[outputs], layer.bias.data[outputs]
    if isinstance(layer, nn.Linear):
        return linear_of(weight[:, inputs], bias)
    groups = layer.groups
    if _mixes(layer):
        weight = weight[:, inputs]
    else:  # its groups go as a whole
        groups = len(weight) * groups // layer.out_channels
    return conv_of(weight, bias, layer.stride, layer.padding, layer.dilation, groups)


def again(graph: Graph, nodes: Iterable[Node], layers: Mapping[str, nn.Module], size: int | None = None) -> Graph:
    """A network of other nodes that reads pictures as `graph` does; None: as large as it does, too."""
    new = Graph(nodes, layers, size or graph.size, (1.0,) * 3, (0.0,) * 3)
    new.register_buffer("scale", graph.get_buffer("scale").clone(), persistent=False)
    new.register_buffer("shift", graph.get_buffer("shift").clone(), persistent=False)
    return new.train(graph.training)


def at_size(graph: Graph, size: int) -> Graph | None:
    """A copy that reads pictures of so many pixels a side; None where its layers are made for one size."""
    new = again(graph, graph.nodes, copy.deepcopy(dict(graph.layers)), size)
    try:
        found = shapes(graph), shapes(new)
    except RuntimeError:  # a window larger than its map, or a matrix for another number of places
        return None
    flat = (n.inputs[0] for n in graph.nodes if n.op == "flatten")
    return new if all(here[name][1:] in ((), (1, 1)) for name in flat for here in found) else None


def waists(graph: Graph) -> list[str]:
    """Nodes in front of the head that everything passes through, in the order they run: the network can be read there. Not those whose activation is still to come."""
    last = {name: i for i, node in enumerate(graph.nodes) for name in node.inputs}
    found = []
    for i, node in enumerate(graph.nodes[: graph.before_pool]):
        others = any(last.get(n.name, 0) > i for n in graph.nodes[:i])
        following = graph.nodes[i + 1].op if i + 1 < len(graph.nodes) else ""
        if not others and last.get(INPUT, 0) <= i and following in (*LAYERS, "global_average_pool", "flatten", ""):
            found.append(node.name)
    return found


def ended(graph: Graph, at: str | None = None) -> Graph:
    """A copy without head that says the value of node `at` (None: what the head reads), averaged over space if it is a map.

    Raises:
        InputError: there is no such node.
    """
    draft, at = _redrafted(graph), graph.nodes[graph.ends - 1].name if at is None else at
    flat = len(draft.shape.get(at, "1")) == 1
    last = at if flat else draft.add("flatten", draft.add("global_average_pool", at))
    if flat and last in draft.layers and draft.nodes[last].op == "linear":  # it would be taken for a head
        last = draft.add("flatten", last)
    return again(graph, draft.graph(last).nodes, draft.layers)


def _redrafted(graph: Graph) -> Draft:
    """A copy to go on from."""
    draft = Draft(graph.size)
    draft.nodes, draft.layers = {n.name: n for n in graph.nodes}, copy.deepcopy(dict(graph.layers))
    draft.shape = shapes(graph)
    draft.taken |= set(draft.nodes)
    return draft


def with_head(graph: Graph, weight: Float[Tensor, "c f"], bias: Float[Tensor, " c"]) -> Graph:
    """A copy with this head instead of its own.

    Raises:
        InputError: the head reads another number of features.
    """
    draft = _redrafted(ended(graph))
    features = list(draft.nodes)[-1]
    if weight.shape[1:] != draft.shape[features]:
        raise InputError(
            f"the head reads {weight.shape[1]} features, the network has {draft.shape[features][0]}: fit it on this network"
        )
    draft.linear(features, weight, bias, "head")
    return again(graph, draft.nodes.values(), draft.layers)
