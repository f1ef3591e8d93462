"""A head for the user's classes on features as they are: where they are clearest is where the network is read.

A pre-trained network's last layers belong to what it was trained for last. So the head is fitted behind each of the later layers, and the depth with the fewest nats on pictures that
were left out (folds of the training split) is taken. Where the network came with a head that knows the user's classes, its rows for them are what another fit behind the last layer is pulled towards, instead of
zero. Without labels the classes are clusters of the user's own pictures: what a cut must keep apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int, UInt8
from scipy.cluster.vq import kmeans2
from torch import Tensor, nn

from sartor.model import graph_channels
from sartor.model.classifier import Rows
from sartor.model.graph import Graph
from sartor.model.graph_channels import ended, waists
from sartor.model.network import clone, embed, layers_of
from sartor.model.precision import running
from sartor.model.vision import FEATURES, Vision, cut_layers_
from sartor.stages.recognition import BATCH

STRENGTHS = (0.03, 0.3, 3.0)  # of the pull of weights towards zero, for features of variance one
OWN_STRENGTHS = (
    0.3,
    3.0,
    30.0,
    300.0,
)  # and towards the rows that the network came with; at the last these are taken as they are
FOLDS = 4
STEPS = 60
PICTURES_A_CLUSTER, MOST_CLUSTERS = 12, 32


@dataclass(frozen=True)
class Head:
    """Behind which layer it reads, its weights, and the nats a picture it cost on pictures left out. own: for how many classes it began with rows of the network's own head."""

    depth: int
    weight: Float[Tensor, "c f"]
    bias: Float[Tensor, " c"]
    nats: float
    own: int = 0


def depths(model: Any) -> int:
    """At how many places the network can be read, one behind the other: layers, or waists of a convolutional network."""
    return len(waists(model)) if isinstance(model, Graph) else len(layers_of(model))


@torch.no_grad()
def read_out(
    model: Any, pixels: UInt8[Tensor, "n 3 s s"], first: int, last: int | None = None
) -> list[Float[Tensor, "n f"]]:
    """Pooled features at depths `first`, first + 1, ... `last` (None: of as many as there are), in fp32; those of a transformer's layers through the last norm."""
    read, last = (_of_maps if isinstance(model, Graph) else _of_layers), depths(model) if last is None else last
    found = [read(model, part, first, last) for part in pixels.split(BATCH)]
    return [torch.cat(parts) for parts in zip(*found, strict=True)]


def _of_layers(model: Vision, pixels: Tensor, first: int, last: int) -> list[Tensor]:
    state, behind = embed(model, pixels), []
    for n, layer in enumerate(layers_of(model)[:last], 1):
        state = layer(state)
        if n >= first:
            behind.append(model.pool(model.model.norm(state)).float())
    return behind


def _of_maps(model: Graph, pixels: Tensor, first: int, last: int) -> list[Tensor]:
    read, behind = waists(model)[first - 1 : last], list[Tensor]()
    wanted = set(read)
    end = 1 + next(i for i, node in enumerate(model.nodes) if node.name == read[-1])

    def tell(name: str, value: Tensor) -> None:
        if name in wanted:
            behind.append(value.flatten(2).mean(2) if value.ndim > 2 else value)

    model.run(model.embed(pixels), 0, end, tell)
    return behind


