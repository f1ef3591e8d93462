"""Repair after a cut: every matrix that writes to the residual stream is fitted once more, so that the stream is again what it was.

Layer by layer, two networks read the same rows: the whole one and the cut one. o_proj and then down_proj of the cut one are fitted to what is missing from *its
own* stream to the whole one's, so that each layer also takes up what those before it got wrong, whether or not it lost anything itself. The usual form of this
(targets from the whole network, inputs from the cut one, each matrix for itself) knows nothing of the stream and made things worse (docs/log.md).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from sartor.model.network import has_attention, has_mlp, layers_of, linear
from sartor.model.tail import arguments_of
from sartor.numerics.compensate import refit

WRITERS = ("self_attn.o_proj", "mlp.down_proj")
BATCH = 8  # rows a pass
LAMBDA = 0.3  # pull towards the plain cut; from 0.1 to 1 it hardly matters (docs/log.md)


def mixed(
    own: Int[Tensor, "m t"], generic: Int[Tensor, "k t"], rho: float
) -> tuple[Int[Tensor, "n t"], Float[Tensor, " n"]]:
    """Rows of both texts, and the weight of each: the generic ones have `rho` of it all."""
    weight = torch.cat([torch.full((len(r),), s / len(r)) for r, s in ((own, 1 - rho), (generic, rho))])
    return torch.cat([own, generic]), weight


@torch.no_grad()
def repair_(
    small: Any,
    cut: Any,
    whole: Any,
    rows: Int[Tensor, "n t"],
    weight: Float[Tensor, " n"],
    tell: Callable[[float], None] = lambda share: None,
) -> None:
    """Fit o_proj and down_proj of all layers, in place.

    Args:
        small: the cut network in fp32, which gets the fitted matrices. cut: the same in the precision to run in. whole: what it was cut from, in that precision.
        rows: text of whole batches or not. weight: of each row; they sum to 1.
    """
    parts = rows.split(BATCH)
    weights = [w[:, None, None].sqrt() for w in (weight / rows.shape[1]).split(BATCH)]
    arguments = {len(part): arguments_of(whole, part) for part in parts}
    theirs = [whole.model.embed_tokens(part) for part in parts]
    ours = [x.clone() for x in theirs]
    for n in range(len(layers_of(cut))):
        ours, theirs = _layer_(small, cut, whole, n, ours, theirs, weights, arguments)
        tell((n + 1) / len(layers_of(cut)))


def _layer_(
    small: Any,
    cut: Any,
    whole: Any,
    n: int,
    ours: list[Tensor],
    theirs: list[Tensor],
    weights: list[Tensor],
    arguments: dict[int, Any],
) -> tuple[list[Tensor], list[Tensor]]:
    """Both streams behind layer n, whose writers are fitted on the way."""
    block, other = layers_of(cut)[n], layers_of(whole)[n]
    middles, ends = [], []
    for x in theirs:
        with _read(other.post_attention_layernorm) as middle:
            ends.append(other(x, **arguments[len(x)][n]))
        middles.append(middle[0])
    if has_attention(cut, n):
        read = []
        for x in ours:
            with _read(block.self_attn.o_proj) as z:
                block.self_attn(hidden_states=block.input_layernorm(x), **arguments[len(x)][n])
            read.append(z[0])
        ours = _written_(small, cut, (n, "self_attn.o_proj"), read, ours, middles, weights)
    if has_mlp(cut, n):
        read = []
        for x in ours:
            with _read(block.mlp.down_proj) as z:
                block.mlp(block.post_attention_layernorm(x))
            read.append(z[0])
        ours = _written_(small, cut, (n, "mlp.down_proj"), read, ours, ends, weights)
    return ours, ends


def _written_(
    small: Any,
    cut: Any,
    name: tuple[int, str],
    read: list[Tensor],
    stream: list[Tensor],
    wanted: list[Tensor],
    weights: list[Tensor],
) -> list[Tensor]:
    """The stream once the fitted matrix has written to it: as near to `wanted` as what it reads allows."""
    a, b = torch.zeros(()), torch.zeros(())
    for z, x, target, w in zip(read, stream, wanted, weights, strict=True):
        z, missing = (z * w.to(z.dtype)).flatten(0, 1), ((target - x) * w.to(z.dtype)).flatten(0, 1)
        a, b = a + (missing.T @ z).float(), b + (z.T @ z).float()
    running, kept = linear(cut, *name), linear(small, *name)
    kept.weight.data = refit(kept.weight.data.float(), a, b, LAMBDA).to(kept.weight.dtype)
    running.weight.data = kept.weight.data.to(running.weight.dtype)
    return [x + running(z) for z, x in zip(read, stream, strict=True)]


@contextmanager
def _read(module: nn.Module) -> Iterator[list[Tensor]]:
    """What the module reads while the body runs."""
    found: list[Tensor] = []
    handle = module.register_forward_pre_hook(lambda _, args: found.append(args[0]))
    try:
        yield found
    finally:
        handle.remove()
