"""Pruning: the plan's query groups and FFN channels go."""

from __future__ import annotations

from typing import Any

import torch

from sartor.model.network import BLOCK, Anatomy, shrink_attention_, shrink_mlp_
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


def share_gone(plan: Plan, before: Anatomy) -> float:
    """The share of the layers' weights that the plan takes out, 0 to 1."""
    block, group = before.unit_parameters()
    weights = lambda groups, channels: group * groups + block * channels / BLOCK  # noqa: E731
    kept = sum(weights(len(layer.kept_groups()), len(layer.kept_channels())) for layer in plan.layers)
    return 1 - kept / weights(sum(before.groups), sum(before.ffn))
