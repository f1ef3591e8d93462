"""What a training is judged by while it goes on: validation. The best weights are kept, and are what it ends with.

Judged meanwhile is the *mean* of the weights that the training went through; in the end the last weights are, too, and those half-way between. A user's text or
photos are few: after the second epoch the last weights know them by heart, and their mean does not (docs/log.md, eleventh session).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from sartor import paging
from sartor.memory import hand_back
from sartor.stages.masters import Kept, Latents, Mean, put_

EVERY = 4  # steps the weights join their mean
BETWEEN = (0.0, 0.5)  # of the way from the mean to the last weights: what is judged in the end
WORSE = 1.02  # while the rate is high validation wanders: only a clear rise counts towards stopping early


class Watch:
    """Judges, and keeps the best.

    Attributes:
        best: the least measured. bad: checks in a row that were clearly worse than it. curve: (seconds, measured), from before the first step on.
    """

    def __init__(
        self,
        model: Any,
        latents: Latents,
        measure: Callable[[Any], float],
        kept: Kept,
        before: float = 0.0,
        averaged: bool = True,
    ) -> None:
        """Args: measure: of the model as it stands, less is better. before: seconds trained ahead of an interruption. averaged: the mean is judged, or only the weights of the moment."""
        self.model, self.latents, self.measure, self.kept, self.before = model, latents, measure, kept, before
        self.mean = Mean(latents) if averaged else None
        self.steps, self.bad, self.best = 0, 0, measure(model)
        self.curve = [(0.0, self.best)]
        kept.save(latents, before)

    def stepped(self) -> None:
        """To be called after every step."""
        self.steps += 1
        if self.mean and self.steps % EVERY == 0:
            self.mean.add_(self.latents)

    def check(self, seconds: float) -> None:
        """Judge what there is; the training goes on with the weights that it was at."""
        self._judge(self.mean.latents if self.mean else self.latents, seconds)
        if self.mean:
            put_(self.model, self.latents)

    def end_(self, seconds: float) -> None:
        """Judge for the last time; model and latents are the best ones afterwards."""
        self._judge(self.latents, seconds)
        if self.mean and self.mean.count:
            for share in BETWEEN:
                self._judge(self.mean.moved_(self.latents, share), seconds)
        put_(self.model, self.latents)  # off the mean, which may go now
        self.mean = None
        hand_back()  # the weights that come back need other rooms than Adam's and the mean
        if last := self.kept.load():
            with torch.no_grad():
                for name, best in last[0].masters.items():
                    self.latents.masters[name].copy_(best)
                    paging.let_go(self.latents.masters[name], best)
        put_(self.model, self.latents)

    def _judge(self, latents: Latents, seconds: float) -> None:
        put_(self.model, latents)
        measured = self.measure(self.model)
        self.curve.append((seconds, measured))
        self.bad = self.bad + 1 if measured > WORSE * self.best else 0
        if measured < self.best:
            self.best = measured
            self.kept.save(latents, self.before + seconds)
