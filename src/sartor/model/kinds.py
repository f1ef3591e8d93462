"""What a model reads: texts or pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sartor.errors import InputError, SourceError
from sartor.model import graph_saved
from sartor.model.checkpoints import is_timm, load_vision
from sartor.model.families import FAMILIES, VISION
from sartor.model.stored import read_json


def is_vision(folder: Path) -> bool:
    """Whether this is a convolutional network, or config.json names a vision transformer that Sartor knows, or a network of timm."""
    if not (folder / "config.json").is_file():
        return graph_saved.is_graph(folder)
    raw = read_json(folder / "config.json")
    return is_timm(raw) or raw.get("model_type") in VISION


def kind_of(folder: Path) -> str:
    """ "pictures" for a network that sees and that Sartor knows, "texts" for everything that has a vocabulary.

    Raises:
        SourceError: it is neither.
    """
    if is_vision(folder):
        return "pictures"
    raw = read_json(folder / "config.json")
    if "vocab_size" not in raw and "text_config" not in raw:
        raise SourceError(
            f"the model is of type '{raw.get('model_type')}': of models that see Sartor knows {', '.join(VISION)} so far, of language models {', '.join(FAMILIES)}"
        )
    return "texts"


def load_seer(folder: Path, size: int | None = None) -> Any:
    """The network of a source that sees, in fp32, as it came: `load_vision`, or a `Graph`.

    Args:
        size: a side of the pictures in pixels, for a vision transformer.
    Raises:
        SourceError: as `load_vision` and `graph_saved.load`. InputError: another size for a convolutional network.
    """
    if not graph_saved.is_graph(folder):
        return load_vision(folder, size)
    graph, _ = graph_saved.load(folder)
    if size not in (None, graph.size):
        raise InputError(f"pictures of {size} pixels a side for a network of convolutions, {graph.size} were needed")
    return graph
