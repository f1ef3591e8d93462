"""Which parts of a picture decided for an answer.

Of a transformer: attention rollout, weighted by the answer's gradient (Chefer, Gur and Wolf 2021, arXiv:2103.15679). Of a convolutional network: the last map times the answer's gradient there, place by
place (HiResCAM: Draelos and Carin 2020, arXiv:2011.08891), which sums to the answer where only pooling and a linear layer follow.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from sartor.errors import InputError
from sartor.model.graph import Graph
from sartor.model.hooks import removed_after
from sartor.model.network import has_attention, layers_of, tracked
from sartor.model.vision import Vision


def patches_that_decided(model: Any, pixels: UInt8[Tensor, "1 3 s s"], label: int) -> Float[Tensor, "g g"]:
    """Relevance of every patch, or place of the last map, for the answer `label`, from 0 (the least of this picture's) to 1 (the most); 0 everywhere where none stands out.

    Raises:
        InputError: the model has no head.
    """
    if model.head is None:
        raise InputError(
            "the model has no head, an answer of a head is needed: give a model fitted to pictures with labels"
        )
    return _places(model, pixels, label) if isinstance(model, Graph) else _patches(model, pixels, label)


def _places(model: Graph, pixels: UInt8[Tensor, "1 3 s s"], label: int) -> Float[Tensor, "g g"]:
    with torch.enable_grad():
        hidden = model.hidden(pixels).detach().requires_grad_(True)
        logits = model.head(model.pool(hidden))[0]
        slope = torch.autograd.grad(logits[label] - logits.mean(), hidden)[0]
    found = (hidden.detach() * slope)[0].sum(0).relu()
    return _stretched(found.flatten()).reshape(found.shape)


def _patches(model: Any, pixels: UInt8[Tensor, "1 3 s s"], label: int) -> Float[Tensor, "g g"]:
    """With A the attention maps of a layer and y the answer: R starts as the identity and takes R + mean over heads of relu(A * dy/dA) R at every layer (equations 5 and 6).

    Where we depart from the paper: y is the answer's logit above the mean logit, since softmax is blind to what all have in common; and the features that the head reads are
    not the class token alone. They are the class token beside the mean patch, so pooling is one attention more, with weight 1 and 1 / patches, and its relu(A * dy/dA) reads R.
    """
    with torch.enable_grad(), _watched(model) as maps:
        hidden = tracked(model, pixels)
        logits = model.head(model.pool(hidden))[0]
        slopes = torch.autograd.grad(logits[label] - logits.mean(), [hidden, *maps])
    relevance = torch.eye(hidden.shape[1], dtype=hidden.dtype)
    for attention, slope in zip(maps, slopes[1:], strict=True):
        relevance = relevance + (attention.detach() * slope).relu()[0].mean(0) @ relevance
    found = (_pooled(hidden.detach(), slopes[0]) @ relevance)[model.config.prefix :]
    side = model.config.size // model.config.patch
    return _stretched(found.float()).reshape(side, side)


def _pooled(hidden: Float[Tensor, "1 t w"], slope: Float[Tensor, "1 t w"]) -> Float[Tensor, " t"]:
    """What the answer gained from every token that was pooled: a patch's slope has its share of the mean in it already, a register's is zero."""
    return (hidden * slope)[0].sum(-1).relu()


def _stretched(x: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    spread = x.max() - x.min()
    return (x - x.min()) / spread if spread > 0 else torch.zeros_like(x)


@contextmanager
def _watched(model: Vision) -> Iterator[list[Float[Tensor, "1 h t t"]]]:
    """The model with its attention maps in a list, layer by layer, for those that have any; they are in the graph. Undone on the way out."""
    maps: list[Tensor] = []
    with removed_after(
        layer.self_attn.softmax.register_forward_hook(lambda _, args, said: maps.append(said))
        for n, layer in enumerate(layers_of(model))
        if has_attention(model, n)
    ):
        yield maps
