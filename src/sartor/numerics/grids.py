"""The quantization grids that llama.cpp can load: levels, scales, bytes.

Every grid here is symmetric in form: a block of weights shares one scale, and a weight is scale * levels[q]. Q4_0 has the
levels -8..7, Q5_0 -16..15, Q8_0 -127..127, IQ4_NL sixteen unevenly spaced ones; their blocks are 32 weights, their scales
fp16. Q3_K (levels -4..3, 16 weights a scale) and IQ4_XS (IQ4_NL's levels, 32 weights a scale) store the scales of 256
weights as six-bit multiples of one fp16 number, and need rows that 256 divides. Byte layouts follow ggml's block structs
(ggml-common.h).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

IQ4_NL_LEVELS = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
SHARED_STEPS = (-32, 31)  # six-bit multiples of the fp16 number that the scales of a shared block have in common


@dataclass(frozen=True)
class Grid:
    """One quantization grid.

    Attributes:
        name: ggml's name of the type.
        levels: ascending integer levels; a weight is scale * level.
        block_bytes: bytes of one block in the file.
        pack: levels' indices (rows, blocks, weights) and scales (rows, blocks, scales) -> bytes (rows, blocks, block_bytes).
        unpack_scales: such bytes -> scales (rows, blocks, scales).
        block: weights that share a scale. scales: how many scales one block in the file holds.
        per_row: scales are whole multiples, up to so many either way, of one number a row; 0: they are free.
    """

    name: str
    levels: tuple[int, ...]
    block_bytes: int
    pack: Callable[[np.ndarray, np.ndarray], np.ndarray]
    unpack_scales: Callable[[np.ndarray], np.ndarray]
    block: int = 32
    scales: int = 1
    per_row: int = 0

    @property
    def weights(self) -> int:
        """Weights of one block in the file; it divides the length of a row."""
        return self.block * self.scales

    @property
    def bits_per_weight(self) -> float:
        return self.block_bytes * 8 / self.weights

    @cached_property
    def uniform(self) -> bool:
        return len(set(np.diff(self.levels).tolist())) == 1


def _half_bytes(d: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(d.astype(np.float16))[..., None].view(np.uint8)


def _halves(raw: np.ndarray) -> np.ndarray:
    """fp16 numbers out of pairs of bytes (..., 2)."""
    return np.ascontiguousarray(raw).view(np.float16)[..., 0].astype(np.float32)


def _own_scale(raw: np.ndarray) -> np.ndarray:
    return _halves(raw[..., :2])[..., None]


def _nibbles(q: np.ndarray) -> np.ndarray:
    low, high = q[..., :16].astype(np.uint8), q[..., 16:].astype(np.uint8)
    return (low & 15) | ((high & 15) << 4)


def _pack_nibbles(q: np.ndarray, scales: np.ndarray) -> np.ndarray:
    return np.concatenate([_half_bytes(scales[..., 0]), _nibbles(q)], axis=-1)


def _pack_five(q: np.ndarray, scales: np.ndarray) -> np.ndarray:
    high = np.packbits((q >> 4).astype(np.uint8), axis=-1, bitorder="little")
    return np.concatenate([_half_bytes(scales[..., 0]), high, _nibbles(q)], axis=-1)


def _pack_eight(q: np.ndarray, scales: np.ndarray) -> np.ndarray:
    signed = (q.astype(np.int16) - 127).astype(np.int8).view(np.uint8)
    return np.concatenate([_half_bytes(scales[..., 0]), signed], axis=-1)


def shared_steps(scales: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Scales that `_share` made, (..., n), back to the fp16 number (...) and the six-bit steps (..., n), plus 32."""
    extreme = np.abs(scales).max(-1)
    d, done = np.zeros_like(extreme), extreme == 0
    for k in (31, 32, *range(30, 0, -1)):
        tried = (extreme / k).astype(np.float16).astype(np.float32)
        steps = np.rint(scales / np.where(tried == 0, 1, tried)[..., None])
        right = ~done & (steps * tried[..., None] == scales).all(-1)
        d, done = np.where(right, tried, d), done | right
        if done.all():
            break
    if not done.all():
        raise ValueError("scales of a shared block are not six-bit multiples of one fp16 number")
    steps = np.rint(scales / np.where(d == 0, 1, d)[..., None])
    return d, (steps - SHARED_STEPS[0]).astype(np.uint8)


