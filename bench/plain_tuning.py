"""What anyone would try first: all weights of a network trained on the user's text, by the next token, for as long as Sartor trains."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from subject import SEED, Subject

from sartor.effort import EFFORTS, Training
from sartor.model.network import clone
from sartor.model.precision import running_dtype
from sartor.stages.distil import Anchor, DistilConfig, Trained, distil_
from sartor.stages.masters import Latents

PLAIN = 1  # version


def plain(training: Training) -> DistilConfig:
    """Both trainings' seconds in one, at the rate that the whole network adapts with; the user's text alone."""
    one, two = training.adapt, training.recover
    return replace(one, seconds=one.seconds + two.seconds, checks=one.checks + two.checks, user_share=1.0)


def tuned_(network: Any, subject: Subject) -> Trained:
    """Train a network (fp32) in place; it ends as the best on the user's validation text, as Sartor's does."""
    rows = subject.rows()
    nobody = Anchor(rows[:0], torch.empty(0, rows.shape[1], 1), torch.empty(0, rows.shape[1], 1, dtype=torch.int32))
    latents = Latents({n: p.data for n, p in network.named_parameters()})
    config = plain(EFFORTS[subject.effort].training)
    running = clone(network, running_dtype())
    course = distil_(running, latents, rows, nobody, subject.validation(), config, SEED)
    for name, p in network.named_parameters():
        p.data = latents.masters[name]
    return course
