"""What it costs to cut a part of a layer once the rest is fitted, measured, beside what the sum of its units' effects foretells.

An effect is of one unit with all others there. Of many units of one part the first go for less than their sum, since what stays says nearly the same; the last for far more, since nothing is left to
say it. How much less and how much more differs from layer to layer, and between heads and channels, up to forty times (docs/log.md). So every part is cut alone, to two depths, the matrix that
reads it is fitted in closed form to what it said, and KL(whole || cut) is measured on other rows; in between, and beyond, the ratio of the damage to the sum is taken to grow exponentially in the share that is gone.
A part of few units is cut to every depth: of three query groups of a language model two may go for a quarter of their sum, and the last for all of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from sartor import paging
from sartor.model.families import ATTENTION, MLP
from sartor.model.hooks import removed_after
from sartor.model.network import Anatomy, anatomy, embed, linear, linears_of, query_rows, through
from sartor.model.tail import Tail
from sartor.numerics.compensate import refit
from sartor.stages.medium import medium_of
from sartor.stages.probe import Effects, Units, kept_groups, order_units

WRITERS = {"attention": ATTENTION[-1], "mlp": MLP[-1]}
MODERATE, DEEP = 0.5, 0.92  # of a part's units, gone
FEW = 4  # units, of which every number is tried
LAM = 0.1
PASS = 16  # rows
MOST = 20.0  # that damage is over or under its sum at most, where the line goes on beyond what was measured and nothing was that is more
Moments = Mapping[tuple[int, str], Float[Tensor, "f f"]]
Curve = list[list[float]]  # (share of the units gone, damage beside their sum), twice or more
Curves = dict[str, Curve]  # by the name of a part's ladder


def summed(units: Units, layer: int, kind: str) -> tuple[float, ...]:
    """The damage of a part's first 0, 1, 2, ... units, the least important first, as the sum of their effects."""
    alone = units.of(layer, kind)
    ordered = alone if kind == "mlp" else np.sort(alone)  # blocks of channels are in order
    return (0.0, *np.cumsum(np.maximum(ordered, 0)).tolist())


def foretold(units: Units, layer: int, kind: str, curves: Curves) -> tuple[float, ...]:
    """The same as measured, where it was."""
    damage, name = summed(units, layer, kind), f"{kind}.{layer}"
    return bent(damage, curves[name]) if name in curves else damage


def bent(damage: Sequence[float], curve: Curve) -> tuple[float, ...]:
    """The damage of the first 0, 1, 2, ... units, from the sum of their effects and what was measured.

    Units that are no longer there cost nothing, and what is measured of the others knows that: the curve begins behind them.
    """
    total, gone = np.asarray(damage), _gone(damage)
    shares = np.clip(np.arange(-gone, len(total) - gone) / max(len(total) - 1 - gone, 1), 0, 1)
    at, logs = np.array([share for share, _ in curve]), np.log([max(ratio, 1e-6) for _, ratio in curve])
    slopes = np.divide(np.diff(logs), np.diff(at), out=np.zeros(len(at) - 1), where=np.diff(at) > 0)
    segment = np.clip(np.searchsorted(at, shares) - 1, 0, len(slopes) - 1)  # the first and the last one go on
    ratio = logs[segment] + slopes[segment] * (shares - at[segment])
    ratio = np.clip(ratio, min(logs.min(), -np.log(MOST)), max(logs.max(), np.log(MOST)))
    return tuple(np.maximum.accumulate(total * np.exp(ratio)).tolist())


def _gone(damage: Sequence[float]) -> int:
    """Units that cost nothing, as they are not there."""
    return max(int(np.count_nonzero(np.asarray(damage) == 0)) - 1, 0)


@torch.no_grad()
def measured_curves(
    model: Any,
    effects: Effects,
    moments: Moments,
    judged: Tensor,
    tell: Callable[[float, str], None] = lambda share, note: None,
    kinds: Sequence[str] = tuple(WRITERS),
) -> Curves:
    """A curve for every part of a network, by the name of its ladder ("mlp.3").

    Args:
        model: in the precision to run in; as it was afterwards. moments: what is left is fitted by them (`moments_of`), by layer and writer. judged: rows that they are not of; damage is measured on them. kinds: of parts.
    """
    a, units = anatomy(model), order_units(effects)
    tail, found = Tail(model, judged), Curves()
    apart = medium_of(model).apart(model, tail.dense)
    parts = [(n, kind) for n in range(a.layers) for kind in kinds if (a.ffn if kind == "mlp" else a.groups)[n]]
    for i, (n, kind) in enumerate(parts):

        def cost(gone: int, n: int = n, kind: str = kind) -> float:
            with narrowed(linear(model, n, WRITERS[kind]), moments[n, WRITERS[kind]], _stays(units, a, n, kind, gone)):
                return apart(tail.hidden_from(n))

        if points := curve_of(summed(units, n, kind), depths, cost):
            found[f"{kind}.{n}"] = points
        tell((i + 1) / len(parts), f"layer {n}: what fewer {'channels' if kind == 'mlp' else 'heads'} cost")
    return found


