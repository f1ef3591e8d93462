"""What a plan left of every layer, for reports on texts and pictures alike."""

from __future__ import annotations

from typing import Any

from sartor.model.network import Anatomy
from sartor.plan import Plan


def layer_rows(plan: Plan, a: Anatomy) -> list[dict[str, Any]]:
    """One row a layer: query groups (heads) and channels before and after, effects on either kind of data, and the verdict."""
    return [
        {
            "groups": int(layer.groups.split(":")[0]),
            "groups_kept": a.groups[n],
            "channels": int(layer.channels.split(":")[0]),
            "channels_kept": a.ffn[n],
            "user": layer.user,
            "generic": layer.generic,
            "verdict": layer.verdict,
        }
        for n, layer in enumerate(plan.layers)
    ]
