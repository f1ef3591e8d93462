"""A fitted network that sees on disk: safetensors and JSON; nothing that can run code.

FOLDER/model.safetensors   the exact weights that model.onnx stands for, in fp32
FOLDER/config.json         what the weights do not say (`VisionConfig`); of a convolutional network graph.json (`graph_saved.py`)
FOLDER/plan.json           the decision
FOLDER/classes.json        names of the classes, in the order of the head's rows; empty where the photos had no labels
FOLDER/preprocessor_config.json   how a photo becomes what the network reads, as transformers says it; these two lie beside every export, too
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

CLASSES, INPUT = "classes.json", "preprocessor_config.json"
FILES = ("plan.json", "model.safetensors", CLASSES)
BICUBIC = 3  # as transformers and Pillow number it


def save(model: Any, plan: Plan, classes: Sequence[str], provenance: dict[str, str], folder: Path) -> None:
    """Write everything that `load` needs."""
    if isinstance(model, Graph):
        graph_saved.save(model, folder)
    else:
        _save_vision(model, folder)
    write_whole(folder / "plan.json", plan.to_json())
    describe(model, classes, folder)
    write_whole(folder / "provenance.json", json.dumps(provenance, indent=1))


def describe(model: Any, classes: Sequence[str], folder: Path) -> None:
    """Write what must be known to use a file of the network, whatever runs it: the names of its answers, and how a photo becomes its input."""
    write_whole(folder / CLASSES, json.dumps(list(classes)))
    write_whole(folder / INPUT, json.dumps(reading(model), indent=1))


def reading(model: Any) -> dict[str, Any]:
    """How `data.photos.open_photo` makes the network's input of a photo, in the words of transformers' image processors; what those have no words for is in "input"."""
    std = 1 / (255 * model.scale.flatten().double())
    mean = -model.shift.flatten().double() * std
    size: int = model.size
    return {
        "image_processor_type": "CLIPImageProcessor",
        "input": f"a photo upright and on white, as whole numbers from 0 to 255: (1, 3, {size}, {size}), red, green, blue (Core ML: an RGB image); the file itself rescales and normalizes them, by the mean and std below",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": size},
        "resample": BICUBIC,
        "do_center_crop": True,
        "crop_size": {"height": size, "width": size},
        "do_rescale": False,
        "do_normalize": False,
        "rescale_factor": 1 / 255,
        "image_mean": [round(x, 6) for x in mean.tolist()],
        "image_std": [round(x, 6) for x in std.tolist()],
        "data_format": "channels_first",
    }


def described(folder: Path) -> tuple[list[str], int]:
    """(names of the classes, pixels of a side) that `describe` wrote.

    Raises:
        SourceError: they are missing or damaged.
    """
    try:
        side = int(json.loads((folder / INPUT).read_text())["crop_size"]["height"])
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise SourceError(
            f"'{folder.name}' does not say what its file reads ({INPUT}: {type(error).__name__}): copy all files that sartor export wrote, or export again"
        ) from error
    return _classes(folder), side


def _classes(folder: Path) -> list[str]:
    try:
        return [str(c) for c in json.loads((folder / CLASSES).read_text())]
    except (OSError, ValueError, TypeError) as error:
        raise SourceError(f"'{folder.name}' is damaged ({CLASSES}: {str(error)[:80]}): fit the model again") from error


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
    return (_load_maps(folder) if maps else _load_vision(folder, plan)), plan, _classes(folder)


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
