"""Published ways to choose heads and FFN channels of a vision transformer, from their papers, on the network that has adapted to the user.

Scores are per channel and per head; `choose` turns them into masks of a share of all multiplications by the method's own policy: the same share of every layer (Torch-Pruning's
default), or one threshold for all channels and one for all heads (Isomorphic Pruning ranks only what has the same shape).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sartor.model.network import BLOCK, Anatomy, anatomy, clone, linear
from sartor.stages.curves import moments_of, refitted
from sartor.stages.recognition import loss_of

Scores = dict[int, Tensor]


@dataclass(frozen=True)
class Ranking:
    """Scores of channels and heads, the policy, and whether the rest is repaired in closed form."""

    channel: Scores
    head: Scores
    uniform: bool
    repaired: bool = False


def macs(a: Anatomy, tokens: int) -> int:
    """Multiplications of all layers for one picture: matrices, and what heads read of each other."""
    block, head = unit_macs(a, tokens)
    return block * sum(a.ffn) // BLOCK + head * sum(a.groups)


def unit_macs(a: Anatomy, tokens: int) -> tuple[int, int]:
    """Of a block of channels, and of a head."""
    return 2 * BLOCK * a.width * tokens, (4 * a.head_dim * a.width + 2 * a.head_dim * tokens) * tokens


def _coupled(model: Any, of: Callable[[Tensor], Tensor]) -> tuple[Scores, Scores]:
    """Sums over all weights that go with a channel or a head, of what `of` makes of each weight."""
    a, channel, head = anatomy(model), Scores(), Scores()
    for n in range(a.layers):
        up, down = (of(linear(model, n, f"mlp.{k}").weight) for k in ("up_proj", "down_proj"))
        channel[n] = up.sum(1) + down.sum(0)
        rows = sum(of(linear(model, n, f"self_attn.{k}_proj").weight).sum(1) for k in "qkv")
        head[n] = (rows + of(linear(model, n, "self_attn.o_proj").weight).sum(0)).reshape(a.groups[n], -1).sum(1)
    return channel, head


def magnitude(model: Any, pixels: Tensor, labels: Tensor) -> Ranking:
    """Squared weights of everything coupled (Fang et al. 2023, arXiv:2301.12900: group L2 norm)."""
    return Ranking(*_coupled(model, lambda w: w.detach().square()), uniform=True)


def _first_order(model: Any, pixels: Tensor, labels: Tensor) -> tuple[Scores, Scores]:
    trained = clone(model).requires_grad_(True)
    for at in range(0, len(pixels), 8):
        loss_of(trained, pixels[at : at + 8], labels[at : at + 8]).backward()
    return _coupled(trained, lambda w: (w * w.grad).detach().abs())


def taylor(model: Any, pixels: Tensor, labels: Tensor) -> Ranking:
    """|weight x gradient| of the loss, summed over everything coupled (Molchanov et al. 2019, arXiv:1906.10771, as Torch-Pruning groups it)."""
    return Ranking(*_first_order(model, pixels, labels), uniform=True)


def isomorphic(model: Any, pixels: Tensor, labels: Tensor) -> Ranking:
    """The same scores, ranked over all layers but only among units of one shape (Fang et al. 2024, arXiv:2407.04616)."""
    return Ranking(*_first_order(model, pixels, labels), uniform=False)


def corp(model: Any, pixels: Tensor, labels: Tensor) -> Ranking:
    """Activations' energy times what reads them, the same share everywhere, the rest repaired on the whole network's own activations, mean included (CORP-like)."""
    a, energy = anatomy(model), moments_of(model, pixels)
    channel, head = Scores(), Scores()
    for n in range(a.layers):
        for name, out in (("mlp.down_proj", channel), ("self_attn.o_proj", head)):
            e = energy[n, name].diagonal()[:-1] * linear(model, n, name).weight.square().sum(0)
            out[n] = e if out is channel else e.reshape(a.groups[n], -1).sum(1)
    return Ranking(channel, head, uniform=True, repaired=True)


def random(model: Any, pixels: Tensor, labels: Tensor) -> Ranking:
    a, g = anatomy(model), torch.Generator().manual_seed(0)
    draw = lambda sizes: {n: torch.rand(s, generator=g) for n, s in enumerate(sizes)}  # noqa: E731
    return Ranking(draw(a.ffn), draw(a.groups), uniform=True)


def choose(a: Anatomy, r: Ranking, share: float) -> list[tuple[list[int], list[int]]]:
    """Heads and channels of every layer that stay when `share` of both goes."""
    channels = _lowest(r.channel, share, r.uniform)
    heads = _lowest(r.head, share, r.uniform)
    return [(heads[n], channels[n]) for n in range(a.layers)]


def _lowest(scores: Scores, share: float, uniform: bool) -> dict[int, list[int]]:
    if uniform:
        return {n: sorted(s.argsort()[round(share * len(s)) :].tolist()) for n, s in scores.items()}
    every = torch.cat(list(scores.values()))
    line = every.sort().values[round(share * len(every))]
    kept = {n: (s >= line).nonzero()[:, 0].tolist() for n, s in scores.items()}
    return {n: k or [int(scores[n].argmax())] for n, k in kept.items()}


@torch.no_grad()
def repair_(small: Any, whole: Any, pixels: Tensor, kept: list[tuple[list[int], list[int]]]) -> None:
    """Each matrix for itself: what it said of all its inputs from those that stay, in place."""
    a, c = anatomy(whole), moments_of(whole, pixels)
    for n, (heads, channels) in enumerate(kept):
        columns = [h * a.head_dim + i for h in heads for i in range(a.head_dim)]
        for name, stays in (("self_attn.o_proj", columns), ("mlp.down_proj", channels)):
            new = linear(small, n, name)
            new.weight.data, new.bias.data = refitted(linear(whole, n, name), c[n, name], stays)


RIVALS: dict[str, Callable[[Any, Tensor, Tensor], Ranking]] = {
    "random": random,
    "Torch-Pruning, magnitude": magnitude,
    "Torch-Pruning, Taylor": taylor,
    "Isomorphic": isomorphic,
    "CORP-like": corp,
}