def fit_head(
    features: Float[Tensor, "n f"],
    labels: Int[Tensor, " n"],
    classes: int,
    strength: float,
    towards: Rows | None = None,
) -> tuple[Float[Tensor, "c f"], Float[Tensor, " c"]]:
    """Multinomial logistic regression in which every class weighs the same, on standardized features; the scaling is folded into the weights.

    Args:
        strength: of the pull towards zero, or towards these weights. The biases are free.
    """
    mean, deviation = features.mean(0), features.std(0).clamp_min(1e-6)
    x = (features - mean) / deviation
    start, b = torch.zeros(classes, x.shape[1]), torch.zeros(classes)
    if towards is not None:
        start, b = towards.weight * deviation, towards.bias + towards.weight @ mean
    w, b = start.clone().requires_grad_(True), b.requires_grad_(True)
    weight = 1 / torch.bincount(labels, minlength=classes).clamp_min(1).float()
    optimizer = torch.optim.LBFGS([w, b], max_iter=STEPS, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        nats = nn.functional.cross_entropy(x @ w.T + b, labels, weight=weight)
        total = nats + strength / 2 * (w - start).square().sum() / classes
        total.backward()
        return total

    optimizer.step(loss)
    scaled = (w / deviation).detach()
    return scaled, (b - scaled @ mean).detach()


def choose_head(
    model: Any,
    pixels: UInt8[Tensor, "n 3 s s"],
    labels: Int[Tensor, " n"],
    classes: int,
    seed: int = 0,
    first: int | None = None,
    last: int | None = None,
    own: Rows | None = None,
) -> Head:
    """The head, and the depth it reads at, of least nats on pictures left out; from behind layer `first` (None: over half of them) to behind layer `last` (None: all).

    Args:
        own: of the head that the network came with, for these classes.
    """
    first = first or depths(model) // 2 + 1
    read = read_out(running(model), pixels, first, last)
    fold = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed)) % FOLDS
    tried: list[tuple[int, float, Rows | None]] = [
        (d, s, None) for d in range(first, first + len(read)) for s in STRENGTHS
    ]
    if own and first + len(read) > depths(model):
        tried += [(depths(model), s, own) for s in OWN_STRENGTHS]
    nats = [_left_out(read[d - first], labels, classes, strength, fold, towards) for d, strength, towards in tried]
    best = min(range(len(tried)), key=nats.__getitem__)
    depth, strength, towards = tried[best]
    known = towards.known if towards else 0
    return Head(depth, *fit_head(read[depth - first], labels, classes, strength, towards), nats[best], known)


def _left_out(
    features: Tensor, labels: Tensor, classes: int, strength: float, fold: Tensor, towards: Rows | None
) -> float:
    """Mean nats of every fold by a head of the others."""
    total = 0.0
    for f in range(FOLDS):
        w, b = fit_head(features[fold != f], labels[fold != f], classes, strength, towards)
        here = fold == f
        total += float(nn.functional.cross_entropy(features[here] @ w.T + b, labels[here], reduction="sum"))
    return total / len(labels)


def with_head(model: Any, head: Head) -> Any:
    """A copy that ends where the head reads, with the head on it."""
    if isinstance(model, Graph):
        return graph_channels.with_head(ended(model, waists(model)[head.depth - 1]), head.weight, head.bias)
    new: Any = clone(model)
    cut_layers_(new, range(head.depth))
    new.config = replace(model.config, layers=head.depth, classes=len(head.weight))
    new.head = nn.Linear(FEATURES * model.config.hidden_size, len(head.weight))
    new.head.weight.data, new.head.bias.data = head.weight.clone(), head.bias.clone()
    return new.eval().requires_grad_(False)


def clustered(
    model: Any, parts: Sequence[UInt8[Tensor, "n 3 s s"]], seed: int = 0
) -> tuple[list[Int[Tensor, " n"]], int]:
    """(the cluster of every picture, part by part; how many there are): k-means on the direction of features, for pictures without labels.

    Only the first part shapes the clusters; pictures of the others belong to the nearest.
    """
    half, last = running(model), depths(model)
    features = [nn.functional.normalize(read_out(half, p, last)[-1], dim=-1) for p in parts]
    k = max(2, min(MOST_CLUSTERS, len(parts[0]) // PICTURES_A_CLUSTER))
    centres, cluster = kmeans2(features[0].double().numpy(), k, minit="++", seed=seed)
    used = torch.as_tensor(centres)[torch.unique(torch.as_tensor(cluster, dtype=torch.long))]
    return [torch.cdist(f.double(), used).argmin(-1) for f in features], len(used)
