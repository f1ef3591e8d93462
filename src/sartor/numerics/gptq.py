"""Error-feedback quantization onto a grid (GPTQ, Frantar et al. 2022, arXiv:2210.17323).

Departures: scales are searched per block of the file at the moment the sweep reaches it, on the already corrected weights
and weighted by the second moments; and besides the rounded weights the *latent* ones are returned, the values just
before rounding. Training that goes on from the latents starts exactly at the GPTQ solution, yet no weight sits in
the dead middle of its cell.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from sartor.numerics.grids import Grid, nearest_index, search_scales


@dataclass(frozen=True)
class Quantized:
    """latent (out, in): values just before rounding; scales (out, in / block)."""

    latent: Tensor
    scales: Tensor


def inverse_cholesky(c: Float[Tensor, "n n"], damp: float) -> Float[Tensor, "n n"]:
    """Upper Cholesky factor of (C + damp mean(diag C) I)^-1, as GPTQ needs it; dead inputs get unit diagonal."""
    c = c.clone()
    diag = c.diagonal()
    diag[diag <= 0] = 1.0
    diag += damp * diag.mean()
    for _ in range(8):
        lower, info = torch.linalg.cholesky_ex(c)
        if info == 0:
            inverse = torch.cholesky_inverse(lower)
            upper, info = torch.linalg.cholesky_ex(inverse, upper=True)
            if info == 0:
                return upper
        diag += damp * diag.mean()  # few tokens make C singular: more damping, never a crash
    return torch.diag(diag.rsqrt())


def gptq(
    w: Float[Tensor, "out inn"],
    c: Float[Tensor, "inn inn"],
    grid: Grid,
    damp: float = 0.01,
) -> Quantized:
    """Quantize w so that the outputs on inputs with second moments C change least.

    Args:
        w: weights, `inn` a multiple of grid.weights. c: E[z z^T] of its inputs. grid: target. damp: share of mean(diag C).
    Returns:
        Quantized; `snap(latent, scales, grid)` are the rounded weights.
    """
    w = w.clone()
    out, inn = w.shape
    upper = inverse_cholesky(c, damp)
    importance = c.diagonal()
    levels = torch.tensor(grid.levels, dtype=w.dtype)
    latent = torch.empty_like(w)
    scales = torch.empty(out, inn // grid.block)
    for start in range(0, inn, grid.weights):
        end = start + grid.weights
        block = w[:, start:end]
        scale = search_scales(block, importance[start:end], grid, candidates=8)
        scales[:, start // grid.block : end // grid.block] = scale
        safe = torch.where(scale == 0, torch.ones_like(scale), scale)
        errors = torch.empty(out, grid.weights)
        local = upper[start:end, start:end]
        for j in range(grid.weights):
            column, at = block[:, j], j // grid.block
            latent[:, start + j] = column
            rounded = levels[nearest_index(column / safe[:, at], grid).int()] * scale[:, at]
            errors[:, j] = (column - rounded) / local[j, j]
            if j + 1 < grid.weights:
                block[:, j + 1 :] -= errors[:, j : j + 1] * local[j : j + 1, j + 1 :]
        w[:, end:] -= errors @ upper[start:end, end:]
    return Quantized(latent, scales)
