"""Probing: which units a text needs, how sure that is, and whether it foretells what a cut really costs.

Effects come from backward probes (`sensitivity.py`): each draws one random direction among the outputs and is felt by all units at once. Forward
probes, random masks over the units that could go, then measure the true damage KL(dense || masked) on other text: the effects must foretell it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from scipy.stats import spearmanr
from torch import Tensor

from sartor.model.network import BLOCK, Anatomy, anatomy, masked
from sartor.model.tail import Tail
from sartor.numerics.metrics import student_interval
from sartor.stages.medium import medium_of
from sartor.stages.sensitivity import Felt

TINY = 1e-30  # of an effect whose logarithm is taken
SURE = 1 - 1e-6  # of a correlation whose odds are taken
SHARES = (0.02, 0.25)  # of all units that a mask takes, from few to many
PARTS = {"attention": 0, "mlp": 1}


@dataclass(frozen=True)
class Effects:
    """What one text needs, in nats per token.

    Attributes:
        channel, group: {layer: effect of every FFN channel, of every query group}. parts: {"attention" or "mlp": by layer, [effect, low, high]} of
        all of them together, with 95% intervals over rows of text. tokens: how much text it was. known: reliability of the units' order. rows: that the intervals come from. heads: the same intervals for every query group, by layer.
    """

    channel: dict[int, Float[Tensor, " f"]]
    group: dict[int, Float[Tensor, " g"]]
    parts: dict[str, list[list[float]]]
    tokens: int
    known: float = 0.0
    rows: int = 0
    heads: dict[int, list[list[float]]] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """For JSON, with four digits; nothing in it but numbers of the model's own parts."""
        short = lambda d: {str(n): [float(f"{x:.4g}") for x in v.tolist()] for n, v in d.items()}  # noqa: E731
        return {
            "channel": short(self.channel),
            "group": short(self.group),
            "parts": self.parts,
            "tokens": self.tokens,
            "known": round(self.known, 4),
            "rows": self.rows,
            "heads": {str(n): x for n, x in self.heads.items()},
        }

    @staticmethod
    def from_dict(raw: Mapping[str, Any]) -> Effects:
        read = lambda d: {int(n): torch.tensor(v) for n, v in d.items()}  # noqa: E731
        heads = {int(n): x for n, x in raw["heads"].items()}
        return Effects(
            read(raw["channel"]), read(raw["group"]), raw["parts"], raw["tokens"], raw["known"], raw["rows"], heads
        )


def effects_of(a: Anatomy, felt: Felt) -> Effects:
    """From what the rows said of single inputs to channels, query groups and whole layers."""
    channel: dict[int, Tensor] = {}
    group: dict[int, Tensor] = {}
    heads: dict[int, list[list[float]]] = {}
    parts: dict[str, list[list[float]]] = {k: [] for k in PARTS}
    rows = 0
    for n in range(a.layers):
        by_row = dict.fromkeys(PARTS, np.zeros(1))
        if a.groups[n]:
            of_groups = felt.sketch[n, "output"].reshape(-1, a.groups[n], a.queries_per_group * a.head_dim).sum(-1)
            group[n] = of_groups.square().sum(0)
            squares = felt.by_row(of_groups)
            heads[n] = [student_interval(x) for x in squares.T]
            by_row["attention"] = squares.sum(1)
        if a.ffn[n]:
            channel[n] = felt.effect((n, "down"))
            by_row["mlp"] = felt.by_row(felt.sketch[n, "down"]).sum(1)
        rows = max(rows, *map(len, by_row.values()))
        for k, x in by_row.items():
            parts[k].append(student_interval(x))
    return Effects(channel, group, parts, felt.tokens, 0.0, rows, heads)


def blended(user: Effects, generic: Effects, rho: float) -> Effects:
    """Effects on both texts, by share."""
    channel, group = (
        {n: (1 - rho) * x + rho * theirs[n] for n, x in mine.items()}
        for mine, theirs in ((user.channel, generic.channel), (user.group, generic.group))
    )
    return replace(user, channel=channel, group=group)


def reliability(one: Effects, other: Effects, generic: Effects | None = None) -> float:
    """How well the order of all channels and query groups is known from two halves of a text together: the squared correlation with the truth, of ranks.

    Alone 2r / (1 + r), r being the rank correlation of the halves (Spearman and Brown). Beside a generic profile one half is `recovered` first; c, its correlation with the other half as that was
    measured, tells by c^2 / r how true it has become (correction for attenuation; Spearman 1904). Odds of either half, x / (1 - x), are how many times the noise the signal has, and add up.
    """
    r = min(_agreement(one, other), SURE)
    if not r > 0:  # nor where all effects are alike and there is no order
        return 0.0
    half = r
    if generic is not None:
        c = np.mean([_agreement(_half(x, y, generic), y) for x, y in ((one, other), (other, one))])
        half = min(float(c) ** 2 / r, SURE) if c > 0 else 0.0
    odds = half / (1 - half) + r / (1 - r)
    return odds / (1 + odds)


