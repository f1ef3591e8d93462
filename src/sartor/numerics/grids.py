"""The quantization grids that llama.cpp can load: levels, scales, bytes.

Every grid here is symmetric in form: a block of 32 weights shares one fp16 scale d, and a weight is
d * levels[q]. Q4_0 has the levels -8..7, Q5_0 -16..15, Q8_0 -127..127, IQ4_NL sixteen unevenly spaced ones.
Byte layouts follow ggml's block structs (ggml-common.h).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

BLOCK = 32

IQ4_NL_LEVELS = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


@dataclass(frozen=True)
class Grid:
    """One quantization grid.

    Attributes:
        name: ggml's name of the type.
        levels: ascending integer levels; a weight is scale * level.
        block_bytes: bytes of one block of 32 weights in the file.
        pack: levels' indices (rows, blocks, 32) and fp16 scales (rows, blocks) -> bytes (rows, blocks, block_bytes).
    """

    name: str
    levels: tuple[int, ...]
    block_bytes: int
    pack: Callable[[np.ndarray, np.ndarray], np.ndarray]

    @property
    def bits_per_weight(self) -> float:
        return self.block_bytes * 8 / BLOCK

    @property
    def uniform(self) -> bool:
        return len(set(np.diff(self.levels).tolist())) == 1


def _scale_bytes(scales: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(scales.astype(np.float16))[..., None].view(np.uint8)


def _nibbles(q: np.ndarray) -> np.ndarray:
    low, high = q[..., :16].astype(np.uint8), q[..., 16:].astype(np.uint8)
    return (low & 15) | ((high & 15) << 4)


def _pack_nibbles(q: np.ndarray, scales: np.ndarray) -> np.ndarray:
    return np.concatenate([_scale_bytes(scales), _nibbles(q)], axis=-1)


def _pack_five(q: np.ndarray, scales: np.ndarray) -> np.ndarray:
    high = np.packbits((q >> 4).astype(np.uint8), axis=-1, bitorder="little")
    return np.concatenate([_scale_bytes(scales), high, _nibbles(q)], axis=-1)


def _pack_eight(q: np.ndarray, scales: np.ndarray) -> np.ndarray:
    signed = (q.astype(np.int16) - 127).astype(np.int8).view(np.uint8)
    return np.concatenate([_scale_bytes(scales), signed], axis=-1)


GRIDS: dict[str, Grid] = {
    grid.name: grid
    for grid in (
        Grid("Q4_0", tuple(range(-8, 8)), 18, _pack_nibbles),
        Grid("IQ4_NL", IQ4_NL_LEVELS, 18, _pack_nibbles),
        Grid("Q5_0", tuple(range(-16, 16)), 22, _pack_five),
        Grid("Q8_0", tuple(range(-127, 128)), 34, _pack_eight),
    )
}


def tensor_bytes(grid: str, shape: tuple[int, int]) -> int:
    """Bytes of an (out, in) tensor in the file; `in` must be a multiple of 32. Also knows F16 and F32."""
    out, inn = shape
    plain = {"F16": 2, "F32": 4}
    if grid in plain:
        return out * inn * plain[grid]
    return out * (inn // BLOCK) * GRIDS[grid].block_bytes


def nearest_index(x: Float[Tensor, ...], grid: Grid) -> Int[Tensor, ...]:
    """Index of the level nearest to x, x in units of the scale. Ties go up."""
    if grid.uniform:
        return (torch.floor(x + 0.5).clamp_(grid.levels[0], grid.levels[-1]) - grid.levels[0]).to(torch.int16)
    return _table(grid)[(torch.floor(x * _FINE).clamp_(-_FINE * 128, _FINE * 128) + _FINE * 128).to(torch.int32)]


# The midpoints of integer levels are multiples of one half: cells [k/2, (k+1)/2) never straddle one, so the table is exact.
_FINE = 2
_TABLES: dict[str, Tensor] = {}


def _table(grid: Grid) -> Tensor:
    """Nearest-level table over [-128, 128] in steps of 1/2, ties going up; built once per grid."""
    if grid.name not in _TABLES:
        levels = torch.tensor(grid.levels, dtype=torch.float32)
        points = torch.arange(-_FINE * 128, _FINE * 128 + 1, dtype=torch.float32) / _FINE
        _TABLES[grid.name] = torch.bucketize(points, (levels[1:] + levels[:-1]) / 2, right=True).to(torch.int16)
    return _TABLES[grid.name]


def snap(w: Float[Tensor, "out inn"], scales: Float[Tensor, "out blocks"], grid: Grid) -> Float[Tensor, "out inn"]:
    """w rounded to the grid with the given scales: scale * level, the very values the runtime will use."""
    out, inn = w.shape
    d = scales.reshape(out, -1, 1)
    x = w.reshape(out, -1, BLOCK) / torch.where(d == 0, torch.ones_like(d), d)
    if grid.uniform:
        level = torch.floor(x.add_(0.5)).clamp_(grid.levels[0], grid.levels[-1])
    else:
        level = torch.tensor(grid.levels, dtype=w.dtype)[nearest_index(x, grid).int()]
    return level.mul_(d).reshape(out, inn)


def search_scales(
    w: Float[Tensor, "out inn"],
    weights: Float[Tensor, " inn"] | None,
    grid: Grid,
    candidates: int = 12,
) -> Float[Tensor, "out blocks"]:
    """Scale of every block that least hurts sum_j weights_j (w_j - d level_j)^2.

    Starts from both signs of the scale that maps the block's extreme onto the grid's end, tries `candidates`
    shrunken versions of each, and closes with one least-squares step. The search of llama.cpp's quantizer, with the
    user's second moments as weights (a diagonal GPTQ).

    Args:
        w: weights. weights: importance of each input, or None for equal. candidates: shrink factors tried per sign.
    Returns:
        scales that are exact in fp16.
    """
    out, inn = w.shape
    x = w.reshape(out, -1, BLOCK)
    h = torch.ones(inn) if weights is None else weights
    h = (h / h.mean().clamp_min(1e-20)).reshape(1, -1, BLOCK) + 1e-3
    extreme = x.gather(-1, x.abs().argmax(-1, keepdim=True))
    best = torch.zeros(out, x.shape[1])
    best_error = torch.full_like(best, torch.inf)
    ends = [grid.levels[0]] if abs(grid.levels[0]) == grid.levels[-1] else [grid.levels[0], grid.levels[-1]]
    shrink = torch.linspace(0.7, 1.1, candidates) if len(grid.levels) <= 32 else torch.tensor([0.98, 1.0])
    for end in ends:
        for factor in shrink.tolist():
            d = _half(extreme * factor / end)
            error, fitted = _scale_error(x, h, d, grid)
            for scale, err in ((d.squeeze(-1), error), (fitted, None)):
                e = err if err is not None else _scale_error(x, h, scale.unsqueeze(-1), grid)[0]
                better = e < best_error
                best = torch.where(better, scale, best)
                best_error = torch.where(better, e, best_error)
                if len(grid.levels) > 32:
                    break
    return best


def _half(d: Tensor) -> Tensor:
    return d.to(torch.float16).to(torch.float32)


def _scale_error(x: Tensor, h: Tensor, d: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Weighted error of every block under scale d (out, blocks, 1), and the scale that fits the same levels best."""
    safe = torch.where(d == 0, torch.ones_like(d), d)
    level = torch.tensor(grid.levels, dtype=x.dtype)[nearest_index(x / safe, grid).int()]
    error = ((x - level * d) ** 2 * h).sum(-1)
    fitted = (x * level * h).sum(-1) / (level * level * h).sum(-1).clamp_min(1e-20)
    return error, _half(fitted)


def encode(w: Float[Tensor, "out inn"], scales: Float[Tensor, "out blocks"], grid: Grid) -> np.ndarray:
    """Bytes of w in the file, shape (out, inn / 32 * block_bytes), uint8; w is snapped first."""
    out, inn = w.shape
    d = scales.reshape(out, -1, 1)
    x = w.reshape(out, -1, BLOCK) / torch.where(d == 0, torch.ones_like(d), d)
    packed = grid.pack(nearest_index(x, grid).numpy(), scales.numpy())
    return np.ascontiguousarray(packed.reshape(out, -1))
