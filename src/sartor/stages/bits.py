"""What fewer bits cost: tensors rounded to a grid, everything else left alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sartor import paging
from sartor.model.families import LINEARS
from sartor.model.network import Anatomy, anatomy, linears_of, parameter
from sartor.numerics.gptq import gptq
from sartor.numerics.grids import GRIDS, fits, search_scales, snap
from sartor.stages.calibrate import Moments
from sartor.stages.likelihood import kl_of

BASE = "IQ4_NL"
RICHER = ("Q5_0", "Q8_0")
SAMPLED = 64  # rows of a tensor on which grids are compared
POORER = ("IQ4_XS", "Q3_K")  # need rows that 256 divides, which in small models only down_proj has
DOWN = "mlp.down_proj"


def kinds_of(model: Any) -> dict[str, list[str]]:
    """{kind: parameter names}: the same linear in every layer."""
    found: dict[str, list[str]] = {k: [] for k in LINEARS}
    for layer, name, _ in linears_of(model):
        found[name].append(parameter(layer, name))
    return found


def embeddings_of(a: Anatomy) -> list[str]:
    """Parameters with a row per token."""
    return ["model.embed_tokens.weight"] + ([] if a.tied else ["lm_head.weight"])


def all_on_base(model: Any) -> dict[str, str]:
    """{parameter: BASE}: the whole model at four bits."""
    names = [n for names in kinds_of(model).values() for n in names]
    return dict.fromkeys([*names, *embeddings_of(anatomy(model))], BASE)


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
def base_damage(
    model: Any, names: Sequence[str], rows: Tensor, reference: tuple[Tensor, Tensor], moments: Moments
) -> float:
    """KL in nats per token when these parameters alone are rounded to BASE with error feedback, as the real thing will be.

    Plain rounding would cost two to six times as much (docs/log.md). The model comes back unchanged.
    """
    parameters = dict(model.named_parameters())
    rounded = {n: _rounded_alone(parameters[n].data, BASE, moments.of(n)) for n in names}
    with _exchanged(parameters, rounded):
        return kl_of(model, rows, reference)


@torch.no_grad()
def damage_by_grid(model: Any, names: Sequence[str], base: float, grids: Sequence[str]) -> dict[str, float]:
    """Damage on other grids: `base`, that on BASE, in proportion to the squared rounding error of some rows."""
    parameters = dict(model.named_parameters())
    some = [w[:: max(1, len(w) // SAMPLED)].float() for w in (parameters[n].data for n in names)]
    error = {g: sum(float((_rounded(w, g, None) - w).square().sum()) for w in some) for g in (BASE, *grids)}
    return {BASE: base} | {g: base * error[g] / max(error[BASE], 1e-30) for g in grids}


def _rounded_alone(w: Tensor, grid: str, c: Tensor) -> Tensor:
    """A matrix on a grid, in its own dtype; nothing of it stays in memory that need not."""
    rounded = paging.kept(_rounded(w.float(), grid, c).to(w.dtype))
    paging.let_go(w, c)
    return rounded


def _rounded(w: Tensor, grid: str, c: Tensor | None) -> Tensor:
    if c is None:
        return snap(w, search_scales(w, None, GRIDS[grid]), GRIDS[grid])
    q = gptq(w, c, GRIDS[grid])
    return snap(q.latent, q.scales, GRIDS[grid])


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

    Q3_K `at_once` neighbouring layers together (their damage is shared out evenly); IQ4_XS, which differs from BASE by the
    rounding of its scales alone, in all layers together.

    Args:
        moments: of the user's text. base: KL of all of them on BASE, after error feedback too.
    """
    parameters = dict(model.named_parameters())
    names = {int(name.split(".")[2]): name for name in kinds_of(model)[DOWN]}
    layers = [n for n, name in names.items() if all(fits(g, parameters[name].shape[1]) for g in POORER)]
    damage = {g: np.full(anatomy(model).layers, np.inf) for g in POORER}
    if not layers:
        return damage
    share = base / len(names)
    whole = damage_by_grid(model, [names[n] for n in layers], share, ("IQ4_XS",))["IQ4_XS"]
    damage["IQ4_XS"][layers] = max(0.0, whole - share)
    for start in range(0, len(layers), at_once):
        some = layers[start : start + at_once]
        new = {}
        for n in some:
            new[names[n]] = _rounded_alone(parameters[names[n]].data, "Q3_K", moments.c[n, "down"])
        with _exchanged(parameters, new):
            damage["Q3_K"][some] = max(0.0, kl_of(model, rows, reference) / len(some) - share)
        tell((start + len(some)) / len(layers), f"three bits for down_proj up to layer {some[-1]}")
    return damage
