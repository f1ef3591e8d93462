"""What a model reads: texts or pictures."""

from __future__ import annotations

from pathlib import Path

from sartor.errors import SourceError
from sartor.model.checkpoints import is_timm, read_json
from sartor.model.families import FAMILIES, VISION


def is_vision(folder: Path) -> bool:
    """Whether config.json names a vision transformer that Sartor knows, or a network of timm."""
    if not (folder / "config.json").is_file():
        return False
    raw = read_json(folder / "config.json")
    return is_timm(raw) or raw.get("model_type") in VISION


def kind_of(folder: Path) -> str:
    """ "pictures" for a vision transformer that Sartor knows, "texts" for everything that has a vocabulary.

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
