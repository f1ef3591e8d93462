"""Cutting query groups and FFN channels out, and repairing what read them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sartor.model.network import anatomy, linear, query_rows, shrink_attention_, shrink_mlp_
from sartor.numerics.compensate import compensate
from sartor.stages.calibrate import Moments


def cut_mlp_(model: Any, layer: int, keep: Sequence[int], moments: Moments, lam: float) -> None:
    """Keep these channels of the layer's MLP; the matrix that reads them is repaired."""
    reader = linear(model, layer, "mlp.down_proj")
    mask = _mask(keep, reader.in_features)
    if mask.all():
        return
    repaired = compensate(reader.weight.data.float(), moments.c[layer, "down"], mask, lam)
    shrink_mlp_(model, layer, mask.nonzero().flatten())
    if len(keep):
        _set_(model, layer, "mlp.down_proj", repaired)


def cut_attention_(model: Any, layer: int, keep: Sequence[int], moments: Moments, lam: float) -> None:
    """Keep these query groups of the layer; the matrix that reads them is repaired."""
    a = anatomy(model)
    if len(keep) == a.groups[layer]:
        return
    reader = linear(model, layer, "self_attn.o_proj")
    columns = query_rows(sorted(keep), a)[0].tolist() if keep else []
    repaired = compensate(
        reader.weight.data.float(), moments.c[layer, "output"], _mask(columns, reader.in_features), lam
    )
    shrink_attention_(model, layer, sorted(keep))
    if keep:
        _set_(model, layer, "self_attn.o_proj", repaired)


def _mask(keep: Sequence[int], n: int) -> Tensor:
    mask = torch.zeros(n, dtype=torch.bool)
    mask[list(keep)] = True
    return mask


def _set_(model: Any, layer: int, name: str, weight: Tensor) -> None:
    target = linear(model, layer, name)
    target.weight.data = weight.to(target.weight.dtype)
