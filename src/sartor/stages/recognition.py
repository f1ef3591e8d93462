"""What a vision transformer says of pictures: probabilities of classes, accuracy, and how far two networks lie apart."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from sartor.model.network import embed, through

BATCH = 16  # pictures a pass


@dataclass(frozen=True)
class Recognized:
    """Which pictures were named as their owner names them, and the nats of doing so."""

    right: Bool[Tensor, " n"]
    nats: Float[Tensor, " n"]

    @property
    def accuracy(self) -> float:
        return float(self.right.double().mean())


@torch.no_grad()
def log_p_of(model: Any, pixels: UInt8[Tensor, "n 3 s s"]) -> Float[Tensor, "n c"]:
    """Log-probabilities of the classes, in fp32."""
    return torch.cat([torch.log_softmax(model(part).float(), -1) for part in pixels.split(BATCH)])


def recognize(model: Any, pixels: UInt8[Tensor, "n 3 s s"], labels: Int[Tensor, " n"]) -> Recognized:
    log_p = log_p_of(model, pixels)
    return Recognized(log_p.argmax(-1) == labels, -log_p.gather(1, labels[:, None])[:, 0])


def said_of(model: Any, pixels: UInt8[Tensor, "n 3 s s"]) -> tuple[Tensor, Tensor]:
    """(log-probabilities of all classes, the classes): what `kl_of` compares with."""
    log_p = log_p_of(model, pixels)
    return log_p, torch.arange(log_p.shape[1]).expand_as(log_p)


def kl_of(model: Any, pixels: UInt8[Tensor, "n 3 s s"], said: tuple[Tensor, Tensor]) -> float:
    """Mean KL(said || model) in nats a picture."""
    p = said[0].exp()
    return float((p * (said[0] - log_p_of(model, pixels))).sum(-1).mean())


@torch.no_grad()
def apart(model: Any, dense: Float[Tensor, "n t w"]) -> Callable[[Float[Tensor, "n t w"]], float]:
    """Mean KL, in nats a picture, of what the head makes of these hidden states to what it makes of others."""

    @torch.no_grad()
    def log_p(hidden: Float[Tensor, "n t w"]) -> Float[Tensor, "n c"]:
        return torch.log_softmax(model.head(model.pool(hidden)).float(), -1)

    said = log_p(dense)
    return lambda hidden: float((said.exp() * (said - log_p(hidden))).sum(-1).mean())


@torch.no_grad()
def renamed(
    model: Any, pixels: UInt8[Tensor, "n 3 s s"], dense: Float[Tensor, "n t w"]
) -> Callable[[Float[Tensor, "n t w"]], Float[np.ndarray, " n"]]:
    """Of each picture 1 where it is named otherwise, 0 where it is not."""

    @torch.no_grad()
    def names(hidden: Float[Tensor, "n t w"]) -> Int[Tensor, " n"]:
        return model.head(model.pool(hidden)).argmax(-1)

    before = names(dense)
    return lambda hidden: (names(hidden) != before).float().numpy()


def signed(logits: Float[Tensor, "n c"], generator: torch.Generator) -> Float[Tensor, "n c"]:
    """A random direction among what a model foretells.

    A picture has one prediction, often a sure one: a label drawn from it is nearly always the same and says nothing, or rare and says all. So every class takes part:
    with signs s_c of +1 and -1 at random, sum_c s_c sqrt(p_c) (e_c - p) has mean zero and the same second moments as e_y - p with y drawn, diag p - p p^T, and none of the luck.
    """
    p = torch.softmax(logits.detach().float(), -1)
    drawn = p.sqrt() * (2 * torch.randint(0, 2, p.shape, generator=generator) - 1)
    return (drawn - p * drawn.sum(-1, keepdim=True)).to(logits.dtype)


@torch.no_grad()
def signed_gradients(model: Any, hidden: Float[Tensor, "n t w"], generator: torch.Generator) -> Float[Tensor, "n t w"]:
    """Gradients at the hidden states along such a direction."""
    with torch.enable_grad():
        here = hidden.detach().requires_grad_(True)
        logits = model.head(model.pool(here))
    return torch.autograd.grad(logits, here, signed(logits, generator))[0]


def loss_of(model: Any, pixels: UInt8[Tensor, "n 3 s s"], labels: Int[Tensor, " n"]) -> Float[Tensor, ""]:
    """Mean -log p of the labels, with gradients."""
    return torch.nn.functional.cross_entropy(
        model.head(model.pool(through(model, embed(model, pixels)))).float(), labels
    )


def listen(model: Any, hidden: Float[Tensor, "n t w"], generator: torch.Generator, directions: int) -> None:
    """Send back several random directions of what the model foretells, one after the other."""
    for left in reversed(range(directions)):
        hidden.backward(signed_gradients(model, hidden.detach(), generator), retain_graph=left > 0)
