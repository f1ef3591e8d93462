"""What a probe is measured by: one run of the masked network, and everything that can be said of its last hidden states.

Four measurements, on the same rows for every probe (common random numbers):

- `kl`, nats per token: KL(dense || masked) over the dense model's TOP likeliest tokens and the rest as one event;
- `loss`, nats per token: the rise of the text's own coding length; negative for a unit that hurts;
- `hidden`: ||h - h'||^2 / ||h||^2 of what the head reads;
- `vector`: the change of the head's input, along gradients of log p(y) with y drawn from the dense model's own distribution. With g = U^T (e_y - p),
  U the head, E[g g^T] is the Fisher matrix of the hidden state, so ||vector||^2 = KL to second order in the change, and inner products of two
  vectors are the interaction of two cuts. Per-probe numbers: DRAWS * positions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from sartor.stages.likelihood import CHUNK, drawn_gradients, kl_terms, nats_of, top_of

DRAWS = 2  # gradients a position


@dataclass(frozen=True)
class Reading:
    """What one probe said, by row: nats per token, nats per token, share; and the vector in all."""

    kl: Float[np.ndarray, " n"]
    loss: Float[np.ndarray, " n"]
    hidden: Float[np.ndarray, " n"]
    vector: Float[np.ndarray, " s"]


class Yardstick:
    """The dense model's words on some rows, and the distance of any other hidden states from them."""

    @torch.no_grad()
    def __init__(self, model: Any, ids: Int[Tensor, "n t"], dense: Float[Tensor, "n t w"], seed: int = 0) -> None:
        self.model, self.ids, self.dense = model, ids, dense
        self.top = top_of(model, ids)
        generator = torch.Generator().manual_seed(seed)
        self.gradients = torch.stack([drawn_gradients(model, dense, generator) for _ in range(DRAWS)], -2)
        self.nats = nats_of(model, ids)
        self.norm = dense.float().square().sum((1, 2))

    @torch.no_grad()
    def vector(self, hidden: Float[Tensor, "n t w"]) -> Float[np.ndarray, " s"]:
        """The vector measurement alone: no head is needed for it."""
        change = (hidden - self.dense).float()
        along = (self.gradients.float() @ change[..., None])[..., 0]
        return (along.flatten() / (2 * along.numel()) ** 0.5).numpy()

    @torch.no_grad()
    def read(self, hidden: Float[Tensor, "n t w"]) -> Reading:
        """All four measurements."""
        n, t = self.ids.shape
        values, tokens = (r.flatten(0, 1) for r in self.top)
        targets, kl, nats = self.ids.roll(-1, 1).flatten(), torch.empty(n * t), torch.empty(n * t)
        for at in range(0, n * t, CHUNK):
            here = slice(at, at + CHUNK)
            logits = self.model.lm_head(hidden.flatten(0, 1)[here]).float()
            log_q = torch.log_softmax(logits, -1)
            kl[here] = kl_terms(log_q, values[here], tokens[here])
            nats[here] = -log_q.gather(1, targets[here, None])[:, 0]
        rise = nats.reshape(n, t)[:, :-1] - self.nats  # what follows a row's last token is not known
        moved = (hidden - self.dense).float().square().sum((1, 2)) / self.norm
        return Reading(kl.reshape(n, t).mean(1).numpy(), rise.mean(1).numpy(), moved.numpy(), self.vector(hidden))


def rise(
    model: Any, ids: Int[Tensor, "n t"], dense: Float[Tensor, "n t w"]
) -> Callable[[Float[Tensor, "n t w"]], Float[np.ndarray, " n"]]:
    """By how much the coding length of each row rises, as a share of the mean row's."""
    stick = Yardstick(model, ids, dense)
    cost = float(stick.nats.mean())
    return lambda hidden: stick.read(hidden).loss / cost
