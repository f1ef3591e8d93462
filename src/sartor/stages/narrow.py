"""Queries and keys of fewer dimensions than the values: the best rank of what heads compare tokens by.

A head of d dimensions compares a query q with a key k by q . k. Of all pairs A, B of d x r matrices, (A^T q) . (B^T k) is nearest in mean square to q . k, over queries with second moments Q and keys with covariance K
that are drawn each for itself, where A = Q^-1/2 U S^1/2 and B = K^-1/2 V S^1/2 with U S V^T the r largest parts of Q^1/2 K^1/2 (Eckart and Young 1936). Keys count from the mean of their picture, as what a query makes of that is the same for
all keys that it is compared with, and softmax does not see it. Of DINOv2's 64 dimensions 48 cost as little as as many parameters of its FFN channels, and come on top (docs/log.md). Values cost ten times as much: they stay.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from sartor.model.hooks import removed_after
from sartor.model.network import anatomy, clone, has_attention, linear
from sartor.model.vision import Vision

LEAST = 1e-7  # of the largest eigenvalue of moments, that the smallest counts as
NONE = 1e-30  # that the largest counts as, of a head that compares nothing
PASS = 16  # pictures
STEP = 8  # dimensions: fewer make no product faster
SHARES = (0.75, 0.5)  # of a head's dimensions, that may be left of its queries and keys
Moments = dict[tuple[int, str], Float[Tensor, "h d d"]]


def widths(model: Vision) -> list[int]:
    """Dimensions that queries and keys may be narrowed to, the most first."""
    dims = anatomy(model).head_dim
    found = {STEP * round(share * dims / STEP) for share in SHARES}
    return sorted((keys for keys in found if 0 < keys < dims), reverse=True)


@torch.no_grad()
def narrowed(model: Vision, moments: Moments, keys: int) -> Vision:
    """A copy whose heads compare tokens by `keys` dimensions.

    Args:
        model: whole, or with fewer heads; of queries and keys as wide as its values. moments: of them (`moments_of_heads`).
    """
    a = anatomy(model)
    new: Vision = clone(model)
    new.config = replace(model.config, keys=keys)
    for n in range(a.layers):
        if not has_attention(model, n):
            continue
        turned = [_turned(q, k, keys) for q, k in zip(moments[n, "q"], moments[n, "k"], strict=True)]
        for side, letter in enumerate("qk"):
            old, parts = linear(model, n, f"self_attn.{letter}_proj"), []
            for h, pair in enumerate(turned):
                at, turn = slice(h * a.head_dim, (h + 1) * a.head_dim), pair[side].T
                parts.append((turn @ old.weight[at].double(), turn @ old.bias[at].double()))
            _exchange(new, n, letter, parts)
        block: Any = new.model.layers[n].self_attn
        block.key_dim = keys
    return new


def _turned(
    q: Float[Tensor, "d d"], k: Float[Tensor, "d d"], keys: int
) -> tuple[Float[Tensor, "d r"], Float[Tensor, "d r"]]:
    """(A, B), A with the factor by which fewer dimensions are scaled otherwise."""
    (root, back), (other, other_back) = _root(q), _root(k)
    u, s, v = torch.linalg.svd(root @ other)
    half = s[:keys].sqrt()
    return (keys / len(q)) ** 0.5 * back @ (u[:, :keys] * half), other_back @ (v[:keys].T * half)


def _root(c: Float[Tensor, "d d"]) -> tuple[Float[Tensor, "d d"], Float[Tensor, "d d"]]:
    """Square root of a moment matrix, and its inverse."""
    w, v = torch.linalg.eigh(c)
    w = w.clamp_min(max(float(w.max()), NONE) * LEAST)
    return (v * w.sqrt()) @ v.T, (v / w.sqrt()) @ v.T


def _exchange(model: Vision, layer: int, letter: str, parts: list[tuple[Tensor, Tensor]]) -> None:
    """Another matrix of queries or keys, head below head."""
    weight, bias = (torch.cat(x).float() for x in zip(*parts, strict=True))
    new = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
    new.weight, new.bias = (nn.Parameter(x, requires_grad=False) for x in (weight, bias))
    setattr(model.model.layers[layer].self_attn, f"{letter}_proj", new)


@torch.no_grad()
def moments_of_heads(model: Vision, pictures: UInt8[Tensor, "n 3 s s"]) -> Moments:
    """Of every head: second moments of its queries, over all tokens, and covariances of its keys within a picture, by (layer, "q" or "k")."""
    a, total, tokens = anatomy(model), Moments(), len(pictures) * model.config.tokens

    def note(key: tuple[int, str]) -> Any:
        def add(_: nn.Module, __: Any, out: Tensor) -> None:
            z = out.unflatten(-1, (-1, a.head_dim)).double()
            z = (z - z.mean(1, keepdim=True) if key[1] == "k" else z).flatten(0, 1)
            found = torch.einsum("nhi,nhj->hij", z, z) / tokens
            total[key] = total[key] + found if key in total else found

        return add

    sites = [(n, letter) for n in range(a.layers) if has_attention(model, n) for letter in "qk"]
    handles = [linear(model, n, f"self_attn.{x}_proj").register_forward_hook(note((n, x))) for n, x in sites]
    with removed_after(handles):
        for part in pictures.split(PASS):
            model(part)
    return total
