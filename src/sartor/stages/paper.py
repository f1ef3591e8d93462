"""The plain rule of arXiv:2408.08684, as a baseline: personalized parts of the network lose half as much of themselves as the others.

*Our reading*: only the abstract of that paper could be had. It divides linear layers into personalized and generic ones by compressed sensing (parts of the model are
sub-sampled at random, what that does to the user's results is measured, a sparse vector explains it) and gives the two kinds different pruning rates. The numbers here are ours.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy.optimize import minimize
from torch import Tensor

from sartor.errors import BudgetError, InputError
from sartor.model.families import family_of
from sartor.model.network import BLOCK, Anatomy, anatomy, linear, masked
from sartor.plan import LayerPlan, Plan, to_mask
from sartor.stages.bits import BASE, all_on_base, embeddings_of
from sartor.stages.calibrate import Moments
from sartor.stages.decide import LEAST_BLOCKS, Bytes, Measured, exists, worth_told
from sartor.stages.likelihood import kl_of, top_of
from sartor.stages.whose import diagnose

PROBES = 60
TAKEN = 0.1  # of all parts, in a probe
HALF = 0.5  # of a part's units, where it is taken
SPARSITY = 0.05  # of the penalty that leaves nothing
SPARED = 0.5  # the rate of personalized parts beside that of the others


@dataclass(frozen=True)
class Order:
    """Units from the first to go to the last: {layer: channels}, {layer: query groups}."""

    channels: dict[int, Int[Tensor, " f"]]
    groups: dict[int, list[int]]


def refuse_equal_layers(a: Anatomy) -> None:
    """Raises InputError where layers of the family must be equal in size."""
    if family_of(a.family).gguf_flexible is None:
        raise InputError(
            f"--method paper gives every layer its own size, which llama.cpp cannot load for '{a.family}': leave --method at sartor"
        )


def by_activation(model: Any, moments: Moments) -> Order:
    """By ||W_j||^2 E[z_j^2] (Wanda, arXiv:2306.11695, for whole inputs)."""
    a = anatomy(model)

    def score(n: int, site: str, name: str) -> Tensor:
        return linear(model, n, name).weight.data.float().square().sum(0) * moments.c[n, site].diagonal()

    channels = {n: score(n, "down", "mlp.down_proj").argsort() for n in range(a.layers) if a.ffn[n]}
    heads = {n: score(n, "output", "self_attn.o_proj").reshape(a.groups[n], -1) for n in range(a.layers) if a.groups[n]}
    return Order(channels, {n: h.sum(-1).argsort().tolist() for n, h in heads.items()})


def importance(
    model: Any,
    order: Order,
    rows: Int[Tensor, "n t"],
    seed: int = 0,
    tell: Callable[[float, str], None] = lambda share, note: None,
) -> Float[np.ndarray, " p"]:
    """What the user's text needs of every part, in nats per token: attention of layer 0, its MLP, attention of layer 1, ...

    A probe takes half of the units off a tenth of the parts at random; what KL(dense || masked) that gives is explained by a sparse, non-negative sum.
    """
    a, rng, reference = anatomy(model), np.random.default_rng(seed), top_of(model, rows)
    taken, y = np.zeros((PROBES, 2 * a.layers)), np.zeros(PROBES)
    for i, row in enumerate(taken):
        row[rng.permutation(len(row))[: max(1, round(TAKEN * len(row)))]] = 1
        groups, channels = {}, {}
        for part in np.flatnonzero(row):
            n = int(part) // 2
            if part % 2 and a.ffn[n]:
                channels[n] = _without(a.ffn[n], order.channels[n][: round(HALF * a.ffn[n])])
            elif not part % 2 and a.groups[n]:
                groups[n] = _without(a.groups[n], order.groups[n][: round(HALF * a.groups[n])])
        with masked(model, groups, channels):
            y[i] = kl_of(model, rows, reference)
        tell((i + 1) / PROBES, f"probe {i + 1}/{PROBES}: {y[i]:.3f} nats per token")
    return sparse(taken, y)


def _without(n: int, gone: Any) -> Tensor:
    keep = torch.ones(n, dtype=torch.bool)
    keep[gone] = False
    return keep


def sparse(a: Float[np.ndarray, "m p"], y: Float[np.ndarray, " m"]) -> Float[np.ndarray, " p"]:
    """min |y - a x|^2 / 2 + s sum(x) over x >= 0, s a share SPARSITY of the strength that leaves nothing; means are taken off first."""
    a, y = a - a.mean(0), y - y.mean()
    s = SPARSITY * float((a.T @ y).max())

    def cost(x: np.ndarray) -> tuple[float, np.ndarray]:
        rest = a @ x - y
        return float(rest @ rest / 2 + s * x.sum()), a.T @ rest + s

    found: np.ndarray = minimize(cost, np.zeros(a.shape[1]), jac=True, bounds=[(0, None)] * a.shape[1]).x
    return found


def rates(found: Float[np.ndarray, " p"]) -> Float[np.ndarray, " p"]:
    """Of the common rate: SPARED for personalized parts, those above the mean, 1 for the others."""
    return np.where(found > found.mean(), SPARED, 1.0)


def cut_at(
    order: Order, rate: Float[np.ndarray, " p"], common: float, least_blocks: int
) -> tuple[Mapping[int, list[int]], Mapping[int, list[int]]]:
    """(query groups, channels) that every layer keeps at a common rate; channels go in blocks, and `least_blocks` of them stay."""
    groups, channels = {}, {}
    for n, first in order.groups.items():
        groups[n] = sorted(first[int(min(1.0, common * rate[2 * n]) * len(first)) :])
    for n, cheap in order.channels.items():
        most = max(0, len(cheap) // BLOCK - least_blocks)
        blocks = min(most, int(common * rate[2 * n + 1] * len(cheap) / BLOCK))
        channels[n] = sorted(cheap[blocks * BLOCK :].tolist())
    return groups, channels


def decide(
    model: Any,
    tokenizer: Any,
    m: Measured,
    order: Order,
    found: np.ndarray,
    budget: int,
    bytes_of: Bytes,
    sha256: str,
    rho: float,
    seed: int,
) -> Plan:
    """The paper's rule: four bits everywhere, all words, and the smallest common rate of pruning that fits the budget.

    Args:
        found: importance of every part. The rest is as for `decide`.
    Raises:
        BudgetError: too small a budget for cuts of this kind.
    """
    a = anatomy(model)
    grids = all_on_base(model) | dict.fromkeys(embeddings_of(a), BASE)
    rate = rates(found)

    said = diagnose(m.user, m.generic, m.worth)

    def at(common: float) -> tuple[int, tuple[LayerPlan, ...], dict[str, str]]:
        groups, channels = cut_at(order, rate, common, LEAST_BLOCKS)
        kept = [(groups.get(n, []), channels.get(n, [])) for n in range(a.layers)]
        cut = replace(a, groups=tuple(len(g) for g, _ in kept), ffn=tuple(len(c) for _, c in kept))
        there = {n: g for n, g in grids.items() if exists(n, cut)}
        layers = tuple(
            LayerPlan(to_mask(g, a.groups[n]), to_mask(c, a.ffn[n]), *said[n]) for n, (g, c) in enumerate(kept)
        )
        return bytes_of(cut, tokenizer, there), layers, there

    low, high = 0.0, 1 / SPARED
    if at(high)[0] > budget:
        raise BudgetError(
            f"a budget of {budget:,} bytes cannot be reached by the paper's rule, which keeps every word and four bits: its smallest model has {at(high)[0]:,} bytes; ask for more, or leave --method at sartor",
            at(high)[0],
        )
    if at(low)[0] > budget:
        for _ in range(20):
            middle = (low + high) / 2
            low, high = (low, middle) if at(middle)[0] <= budget else (middle, high)
        low = high
    size, layers, there = at(low)
    damage = _foretold(m, layers)
    saved = at(0.0)[0] - size
    return Plan(
        sha256, a.family, budget, size, None, None, layers, there, damage, damage / max(1, saved), {"common rate": [low]},
        worth_told(m), {}, rho, seed, settled=True, method="paper",
    )  # fmt: skip


def _foretold(m: Measured, layers: Sequence[LayerPlan]) -> float:
    """Summed effects of all that these layers lose, on the user's text."""
    total = 0.0
    for n, layer in enumerate(layers):
        for effects, kept in (
            (m.user.group.get(n), layer.kept_groups()),
            (m.user.channel.get(n), layer.kept_channels()),
        ):
            if effects is not None:
                total += float(effects.sum() - effects[kept].sum())
    return total
