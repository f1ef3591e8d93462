"""Pruning: the plan's query groups and FFN channels go."""

from __future__ import annotations

from typing import Any

import torch

from sartor.model.network import Anatomy, shrink_attention_, shrink_mlp_
from sartor.plan import Plan


def cut_(small: Any, plan: Plan) -> None:
    """The plan's sizes, without repair, in place."""
    for n, layer in enumerate(plan.layers):
        shrink_mlp_(small, n, torch.tensor(layer.kept_channels(), dtype=torch.long))
        shrink_attention_(small, n, layer.kept_groups())


def gone(before: Anatomy, after: Anatomy) -> dict[str, Any]:
    """Channels and query groups that went, or nothing."""
    if after == before:
        return {}
    return {"channels": sum(before.ffn) - sum(after.ffn), "groups": sum(before.groups) - sum(after.groups)}
