"""Four bits in the file, eight bits in the machine.

A weight is unit x step x level: a number for its row, a whole number from -15 to 15 for each block of 32, and a level from -8 to 7. Step times level is a whole number from -120 to 120, so a
runtime that has unfolded the file multiplies by these very weights at eight bits with one scale a row, as fast as it does with any file of eight bits. Scales as multiples of one number are
ggml's k-quants' way; that the number stands for the whole row, so that nothing but the row is left when it is unfolded, is ours.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from jaxtyping import Float, Int8
from torch import Tensor

from sartor.numerics.grids import GRIDS, Grid, indices, search_scales

BLOCK, MOST = 32, 15  # weights of a block; steps of a block's scale either way


def _pack(codes: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Sixteen bytes of codes, two a byte, the first in its low bits, and the block's step."""
    low, high = codes[..., 0::2].astype(np.uint8), codes[..., 1::2].astype(np.uint8)
    _, steps = row_steps(torch.from_numpy(scales[..., 0]))
    return np.concatenate([low | (high << 4), steps.numpy()[..., None].view(np.uint8)], axis=-1)


def _unpack_steps(raw: np.ndarray) -> np.ndarray:
    """Scales in units of their row."""
    return np.ascontiguousarray(raw[..., 16:]).view(np.int8).astype(np.float32)


FOUR = Grid("INT4", tuple(range(-8, 8)), 17, _pack, _unpack_steps, per_row=MOST)
NAMED: Mapping[str, Grid] = GRIDS | {FOUR.name: FOUR}  # llama.cpp's grids, and this one


def row_steps(scales: Float[Tensor, "out blocks"]) -> tuple[Float[Tensor, " out"], Int8[Tensor, "out blocks"]]:
    """(units, steps) of scales that `search_scales` made on this grid; their products are the scales exactly.

    Raises:
        ValueError: they are not multiples of one number a row.
    """
    extreme = scales.abs().amax(1)
    units, done = torch.ones_like(extreme), extreme == 0
    for most in range(MOST, 0, -1):
        tried = (extreme / most).to(torch.bfloat16).to(torch.float32)
        steps = (scales / torch.where(tried == 0, 1, tried)[:, None]).round()
        right = ~done & (steps * tried[:, None] == scales).all(1)
        units, done = torch.where(right, tried, units), done | right
    if not done.all():
        raise ValueError("scales of a row are not whole multiples of one number")
    return units, (scales / units[:, None]).round().to(torch.int8)


def padded(weight: Float[Tensor, "out inn"]) -> Float[Tensor, "out padded"]:
    """The matrix in fp32 with columns of zeros, so that blocks fill it."""
    return torch.nn.functional.pad(weight.detach().float(), (0, -weight.shape[1] % BLOCK))


def nearest_scales(weight: Float[Tensor, "out inn"]) -> Float[Tensor, "out blocks"]:
    """Scales for a matrix of which nothing else is known; its columns are padded to whole blocks."""
    return search_scales(padded(weight), None, FOUR)


def packed(
    weight: Float[Tensor, "out inn"], scales: Float[Tensor, "out blocks"]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(codes uint8 (out, blocks, 16), steps int8 (out, blocks, 1), units fp32 (out)) of a matrix with these scales."""
    full = padded(weight)
    codes = indices(full, scales, FOUR).numpy().reshape(len(full), -1, BLOCK)
    raw = FOUR.pack(codes, scales.numpy()[..., None])
    return raw[..., :16], raw[..., 16:].view(np.int8), row_steps(scales)[0].numpy()
