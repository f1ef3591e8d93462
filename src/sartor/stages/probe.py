"""Probing: which units this text needs.

Two measurements. (1) One forward and one backward pass give the Fisher damage of every FFN channel and query group,
1/2 E[(z_u . dL/dz_u)^2] in nats per token, shrunk by what the other channels explain (OBS). (2) Random masks, a few
per cent of the units off at a time, give the true damage KL(dense || masked); recovery turns them into one factor per
layer and kind. Common random numbers: every mask sees the same tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from sartor.model.network import BLOCK, Anatomy, anatomy, linears_of, masked
from sartor.numerics.compensate import obs_shrink
from sartor.numerics.recover import Recovered, partition_design, recover
from sartor.stages.calibrate import SITE_OF, Moments
from sartor.stages.likelihood import cross_entropy, kl_of, top_of


@dataclass(frozen=True)
class Fisher:
    """First-order damage: channel[layer] (f,) and group[layer] (g,), nats per token."""

    channel: dict[int, Tensor]
    group: dict[int, Tensor]


@dataclass(frozen=True)
class Units:
    """What probes switch: query groups, and blocks of `size` channels of like importance.

    order[layer]: channels from the least to the most important; block b is order[layer][size b : size b + size].
    layer, kind, index: per unit; kind 0 is a query group, 1 a block.
    """

    order: dict[int, Tensor]
    layer: np.ndarray
    kind: np.ndarray
    index: np.ndarray
    size: int = BLOCK

    @property
    def factor(self) -> np.ndarray:
        """Units that share a recovered factor: those of one layer and kind."""
        return np.asarray(self.layer * 2 + self.kind)


@dataclass(frozen=True)
class Probed:
    """Effects of all units on one text, and the worth of their recovery."""

    recovered: Recovered
    probes: int
    tokens: int


def fisher(model: Any, rows: Int[Tensor, "n t"], batch: int = 2) -> Fisher:
    """Gradients of the text's own log-likelihood (empirical Fisher) at what o_proj and down_proj read."""
    a = anatomy(model)
    size = a.queries_per_group * a.head_dim
    caught: dict[tuple[int, str], Tensor] = {}
    channel: dict[int, Tensor] = {}
    group: dict[int, Tensor] = {}
    embedding = model.model.embed_tokens
    with _catching(model, caught):
        for part in rows.split(batch):
            inputs = embedding(part).detach().requires_grad_(True)
            cross_entropy(model, part, inputs).backward()
            predicted = part.numel() - len(part)  # the loss is a mean over them
            for (layer, site), z in caught.items():
                if z.grad is None:
                    continue
                product = (z.detach().float() * z.grad.float()).flatten(0, 1) * predicted
                if site == "down":
                    channel[layer] = channel.get(layer, 0) + 0.5 * (product**2).sum(0)
                else:
                    by_group = product.reshape(len(product), -1, size).sum(-1)
                    group[layer] = group.get(layer, 0) + 0.5 * (by_group**2).sum(0)
            caught.clear()
    tokens = rows.numel()
    return Fisher({k: v / tokens for k, v in channel.items()}, {k: v / tokens for k, v in group.items()})


@contextmanager
def _catching(model: Any, caught: dict[tuple[int, str], Tensor]) -> Iterator[None]:
    handles = [
        module.register_forward_pre_hook(_keep(caught, (layer, SITE_OF[name])))
        for layer, name, module in linears_of(model)
        if SITE_OF[name] in ("output", "down")
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _keep(caught: dict[tuple[int, str], Tensor], key: tuple[int, str]) -> Any:
    def hook(_: Any, args: tuple[Tensor, ...]) -> None:
        args[0].retain_grad()
        caught[key] = args[0]

    return hook


def order_units(a: Anatomy, scores: Fisher, moments: Moments, size: int = BLOCK) -> tuple[Units, np.ndarray]:
    """Units and their prior effects: channels sorted by Fisher damage times what the others cannot explain.

    Returns:
        (units, prior): prior (d,) in nats per token.
    """
    order: dict[int, Tensor] = {}
    rows: list[tuple[int, int, int, float]] = []
    for n in range(a.layers):
        for g in range(a.groups[n]):
            rows.append((n, 0, g, float(scores.group[n][g])))
        if not a.ffn[n]:
            continue
        effect = scores.channel[n] * obs_shrink(moments.c[n, "down"])
        order[n] = effect.argsort()
        for b, value in enumerate(effect[order[n]].reshape(-1, size).sum(-1).tolist()):
            rows.append((n, 1, b, value))
    layer, kind, index, prior = (np.array(column) for column in zip(*rows, strict=True))
    return Units(order, layer, kind, index, size), prior


def block_effects(units: Units, scores: Fisher, moments: Moments) -> np.ndarray:
    """Prior effects of *given* units on another text (their order stays)."""
    out = []
    shrunk = {n: scores.channel[n] * obs_shrink(moments.c[n, "down"]) for n in units.order}
    for n, kind, i in zip(units.layer, units.kind, units.index, strict=True):
        out.append(
            float(scores.group[n][i])
            if kind == 0
            else float(shrunk[n][units.order[n][i * units.size : (i + 1) * units.size]].sum())
        )
    return np.array(out)


def probe(
    model: Any,
    units: Units,
    prior: np.ndarray,
    rows: Int[Tensor, "n t"],
    probes: int,
    share: float = 0.03,
    seed: int = 0,
    tell: Callable[[float, str], None] = lambda share, note: None,
) -> Probed:
    """Random masks over the units, measured on `rows`, recovered towards the prior."""
    design = partition_design(units.factor, share, max(1, round(probes * share)), seed)[:probes]
    reference = top_of(model, rows)
    y = np.empty(len(design))
    for i, removed in enumerate(design):
        with masked(model, *unit_masks(model, units, removed)):
            y[i] = kl_of(model, rows, reference)
        tell((i + 1) / len(design), f"probe {i + 1}/{len(design)}, damage {y[i]:.3f} nats per token")
    return Probed(recover(design, y, prior, units.factor, seed=seed), len(design), rows.numel())


def unit_masks(model: Any, units: Units, removed: np.ndarray) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
    """Keep-masks of the touched layers: query groups, and channels through the units' order."""
    a = anatomy(model)
    groups: dict[int, Tensor] = {}
    channels: dict[int, Tensor] = {}
    for u in np.flatnonzero(removed):
        n, i = int(units.layer[u]), int(units.index[u])
        if units.kind[u] == 0:
            groups.setdefault(n, torch.ones(a.groups[n], dtype=torch.bool))[i] = False
        else:
            channels.setdefault(n, torch.ones(a.ffn[n], dtype=torch.bool))[
                units.order[n][i * units.size : (i + 1) * units.size]
            ] = False
    return groups, channels
