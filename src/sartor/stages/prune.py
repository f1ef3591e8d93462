"""Pruning: the plan's query groups and FFN channels go, and what is left is fitted to the whole network's residual stream."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from sartor.model.network import anatomy, clone, linear, linears_of, shrink_attention_, shrink_mlp_
from sartor.plan import Plan
from sartor.stages.measure import score
from sartor.stages.repair import WRITERS, mixed, repair_
from sartor.stages.tokens import Window, sample


def cut_(small: Any, plan: Plan) -> None:
    """The plan's sizes, without repair, in place."""
    for n, layer in enumerate(plan.layers):
        shrink_mlp_(small, n, torch.tensor(layer.kept_channels(), dtype=torch.long))
        shrink_attention_(small, n, layer.kept_groups())


def prune_(
    small: Any,
    plan: Plan,
    rows: tuple[Tensor, Tensor],
    validation: Sequence[Window],
    sampled: int,
    tell: Callable[[float, str], None],
) -> dict[str, float]:
    """Cut and repair, in place.

    Args:
        small: in fp32. rows: the user's and generic ones. sampled: how many of the user's to repair with; half as many generic ones join them, and all of them count as the plan's `rho` says.
    Returns:
        what went, and bits per byte on validation before and after the repair; empty where nothing is cut. A repair that does not help is undone.
    """
    before = anatomy(small)
    whole = clone(small, torch.bfloat16)
    cut_(small, plan)
    after = anatomy(small)
    if after == before:
        return {}
    running = clone(small, torch.bfloat16)
    plain = score(running, validation).bits_per_byte
    writers = {(n, name): linear(small, n, name).weight.data for n, name, _ in linears_of(small) if name in WRITERS}
    own, generic = sample(rows[0], sampled, plan.seed), sample(rows[1], sampled // 2, plan.seed)
    told = lambda share: tell(share, f"repair after the cut ({plain:.3f} bits per byte)")  # noqa: E731
    repair_(small, running, whole, *mixed(own, generic, plan.rho), told)
    repaired = score(running, validation).bits_per_byte
    if repaired > plain:
        for at, weights in writers.items():
            linear(small, *at).weight.data = weights
    tell(1.0, f"validation {plain:.3f} bits per byte, repaired {repaired:.3f}")
    return {
        "channels": float(sum(before.ffn) - sum(after.ffn)),
        "groups": float(sum(before.groups) - sum(after.groups)),
        "validation_cut": plain,
        "validation_repaired": repaired,
    }