def _agreement(one: Effects, other: Effects) -> float:
    return rank_correlation(_flat(one), _flat(other))


def rank_correlation(one: Float[np.ndarray, " d"], other: Float[np.ndarray, " d"]) -> float:
    """Spearman's; NaN where all of one are alike."""
    return float(spearmanr(one, other).statistic)


def _flat(e: Effects) -> Float[np.ndarray, " d"]:
    flat: np.ndarray = torch.cat([*e.channel.values(), *e.group.values()]).numpy()
    return flat


def recovered(user: Effects, halves: tuple[Effects, Effects], generic: Effects) -> Effects:
    """The user's effects as generic ones times a difference, of which only as much is believed as two halves of the text agree on.

    The logarithm of the ratio to the generic effect, once as a mean of each layer and once for every unit beside it, is shrunk by signal / (signal + noise), the noise being
    what the halves differ by: the posterior mean of a Gaussian difference (James and Stein 1961; Efron and Morris 1973). Soft thresholds, for a sparse difference, do a little
    worse: few units differ greatly, but nearly all differ (docs/log.md).
    """
    return _beside(user, halves, generic, 2)


def _half(one: Effects, other: Effects, generic: Effects) -> Effects:
    """The same from one half, the other telling only how far to believe it."""
    return _beside(one, (one, other), generic, 1)


def _beside(user: Effects, halves: tuple[Effects, Effects], generic: Effects, heard: int) -> Effects:
    channel = _shrunk([h.channel for h in halves], generic.channel, heard)
    group = _shrunk([h.group for h in halves], generic.group, heard)
    return replace(user, channel=channel, group=group)


def _shrunk(halves: list[dict[int, Tensor]], prior: dict[int, Tensor], heard: int) -> dict[int, Tensor]:
    """Args: heard: of the halves, the first so many say what the difference is; both say how noisy that is."""
    if not prior:
        return {}
    ratios = [{n: _log(h[n]) - _log(prior[n]) for n in prior} for h in halves]
    means = torch.tensor([[float(r[n].mean()) for n in prior] for r in ratios])
    level, believed = means[:heard].mean(), _believed(means[0], means[1], heard)
    layers = {n: level + believed * (m - level) for n, m in zip(prior, means[:heard].mean(0), strict=True)}
    beside = torch.stack([torch.cat([r[n] - r[n].mean() for n in prior]) for r in ratios])
    believed = _believed(beside[0], beside[1], heard)
    units = (believed * beside[:heard].mean(0)).split([len(x) for x in prior.values()])
    return {n: prior[n] * (layers[n] + u).exp() for n, u in zip(prior, units, strict=True)}


def _log(x: Tensor) -> Tensor:
    return x.clamp_min(TINY).log()


def _believed(one: Tensor, other: Tensor, heard: int) -> float:
    """Signal / (signal + noise) of the mean of so many of two noisy measurements of the same things."""
    noise = float((one - other).square().mean()) / 2  # of one of them
    signal = max(0.0, float(((one + other) / 2).var(correction=0)) - noise / 2)
    return signal / max(signal + noise / heard, TINY)


def left_out(model: Any, tail: Tail) -> Iterator[tuple[int, str, Tensor]]:
    """(layer, part, what the head reads without it), for every attention and every MLP; a layer costs only itself and those after it."""
    a = anatomy(model)
    for n in range(a.layers):
        for k, off in (
            ("attention", ({n: torch.zeros(a.groups[n], dtype=torch.bool)} if a.groups[n] else {}, {})),
            ("mlp", ({}, {n: torch.zeros(a.ffn[n], dtype=torch.bool)} if a.ffn[n] else {})),
        ):
            with masked(model, *off):
                hidden = tail.hidden_from(n)
            yield n, k, hidden


def without_parts(
    model: Any,
    rows: Tensor,
    tell: Callable[[float, str], None] = lambda share, note: None,
    batch: int | None = None,
) -> dict[str, Any]:
    """Every attention and every MLP left out alone: {part: by layer, [worse, low, high]}, the rise of the text's coding length as a share of it, or the share of pictures that are named otherwise; "rows": that the intervals come from.

    Exact, as there are few of them. A negative rise is a part that hurts.

    Args:
        batch: pictures that run at once; None: all rows, as texts must, whose rise is a share of all their length.
    """
    medium, steps = medium_of(model), 2 * anatomy(model).layers
    heard: dict[tuple[int, str], Float[np.ndarray, " n"]] = {}
    parts = rows.split(batch or len(rows))
    for i, some in enumerate(parts):
        tail = Tail(model, some)
        worse = medium.worse(model, some, tail.dense)
        for step, (n, k, hidden) in enumerate(left_out(model, tail)):
            heard[n, k] = np.concatenate([heard.get((n, k), np.zeros(0)), worse(hidden)])
            share = (i + (step + 1) / steps) / len(parts)
            tell(share, f"layer {n} without its {k}: {heard[n, k].mean():+.1%}")
    found: dict[str, Any] = {k: [medium.interval(x) for (_, of), x in heard.items() if of == k] for k in PARTS}
    return {"rows": len(rows), **found}


