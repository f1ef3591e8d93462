"""Every tensor onto its grid with error feedback, on the second moments of what it reads."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sartor.numerics.gptq import gptq
from sartor.numerics.grids import GRIDS, Grid
from sartor.stages.calibrate import Moments, Site, site_of
from sartor.stages.distil import Latents


def quantize(
    model: Any,
    moments: Moments,
    grids: Mapping[str, str],
    tell: Callable[[float, str], None] = lambda share, note: None,
) -> Latents:
    """Latent weights and scales for every parameter of the model.

    Args:
        model: fp32. moments: C at every site. grids: {parameter name: grid name}; what is absent stays free (fp32).
    Returns:
        Latents whose `value(name)` are the weights of the artifact.
    """
    latents = Latents({})
    together: dict[tuple[Site | None, str], list[str]] = {}
    parameters = {n: p.detach().float() for n, p in model.named_parameters()}
    for name, w in parameters.items():
        if name in grids:
            together.setdefault((site_of(name), grids[name]), []).append(name)
        else:
            latents.masters[name] = w.clone()
    for n, ((site, grid), names) in enumerate(together.items()):
        _quantize_together_(latents, parameters, names, moments.of(names[0]), GRIDS[grid])
        tell((n + 1) / len(together), f"layer {site[0]}, {site[1]}" if site else "vocabulary")
    latents.masters = {n: latents.masters[n] for n in parameters}
    return latents


def _quantize_together_(
    latents: Latents, parameters: Mapping[str, Tensor], names: Sequence[str], c: Tensor, grid: Grid
) -> None:
    """Matrices that read the same input share its Cholesky factor and one sweep: rows do not depend on each other."""
    q = gptq(torch.cat([parameters[n] for n in names]), c, grid)
    sizes = [len(parameters[n]) for n in names]
    for name, latent, scales in zip(names, q.latent.split(sizes), q.scales.split(sizes), strict=True):
        latents.masters[name], latents.scales[name], latents.grids[name] = latent.clone(), scales.clone(), grid
