"""Whose a part is: what it is worth to the user's data beside generic data, all parts judged together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, TypeVar

import numpy as np
from scipy.stats import false_discovery_control, t

from sartor.stages.probe import PARTS, Effects, Worth, rank_correlation

LEAST_WORTH = 0.5  # rank correlation with measured damage below which effects decide nothing about whose a layer is
FALSE = 0.05  # of all parts called personalized, that may be so by chance
ALIKE = 0.5  # of the larger one, that the smaller must have to be called alike
LEAST_KNOWN = 0.2  # rank correlation of two halves of a text, below which their order says nothing
NONE = 1e-30  # of a part that is not there
K = TypeVar("K")
Measured = Sequence[Sequence[float]]  # [mean, low, high] of every part, as `metrics.student_interval` has them


def verdicts(user: Measured, generic: Measured, rows: tuple[int, int], ratios: bool = True) -> list[str]:
    """personalized where the difference stands out, generic where it surely is small, undecided where the data cannot tell.

    Every part has Student's t of the difference, with the freedom of the smaller number of rows; of those called personalized a share of FALSE is there by chance at most (Benjamini and Hochberg 1995).
    Effects are compared by their ratio (the delta method), as their rows are squares; each counts as no surer than the median of its side. Where such rows were drawn, 16 to 128 of them, 3 to 5% of the parts called personalized were so by chance. Shares of pictures come with Wilson's intervals, which do not collapse at none or all.
    A part is generic where the 95% interval of the difference has the smaller no further than ALIKE from the larger.

    Args:
        rows: of text, or pictures, that the user's and the generic intervals come from. ratios: effects, which are positive; else what may have either sign.
    """
    if not user or min(rows) < 2:
        return ["undecided"] * len(user)
    means = np.array([[x[0] for x in side] for side in (user, generic)])
    freedom = np.array(rows)[:, None] - 1.0
    errors = np.array([[max(x[2] - x[0], x[0] - x[1]) for x in side] for side in (user, generic)])
    errors = errors / t.ppf(0.975, freedom)  # of shares, whose intervals are not even, the wider side
    room = -np.log(ALIKE) if ratios else ALIKE * abs(means).max(0)
    none = ((means == 0) & (errors == 0)).all(0)
    if ratios:  # a mean that fell low by chance says of itself that it is sure: at least the error of the others counts
        errors = errors / np.maximum(means, NONE)
        errors = np.maximum(errors, np.median(errors[:, ~none], 1)[:, None]) if not none.all() else errors
        low = errors**2 / 2  # that the logarithm of a mean lies too low by: half of its variance
        means = np.log(np.maximum(means, NONE)) + low
    apart = abs(means[0] - means[1])
    error = np.maximum(np.sqrt((errors**2).sum(0)), NONE)
    least = freedom.min()
    by_chance = false_discovery_control(2 * t.sf(apart / error, least))
    near = (apart + t.ppf(0.975, least) * error <= room) | none
    return [
        "personalized" if chance <= FALSE else "generic" if close else "undecided"
        for chance, close in zip(by_chance, near, strict=True)
    ]


def _together(
    user: Mapping[K, Measured], generic: Mapping[K, Measured], rows: tuple[int, int], ratios: bool = True
) -> dict[K, list[str]]:
    """Verdicts of several lists of parts, all judged together."""
    sides = [[x for k in user for x in side[k]] for side in (user, generic)]
    said = iter(verdicts(sides[0], sides[1], rows, ratios))
    return {k: [next(said) for _ in parts] for k, parts in user.items()}


def diagnose(
    user: Effects, generic: Effects, worth: Worth
) -> list[tuple[dict[str, list[float]], dict[str, list[float]], dict[str, str]]]:
    """Layer by layer [effect, low, high] of its parts on either kind of data, and what that makes them; undecided where effects do not foretell what cuts cost."""
    said = _believed(_together(user.parts, generic.parts, (user.rows, generic.rows)), worth)
    return [
        tuple({k: x[n] for k, x in of.items()} for of in (user.parts, generic.parts, said))  # type: ignore[misc]
        for n in range(len(next(iter(user.parts.values()))))
    ]


def of_parts(user: dict[str, Any], generic: dict[str, Any]) -> dict[str, list[str]]:
    """Of every attention and MLP that was left out alone (`probe.without_parts`), by layer, all judged together."""
    mine, theirs = ({k: side[k] for k in PARTS} for side in (user, generic))
    return _together(mine, theirs, (user["rows"], generic["rows"]), ratios=False)


def heads_of(user: Effects, generic: Effects, worth: Worth) -> dict[str, dict[str, list[Any]]]:
    """Every query group by layer: {"user" or "generic": {layer: [effect, low, high] of each}, "verdicts": {layer: of each}}."""
    said = _believed(_together(user.heads, generic.heads, (user.rows, generic.rows)), worth)
    told = {"user": user.heads, "generic": generic.heads, "verdicts": said}
    return {name: {str(n): list(x) for n, x in of.items()} for name, of in told.items()}  # type: ignore[attr-defined]


def told(
    user: Effects, generic: Effects, halves: tuple[Effects, Effects], worth: Worth, without: dict[str, Any]
) -> dict[str, Any]:
    """All of it, for JSON; without: {"user" or "generic": parts left out (`probe.without_parts`)}."""
    return {
        "tokens": {"user": user.tokens, "generic": generic.tokens},
        "known": user.known,
        "worth": asdict(worth),
        "without": without,
        "verdicts": of_parts(without["user"], without["generic"]),
        "groups": heads_of(user, generic, worth),
        "alike": alike(halves, generic),
    }


def alike(halves: tuple[Effects, Effects], generic: Effects) -> dict[str, float]:
    """By layer, how alike channels are ordered by what they are worth to either: rank correlations, without what noise takes off them.

    Of halves of the user's text as they were measured, over the root of what these agree on and of the profile's own reliability (Spearman 1904); layers whose halves agree on less than LEAST_KNOWN are left out.
    """
    found = {}
    for n, theirs in generic.channel.items():
        one, other = (h.channel[n].numpy() for h in halves)
        known = rank_correlation(one, other)
        if known >= LEAST_KNOWN:
            seen = np.mean([rank_correlation(x, theirs.numpy()) for x in (one, other)])
            found[str(n)] = round(float(np.clip(seen / np.sqrt(known * max(generic.known, LEAST_KNOWN)), -1, 1)), 3)
    return found


def _believed(said: dict[K, list[str]], worth: Worth) -> dict[K, list[str]]:
    """Effects say nothing of whose a part is where they do not foretell what cuts cost."""
    return said if worth.spearman >= LEAST_WORTH else {k: ["undecided"] * len(v) for k, v in said.items()}
