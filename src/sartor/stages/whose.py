"""Whose a part is: what it is worth to the user's data beside generic data, all parts judged together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.stats import false_discovery_control, spearmanr, t

from sartor.stages.probe import PARTS, Effects, Worth

LEAST_WORTH = 0.5  # rank correlation with measured damage below which effects decide nothing about whose a layer is
FALSE = 0.05  # of all parts called personalized, that may be so by chance
ALIKE = 0.5  # of the larger one, that the smaller must have to be called alike
LEAST_KNOWN = 0.2  # rank correlation of two halves of a text, below which their order says nothing
NONE = 1e-30  # of a part that is not there
Measured = Sequence[Sequence[float]]  # [mean, low, high] of every part, as `probe.interval` has them


def verdicts(user: Measured, generic: Measured, rows: tuple[int, int], ratios: bool = True) -> list[str]:
    """personalized where the difference stands out, generic where it surely is small, undecided where the data cannot tell.

    Every part has Student's t of the difference, with the freedom of the smaller number of rows; of those called personalized a share of FALSE is there by chance at most (Benjamini and Hochberg 1995).
    Effects are compared by their ratio (the delta method), as their rows are squares; each counts as no surer than the median of its side. Where such rows were drawn, 16 to 128 of them, 3 to 5% of the parts called personalized were so by chance.
    A part is generic where the 95% interval of the difference has the smaller no further than ALIKE from the larger.

    Args:
        rows: of text, or pictures, that the user's and the generic intervals come from. ratios: effects, which are positive; else what may have either sign.
    """
    if not user or min(rows) < 2:
        return ["undecided"] * len(user)
    means = np.array([[x[0] for x in side] for side in (user, generic)])
    freedom = np.array(rows)[:, None] - 1.0
    errors = np.array([[x[2] - x[0] for x in side] for side in (user, generic)]) / t.ppf(0.975, freedom)
    room = -np.log(ALIKE) if ratios else ALIKE * abs(means).max(0)
    none = (means == 0).all(0)
    if ratios:  # a mean that fell low by chance says of itself that it is sure: at least the error of the others counts
        errors = errors / np.maximum(means, NONE)
        errors = np.maximum(errors, np.median(errors[:, ~none], 1)[:, None]) if not none.all() else errors
        means = (
            np.log(np.maximum(means, NONE)) + errors**2 / 2
        )  # the logarithm of a mean lies too low by half of its variance
    apart = abs(means[0] - means[1])
    error = np.maximum(np.sqrt((errors**2).sum(0)), NONE)
    least = freedom.min()
    by_chance = false_discovery_control(2 * t.sf(apart / error, least))
    near = (apart + t.ppf(0.975, least) * error <= room) | none
    return [
        "personalized" if chance <= FALSE else "generic" if close else "undecided"
        for chance, close in zip(by_chance, near, strict=True)
    ]


def diagnose(
    user: Effects, generic: Effects, worth: Worth
) -> list[tuple[dict[str, list[float]], dict[str, list[float]], dict[str, str]]]:
    """Layer by layer [effect, low, high] of its parts on either kind of data, and what that makes them; undecided where effects do not foretell what cuts cost."""
    flat = lambda e: [x for k in user.parts for x in e.parts[k]]  # noqa: E731
    said = _believed(verdicts(flat(user), flat(generic), (user.rows, generic.rows)), worth)
    layers = len(next(iter(user.parts.values())))
    by_part = dict(zip(user.parts, (said[i : i + layers] for i in range(0, len(said), layers)), strict=True))
    return [
        (
            {k: x[n] for k, x in user.parts.items()},
            {k: generic.parts[k][n] for k in user.parts},
            {k: v[n] for k, v in by_part.items()},
        )
        for n in range(layers)
    ]


def of_parts(user: dict[str, Any], generic: dict[str, Any]) -> dict[str, list[str]]:
    """Of every attention and MLP that was left out alone (`probe.without_parts`), by layer, all judged together."""
    sides = [[x for k in PARTS for x in side[k]] for side in (user, generic)]
    said = verdicts(sides[0], sides[1], (user["rows"], generic["rows"]), ratios=False)
    layers = len(said) // len(PARTS)
    return {k: said[i * layers : (i + 1) * layers] for i, k in enumerate(PARTS)}


def heads_of(user: Effects, generic: Effects, worth: Worth) -> dict[str, dict[str, list[Any]]]:
    """Every query group by layer: {"user" or "generic": {layer: [effect, low, high] of each}, "verdicts": {layer: of each}}."""
    places = [(n, g) for n, groups in user.heads.items() for g in range(len(groups))]
    sides = [[e.heads[n][g] for n, g in places] for e in (user, generic)]
    said = iter(_believed(verdicts(sides[0], sides[1], (user.rows, generic.rows)), worth))
    by_layer = {str(n): [next(said) for _ in groups] for n, groups in user.heads.items()}
    mine, theirs = ({str(n): list(x) for n, x in e.heads.items()} for e in (user, generic))
    return {"user": mine, "generic": theirs, "verdicts": by_layer}


def alike(halves: tuple[Effects, Effects], generic: Effects) -> dict[str, float]:
    """By layer, how alike channels are ordered by what they are worth to either: rank correlations, without what noise takes off them.

    Of halves of the user's text as they were measured, over the root of what these agree on and of the profile's own reliability (Spearman 1904); layers whose halves agree on less than LEAST_KNOWN are left out.
    """
    found = {}
    for n, theirs in generic.channel.items():
        one, other = (h.channel[n].numpy() for h in halves)
        known = _ranks_agree(one, other)
        if known >= LEAST_KNOWN:
            seen = np.mean([_ranks_agree(x, theirs.numpy()) for x in (one, other)])
            found[str(n)] = round(float(np.clip(seen / np.sqrt(known * max(generic.known, LEAST_KNOWN)), -1, 1)), 3)
    return found


def _ranks_agree(one: np.ndarray, other: np.ndarray) -> float:
    return float(spearmanr(one, other).statistic)


def _believed(said: list[str], worth: Worth) -> list[str]:
    """Effects say nothing of whose a part is where they do not foretell what cuts cost."""
    return said if worth.spearman >= LEAST_WORTH else ["undecided"] * len(said)
