"""From probes back to effects: y = A x, few probes, many units, and a prior that is cheap.

Below about 2 k ln(d / k) probes (k important units of d) no sparse solver recovers single effects (simulated in
../docs/method.md). So here the prior's *shape* inside a layer is trusted and one non-negative factor per layer is
recovered: x_j = p_j s_layer(j), ridge towards s = 1. Whether that is worth anything is judged on held-out probes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int
from scipy.optimize import nnls
from scipy.stats import spearmanr

Array = np.ndarray


@dataclass(frozen=True)
class Recovered:
    """Effects and what they are worth.

    Attributes:
        effects: (d,) nats per token. low, high: (d,) 95% bootstrap interval over probes.
        r2, spearman: on held-out probes (cross-validated), of the recovered effects.
        prior_r2, prior_spearman: the same for the prior alone, scaled by one factor. supported: whether recovery beats it.
    """

    effects: Array
    low: Array
    high: Array
    r2: float
    spearman: float
    prior_r2: float
    prior_spearman: float
    supported: bool


def recover(
    removed: Float[Array, "m d"],
    y: Float[Array, " m"],
    prior: Float[Array, " d"],
    group: Int[Array, " d"],
    folds: int = 5,
    draws: int = 50,
    seed: int = 0,
) -> Recovered:
    """Effects of the units from probes.

    Args:
        removed: 1 where a probe had the unit off. y: damage of each probe, nats per token. prior: cheap effect of each
        unit, any scale. group: which factor a unit shares (its layer and kind).
    """
    scale = _one_factor(removed @ prior, y)
    p = prior * scale
    design = _by_group(removed * p, group)
    strengths = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
    held = [_held_out(design, y, s, folds, seed) for s in strengths]
    errors = [float(((h - y) ** 2).sum()) for h in held]
    best = int(np.argmin(errors))
    prior_held = _held_out(design.sum(1, keepdims=True), y, 1e-6, folds, seed)
    factors = _ridge_to_one(design, y, strengths[best])
    rng = np.random.default_rng(seed)
    drawn = np.stack(
        [
            _ridge_to_one(design[i], y[i], strengths[best])
            for i in (rng.integers(0, len(y), len(y)) for _ in range(draws))
        ]
    )
    low, high = np.percentile(drawn, [2.5, 97.5], axis=0)
    r2, prior_r2 = _r2(held[best], y), _r2(prior_held, y)
    supported = r2 > prior_r2 and r2 > 0
    use = factors if supported else np.ones_like(factors)
    return Recovered(
        p * use[group],
        p * low[group],
        p * high[group],
        r2,
        _rank(held[best], y),
        prior_r2,
        _rank(prior_held, y),
        supported,
    )


def _one_factor(predicted: Array, y: Array) -> float:
    return float(max(1e-12, predicted @ y / max(1e-20, predicted @ predicted)))


def _by_group(a: Float[Array, "m d"], group: Int[Array, " d"]) -> Float[Array, "m g"]:
    out = np.zeros((a.shape[0], int(group.max()) + 1))
    np.add.at(out.T, group, a.T)
    return out


def _ridge_to_one(design: Float[Array, "m g"], y: Float[Array, " m"], strength: float) -> Float[Array, " g"]:
    """min ||y - D s||^2 + strength * mean(diag D^T D) * ||s - 1||^2 with s >= 0, by non-negative least squares."""
    weight = np.sqrt(strength * (design**2).sum() / design.shape[1])
    stacked = np.vstack([design, weight * np.eye(design.shape[1])])
    return np.asarray(nnls(stacked, np.concatenate([y, np.full(design.shape[1], weight)]))[0])


def _held_out(design: Array, y: Array, strength: float, folds: int, seed: int) -> Array:
    fold = np.random.default_rng(seed).permutation(len(y)) % folds
    out = np.empty_like(y)
    for f in range(folds):
        out[fold == f] = design[fold == f] @ _ridge_to_one(design[fold != f], y[fold != f], strength)
    return out


def _r2(predicted: Array, y: Array) -> float:
    return float(1 - ((predicted - y) ** 2).sum() / max(1e-20, ((y - y.mean()) ** 2).sum()))


def _rank(predicted: Array, y: Array) -> float:
    return float(spearmanr(predicted, y).statistic) if len(y) > 2 else 0.0


def partition_design(group: Int[Array, " d"], share: float, permutations: int, seed: int) -> Float[Array, "m d"]:
    """Random partition design: in every permutation each unit is off exactly once, `share` of all units a probe."""
    rng = np.random.default_rng(seed)
    d, probes = len(group), max(2, round(1 / share))
    rows = []
    for _ in range(permutations):
        block = np.zeros((probes, d))
        offset = rng.integers(probes)
        for g in rng.permutation(
            int(group.max()) + 1
        ):  # deal each layer's units round the probes: few of one layer in one probe
            units = rng.permutation(np.flatnonzero(group == g))
            block[(offset + np.arange(len(units))) % probes, units] = 1
            offset += len(units)
        rows.append(block)
    return np.concatenate(rows)
