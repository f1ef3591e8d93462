"""Training: adaptation of the whole network to the user, recovery of the cut one on its grids.

Masters (`masters.py`) start at GPTQ's latent weights, so that training starts at the GPTQ solution.

It is used twice (docs/method.md). *Adaptation* trains the trimmed network, still whole and off the grid, on the user's rows with
cross entropy, and on a few generic rows with KL to the dense model, which keeps it from forgetting. *Recovery* trains the cut and quantized
network with KL alone: towards what the adapted network says of the user's rows, and the dense one of the generic rows. What is said is
known before training, so that no teacher takes part, or memory. What is best on validation is kept (`watch.py`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sartor.numerics.schedule import warm_then_cosine
from sartor.stages.likelihood import hidden_of, lesson_of, loss_of, loss_to_lesson
from sartor.stages.masters import Adam, Batches, InMemory, Kept, Latents, Rows, gradients_, put_, update_
from sartor.stages.measure import score
from sartor.stages.tokens import Window
from sartor.stages.watch import Watch

PART = 2  # rows in one forward and backward pass: bounds the memory of activations


@dataclass(frozen=True)
class DistilConfig:
    """How to train.

    Attributes:
        seconds: wall-clock budget. rate: peak learning rate of AdamW. batch_rows: rows a step at most; fewer where there is no time for `steps` of so many: short trainings are made of steps (docs/log.md). user_share: share of all rows
        with cross entropy where there are such rows. checks: how often validation is measured. patience: checks in a row clearly above the best before stopping.
        averaged: judged and kept is the mean of the weights (`Mean`), instead of the weights of the moment.
        rows: seen instead of seconds, for comparisons that shall say the same on every machine (those do not go on where they were interrupted).
    """

    seconds: float = 300.0
    rate: float = 5e-4
    batch_rows: int = 4
    steps: int = 200
    user_share: float = 0.875
    checks: int = 8
    patience: int = 3
    averaged: bool = True
    rows: int = 0

    def __post_init__(self) -> None:
        if min(self.seconds, self.rows) < 0 or not 0 <= self.user_share <= 1 or min(self.batch_rows, self.steps) < 1:
            raise ValueError(f"not a valid training: {self}")

    def part(self, share: float) -> DistilConfig:
        """A shorter one."""
        rows = max(1, round(self.rows * share)) if self.rows else 0
        return replace(self, seconds=self.seconds * share, rows=rows)


@dataclass(frozen=True)
class Anchor:
    """Rows and what a teacher says of them (`lesson_of`): log-probabilities and tokens at every position."""

    rows: Int[Tensor, "n t"]
    values: Float[Tensor, "n t k"]
    ids: Int[Tensor, "n t k"]


def anchor(teacher: Any, rows: Int[Tensor, "n t"]) -> Anchor:
    """Args: teacher: with the student's vocabulary."""
    return Anchor(rows, *lesson_of(teacher, rows))


def joined(one: Anchor, other: Anchor) -> Anchor:
    """The rows of both."""
    parts = ((one.rows, other.rows), (one.values, other.values), (one.ids, other.ids))
    return Anchor(*(torch.cat(p) for p in parts))


@dataclass(frozen=True)
class Trained:
    """What training did: (seconds, validation bits per byte), tokens seen, seconds."""

    curve: tuple[tuple[float, float], ...]
    tokens: int
    seconds: float


def distil_(
    model: Any,
    latents: Latents,
    own: Int[Tensor, "n t"] | None,
    said: Anchor,
    validation: Sequence[Window],
    config: DistilConfig,
    seed: int = 0,
    tell: Callable[[float, str], None] = lambda share, note: None,
    best: Kept | None = None,
    before: float = 0.0,
) -> Trained:
    """Train `model` (bf16) and `latents` in place for `config.seconds`; both end as the best on validation.

    Args:
        own: rows to learn from by cross entropy, or None. said: rows to learn from by what a teacher says of them.
        validation: windows of the user's validation documents.
        tell: called with the share done and a note. best: where the best weights are kept meanwhile (None: in memory).
        before: seconds trained ahead of an interruption.
    """
    share_own = 0.0 if own is None else config.user_share
    own = said.rows[:0] if own is None else own
    started = time.monotonic()
    put_(model, latents)
    named = {n: p.requires_grad_(True) for n, p in model.named_parameters() if n in latents.masters}
    optimizers = {n: Adam(latents.masters[n], config.rate) for n in named}
    gradients_(named)
    mine, others = Rows(len(own), seed), Rows(len(said.rows), seed + 1)
    bpb = lambda network: score(network, validation).bits_per_byte  # noqa: E731
    watch = Watch(model, latents, bpb, best or InMemory(), before, config.averaged)
    batches = Batches(PART, 1, config.batch_rows, config.steps, config.seconds, config.rows)
    while (share := batches.done(time.monotonic() - started, before)) < 1 and watch.bad < config.patience:
        n_own = _due(batches.seen + batches.many, share_own) - _due(batches.seen, share_own)
        loss = _backward(model, own[mine.deal(n_own)], said, others.deal(batches.many - n_own))
        update_(named, optimizers, config.rate * warm_then_cosine(share))
        put_(model, latents)
        watch.stepped()
        batches.stepped()
        if share * config.checks >= len(watch.curve):
            watch.check(time.monotonic() - started)
        tell(share, f"step {watch.steps}, loss {loss:.3f}, validation {watch.best:.3f} bits per byte")
    seconds = time.monotonic() - started
    optimizers.clear()
    model.zero_grad()
    watch.end_(seconds)
    model.requires_grad_(False)
    return Trained(tuple(watch.curve), batches.seen * said.rows.shape[1], seconds)


def _due(seen: int, share: float) -> int:
    """Of so many rows, those of a kind that has this share; it need not come out even."""
    return int(seen * share + 1e-9)


def _backward(model: Any, own: Int[Tensor, "n t"], said: Anchor, dealt: Int[Tensor, " m"]) -> float:
    """One batch, PART rows at a time forward and backward; both kinds of rows may share a pass. Returns the loss."""
    rows = torch.cat([own, said.rows[dealt]])
    total = 0.0
    for start in range(0, len(rows), PART):
        part = rows[start : start + PART]
        mine = min(max(len(own) - start, 0), len(part))
        hidden = hidden_of(model, part)
        losses = [loss_of(model, hidden[:mine], part[:mine]) * mine] if mine else []
        if mine < len(part):
            at = dealt[start + mine - len(own) : start + len(part) - len(own)]
            losses.append(loss_to_lesson(model, hidden[mine:], said.values[at], said.ids[at]) * len(at))
        loss = torch.stack(losses).sum() / len(rows)
        loss.backward()
        total += float(loss.detach())
    return total