def _pack_q3_k(q: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """block_q3_K: the high bits, the low two bits, twelve bytes of sixteen six-bit scales, fp16."""
    d, s = shared_steps(scales)
    lead = q.shape[:-1]
    high = (((q >> 2) & 1).reshape(*lead, 8, 32) << np.arange(8)[:, None]).sum(-2).astype(np.uint8)
    low = ((q & 3).reshape(*lead, 2, 4, 32) << np.array([0, 2, 4, 6])[:, None]).sum(-2).astype(np.uint8)
    bottom = (s[..., :8] & 15) | ((s[..., 8:] & 15) << 4)
    top = ((s >> 4).reshape(*lead, 4, 4) << np.array([0, 2, 4, 6])[:, None]).sum(-2).astype(np.uint8)
    return np.concatenate([high, low.reshape(*lead, 64), bottom, top, _half_bytes(d)], axis=-1)


def _q3_k_scales(raw: np.ndarray) -> np.ndarray:
    lead, bottom, top = raw.shape[:-1], raw[..., 96:104], raw[..., 104:108]
    low = np.concatenate([bottom & 15, bottom >> 4], axis=-1)
    high = ((top[..., None, :] >> np.array([0, 2, 4, 6], np.uint8)[:, None]) & 3).reshape(*lead, 16)
    return _halves(raw[..., 108:])[..., None] * ((low | (high << 4)).astype(np.float32) + SHARED_STEPS[0])


def _pack_iq4_xs(q: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """block_iq4_xs: fp16, eight six-bit scales (high bits, then low ones), nibbles of blocks of 32."""
    d, s = shared_steps(scales)
    lead = q.shape[:-1]
    high = ((s >> 4).astype(np.uint16) << np.arange(0, 16, 2, dtype=np.uint16)).sum(-1).astype(np.uint16)
    low = (s[..., 0::2] & 15) | ((s[..., 1::2] & 15) << 4)
    nibbles = _nibbles(q.reshape(*lead, 8, 32)).reshape(*lead, 128)
    return np.concatenate([_half_bytes(d), high[..., None].view(np.uint8), low, nibbles], axis=-1)


def _iq4_xs_scales(raw: np.ndarray) -> np.ndarray:
    lead = raw.shape[:-1]
    high = (np.ascontiguousarray(raw[..., 2:4]).view(np.uint16) >> np.arange(0, 16, 2, dtype=np.uint16)) & 3
    low = np.stack([raw[..., 4:8] & 15, raw[..., 4:8] >> 4], axis=-1).reshape(*lead, 8)
    return _halves(raw[..., :2])[..., None] * ((low | (high << 4)).astype(np.float32) + SHARED_STEPS[0])


GRIDS: dict[str, Grid] = {
    grid.name: grid
    for grid in (
        Grid("Q3_K", tuple(range(-4, 4)), 110, _pack_q3_k, _q3_k_scales, block=16, scales=16),
        Grid("IQ4_XS", IQ4_NL_LEVELS, 136, _pack_iq4_xs, _iq4_xs_scales, scales=8),
        Grid("Q4_0", tuple(range(-8, 8)), 18, _pack_nibbles, _own_scale),
        Grid("IQ4_NL", IQ4_NL_LEVELS, 18, _pack_nibbles, _own_scale),
        Grid("Q5_0", tuple(range(-16, 16)), 22, _pack_five, _own_scale),
        Grid("Q8_0", tuple(range(-127, 128)), 34, _pack_eight, _own_scale),
    )
}


def fits(grid: str, inn: int) -> bool:
    """Whether rows of `inn` weights can be written on this grid."""
    return inn % GRIDS[grid].weights == 0


def tensor_bytes(grid: str, shape: tuple[int, int]) -> int:
    """Bytes of an (out, in) tensor in the file; `in` must fit the grid. Also knows F16 and F32."""
    out, inn = shape
    plain = {"F16": 2, "F32": 4}
    if grid in plain:
        return out * inn * plain[grid]
    return out * (inn // GRIDS[grid].weights) * GRIDS[grid].block_bytes


def nearest_index(x: Float[Tensor, ...], grid: Grid) -> Int[Tensor, ...]:
    """Index of the level nearest to x, x in units of the scale. Ties go up."""
    if grid.uniform:
        return (torch.floor(x + 0.5).clamp_(grid.levels[0], grid.levels[-1]) - grid.levels[0]).to(torch.int16)
    return _table(grid).take(_cell(x))


def _cell(x: Float[Tensor, ...]) -> Int[Tensor, ...]:
    """Where the table has the level nearest to x."""
    return x.mul(_FINE).floor_().clamp_(-_FINE * 128, _FINE * 128).add_(_FINE * 128).long()


# The midpoints of integer levels are multiples of one half: cells [k/2, (k+1)/2) never straddle one, so the table is exact.
_FINE = 2
_TABLES: dict[str, Tensor] = {}
_LEVELS: dict[str, Tensor] = {}


def _table(grid: Grid) -> Tensor:
    """Nearest-level table over [-128, 128] in steps of 1/2, ties going up; built once per grid."""
    if grid.name not in _TABLES:
        levels = torch.tensor(grid.levels, dtype=torch.float32)
        points = torch.arange(-_FINE * 128, _FINE * 128 + 1, dtype=torch.float32) / _FINE
        _TABLES[grid.name] = torch.bucketize(points, (levels[1:] + levels[:-1]) / 2, right=True).to(torch.int16)
    return _TABLES[grid.name]


def nearest_level(x: Float[Tensor, ...], grid: Grid) -> Float[Tensor, ...]:
    """The level nearest to x, x in units of the scale, in place where it can. Ties go up."""
    if grid.uniform:
        return x.add_(0.5).floor_().clamp_(grid.levels[0], grid.levels[-1])
    return _levels(grid).take(_cell(x))  # as a gather, three times as slow


def _levels(grid: Grid) -> Tensor:
    """The same table with the levels themselves."""
    if grid.name not in _LEVELS:
        _LEVELS[grid.name] = torch.tensor(grid.levels, dtype=torch.float32)[_table(grid).int()]
    return _LEVELS[grid.name]


def snap(w: Float[Tensor, "out inn"], scales: Float[Tensor, "out blocks"], grid: Grid) -> Float[Tensor, "out inn"]:
    """w rounded to the grid with the given scales: scale * level, the very values the runtime will use."""
    out, inn = w.shape
    if out > (many := _rows_at_once(inn)):
        return torch.cat([snap(x, s, grid) for x, s in zip(w.split(many), scales.split(many), strict=True)])
    d = scales.reshape(out, -1, 1)
    x = w.reshape(out, -1, grid.block) / torch.where(d == 0, torch.ones_like(d), d)
    return nearest_level(x, grid).mul_(d).reshape(out, inn)


# numbers of a matrix that are searched or packed at once: what is made on the way is several times as large
AT_ONCE = 1 << 22


def _rows_at_once(width: int) -> int:
    return max(1, AT_ONCE // width)


def search_scales(
    w: Float[Tensor, "out inn"],
    weights: Float[Tensor, " inn"] | None,
    grid: Grid,
    candidates: int = 12,
    units: Float[Tensor, " out"] | None = None,
) -> Float[Tensor, "out blocks"]:
    """Scale of every block that least hurts sum_j weights_j (w_j - d level_j)^2.

    Starts from both signs of the scale that maps the block's extreme onto the grid's end, and tries `candidates` shrunken versions of each: every one
    says which level each weight goes to, and the scale that fits those levels best, by least squares, counts. The search of llama.cpp's quantizer, with the
    user's second moments as weights (a diagonal GPTQ).

    Args:
        w: weights. weights: importance of each input, or None for equal. candidates: shrink factors tried per sign.
        units: `row_units` of the whole rows, where w is some of their blocks on a grid that has such.
    Returns:
        scales as the file can hold them.
    """
    out, inn = w.shape
    if out > (many := _rows_at_once(inn)):
        of = [None] * len(w.split(many)) if units is None else units.split(many)
        return torch.cat(
            [search_scales(x, weights, grid, candidates, u) for x, u in zip(w.split(many), of, strict=True)]
        )
    x = w.reshape(out, -1, grid.block)
    h = torch.ones(inn) if weights is None else weights
    h = (h / h.mean().clamp_min(1e-20)).reshape(1, -1, grid.block) + 1e-3
    extreme = x.gather(-1, x.abs().argmax(-1, keepdim=True))
    hx = h * x
    best, most = torch.zeros(out, x.shape[1]), torch.full((out, x.shape[1]), -1.0)
    ends = [grid.levels[0]] if abs(grid.levels[0]) == grid.levels[-1] else [grid.levels[0], grid.levels[-1]]
    shrink = torch.linspace(0.7, 1.1, candidates) if len(grid.levels) <= 32 else torch.tensor([0.98, 1.0])
    for end in ends:
        for factor in shrink.tolist():
            d = extreme * (factor / end)
            level = nearest_level(x / torch.where(d == 0, torch.ones_like(d), d), grid)
            said, size = (hx * level).sum(-1), (h * level * level).sum(-1).clamp_min(1e-20)
            explained = said * said / size  # of sum_j weights_j w_j^2, by these levels at their best scale
            best = torch.where(explained > most, said / size, best)
            most = torch.maximum(explained, most)
    if grid.per_row:
        return _whole_steps(x, h, best, row_units(w, grid) if units is None else units, grid)
    best = _half(best)
    return best if grid.scales == 1 else _share(best, grid)


def row_units(w: Float[Tensor, "out inn"], grid: Grid) -> Float[Tensor, " out"]:
    """The number of each row that its scales are multiples of. With the bits of bf16, scales and weights are its multiples exactly in fp32, however small a row is."""
    return (w.abs().amax(1) / (-grid.levels[0] * grid.per_row)).to(torch.bfloat16).to(torch.float32)


def _whole_steps(
    x: Float[Tensor, "out blocks n"], h: Tensor, scales: Float[Tensor, "out blocks"], units: Tensor, grid: Grid
) -> Float[Tensor, "out blocks"]:
    """Of the multiples of the row's unit around each scale, the one that least hurts; none is zero, as that would lose the block."""
    unit = torch.where(units == 0, torch.ones_like(units), units)[:, None]
    near = (scales.abs() / unit).round_()
    best, least = torch.zeros_like(scales), torch.full_like(scales, torch.inf)
    for step in (near, near - 1, near + 1):
        d = step.clamp(1, grid.per_row).mul_(unit).mul_(scales.sign())
        said = nearest_level(x / torch.where(d == 0, torch.ones_like(d), d)[..., None], grid) * d[..., None]
        error = (h * (x - said).square()).sum(-1)
        best, least = torch.where(error < least, d, best), torch.minimum(error, least)
    return best


def _share(scales: Float[Tensor, "out blocks"], grid: Grid) -> Float[Tensor, "out blocks"]:
    """Scales rounded to six-bit multiples of one fp16 number for every block of the file."""
    by_block = scales.reshape(len(scales), -1, grid.scales)
    d = _half(by_block.abs().amax(-1, keepdim=True) / SHARED_STEPS[1])
    steps = (by_block / torch.where(d == 0, torch.ones_like(d), d)).round_().clamp_(*SHARED_STEPS)
    return steps.mul_(d).reshape(scales.shape)


def _half(d: Tensor) -> Tensor:
    return d.to(torch.float16).to(torch.float32)


def indices(w: Float[Tensor, "out inn"], scales: Float[Tensor, "out blocks"], grid: Grid) -> Int[Tensor, "out inn"]:
    """Index of the level that each weight is snapped to."""
    d = scales.reshape(len(w), -1, 1)
    x = w.reshape(len(w), -1, grid.block) / torch.where(d == 0, torch.ones_like(d), d)
    return nearest_index(x, grid).reshape(w.shape)


def encode(w: Float[Tensor, "out inn"], scales: Float[Tensor, "out blocks"], grid: Grid) -> np.ndarray:
    """Bytes of w in the file, shape (out, inn / weights * block_bytes), uint8; w is snapped first."""
    out = len(w)
    if out > (most := _rows_at_once(w.shape[1])):
        return np.concatenate([encode(x, s, grid) for x, s in zip(w.split(most), scales.split(most), strict=True)])
    levels = indices(w, scales, grid).numpy().reshape(out, -1, grid.weights)
    packed = grid.pack(levels, scales.numpy().reshape(out, -1, grid.scales))
    return np.ascontiguousarray(packed.reshape(out, -1))


def decode_scales(raw: np.ndarray, grid: Grid) -> Float[Tensor, "out blocks"]:
    """The scales inside the bytes that `encode` made."""
    blocks = raw.reshape(len(raw), -1, grid.block_bytes)
    return torch.from_numpy(np.ascontiguousarray(grid.unpack_scales(blocks).reshape(len(raw), -1)))