@dataclass(frozen=True)
class Units:
    """What a decision is about: query groups, and blocks of `size` channels of like importance.

    Attributes:
        order[layer]: channels from the least to the most important; block b is order[layer][size b : size b + size].
        layer, kind, index: per unit; kind 0 is a query group, 1 a block. effects: (d,) nats per token.
    """

    order: dict[int, Tensor]
    layer: np.ndarray
    kind: np.ndarray
    index: np.ndarray
    effects: np.ndarray
    size: int = BLOCK

    def of(self, layer: int, kind: str) -> np.ndarray:
        """Effects of one layer's units of a kind, in the order of their indices."""
        here: np.ndarray = self.effects[(self.layer == layer) & (self.kind == PARTS[kind])]
        return here


def order_units(e: Effects, size: int = BLOCK) -> Units:
    """Units and their effects."""
    order: dict[int, Tensor] = {}
    rows: list[tuple[int, int, int, float]] = []
    for n in sorted(e.group.keys() | e.channel.keys()):
        if n in e.group:
            rows += [(n, 0, g, float(x)) for g, x in enumerate(e.group[n])]
        if n in e.channel:
            order[n] = e.channel[n].argsort()
            rows += [(n, 1, b, float(x)) for b, x in enumerate(e.channel[n][order[n]].reshape(-1, size).sum(-1))]
    layer, kind, index, effects = (np.array(column) for column in zip(*rows, strict=True))
    return Units(order, layer, kind, index, effects, size)


def kept_groups(effects: np.ndarray, removed: int) -> list[int]:
    """Query groups of a layer that stay when the `removed` cheapest go."""
    return sorted(np.argsort(effects, kind="stable")[removed:].tolist())


@dataclass(frozen=True)
class Worth:
    """How well summed effects foretell the damage of random masks on other text.

    Attributes:
        masks: how many. r2: of log damage, with one factor for all. spearman: of the order. factor: measured over foretold, the median.
    """

    masks: int
    r2: float
    spearman: float
    factor: float


def check(
    model: Any,
    units: Units,
    rows: Tensor,
    masks: int,
    seed: int = 0,
    tell: Callable[[float, str], None] = lambda share, note: None,
) -> Worth:
    """Measure random masks over the cheaper half of the units, a few of them to half of them at a time, on `rows`."""
    medium = medium_of(model)
    reference = medium.said(model, rows)

    def cost(mask: np.ndarray) -> float:
        with masked(model, *unit_masks(model, units, mask)):
            return medium.kl(model, rows, reference)

    return worth_of_masks(units.effects, cost, masks, medium.unit, seed, tell)


def worth_of_masks(
    effects: Float[np.ndarray, " d"],
    cost: Callable[[Float[np.ndarray, " d"]], float],
    masks: int,
    unit: str,
    seed: int = 0,
    tell: Callable[[float, str], None] = lambda share, note: None,
) -> Worth:
    """What random masks cost beside what the units' effects foretell; `cost` is of a mask, 1 where a unit is off, in `unit`."""
    removed, y = random_masks(effects, masks, seed), np.empty(masks)
    for i, mask in enumerate(removed):
        y[i] = cost(mask)
        tell((i + 1) / masks, f"check {i + 1}/{masks}: {int(mask.sum())} units off cost {y[i]:.3f} {unit}")
    ratio = np.log(np.maximum(y, 1e-9)) - np.log(np.maximum(removed @ effects, 1e-9))
    spread = np.log(np.maximum(y, 1e-9)).var()
    r2 = float(1 - ratio.var() / spread) if spread > 0 else 0.0
    return Worth(masks, r2, rank_correlation(removed @ effects, y), float(np.exp(np.median(ratio))))


def random_masks(effects: Float[np.ndarray, " d"], masks: int, seed: int) -> Float[np.ndarray, "m d"]:
    """1 where a mask has the unit off: units of the cheaper half, as many as SHARES say, growing evenly on a log scale."""
    rng = np.random.default_rng(seed)
    cheap = np.argsort(effects, kind="stable")[: max(1, len(effects) // 2)]
    out = np.zeros((masks, len(effects)))
    for row, share in zip(out, np.geomspace(*SHARES, masks), strict=True):
        row[rng.choice(cheap, max(1, min(len(cheap), round(share * len(effects)))), replace=False)] = 1
    return out


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
            gone = units.order[n][i * units.size : (i + 1) * units.size]
            channels.setdefault(n, torch.ones(a.ffn[n], dtype=torch.bool))[gone] = False
    return groups, channels
