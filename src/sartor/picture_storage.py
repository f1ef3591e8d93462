"""A fitted network that sees on disk: safetensors and JSON; nothing that can run code.

FOLDER/model.safetensors   the exact weights that model.onnx stands for, in fp32
FOLDER/config.json         what the weights do not say (`VisionConfig`); of a convolutional network graph.json (`graph_saved.py`)
FOLDER/plan.json           the decision
FOLDER/classes.json        names of the classes, in the order of the head's rows; empty where the photos had no labels
FOLDER/provenance.json     where the model came from, by sha256
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from sartor.errors import SourceError
from sartor.files import whole_file, write_whole
from sartor.model import graph_saved
from sartor.model.graph import Graph
from sartor.model.network import shrink_attention_, shrink_mlp_
from sartor.model.vision import Vision, VisionConfig
from sartor.plan import Plan
from sartor.stages.eight import round_
from sartor.storage import with_scales, without_scales

FILES = ("plan.json", "model.safetensors", "classes.json")


def save(model: Any, plan: Plan, classes: Sequence[str], provenance: dict[str, str], folder: Path) -> None:
    """Write everything that `load` needs."""
    if isinstance(model, Graph):
        graph_saved.save(model, folder)
    else:
        _save_vision(model, folder)
    write_whole(folder / "plan.json", plan.to_json())
    write_whole(folder / "classes.json", json.dumps(list(classes)))
    write_whole(folder / "provenance.json", json.dumps(provenance, indent=1))


def _save_vision(model: Vision, folder: Path) -> None:
    from safetensors.torch import save_file

    weights = {n: p.data.contiguous() for n, p in model.named_parameters()}
    with whole_file(folder / "model.safetensors") as part:
        save_file(with_scales(weights, model.block_scales), part, {"format": "sartor-vision-1"})
    write_whole(folder / "config.json", model.config.to_json())


def load(folder: Path) -> tuple[Any, Plan, list[str]]:
    """(network in fp32, plan, names of the classes) from a folder that `save` wrote.

    Raises:
        SourceError: something is missing or does not fit together.
    """
    maps = graph_saved.is_graph(folder)
    if missing := [n for n in (*FILES, graph_saved.FILE if maps else "config.json") if not (folder / n).exists()]:
        raise SourceError(f"'{folder.name}' is not a fitted vision model: {', '.join(missing)} missing")
    plan = Plan.from_json((folder / "plan.json").read_text())
    try:
        classes = [str(c) for c in json.loads((folder / "classes.json").read_text())]
    except (ValueError, TypeError) as error:
        raise SourceError(
            f"'{folder.name}' is damaged (classes.json: {str(error)[:80]}): fit the model again"
        ) from error
    return (_load_maps(folder) if maps else _load_vision(folder, plan)), plan, classes


def _load_maps(folder: Path) -> Graph:
    graph, grids = graph_saved.load(folder)
    round_(graph, grids)
    return graph


def _load_vision(folder: Path, plan: Plan) -> Vision:
    import torch
    from safetensors.torch import load_file

    try:
        config = VisionConfig.from_json((folder / "config.json").read_text())
        state, scales = without_scales(load_file(folder / "model.safetensors"))
        with torch.device("meta"):
            model = Vision(replace(config, layers=len(plan.layers)))
        for n, layer in enumerate(plan.layers):
            shrink_attention_(model, n, range(len(layer.kept_groups())))
            shrink_mlp_(model, n, torch.arange(len(layer.kept_channels())))
        model.block_scales = scales
        model.load_state_dict(state, assign=True)
    except Exception as error:
        raise SourceError(
            f"'{folder.name}' is damaged or does not fit its plan ({type(error).__name__}: {str(error)[:100]}): fit the model again"
        ) from error
    model.fill_pixels_()
    return model.eval().requires_grad_(False)
