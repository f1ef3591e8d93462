"""Published structured pruning, implemented from the papers, for `bench/cuts.py`: what each would remove of a model's FFN and attention.

A rival gives, per layer, an order of FFN channels and a cost for every block of 32 of them and for every query group; or it takes whole
sub-layers. All see the same rows. Where a paper leaves attention's grouped queries open, a group (a key/value head with its query heads) goes as one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sartor.model.network import BLOCK, anatomy, linear, tracked
from sartor.model.tail import Tail
from sartor.stages import paper
from sartor.stages.calibrate import Moments, second_moments
from sartor.stages.likelihood import loss_of


@dataclass(frozen=True)
class Seen:
    """What the rivals may look at: the model, its rows, and first-order statistics of them."""

    model: Any
    rows: Tensor
    moments: Moments
    means: dict[tuple[int, str], Tensor]
    taylor: dict[tuple[int, str], Tensor]
    fisher: dict[tuple[int, str], Tensor]


@dataclass(frozen=True)
class Ranking:
    """order[layer]: channels, the first to go first. blocks, groups: costs of blocks of that order, and of query groups. uniform: the same share of every layer."""

    order: dict[int, Tensor]
    blocks: dict[int, np.ndarray]
    groups: dict[int, np.ndarray]
    uniform: bool


def look(model: Any, rows: Tensor) -> Seen:
    """Statistics of the rows."""
    means: dict[tuple[int, str], Tensor] = {}
    signed: dict[tuple[int, str], Tensor] = {}
    squared: dict[tuple[int, str], Tensor] = {}
    sites = [
        ((n, site), linear(model, n, name))
        for n in range(anatomy(model).layers)
        for site, name in (("output", "self_attn.o_proj"), ("down", "mlp.down_proj"))
    ]
    for part in rows.split(4):
        read: dict[tuple[int, str], Any] = {}

        def note(key: tuple[int, str], z: Any, read: dict[tuple[int, str], Any] = read) -> None:
            z.retain_grad()
            read[key] = z

        handles = [m.register_forward_pre_hook(lambda _, args, k=key: note(k, args[0])) for key, m in sites]
        loss_of(model, tracked(model, part), part).backward()
        for handle in handles:
            handle.remove()
        for key, z in read.items():
            means[key] = means.get(key, torch.zeros(())) + z.detach().float().sum((0, 1)) / rows.numel()
            felt = (z.detach() * z.grad).float().sum(1)
            signed[key] = signed.get(key, torch.zeros(())) + felt.sum(0)
            squared[key] = squared.get(key, torch.zeros(())) + felt.square().sum(0)
    return Seen(model, rows, second_moments(model, rows), means, signed, squared)


def by_channel(seen: Seen, score: Callable[[int, str], Tensor], uniform: bool) -> Ranking:
    """A score for every input of o_proj and down_proj."""
    a = anatomy(seen.model)
    order, blocks, groups = {}, {}, {}
    for n in range(a.layers):
        s = score(n, "down")
        order[n] = s.argsort()
        blocks[n] = s[order[n]].reshape(-1, BLOCK).sum(-1).numpy()
        groups[n] = score(n, "output").reshape(a.groups[n], -1).sum(-1).numpy()
    return Ranking(order, blocks, groups, uniform)


def _weight(seen: Seen, n: int, site: str) -> Tensor:
    return linear(seen.model, n, "mlp.down_proj" if site == "down" else "self_attn.o_proj").weight.data.float()


def wanda_sp(seen: Seen) -> Ranking:
    """||W_j||^2 E[z_j^2], equal shares (Wanda, arXiv:2306.11695, by channel as in FLAP's comparison)."""
    return by_channel(
        seen, lambda n, s: _weight(seen, n, s).square().sum(0) * seen.moments.c[n, s].diagonal(), uniform=True
    )


def flap(seen: Seen) -> Ranking:
    """||W_j||^2 Var(z_j), standardized layer by layer, one threshold (FLAP, arXiv:2312.11983); its bias goes in `cuts.py`."""

    def score(n: int, s: str) -> Tensor:
        variance = seen.moments.c[n, s].diagonal() - seen.means[n, s].square()
        x = _weight(seen, n, s).square().sum(0) * variance
        return (x - x.mean()) / x.std()

    r, (block, group) = by_channel(seen, score, uniform=False), anatomy(seen.model).unit_parameters()
    mean = {n: v / BLOCK for n, v in r.blocks.items()}, {n: v / _width(seen, n) for n, v in r.groups.items()}
    least = min(v.min() for side in mean for v in side.values())
    priced = [
        {n: (v - least + 1e-6) * size for n, v in side.items()} for side, size in zip(mean, (block, group), strict=True)
    ]
    return Ranking(
        r.order, *priced, uniform=False
    )  # a unit's mean score is its price per parameter, so one threshold rules all


def _width(seen: Seen, n: int) -> int:
    """Columns of o_proj that a query group has."""
    return len(seen.means[n, "output"]) // anatomy(seen.model).groups[n]


def taylor(seen: Seen) -> Ranking:
    """|sum over positions of z dL/dz| of the text's own loss (LLM-Pruner, arXiv:2305.11627, first order), one threshold."""
    return by_channel(seen, lambda n, s: seen.taylor[n, s].abs(), uniform=False)


def slim_like(seen: Seen) -> Ranking:
    """Greedy OBS on second moments, equal shares (ZipLM, arXiv:2302.04089; SlimGPT, arXiv:2412.18110, without its rising shares)."""
    a = anatomy(seen.model)
    order, blocks, groups = {}, {}, {}
    for n in range(a.layers):
        order[n], cost = removal_order(_weight(seen, n, "down"), seen.moments.c[n, "down"], BLOCK)
        blocks[n] = cost.numpy()
        wide = _weight(seen, n, "output").shape[1] // a.groups[n]
        heads = torch.arange(a.groups[n] * wide).split(wide)
        groups[n] = np.array(block_costs(_weight(seen, n, "output"), seen.moments.c[n, "output"], list(heads)))
    return Ranking(order, blocks, groups, uniform=True)


def magnitude(seen: Seen) -> Ranking:
    """The squares of a channel's weights, or of a query's (in q and o), equal shares (Han et al., arXiv:1506.02626, by channel)."""

    def score(n: int, s: str) -> Tensor:
        readers = ("mlp.gate_proj", "mlp.up_proj") if s == "down" else ("self_attn.q_proj",)
        into = [linear(seen.model, n, name).weight.data.float().square().sum(1) for name in readers]
        return _weight(seen, n, s).square().sum(0) + torch.stack(into).sum(0)

    return by_channel(seen, score, uniform=True)


def random(seen: Seen) -> Ranking:
    """Anything, equal shares."""
    generator = torch.Generator().manual_seed(int(seen.rows.sum()))
    return by_channel(seen, lambda n, s: torch.rand(len(seen.means[n, s]), generator=generator), uniform=True)


def paper_rule(seen: Seen) -> Ranking:
    """The two-rate rule of arXiv:2408.08684, in *our reading* (`stages/paper.py`)."""
    a = anatomy(seen.model)
    order = paper.by_activation(seen.model, seen.moments)
    rate = paper.rates(paper.importance(seen.model, order, seen.rows[:4]))
    block, group = a.unit_parameters()
    # the t-th unit of a part goes once the common rate reaches t / all / rate
    blocks = {n: block * np.arange(1, (f := a.ffn[n] // BLOCK) + 1) / f / rate[2 * n + 1] for n in range(a.layers)}
    groups = {n: np.empty(a.groups[n]) for n in range(a.layers)}
    for n, first in order.groups.items():
        groups[n][first] = group * np.arange(1, len(first) + 1) / len(first) / rate[2 * n]
    return Ranking(order.channels, blocks, groups, uniform=False)


def block_drop(seen: Seen) -> Ranking:
    """Whole layers, those first that turn the stream least (block influence: ShortGPT, arXiv:2403.03853); four blocks of each MLP stay."""
    a, tail = anatomy(seen.model), Tail(seen.model, seen.rows[:16])
    states = [*tail.states, tail.dense]
    turn = [float(1 - torch.cosine_similarity(x.float(), y.float(), -1).mean()) for x, y in pairwise(states)]
    block, group = a.unit_parameters()
    plain = wanda_sp(seen)
    blocks = {n: np.full(a.ffn[n] // BLOCK, block * turn[n]) for n in range(a.layers)}
    return Ranking(
        plain.order, blocks, {n: np.full(a.groups[n], group * turn[n]) for n in range(a.layers)}, uniform=False
    )


RIVALS: dict[str, Callable[[Seen], Ranking]] = {
    "random": random,
    "magnitude": magnitude,
    "Taylor": taylor,
    "Wanda-sp": wanda_sp,
    "FLAP": flap,
    "OBS (SlimGPT-like)": slim_like,
    "block drop (ShortGPT)": block_drop,
    "the paper's rule (our reading)": paper_rule,
}


def removal_order(w: Tensor, c: Tensor, block: int, damp: float = 0.1) -> tuple[Tensor, Tensor]:
    """Inputs from the first to go to the last, and what every block of them adds to E||W z - W' z'||^2, W and C^-1 brought up to date after each."""
    w, p = _prepared(w, c, damp)
    left = torch.ones(w.shape[1], dtype=torch.bool)
    order, cost = [], []
    while left.any():
        each = w.square().sum(0) / p.diagonal().clamp_min(1e-12)
        each[~left] = float("inf")
        gone = each.topk(block, largest=False).indices
        cost.append(_cost(w, p, gone))
        share = torch.linalg.solve(p[gone][:, gone], p[gone])
        w -= w[:, gone] @ share
        p -= p[:, gone] @ share
        w[:, gone] = 0
        p[gone] = p[:, gone] = 0
        p.diagonal()[gone] = 1
        left[gone] = False
        order.append(gone)
    return torch.cat(order), torch.stack(cost)


def block_costs(w: Tensor, c: Tensor, blocks: list[Tensor], damp: float = 0.1) -> list[float]:
    """What each of these sets of inputs costs when it goes alone."""
    w, p = _prepared(w, c, damp)
    return [float(_cost(w, p, block)) for block in blocks]


def _prepared(w: Tensor, c: Tensor, damp: float) -> tuple[Tensor, Tensor]:
    d = c.diagonal().clamp_min(1e-12).sqrt()
    correlation = c / d / d[:, None]
    correlation.diagonal().add_(damp)
    return w * d, torch.cholesky_inverse(torch.linalg.cholesky(correlation))


def _cost(w: Tensor, p: Tensor, gone: Tensor) -> Tensor:
    return (w[:, gone] * torch.linalg.solve(p[gone][:, gone], w[:, gone].T).T).sum()
