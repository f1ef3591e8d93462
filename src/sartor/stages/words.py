"""Which tokens to keep: ranking them by expected use, and what smaller vocabularies cost."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from jaxtyping import Float
from torch import Tensor

from sartor.model.network import clone, shrink_vocabulary_
from sartor.model.vocabulary import closed_order, count_tokens, trim_tokenizer
from sartor.stages.measure import score
from sartor.stages.tokens import encode_windows

SIZES = (0.9, 0.8, 0.65, 0.5, 0.38, 0.28, 0.2, 0.14)


@dataclass(frozen=True)
class Words:
    """The vocabulary's ladder.

    Attributes:
        order: tokens, the most useful first; its prefixes of at least `base` tokens are closed under merges.
        without_one: the order if every token had occurred once less. sizes, lost: tokens kept and what that costs, in nats per original
        token; entry 0 is the whole vocabulary.
    """

    order: list[int]
    base: int
    without_one: list[int]
    sizes: list[int]
    lost: list[float]

    def seen_again(self, kept: int) -> list[int]:
        """The kept tokens that would be kept if they had occurred once less, ascending."""
        return sorted(set(self.order[:kept]) & set(self.without_one[:kept]))


def whole(vocab: int) -> Words:
    """The ladder of a vocabulary that cannot be trimmed."""
    return Words(list(range(vocab)), vocab, list(range(vocab)), [vocab], [0.0])


def words(
    model: Any,
    tokenizer: Any,
    user: Sequence[str],
    expected: Float[Tensor, " v"],
    windows: list[list[tuple[int, str]]],
    tell: Callable[[float, str], None],
) -> Words:
    """Rank the tokens and measure the ladder.

    Args:
        user: training texts. expected: from `expected_use` on them. windows: of texts that the ranking has not seen.
    """
    order, base = rank(tokenizer, user, expected)
    without_one, _ = rank(tokenizer, user, expected, discount=1)
    sizes, lost = _damage(model, tokenizer, order, base, windows, tell)
    return Words(order, base, without_one, sizes, lost)


def rank(
    tokenizer: Any, user: Sequence[str], expected: Float[Tensor, " v"], discount: int = 0
) -> tuple[list[int], int]:
    """Tokens by expected use: the user's rate, twice the rate the dense model expects on that text, a tenth of Zipf's law.

    Words that the text happens not to hold are most of what a trimmed vocabulary costs, and the model knows best which of
    them belong there: of the tokens in held-out mails 1.25% are missing from 32,000 kept ones against 1.65% when generic counts
    stand for them; in held-out code 0.04% against 0.87% (docs/log.md).
    """
    own = count_tokens(tokenizer, user)
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
    tell: Callable[[float, str], None],
) -> tuple[list[int], list[float]]:
    """Coding length that smaller vocabularies add to the windows, in nats per original token; entry 0 is the whole."""
    encoded = encode_windows(windows, tokenizer)
    tokens = sum(p.end - p.start for w in encoded for p in w.pieces)
    nats = sum(score(model, encoded).nats)
    sizes, lost = [len(order)], [0.0]
    for n, share in enumerate(SIZES):
        size = max(int(len(order) * share), base + 256)
        if size >= sizes[-1]:
            break
        smaller, ids = trim_tokenizer(tokenizer, order[:size])
        cut = clone(model)
        shrink_vocabulary_(cut, ids, {})
        sizes.append(size)
        lost.append(max(lost[-1], (sum(score(cut, encode_windows(windows, smaller)).nats) - nats) / tokens))
        tell((n + 1) / len(SIZES), f"vocabulary of {size}: +{lost[-1]:.3f} nats per token")
    return sizes, lost
