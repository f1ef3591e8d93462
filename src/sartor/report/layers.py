"""What a plan left of every layer, or of every group of channels, for reports on texts and pictures alike."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sartor.carving import keep_of
from sartor.model.graph import Graph
from sartor.model.graph_channels import Group, channel_groups, gone_branches
from sartor.model.network import Anatomy
from sartor.plan import LayerPlan, Plan


@dataclass(frozen=True)
class Part:
    """What a row counts under `counted`, as effects have it under `felt`, and what it is called in a table of effects."""

    counted: str
    felt: str
    name: str


PARTS = (Part("groups", "attention", "attention"), Part("channels", "mlp", "MLP"))
MAPS = (Part("channels", "channels", "channels"),)


def parts_of(row: Mapping[str, Any]) -> tuple[Part, ...]:
    """What there is in a layer, or in a group of channels."""
    return PARTS if "groups" in row else MAPS


def layer_rows(plan: Plan, a: Anatomy) -> list[dict[str, Any]]:
    """One row a layer: query groups (heads) and channels before and after, effects on either kind of data, and the verdict."""
    return [
        {
            "groups": int(layer.groups.split(":")[0]),
            "groups_kept": a.groups[n],
            "channels": int(layer.channels.split(":")[0]),
            "channels_kept": a.ffn[n],
        }
        | _told(layer)
        for n, layer in enumerate(plan.layers)
    ]


def map_rows(plan: Plan, whole: Graph) -> list[dict[str, Any]]:
    """One row a group of channels of a convolutional network; nothing is kept of those that lie in a residual block which went as a whole."""
    went = gone_branches(whole, keep_of(whole, plan.layers))

    def kept(group: Group, layer: LayerPlan) -> int:
        inside = any({*group.rows, *group.columns} <= branch.inside for branch in went)
        return 0 if inside else len(layer.kept_channels())

    return [
        {"name": group.name, "channels": group.units, "channels_kept": kept(group, layer)} | _told(layer)
        for group, layer in zip(channel_groups(whole), plan.layers, strict=True)
    ]


STEPS = ("step", "went", "foretold, nats", "real, nats", "")


def step_rows(pruning: Mapping[str, Any], groups: str) -> list[tuple[str, str, str, str, str]]:
    """One row a step of a cut that was made in steps, under STEPS; `groups` is what heads are called."""
    return [
        (
            str(n),
            f"{s['blocks']} blocks of channels, {s['groups']} {groups}",
            f"{s['allowed']:.3f}",
            f"{s['real']:.3f}",
            "kept" if s["kept"] else "taken back",
        )
        for n, s in enumerate(pruning.get("steps", ()), 1)
    ]


def _told(layer: LayerPlan) -> dict[str, Any]:
    return {"user": layer.user, "generic": layer.generic, "verdict": layer.verdict}
