"""Vision transformers for LiteRT (.tflite), rounded by its own quantizer.

Whole pixels (uint8) are read as they are. int8: every matrix, a scale a row, inputs rounded as the file runs. int4: the layers' matrices in blocks of 32 with a scale each, their
inputs at eight bits; patches and head at eight, as are matrices whose rows are no whole blocks. (Blocks with inputs in fp32 end the runtime's process, 2.3.0.)
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram

from sartor.errors import InputError
from sartor.export.lowering import lower

NAME, NEEDS = "LiteRT", ("litert_torch", "ai_edge_litert", "ai_edge_quantizer")
INSTALL = "pip install litert-torch==0.10.0 ai-edge-litert==2.3.0 ai-edge-quantizer==0.10.0"
PIXELS = torch.uint8
BLOCK = 32
MATRIX = re.compile(r"network\.model\.layers\.(\d+)\.\w+\.(\w+)\.weight")


@dataclass(frozen=True)
class Converted:
    """The file in fp32, and (layer, name) of the matrices (out, in) whose rows are no whole blocks."""

    file: Path
    odd: tuple[tuple[str, str], ...]


def prepare(program: ExportedProgram, folder: Path) -> Converted:
    import litert_torch

    assert program.example_inputs is not None
    pixels: Any = program.example_inputs[0]
    file = folder / "converted.tflite"
    litert_torch.convert(program.module(), pixels).export(str(file))
    found = [(MATRIX.fullmatch(name), value) for name, value in program.state_dict.items() if value.ndim == 2]
    return Converted(file, tuple((m[1], m[2]) for m, value in found if m and value.shape[1] % BLOCK))


def _write32(converted: Converted, path: Path) -> None:
    path.write_bytes(converted.file.read_bytes())


def _eight() -> Any:
    from ai_edge_quantizer.qtyping import TFLOperationName
    from ai_edge_quantizer.recipe_manager import RecipeManager

    recipe = RecipeManager()
    recipe.add_dynamic_config(regex=".*", operation_name=TFLOperationName.ALL_SUPPORTED, num_bits=8)
    return recipe


def _four(odd: tuple[tuple[str, str], ...]) -> Any:
    """The converter names what it makes after modules (`Layer_3/...Linear_o_proj`); the last rule that fits a name holds."""
    from ai_edge_quantizer.qtyping import QuantGranularity, TFLOperationName

    if any(name in ("q_proj", "k_proj", "v_proj", "up_proj") for _, name in odd):
        raise InputError(f"LiteRT's int4 weights need a network whose width is a multiple of {BLOCK}: take int8")
    recipe, matrix = _eight(), TFLOperationName.FULLY_CONNECTED
    blocks = QuantGranularity.BLOCKWISE_32
    recipe.add_dynamic_config(regex=r"Layer_\d+/", operation_name=matrix, num_bits=4, granularity=blocks)
    for layer, name in odd:
        recipe.add_dynamic_config(regex=rf"Layer_{layer}/.*Linear_{name}", operation_name=matrix, num_bits=8)
    return recipe


def _quantize(file: Path, recipe: Any, path: Path) -> None:
    from ai_edge_quantizer.quantizer import Quantizer

    made = Quantizer(str(file), recipe.get_quantization_recipe()).quantize()
    made.export_model(str(path), overwrite=True)


WEIGHTS: dict[str, Callable[[Converted, Path], None]] = {
    "fp32": _write32,
    "int8": lambda converted, path: _quantize(converted.file, _eight(), path),
    "int4": lambda converted, path: _quantize(converted.file, _four(converted.odd), path),
}


def write(files: Mapping[str, Path], model: Any) -> dict[str, dict[str, Any]]:
    """Write a .tflite for each kind of WEIGHTS in `files`; returns and raises as `lowering.lower`."""
    return lower("litert", files, model)
