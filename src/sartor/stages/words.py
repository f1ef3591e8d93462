"""Which tokens to keep: ranking them by expected use, and what smaller vocabularies cost."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Float
from torch import Tensor

from sartor.model.network import sharing, shrink_vocabulary_
from sartor.model.vocabulary import closed_order, count_tokens, trim_tokenizer
from sartor.stages.measure import score
from sartor.stages.tokens import cut_windows, encode_windows

SIZES = (*(share / 100 for share in range(95, 45, -5)), 0.44, 0.38, 0.33, 0.28, 0.24, 0.2, 0.17, 0.14)  # shares kept
MEASURED = (0.65, 0.3)  # where the price of a missing token is measured
USUAL_PRICE = 7.0  # nats, of a token that must be spelled in pieces; counts as much as USUAL_EVENTS measured ones
USUAL_EVENTS = 10
FEWER = (1, 2, 3, 5, 8, 12, 20)  # occurrences taken off every token, to make the training text as strange as new text


@dataclass(frozen=True)
class Words:
    """The vocabulary's ladder.

    Attributes:
        order: tokens, the most useful first; its prefixes of at least `base` tokens are closed under merges.
        fewer: the orders if every token had occurred so many times less as FEWER says. own, held_out: counts of tokens in the training text and
        in text that the ranking has not seen. sizes, lost: tokens kept and what that costs, in nats per original token; entry 0 is the whole vocabulary.
    """

    order: list[int]
    base: int
    fewer: list[list[int]] = field(default_factory=list)
    own: Counter[int] = field(default_factory=Counter)
    held_out: Counter[int] = field(default_factory=Counter)
    sizes: list[int] = field(default_factory=list)
    lost: list[float] = field(default_factory=list)

    def seen_again(self, kept: int) -> list[int]:
        """The kept tokens to spell the training text with, ascending, so that it lacks as many words as new text does.

        Nearly every word of the training text is kept, because it helped to choose; in new text some are missing. So every token is
        counted a few times less, as many as make the share of missing tokens equal to that in held-out text.
        """
        missing = share_of(self.held_out, self.order[kept:])
        candidates = [set(self.order[:kept]) & set(order[:kept]) for order in self.fewer]
        without = [1 - share_of(self.own, c) for c in candidates]
        return sorted(candidates[min(range(len(without)), key=lambda i: abs(without[i] - missing))])


def share_of(counts: Counter[int], tokens: Iterable[int]) -> float:
    """The share of all occurrences that these tokens have."""
    return sum(counts[t] for t in tokens) / max(1, sum(counts.values()))


def least_size(vocab: int, base: int) -> int:
    """The smallest vocabulary worth having: the end of the ladder, or bytes and a quarter of what could be merged, at most 256."""
    return max(int(vocab * SIZES[-1]), base + min(256, (vocab - base) // 4))


def whole(vocab: int) -> Words:
    """The ladder of a vocabulary that cannot be trimmed."""
    return Words(list(range(vocab)), vocab, sizes=[vocab], lost=[0.0])


def words(
    model: Any,
    tokenizer: Any,
    user: Sequence[str],
    expected: Float[Tensor, " v"],
    held_out: Sequence[str],
    max_bytes: int,
    tell: Callable[[float, str], None],
) -> Words:
    """Rank the tokens and measure the ladder.

    Args:
        user: training texts. expected: from `expected_use` on them. held_out: texts that the ranking has not seen, to count on;
        prices are measured on `max_bytes` of them.
    """
    own, unseen = count_tokens(tokenizer, user), count_tokens(tokenizer, held_out)
    order, base = rank(tokenizer, own, expected)
    fewer = [rank(tokenizer, own, expected, discount)[0] for discount in FEWER]
    sizes, lost = _damage(model, tokenizer, order, base, cut_windows(held_out, max_bytes), unseen, tell)
    return Words(order, base, fewer, own, unseen, sizes, lost)


def rank(tokenizer: Any, own: Counter[int], expected: Float[Tensor, " v"], discount: int = 0) -> tuple[list[int], int]:
    """Tokens by expected use: the user's rate, twice the rate the dense model expects on that text, a tenth of Zipf's law.

    Words that the text happens not to hold are most of what a trimmed vocabulary costs, and the model knows best which of
    them belong there: of the tokens in held-out mails 1.25% are missing from 32,000 kept ones against 1.65% when generic counts
    stand for them; in held-out code 0.04% against 0.87% (docs/log.md).
    """
    total, n = max(1, sum(own.values())), len(tokenizer)
    zipf = sum(1 / (r + 100) for r in range(n))
    use = expected.tolist()
    rate = {i: max(own[i] - discount, 0) / total + 2 * use[i] + 0.1 / (i + 100) / zipf for i in range(n)}
    return closed_order(tokenizer, rate)


def _damage(
    model: Any,
    tokenizer: Any,
    order: Sequence[int],
    base: int,
    windows: list[list[tuple[int, str]]],
    unseen: Counter[int],
    tell: Callable[[float, str], None],
) -> tuple[list[int], list[float]]:
    """Coding length that smaller vocabularies add, in nats per original token; entry 0 is the whole.

    Nearly all of it comes from the tokens that are missing (docs/log.md), so it is their share, which counting alone gives
    exactly, times the price of one, which the model is asked for at two sizes.
    """
    encoded = encode_windows(windows, tokenizer)
    here = Counter(i for w in encoded for i in w.ids)
    nats = sum(score(model, encoded).nats)
    sizes = [k for share in SIZES if (k := int(len(order) * share)) >= least_size(len(order), base)]
    if not sizes:
        return [len(order)], [0.0]
    at, prices = [], []
    for n, size in enumerate(sorted({min(sizes, key=lambda k: abs(k - share * len(order))) for share in MEASURED})):
        smaller, ids = trim_tokenizer(tokenizer, order[:size])
        cut = sharing(model)
        shrink_vocabulary_(cut, ids, {})
        lost = sum(score(cut, encode_windows(windows, smaller)).nats) - nats
        at.append(size)
        prices.append((lost + USUAL_EVENTS * USUAL_PRICE) / (sum(here[i] for i in order[size:]) + USUAL_EVENTS))
        tell((n + 1) / len(MEASURED), f"vocabulary of {size}: {prices[-1]:.1f} nats for every token that is missing")
    missing = [share_of(unseen, order[k:]) for k in sizes]
    losses = np.maximum.accumulate(np.maximum(np.array(missing) * np.interp(sizes, at, prices), 0.0))
    return [len(order), *sizes], [0.0, *losses.tolist()]
