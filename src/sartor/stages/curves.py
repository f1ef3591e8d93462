"""What it costs to cut a part of a layer once the rest is fitted, measured, beside what the sum of its units' effects foretells.

An effect is of one unit with all others there. Of many units of one part the first go for less than their sum, since what stays says nearly the same; the last for far more, since nothing is left to
say it. How much less and how much more differs from layer to layer, and between heads and channels, up to forty times (docs/log.md). So every part is cut alone, to two depths, the matrix that
reads it is fitted in closed form to what it said, and KL(whole || cut) is measured on other rows; in between, and beyond, the ratio of the damage to the sum is taken to grow exponentially in the share that is gone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from sartor.model.families import ATTENTION, MLP
from sartor.model.hooks import removed_after
from sartor.model.network import anatomy, linear, linears_of
from sartor.model.tail import Tail
from sartor.numerics.compensate import refit
from sartor.stages.decide import kept_groups
from sartor.stages.probe import Effects, Units, order_units

WRITERS = {"attention": ATTENTION[-1], "mlp": MLP[-1]}
MODERATE, DEEP = 0.5, 0.92  # of a part's units, gone
LAM = 0.1
PASS = 16  # rows
MOST = 20.0  # that damage is over or under its sum at most, where the line goes on beyond what was measured
Moments = dict[tuple[int, str], Float[Tensor, "f f"]]
Curve = list[list[float]]  # (share of the units gone, damage beside their sum), twice
Curves = dict[str, Curve]  # by the name of a part's ladder


def summed(units: Units, layer: int, kind: str) -> tuple[float, ...]:
    """The damage of a part's first 0, 1, 2, ... units, the least important first, as the sum of their effects."""
    alone = units.of(layer, kind)
    ordered = alone if kind == "mlp" else np.sort(alone)  # blocks of channels are in order
    return (0.0, *np.cumsum(np.maximum(ordered, 0)).tolist())


def bent(damage: Sequence[float], curve: Curve) -> tuple[float, ...]:
    """The damage of the first 0, 1, 2, ... units, from the sum of their effects and what was measured.

    Units that are no longer there cost nothing, and what is measured of the others knows that: the curve begins behind them.
    """
    total = np.asarray(damage)
    gone = max(int(np.count_nonzero(total == 0)) - 1, 0)
    shares = np.clip(np.arange(-gone, len(total) - gone) / max(len(total) - 1 - gone, 1), 0, 1)
    (first, low), (second, high) = ((share, np.log(max(ratio, 1e-6))) for share, ratio in curve)
    slope = (high - low) / (second - first) if second > first else 0.0
    ratio = np.clip(low + slope * (shares - first), -np.log(MOST), np.log(MOST))
    return tuple(np.maximum.accumulate(total * np.exp(ratio)).tolist())


@torch.no_grad()
def measured_curves(
    model: Any,
    effects: Effects,
    rows: Tensor,
    judged: Tensor,
    tell: Callable[[float, str], None] = lambda share, note: None,
) -> Curves:
    """A curve for every part of a network that sees, by the name of its ladder ("mlp.3").

    Args:
        model: in the precision to run in; as it was afterwards. rows: what is left is fitted on them. judged: others, damage is measured on them.
    """
    a, units, moments = anatomy(model), order_units(effects), moments_of(model, rows)
    tail, found = Tail(model, judged), Curves()
    said = _log_p(model, tail.dense)
    parts = [(n, kind) for n in range(a.layers) for kind in WRITERS if (a.ffn if kind == "mlp" else a.groups)[n]]
    for i, (n, kind) in enumerate(parts):
        sums, points = summed(units, n, kind), Curve()
        many = len(sums) - 1
        for gone in sorted({_depth(many, share) for share in (MODERATE, DEEP)}):
            stays = _stays(units, a.head_dim, n, kind, gone)
            with narrowed(linear(model, n, WRITERS[kind]), moments[n, WRITERS[kind]], stays):
                log_p = _log_p(model, tail.hidden_from(n))
            kl = float((said.exp() * (said - log_p)).sum(-1).mean())
            points.append([gone / many, kl / max(sums[gone], 1e-12)])
        found[f"{kind}.{n}"] = points * (3 - len(points))  # a part of two units has one depth
        tell((i + 1) / len(parts), f"layer {n}: what fewer {'channels' if kind == 'mlp' else 'heads'} cost")
    return found


def _depth(units: int, share: float) -> int:
    """How many units go: at least one, never all."""
    return min(max(1, round(share * units)), max(1, units - 1))


def _stays(units: Units, head_dim: int, n: int, kind: str, gone: int) -> list[int]:
    """Inputs of the part's writer that are left when so many units are gone, the least important first."""
    if kind == "mlp":
        left: list[int] = sorted(units.order[n].tolist()[gone * units.size :])
        return left
    return [h * head_dim + i for h in kept_groups(units.of(n, kind), gone) for i in range(head_dim)]


def _log_p(model: Any, hidden: Tensor) -> Float[Tensor, "n c"]:
    return torch.log_softmax(model.head(model.pool(hidden)).float(), -1)


@torch.no_grad()
def moments_of(model: Any, rows: Tensor) -> Moments:
    """Sums of z z^T of what every writer reads, with an input that is always one."""
    found: Moments = {}

    def note(key: tuple[int, str]) -> Any:
        def add(_: Any, args: tuple[Tensor, ...]) -> None:
            z = args[0].flatten(0, -2).float()
            z = torch.cat([z, torch.ones(len(z), 1)], 1)
            found[key] = found[key].addmm_(z.T, z) if key in found else z.T @ z

        return add

    writers = ((n, name, module) for n, name, module in linears_of(model) if name in WRITERS.values())
    with removed_after([module.register_forward_pre_hook(note((n, name))) for n, name, module in writers]):
        for part in rows.split(PASS):
            model(part)
    return found


def refitted(layer: nn.Linear, moments: Float[Tensor, "f f"], stays: Sequence[int]) -> tuple[Tensor, Tensor]:
    """(weights, bias) that say from these inputs alone what the matrix says of all."""
    w = torch.cat([layer.weight, layer.bias[:, None]], 1).detach().float()
    s = torch.tensor([*stays, w.shape[1] - 1])
    fitted = refit(w[:, s], (w @ moments)[:, s], moments[s][:, s], LAM)
    return fitted[:, :-1].contiguous(), fitted[:, -1].contiguous()


@contextmanager
def narrowed(layer: nn.Linear, moments: Float[Tensor, "f f"], stays: Sequence[int]) -> Iterator[None]:
    """The matrix reads these inputs alone while the body runs, fitted to what it said."""
    before = layer.weight.data, layer.bias.data
    weight, bias = refitted(layer, moments, stays)
    wide = torch.zeros_like(before[0])
    wide[:, list(stays)] = weight.to(wide.dtype)
    try:
        layer.weight.data, layer.bias.data = wide, bias.to(wide.dtype)
        yield
    finally:
        layer.weight.data, layer.bias.data = before
