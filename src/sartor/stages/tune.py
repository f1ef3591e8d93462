"""Training on pictures: adaptation of the whole network to the user's classes, recovery of the cut one.

As with text (`distil.py`) the cut network learns what the adapted one says, not the labels: on every view of a picture its class probabilities and the direction of
its features. Views are crops, mirrored where the classes do not mind, in changed light; twenty pictures of a class teach nothing without them.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn

from sartor.numerics.schedule import warm_then_cosine
from sartor.stages.masters import Adam, Batches, InMemory, Kept, Latents, Rows, put_, update_
from sartor.stages.recognition import recognize
from sartor.stages.watch import Watch

PART = 8  # pictures in one forward and backward pass
FEWEST = 4  # in a step
SMOOTH = 0.1  # of a label's probability, for all other classes
OTHERS = 0.25  # of a batch, where a teacher speaks: pictures of everyone else
CROP = 0.5  # of a picture's area that a view shows at least
LIGHT = 0.25  # by how much a view is darker or brighter, and paler or stronger, at most
SURE = 2.0  # standard deviations by which mirrored pictures must be named worse (McNemar 1947), before the classes are taken to mind


@dataclass(frozen=True)
class TuneConfig:
    """How to train: wall-clock seconds, peak learning rate of AdamW as a share of what it moves, pictures a step at most (fewer, down to FEWEST, where there is no time for `steps` of so many),
    how often validation is looked at; pictures seen instead of seconds, for comparisons that shall say the same on every machine (those do not go on where they were interrupted)."""

    seconds: float = 300.0
    rate: float = 1e-3
    batch: int = 16
    steps: int = 100
    checks: int = 6
    pictures: int = 0

    def __post_init__(self) -> None:
        if min(self.seconds, self.pictures) < 0 or min(self.batch, self.steps, self.checks) < 1:
            raise ValueError(f"not a valid training: {self}")

    def part(self, share: float) -> TuneConfig:
        """A shorter one, judged as often by its length."""
        pictures = max(1, round(self.pictures * share)) if self.pictures else 0
        return replace(self, seconds=self.seconds * share, pictures=pictures, checks=max(1, round(self.checks * share)))


@dataclass(frozen=True)
class Lessons:
    """What is learnt from.

    Attributes:
        pixels, labels: the user's. mirror: views may be mirrored. others: generic pictures, that only a teacher can say anything of.
        teacher: says what is learnt of every view; without one the labels do.
    """

    pixels: UInt8[Tensor, "n 3 s s"]
    labels: Int[Tensor, " n"]
    mirror: bool
    others: UInt8[Tensor, "g 3 s s"]
    teacher: Any = None


@dataclass(frozen=True)
class Course:
    """What training did: (seconds, validation nats a picture), pictures seen, seconds."""

    curve: tuple[tuple[float, float], ...]
    pictures: int
    seconds: float


def may_mirror(model: Any, pixels: UInt8[Tensor, "n 3 s s"], labels: Int[Tensor, " n"]) -> bool:
    """Whether mirrored pictures are still named as they were: letters and left shoes are not."""
    plain, mirrored = (recognize(model, p, labels).right for p in (pixels, pixels.flip(-1)))
    lost, won = int((plain & ~mirrored).sum()), int((mirrored & ~plain).sum())
    return lost - won <= SURE * (lost + won) ** 0.5


def views(pixels: UInt8[Tensor, "n 3 s s"], generator: torch.Generator, mirror: bool) -> Float[Tensor, "n 3 s s"]:
    """One random view of each picture, pixels still from 0 to 255."""
    n = len(pixels)
    draw = lambda: torch.rand(n, generator=generator)  # noqa: E731
    side = (CROP + (1 - CROP) * draw()).sqrt()
    stretch = (0.3 * (draw() - 0.5)).exp()
    wide, high = (side * stretch).clamp_max(1.0), (side / stretch).clamp_max(1.0)
    flip = torch.where(draw() < 0.5, -1.0, 1.0) if mirror else torch.ones(n)
    theta = torch.zeros(n, 2, 3)
    theta[:, 0, 0], theta[:, 1, 1] = wide * flip, high
    theta[:, 0, 2], theta[:, 1, 2] = (2 * draw() - 1) * (1 - wide), (2 * draw() - 1) * (1 - high)
    grid = nn.functional.affine_grid(theta, list(pixels.shape), align_corners=False)
    seen = nn.functional.grid_sample(pixels.float(), grid, padding_mode="reflection", align_corners=False)
    brighter, stronger = (1 + LIGHT * (2 * draw() - 1)[:, None, None, None] for _ in range(2))
    mean = seen.mean((1, 2, 3), keepdim=True)
    return ((seen - mean) * stronger + mean * brighter).clamp_(0, 255)


def tune_(
    model: Any,
    latents: Latents,
    lessons: Lessons,
    validation: tuple[UInt8[Tensor, "v 3 s s"], Int[Tensor, " v"]],
    config: TuneConfig,
    seed: int = 0,
    tell: Callable[[float, str], None] = lambda share, note: None,
    best: Kept | None = None,
    before: float = 0.0,
) -> Course:
    """Train `model` (bf16) and `latents` in place for `config.seconds`; both end as the best on validation.

    Args:
        tell: called with the share done and a note. best: where the best weights are kept meanwhile (None: in memory). before: seconds trained ahead of an interruption.
    """
    started = time.monotonic()
    put_(model, latents)
    named = {n: p.requires_grad_(True) for n, p in model.named_parameters() if n in latents.masters}
    optimizers = {n: Adam(latents.masters[n], config.rate, relative=True) for n in named}
    share_strange = OTHERS if lessons.teacher is not None and len(lessons.others) else 0.0
    rows, others = Rows(len(lessons.pixels), seed), Rows(len(lessons.others), seed + 1)
    generator = torch.Generator().manual_seed(seed)
    watch = Watch(model, latents, lambda network: _nats(network, validation), best or InMemory(), before)
    batches = Batches(PART, FEWEST, config.batch, config.steps, config.seconds, config.pictures)
    while (share := batches.done(time.monotonic() - started, before)) < 1:
        strange = round(share_strange * batches.many)
        loss = _backward(model, lessons, rows.deal(batches.many - strange), others.deal(strange), generator)
        update_(named, optimizers, config.rate * warm_then_cosine(share))
        put_(model, latents)
        watch.stepped()
        batches.stepped()
        if share * config.checks >= len(watch.curve):
            watch.check(time.monotonic() - started)
        tell(share, f"{batches.seen} pictures, loss {loss:.3f}, validation {watch.best:.3f} nats a picture")
    seconds = time.monotonic() - started
    optimizers.clear()
    watch.end_(seconds)
    model.requires_grad_(False)
    return Course(tuple(watch.curve), batches.seen, seconds)


def _nats(model: Any, validation: tuple[Tensor, Tensor]) -> float:
    return float(recognize(model, *validation).nats.mean())


def _backward(
    model: Any, lessons: Lessons, dealt: Int[Tensor, " m"], strange: Int[Tensor, " k"], generator: torch.Generator
) -> float:
    """One batch, PART pictures at a time forward and backward. Returns the loss."""
    batch, labels, total = torch.cat([lessons.pixels[dealt], lessons.others[strange]]), lessons.labels[dealt], 0.0
    for at in range(0, len(batch), PART):
        seen = views(batch[at : at + PART], generator, lessons.mirror)
        features = model.features(seen)
        logits = model.head(features).float()
        if lessons.teacher is None:
            loss = nn.functional.cross_entropy(logits, labels[at : at + PART], label_smoothing=SMOOTH)
        else:
            loss = _to_teacher(lessons.teacher, seen, features, logits)
        loss = loss * len(seen) / len(batch)
        loss.backward()
        total += float(loss.detach())
    return total


def _to_teacher(teacher: Any, seen: Tensor, features: Tensor, logits: Tensor) -> Tensor:
    """KL(teacher || student) in nats, and what the cosine of their features lacks to 1."""
    with torch.no_grad():
        wanted = teacher.features(seen)
        said = torch.log_softmax(teacher.head(wanted).float(), -1)
    kl = (said.exp() * (said - torch.log_softmax(logits, -1))).sum(-1)
    return (kl + 1 - torch.cosine_similarity(features.float(), wanted.float(), -1)).mean()
