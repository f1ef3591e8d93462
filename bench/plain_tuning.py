"""What anyone would try first: all weights of a network trained on the user's text, by the next token, for as long as Sartor trains."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from subject import SEED, Subject

from sartor.effort import Training, effort_of
from sartor.model.precision import running
from sartor.stages.distil import Anchor, DistilConfig, Trained, distil_
from sartor.stages.masters import free

PLAIN = 2  # version
RATE, SHORT = 2e-4, 150.0  # peak rate of a training of so many seconds: 9e-5 after twelve minutes


def plain(training: Training) -> DistilConfig:
    """Both trainings' seconds in one, on the user's text alone, as anyone's trainer does it: the weights of the check that was best, not a mean of weights.

    The longer, the smaller the rate: at the one that suits a mean it would learn by heart (docs/log.md, eleventh session).
    """
    one, two = training.adapt, training.recover
    seconds = one.seconds + two.seconds
    rate = RATE * (SHORT / max(seconds, SHORT)) ** 0.5
    return replace(one, seconds=seconds, rate=rate, checks=one.checks + two.checks, user_share=1.0, averaged=False)


def tuned_(network: Any, subject: Subject) -> Trained:
    """Train a network (fp32) in place; it ends as the best on the user's validation text, as Sartor's does."""
    rows = subject.rows()
    nobody = Anchor(rows[:0], torch.empty(0, rows.shape[1], 1), torch.empty(0, rows.shape[1], 1, dtype=torch.int32))
    latents = free(network)
    config = plain(effort_of(subject.effort).training)
    student = running(network)
    course = distil_(student, latents, rows, nobody, subject.validation(), config, SEED)
    for name, p in network.named_parameters():
        p.data = latents.masters[name]
    return course
