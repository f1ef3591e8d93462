"""Eight bits as phones' runtimes compute with them: weights on a scale a row, activations on one scale and a zero point."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int8
from torch import Tensor

STEPS = 255  # of a grid
DIGITS = 16  # of a scale of weights
SHARES = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3)  # of the widest range that are tried for an activation


def rounded(weight: Float[Tensor, "o ..."]) -> tuple[Int8[Tensor, "o ..."], Float[Tensor, " o"]]:
    """(whole numbers from -127 to 127, scale of every row): their product is what an int8 file holds of `weight`. What it holds stays as it is when rounded again."""
    weight = weight.detach().float()
    scale = _short(weight.abs().flatten(1).amax(1) / 127)
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    return (weight / _rows(scale, weight)).round().clamp(-127, 127).to(torch.int8), scale


def _short(scale: Float[Tensor, " o"]) -> Float[Tensor, " o"]:
    """The nearest numbers of DIGITS binary digits: 127 of them, and any fewer, are exact in fp32, so that rounding again finds the same scale, also of weights that were divided and multiplied in between."""
    digits, power = torch.frexp(scale)
    return torch.ldexp((digits * 2**DIGITS).round() / 2**DIGITS, power)


def held(weight: Float[Tensor, "o ..."]) -> Float[Tensor, "o ..."]:
    """What an int8 file holds of `weight`."""
    numbers, scale = rounded(weight)
    return numbers.float() * _rows(scale, weight)


def _rows(scale: Tensor, weight: Tensor) -> Tensor:
    return scale.view(-1, *[1] * (weight.ndim - 1))


def grid_of(low: float, high: float) -> tuple[float, int]:
    """(scale, zero point) of 256 steps from `low` to `high`; zero is one of them, as padding needs."""
    low, high = min(low, 0.0), max(high, 0.0)
    scale = (high - low) / STEPS or 1.0
    return scale, round(-low / scale)


def on_grid(x: Float[Tensor, ...], scale: float, zero: int) -> Float[Tensor, ...]:
    """x rounded to the grid; gradients pass where x lies inside it (Jacob et al. 2018, arXiv:1712.05877)."""
    return torch.fake_quantize_per_tensor_affine(x, scale, zero, 0, STEPS)


def best_grid(x: Float[Tensor, " n"]) -> tuple[float, int]:
    """The grid of least squared error on x, of those that cut its range at either end by the same share."""
    low, high = float(x.min()), float(x.max())
    tried = [grid_of(share * low, share * high) for share in SHARES]
    return min(tried, key=lambda g: float((on_grid(x, *g) - x).square().mean()))
