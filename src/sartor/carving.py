"""What cutting takes of either kind of network that sees: heads and FFN channels of a transformer, channels of a convolutional network."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from sartor.errors import BudgetError
from sartor.model.graph import Graph, shapes
from sartor.model.graph_channels import Keep, channel_groups, ends_of, kept_channels, shrink
from sartor.model.network import anatomy, clone, linears_of, parameter
from sartor.model.precision import running
from sartor.model.vision import Vision
from sartor.numerics.four import FOUR
from sartor.plan import LayerPlan, Plan
from sartor.stages.allot import Allotment, allot, refuse_impossible
from sartor.stages.allot_maps import allot_maps, refuse_impossible_maps
from sartor.stages.curves import Curves, measured_curves, moments_of
from sartor.stages.fit import evidence_of, fit
from sartor.stages.map_curves import measured_map_curves
from sartor.stages.maps import check_maps
from sartor.stages.masters import Latents, free, put_
from sartor.stages.probe import Effects, Worth, check, order_units
from sartor.stages.prune import cut_, gone
from sartor.stages.recognition import kl_of, said_of
from sartor.stages.refit import refit_maps, room_for, seen_of

CALIBRATED = 48  # pictures that a whole network is rounded on
Told = Callable[[float, str], None]


@dataclass(frozen=True)
class Carving:
    """One row a kind of network; costs are `allot.Costs` or `allot_maps.MapCosts`.

    Attributes:
        refuse: (network, costs) raises BudgetError where even the smallest is too much. check: (network, effects, pictures, masks, seed, tell), how well effects foretell random cuts.
        curves: (network as it runs, effects, costs, pictures to fit on, others to judge by, tell), what cuts were measured to damage. allot: (network, effects, costs), what stays. cut: (network, plan), the network without what goes; may change the one it is given. fit: (cut network, whole one, the user's pictures, generic
        ones, plan, tell), what is left fitted to what the whole one says, and its weights as training goes on with them. gone: (before, after), how much went. eight: (whole network, the user's pictures), as it is written with eight bits when nothing is cut. rounds: the fit rounds too, to grids that are not kept
        with the weights.
    """

    refuse: Callable[[Any, Any], None]
    check: Callable[[Any, Effects, Tensor, int, int, Told], Worth]
    curves: Callable[[Any, Effects, Any, Tensor, Tensor, Told], Curves]
    allot: Callable[[Any, Effects, Any], Allotment]
    cut: Callable[[Any, Plan], Any]
    fit: Callable[[Any, Any, Tensor, Tensor, Plan, Told], tuple[Any, Latents]]
    gone: Callable[[Any, Any], dict[str, Any]]
    eight: Callable[[Any, Tensor], Any]
    rounds: bool


def curved(model: Any, effects: Effects, costs: Any, own: Tensor, judged: Tensor, tell: Told) -> Any:
    """Costs with a curve for every part of the network, where anything has to go and none was measured yet."""
    carving = carving_of(model)
    if costs.curves or _nothing_goes(carving, model, effects, costs):
        return costs
    return replace(costs, curves=carving.curves(model, effects, costs, own, judged, tell))


def _nothing_goes(carving: Carving, model: Any, effects: Effects, costs: Any) -> bool:
    try:
        return carving.allot(model, effects, costs).whole
    except BudgetError:  # out of reach with these pictures, perhaps not with smaller ones
        return False


def _cut_heads(model: Any, plan: Plan) -> Any:
    cut_(model, plan)
    return model


def _fit_heads(small: Any, teacher: Any, own: Tensor, others: Tensor, plan: Plan, tell: Told) -> tuple[Vision, Latents]:
    evidence = evidence_of(teacher, own, others, plan.rho, lambda share: tell(0.4 * share, "gradients of every patch"))
    grids = four_grids(small) if plan.grids else {}  # of what is left: heads that went may leave no whole blocks
    latents = fit(small, teacher, evidence, grids, lambda share, note: tell(0.4 + 0.6 * share, note))
    held_(small, latents)
    return small, latents


def held_(model: Any, latents: Latents) -> None:
    """The network, in place, with these weights, on their grids."""
    put_(model, latents)
    if latents.scales:
        model.block_scales = dict(latents.scales)


def four_grids(model: Vision) -> dict[str, str]:
    """{parameter: grid} of all matrices of the layers that can be held at four bits."""
    return {parameter(n, name): FOUR.name for n, name, w in linears_of(model) if w.in_features % FOUR.block == 0}


def four_damage(dense: Vision, own: Tensor, generic: Tensor, judged: Tensor, rho: float) -> float:
    """KL(dense || on four bits) in nats a picture of the user's, where nothing is cut.

    Args:
        own, generic: pictures that are fitted on. judged: the user's, that are not.
    """
    whole = running(dense)
    evidence = evidence_of(whole, own, generic, rho, listened=False)
    rounded = clone(dense)
    held_(rounded, fit(rounded, whole, evidence, four_grids(dense)))
    return kl_of(running(rounded), judged, said_of(whole, judged))


def keep_of(graph: Graph, layers: tuple[LayerPlan, ...]) -> Keep:
    """What stays of every group that loses anything."""
    keep = {}
    for group, layer in zip(channel_groups(graph), layers, strict=True):
        if len(kept := layer.kept_channels()) < group.units:
            keep[group.name] = torch.zeros(group.units, dtype=torch.bool)
            keep[group.name][kept] = True
    return keep


def _fit_maps(
    small: Graph, teacher: Graph, own: Tensor, others: Tensor, plan: Plan, tell: Told
) -> tuple[Graph, Latents]:
    """The teacher is whole, and what the plan's masks are of."""
    outputs, _ = kept_channels(teacher, keep_of(teacher, plan.layers))
    seen = seen_of(own, others, plan.rho, room_for(teacher, shapes(teacher)))
    fitted = refit_maps(small, teacher, outputs, seen, tell=lambda share: tell(share, "layer by layer"))
    return fitted, free(fitted)


def _eight_maps(whole: Graph, own: Tensor) -> Graph:
    seen = seen_of(own, own[:0], 0.0, min(CALIBRATED, room_for(whole, shapes(whole))))
    return refit_maps(whole, whole, kept_channels(whole, {})[0], seen)


def _gone_maps(before: Graph, after: Graph) -> dict[str, Any]:
    units = [sum(g.units for g in channel_groups(graph)) for graph in (before, after)]
    blocks = len(ends_of(before, channel_groups(before))) - len(ends_of(after, channel_groups(after)))
    went = {"channels": units[0] - units[1], "residual_blocks": blocks}
    return {what: count for what, count in went.items() if count}


HEADS = Carving(
    refuse=lambda model, costs: refuse_impossible(anatomy(model), costs),
    check=lambda model, effects, *rest: check(model, order_units(effects), *rest),
    curves=lambda model, effects, costs, own, *rest: measured_curves(model, effects, moments_of(model, own), *rest),
    allot=lambda model, effects, costs: allot(anatomy(model), effects, costs),
    cut=_cut_heads,
    fit=_fit_heads,
    gone=lambda before, after: gone(anatomy(before), anatomy(after)),
    eight=lambda whole, own: whole,
    rounds=False,
)
MAPS = Carving(
    refuse=lambda model, costs: refuse_impossible_maps(costs),
    check=check_maps,
    curves=lambda model, effects, costs, own, judged, tell: measured_map_curves(
        model, effects, own, judged, costs.fixed, tell
    ),
    allot=lambda model, effects, costs: allot_maps(effects, costs),
    cut=lambda model, plan: shrink(model, keep_of(model, plan.layers)),
    fit=_fit_maps,
    gone=_gone_maps,
    eight=_eight_maps,
    rounds=True,
)
CARVINGS: dict[type, Carving] = {Vision: HEADS, Graph: MAPS}


def carving_of(model: Any) -> Carving:
    return CARVINGS[type(model)]
