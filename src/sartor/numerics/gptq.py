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

from sartor.numerics.grids import Grid, nearest_level, row_units, search_scales

ROWS = 16_384  # swept at once: more, as an embedding has, take several times their own memory


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
    upper = inverse_cholesky(c, damp)
    parts = [_swept(part, upper, c.diagonal(), grid) for part in w.split(ROWS)]
    if len(parts) == 1:
        return parts[0]
    return Quantized(torch.cat([p.latent for p in parts]), torch.cat([p.scales for p in parts]))


def _swept(
    w: Float[Tensor, "out inn"], upper: Float[Tensor, "inn inn"], importance: Float[Tensor, " inn"], grid: Grid
) -> Quantized:
    """The sweep over the inputs; rows do not know of each other."""
    out, inn = w.shape
    units = row_units(w, grid) if grid.per_row else None
    w = w.T.contiguous()  # inputs first: the sweep goes through one after the other
    latent = torch.empty_like(w)
    scales = torch.empty(out, inn // grid.block)
    for start in range(0, inn, grid.weights):
        end = start + grid.weights
        block, local = w[start:end], upper[start:end, start:end]
        found = search_scales(block.T.contiguous(), importance[start:end], grid, 8, units)
        scales[:, start // grid.block : end // grid.block] = found
        scale = found.T.contiguous()
        safe = torch.where(scale == 0, torch.ones_like(scale), scale)
        errors = torch.empty(grid.weights, out)
        for j in range(grid.weights):
            at = j // grid.block
            torch.sub(block[j], nearest_level(block[j] / safe[at], grid).mul_(scale[at]), out=errors[j])
            errors[j] /= local[j, j]
            block[j + 1 :].addr_(local[j, j + 1 :], errors[j], alpha=-1)
        latent[start:end] = block
        w[end:].addmm_(upper[start:end, end:].T, errors, alpha=-1)
    return Quantized(latent.T.contiguous(), scales)