def curve_of(sums: Sequence[float], depths: Callable[[int], Sequence[int]], cost: Callable[[int], float]) -> Curve:
    """A part's curve; none where nothing is to be measured, as it says nothing.

    Args:
        sums: the damage of its first 0, 1, 2, ... units, as the sum of effects. depths: how many go, of so many. cost: what it measures to lose so many, those that are not there counted.
    """
    idle = _gone(sums)
    many = len(sums) - 1 - idle
    if many < 1:
        return []
    points = [[gone / many, cost(idle + gone) / max(sums[idle + gone], 1e-12)] for gone in depths(many)]
    return points * 2 if len(points) == 1 else points


def depths(units: int) -> list[int]:
    """How many units go: of many at least one and never all."""
    return list(range(1, units + 1)) if units <= FEW else not_all(units)


def not_all(units: int) -> list[int]:
    """The moderate and the deep cut of so many units: at least one of them, and never all."""
    return sorted({min(max(1, round(share * units)), units - 1) for share in (MODERATE, DEEP)} - {0})


def _stays(units: Units, a: Anatomy, n: int, kind: str, gone: int) -> list[int]:
    """Inputs of the part's writer that are left when so many units are gone, the least important first."""
    if kind == "mlp":
        left: list[int] = sorted(units.order[n].tolist()[gone * units.size :])
        return left
    kept = kept_groups(units.of(n, kind), gone)
    columns: list[int] = query_rows(kept, a)[0].tolist() if kept else []
    return columns


@torch.no_grad()
def moments_of(model: Any, rows: Tensor) -> dict[tuple[int, str], Float[Tensor, "f f"]]:
    """Sums of z z^T of what every writer reads, with an input that is always one where it has a bias."""
    found: dict[tuple[int, str], Tensor] = {}

    def note(key: tuple[int, str]) -> Any:
        def add(module: nn.Linear, args: tuple[Tensor, ...]) -> None:
            z = args[0].flatten(0, -2).float()
            z = z if module.bias is None else torch.cat([z, torch.ones(len(z), 1)], 1)
            found[key] = found[key].addmm_(z.T, z) if key in found else z.T @ z

        return add

    writers = ((n, name, module) for n, name, module in linears_of(model) if name in WRITERS.values())
    with removed_after([module.register_forward_pre_hook(note((n, name))) for n, name, module in writers]):
        for part in rows.split(PASS):
            through(model, embed(model, part))
    return found


def refitted(layer: nn.Linear, moments: Float[Tensor, "f f"], stays: Sequence[int]) -> tuple[Tensor, Tensor | None]:
    """(weights, bias where it has one) that say from these inputs alone what the matrix says of all."""
    w = layer.weight if layer.bias is None else torch.cat([layer.weight, layer.bias[:, None]], 1)
    w = w.detach().float()
    s = torch.tensor([*stays] if layer.bias is None else [*stays, w.shape[1] - 1], dtype=torch.long)
    fitted = refit(w[:, s], (w @ moments)[:, s], moments[s][:, s], LAM) if len(s) else w[:, s]
    return (fitted, None) if layer.bias is None else (fitted[:, :-1].contiguous(), fitted[:, -1].contiguous())


@contextmanager
def narrowed(layer: nn.Linear, moments: Float[Tensor, "f f"], stays: Sequence[int]) -> Iterator[None]:
    """The matrix reads these inputs alone while the body runs, fitted to what it said."""
    weight, bias = refitted(layer, moments, stays)
    paging.let_go(moments, layer.weight.data)  # it is out of its layer, which would have
    wide = torch.zeros_like(layer.weight)
    wide[:, list(stays)] = weight.to(wide.dtype)
    with holding(layer, wide, bias):
        yield


@contextmanager
def holding(layer: Any, weight: Tensor, bias: Tensor | None) -> Iterator[None]:
    """The layer has these weights while the body runs, and this bias where there is one."""
    before = layer.weight, layer.bias
    try:
        layer.weight = nn.Parameter(weight.to(before[0].dtype), requires_grad=False)
        if bias is not None:
            layer.bias = nn.Parameter(bias.to(before[0].dtype), requires_grad=False)
        yield
    finally:
        layer.weight, layer.bias = before
