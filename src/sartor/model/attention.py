"""Attention for short rows on a CPU: grouped queries without copies of keys and values, and one matrix of weights kept for the backward pass.

transformers' own plain attention repeats every key and value head, and keeps the weights twice, in fp32 and in bf16: a quarter of all that a
training step keeps. torch's fused attention is slower on rows of 256 tokens, and less true (docs/log.md).
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

KERNEL = "grouped"


def grouped_attention(
    module: nn.Module,
    query: Float[Tensor, "n h t d"],
    key: Float[Tensor, "n g s d"],
    value: Float[Tensor, "n g s d"],
    attention_mask: Float[Tensor, "n 1 t s"] | None,
    scaling: float,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[Float[Tensor, "n t h d"], None]:
    """softmax(scaling q k^T + mask) v, in transformers' shape of an attention function; `dropout` must be 0."""
    if dropout:
        raise ValueError(f"attention with dropout {dropout}: Sartor trains without")
    n, h, t, d = query.shape
    g, s = key.shape[1:3]
    scores = ((query * scaling).reshape(n, g, h // g * t, d) @ key.transpose(2, 3)).view(n, h, t, s)
    if attention_mask is not None:
        scores += attention_mask
    weights = torch.softmax(scores, -1).view(n, g, h // g * t, s)
    return (weights @ value).view(n, h, t, d).transpose(1, 2).contiguous(), None


def register() -> str:
    """Make it known to transformers; returns the name."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, eager_mask

    AttentionInterface.register(KERNEL, grouped_attention)
    AttentionMaskInterface.register(KERNEL, eager_mask)
    return KERNEL
