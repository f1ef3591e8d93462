"""Every tensor onto its grid: error feedback for what has second moments, a weighted scale search for the embedding."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from sartor.model.families import LINEARS
from sartor.model.network import linear
from sartor.numerics.gptq import gptq
from sartor.numerics.grids import GRIDS, search_scales
from sartor.stages.calibrate import SITE_OF, Moments
from sartor.stages.distil import Latents

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"


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
    parameters = dict(model.named_parameters())
    for n, (name, p) in enumerate(parameters.items()):
        w = p.detach().float()
        if name not in grids:
            latents.masters[name] = w.clone()
            continue
        grid = GRIDS[grids[name]]
        latents.grids[name] = grid
        place = _place(name)
        if place is None:
            latents.masters[name] = w.clone()
            latents.scales[name] = search_scales(w, moments.head.diagonal(), grid)
        else:
            q = gptq(w, moments.c[place], grid)
            latents.masters[name], latents.scales[name] = q.latent, q.scales
        tell((n + 1) / len(parameters), name)
    return latents


def _place(name: str) -> tuple[int, str] | None:
    """(layer, site) of a linear's weight, or None for the embedding and the head."""
    parts = name.split(".")
    if parts[:2] != ["model", "layers"]:
        return None
    return int(parts[2]), SITE_OF[".".join(parts[3:-1])]


def linear_names(model: Any, layer: int) -> list[str]:
    """Parameter names of the layer's linears that exist."""
    found = []
    for name in LINEARS:
        try:
            linear(model, layer, name)
        except AttributeError:
            continue
        found.append(f"model.layers.{layer}.{name}.weight")
    return found
