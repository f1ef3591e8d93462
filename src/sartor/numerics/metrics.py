"""What is measured: bits per byte, and how sure we are of it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from scipy.stats import t as student_t

Array = np.ndarray
FEW = 30  # documents


@dataclass(frozen=True)
class Score:
    """Coding length of held-out documents.

    Attributes:
        nats: per document, summed over its tokens. size: per document, bytes of UTF-8.
    """

    nats: tuple[float, ...]
    size: tuple[int, ...]

    @property
    def bits_per_byte(self) -> float:
        return bits_per_byte(np.array(self.nats), np.array(self.size))


def bits_per_byte(nats: Float[Array, " d"], size: Float[Array, " d"]) -> float:
    """Total nats over total bytes, in bits."""
    return float(nats.sum() / size.sum() / math.log(2))


def interval(score: Score, other: Score | None = None, draws: int = 1000, seed: int = 0) -> tuple[float, float]:
    """95% interval over documents of bits per byte, or of the *relative change* score / other - 1.

    The comparison is paired: both are drawn on the same documents (percentile bootstrap, Efron 1979). Of few documents the bootstrap's intervals are too narrow: below FEW it is Student's, for the
    ratio of two sums (Cochran 1977, section 6.4); one document says nothing of others, so its interval holds everything from none to twice as much.
    """
    nats, size = np.array(score.nats), np.array(score.size)
    if len(nats) < FEW:
        of = np.array(other.nats) if other is not None else size * math.log(2)
        ratio, spread = nats.sum() / of.sum(), _spread(nats, of)
        shift = 0.0 if other is None else 1.0
        return float(max(0.0, ratio - spread) - shift), float(ratio + spread - shift)
    pick = np.random.default_rng(seed).integers(0, len(nats), (draws, len(nats)))
    drawn = nats[pick].sum(1) / size[pick].sum(1) / math.log(2)
    if other is not None:
        base = np.array(other.nats)
        drawn = drawn / (base[pick].sum(1) / size[pick].sum(1) / math.log(2)) - 1
    low, high = np.percentile(drawn, [2.5, 97.5])
    return float(low), float(high)


def _spread(above: Float[Array, " d"], below: Float[Array, " d"]) -> float:
    """Half of the 95% interval of sum(above) / sum(below) over documents."""
    n, ratio = len(above), float(above.sum() / below.sum())
    if n < 2:
        return ratio
    rest = (above - ratio * below) / below.mean()
    return float(student_t.ppf(0.975, n - 1) * rest.std(ddof=1) / math.sqrt(n))


def wilson(right: Array, z: float = 1.96) -> tuple[float, float]:
    """95% interval of a share of right answers (Wilson 1927): honest for few pictures and shares near one."""
    n, p = len(right), float(np.mean(right))
    centre, spread = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, (centre - spread) / (1 + z * z / n)), min(1.0, (centre + spread) / (1 + z * z / n))


def student_interval(values: Array) -> list[float]:
    """[mean, low, high]: Student's 95% interval; as values may be few, not a bootstrap's."""
    n, mean = len(values), float(values.mean())
    half = float(student_t.ppf(0.975, n - 1)) * float(values.std(ddof=1)) / n**0.5 if n > 1 else 0.0
    return [float(f"{x:.4g}") for x in (mean, mean - half, mean + half)]


def share_interval(values: Array) -> list[float]:
    """[share, low, high] of values that are 0 or 1: Wilson's, which does not collapse where all are alike."""
    return [float(f"{x:.4g}") for x in (float(values.mean()), *wilson(values))]


def paired_interval(ours: Array, theirs: Array, z: float = 1.96) -> tuple[float, float]:
    """95% interval of the difference of two shares of right answers to the same questions (Agresti and Min 2005: Wald's, with half an answer more in every cell; it never collapses)."""
    n = len(ours) + 2
    won, lost = float((ours & ~theirs).sum()) + 0.5, float((theirs & ~ours).sum()) + 0.5
    centre = (won - lost) / n
    spread = z * math.sqrt(max(0.0, won + lost - (won - lost) ** 2 / n)) / n
    return centre - spread, centre + spread


def mean_interval(values: Array, draws: int = 1000, seed: int = 0) -> tuple[float, float]:
    """95% bootstrap interval of a mean; of a change, where the values are differences on the same pictures."""
    pick = np.random.default_rng(seed).integers(0, len(values), (draws, len(values)))
    low, high = np.percentile(values[pick].mean(1), [2.5, 97.5])
    return float(low), float(high)


def cosines(one: Float[Array, "n f"], other: Float[Array, "n f"]) -> Float[Array, " n"]:
    """Of the features of the same pictures, in double precision."""
    a, b = one.astype(np.float64), other.astype(np.float64)
    return np.asarray((a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1))
