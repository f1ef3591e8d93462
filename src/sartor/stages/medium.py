"""Texts and pictures: what a network foretells of its rows, and how far that is from what another one foretells.

Everything that probes, masks, cuts and fits a network reads rows and looks at hidden states; only here is it told what rows are.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Generator, Tensor

from sartor.model.graph import Graph
from sartor.model.vision import Vision
from sartor.numerics.metrics import share_interval, student_interval
from sartor.stages import likelihood, recognition, yardstick

DIRECTIONS = 4  # of a picture, which has but one prediction
Said = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Medium:
    """One row a kind of data.

    Attributes:
        positions: of a row at which something is foretold. directions: among the outputs that a backward probe draws for a row.
        gradients: of log p at the hidden states, along a random direction of what the model itself foretells. listen: sends back from the hidden states what the loss summed over these rows feels, in one or several goes.
        apart: from the hidden states of a model, how far others are from them, as `kl`. said: what a model foretells of rows. kl: mean KL of a model to that, in nats a prediction; unit: what that is called. worse: from rows and the hidden states of them, by how much others say less of each row; interval: [mean, low, high] of that, 95%.
    """

    positions: Callable[[Tensor], int]
    directions: int
    gradients: Callable[[Any, Tensor, Generator], Tensor]
    listen: Callable[[Any, Tensor, Tensor, Generator], None]
    apart: Callable[[Any, Tensor], Callable[[Tensor], float]]
    said: Callable[[Any, Tensor], Said]
    kl: Callable[[Any, Tensor, Said], float]
    unit: str
    worse: Callable[[Any, Tensor, Tensor], Callable[[Tensor], np.ndarray]]
    interval: Callable[[np.ndarray], list[float]]


TEXT = Medium(
    lambda rows: rows.shape[1],
    1,
    likelihood.drawn_gradients,
    lambda model, hidden, rows, generator: (likelihood.loss_of(model, hidden, rows) * len(rows)).backward(),
    likelihood.apart,
    likelihood.top_of,
    likelihood.kl_of,
    "nats per token",
    yardstick.rise,
    student_interval,
)
PICTURES = Medium(
    lambda rows: 1,
    DIRECTIONS,
    recognition.signed_gradients,
    lambda model, hidden, rows, generator: recognition.listen(model, hidden, generator, DIRECTIONS),
    recognition.apart,
    recognition.said_of,
    recognition.kl_of,
    "nats a picture",
    recognition.renamed,
    share_interval,
)


def medium_of(model: Any) -> Medium:
    return PICTURES if isinstance(model, (Vision, Graph)) else TEXT
