"""What fewer bits cost: tensors rounded to a grid, everything else left alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sartor.model.families import LINEARS
from sartor.model.network import Anatomy, anatomy, linear
from sartor.numerics.gptq import gptq
from sartor.numerics.grids import GRIDS, fits, search_scales, snap
from sartor.stages.calibrate import Moments
from sartor.stages.likelihood import kl_of

BASE = "IQ4_NL"
RICHER = ("Q5_0", "Q8_0")
POORER = ("IQ4_XS", "Q3_K")  # need rows that 256 divides, which in small models only down_proj has
DOWN = "mlp.down_proj"


def kinds_of(model: Any) -> dict[str, list[str]]:
    """{kind: parameter names}: the same linear in every layer."""
    a = anatomy(model)
    return {
        k: [f"model.layers.{n}.{k}.weight" for n in range(a.layers) if linear(model, n, k) is not None] for k in LINEARS
    }


def embeddings_of(a: Anatomy) -> list[str]:
    """Parameters with a row per token."""
    return ["model.embed_tokens.weight"] + ([] if a.tied else ["lm_head.weight"])


@contextmanager
def _exchanged(parameters: Mapping[str, Any], new: Mapping[str, Tensor]) -> Iterator[None]:
    """Other weights in some places; undone on the way out."""
    old = {n: parameters[n].data for n in new}
    try:
        for n, w in new.items():
            parameters[n].data = w.to(old[n].dtype)
        yield
    finally:
        for n, w in old.items():
            parameters[n].data = w


@torch.no_grad()
def grid_damage(model: Any, names: Sequence[str], grid: str, rows: Tensor, reference: tuple[Tensor, Tensor]) -> float:
    """KL in nats per token when these parameters alone are rounded to the grid; the model comes back unchanged."""
    parameters = dict(model.named_parameters())
    rounded = {}
    for n in names:
        w = parameters[n].data.float()
        rounded[n] = snap(w, search_scales(w, None, GRIDS[grid], candidates=4), GRIDS[grid])
    with _exchanged(parameters, rounded):
        return kl_of(model, rows, reference)


@torch.no_grad()
def poorer_damage(
    model: Any,
    moments: Moments,
    base: float,
    rows: Tensor,
    reference: tuple[Tensor, Tensor],
    at_once: int,
    tell: Callable[[float, str], None],
) -> dict[str, np.ndarray]:
    """KL in nats per token of every layer's `down_proj` on each grid of POORER, beyond BASE; infinite where it does not fit.

    Q3_K after error feedback, `at_once` neighbouring layers together (their damage is shared out evenly); IQ4_XS, which
    differs from BASE by the rounding of its scales alone, in all layers together.

    Args:
        moments: of the user's text. base: KL of all of them on BASE.
    """
    parameters = dict(model.named_parameters())
    names = {int(name.split(".")[2]): name for name in kinds_of(model)[DOWN]}
    layers = [n for n, name in names.items() if all(fits(g, parameters[name].shape[1]) for g in POORER)]
    damage = {g: np.full(anatomy(model).layers, np.inf) for g in POORER}
    if not layers:
        return damage
    share = base / len(names)
    whole = grid_damage(model, [names[n] for n in layers], "IQ4_XS", rows, reference)
    damage["IQ4_XS"][layers] = max(0.0, whole / len(layers) - share)
    for start in range(0, len(layers), at_once):
        some = layers[start : start + at_once]
        new = {}
        for n in some:
            q = gptq(parameters[names[n]].data.float(), moments.c[n, "down"], GRIDS["Q3_K"])
            new[names[n]] = snap(q.latent, q.scales, GRIDS["Q3_K"])
        with _exchanged(parameters, new):
            damage["Q3_K"][some] = max(0.0, kl_of(model, rows, reference) / len(some) - share)
        tell((start + len(some)) / len(layers), f"three bits for down_proj up to layer {some[-1]}")
    return damage
