"""A picture beside itself under a heat map of what decided."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

if TYPE_CHECKING:
    from PIL import Image

HEIGHT = 448  # pixels, at least
GAP = 8  # pixels of white between the two
HEAT = 0.6  # of the colours in the blend; the rest is the picture, grey
# inferno (Smith and van der Walt 2015) at every tenth: its lightness rises evenly, also in grey and to the colour-blind
INFERNO = ("000004", "160b39", "420a68", "6a176e", "932667", "bc3754", "dd513a", "f37819", "fca50a", "f6d746", "fcffa4")
LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601


def overlay(pixels: UInt8[Tensor, "3 s s"], relevance: Float[Tensor, "g g"]) -> Image.Image:
    """The picture, and beside it the picture in grey under the colours of `relevance` (0 dark, 1 bright), smoothly enlarged."""
    from PIL import Image

    side = max(HEIGHT, pixels.shape[-1])
    plain = _enlarged(pixels.float(), side).clamp(0, 255)
    grey = (plain * torch.tensor(LUMA)[:, None, None]).sum(0, keepdim=True)
    heat = inferno(_enlarged(relevance[None].float(), side)[0].clamp(0, 1))
    white = torch.full((3, side, GAP), 255.0)
    both = torch.cat([plain, white, HEAT * heat + (1 - HEAT) * grey], -1)
    return Image.fromarray(both.round().to(torch.uint8).permute(1, 2, 0).numpy())


def _enlarged(x: Float[Tensor, "c h w"], side: int) -> Float[Tensor, "c side side"]:
    """Bicubic; it may swing a little beyond the values it goes through."""
    return nn.functional.interpolate(x[None], (side, side), mode="bicubic", align_corners=False)[0]


def inferno(x: Float[Tensor, "h w"]) -> Float[Tensor, "3 h w"]:
    """Colours from 0 to 255 of values from 0 to 1, straight between the entries of the table."""
    stops = torch.tensor([[float(b) for b in bytes.fromhex(c)] for c in INFERNO])
    at = x * (len(stops) - 1)
    low = at.floor().long().clamp(0, len(stops) - 2)
    share = (at - low)[..., None]
    return ((1 - share) * stops[low] + share * stops[low + 1]).permute(2, 0, 1)
