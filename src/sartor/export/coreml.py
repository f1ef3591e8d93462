"""Vision transformers as Core ML packages (.mlpackage, iOS 18 and macOS 15 on), made anywhere and run by Apple's systems alone.

The input is an RGB image as Core ML has it, so that an app gives it a picture; it reads whole pixels from 0 to 255. Everything is computed in fp16. int8: linear layers and patches
with a scale a row, activations as they are. int4: clustered, sixteen values for every sixteen rows (k-means on their numbers), which Core ML calls palettes. Without a Mac, `edge_worker` reads the package's own program and weights back and computes them in PyTorch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.export import ExportedProgram

from sartor.export.lowering import lower

NAME, NEEDS, INSTALL = "Core ML", ("coremltools",), "pip install coremltools==9.0"
PIXELS = torch.float32  # of the program that is converted; coremltools knows no uint8, the package reads images
OUTPUTS = ("logits", "features")
LEAST = 512  # numbers of a matrix that is rounded: a smaller one saves nothing
CLUSTERED = 16  # rows that share sixteen values


def prepare(program: ExportedProgram, folder: Path) -> Any:
    import coremltools as ct

    assert program.example_inputs is not None
    example: Any = program.example_inputs[0]
    pixels = ct.ImageType(name="pixels", shape=tuple(example[0].shape), color_layout=ct.colorlayout.RGB)
    names = OUTPUTS[-len(program.graph_signature.user_outputs) :]
    return ct.convert(
        program.run_decompositions({}),
        inputs=[pixels],
        outputs=[ct.TensorType(name=name) for name in names],
        minimum_deployment_target=ct.target.iOS18,
        skip_model_load=True,
    )


def _of_matrices(rule: Any) -> Any:
    """The rule for linear layers and patches."""
    import coremltools.optimize.coreml as cto

    return cto.OptimizationConfig(op_type_configs={"linear": rule, "conv": rule})


def _write8(model: Any, path: Path) -> None:
    import coremltools.optimize.coreml as cto

    rule = cto.OpLinearQuantizerConfig(mode="linear_symmetric", weight_threshold=LEAST)
    cto.linear_quantize_weights(model, _of_matrices(rule)).save(str(path))


def _write4(model: Any, path: Path) -> None:
    import coremltools.optimize.coreml as cto

    rule = cto.OpPalettizerConfig(
        mode="kmeans", nbits=4, granularity="per_grouped_channel", group_size=CLUSTERED, weight_threshold=LEAST
    )
    cto.palettize_weights(model, _of_matrices(rule)).save(str(path))


WEIGHTS: dict[str, Callable[[Any, Path], None]] = {
    "fp16": lambda model, path: model.save(str(path)),
    "int8": _write8,
    "int4": _write4,
}


def write(files: Mapping[str, Path], model: Any) -> dict[str, dict[str, Any]]:
    """Write a .mlpackage for each kind of WEIGHTS in `files`; returns and raises as `lowering.lower`."""
    return lower("coreml", files, model)


def named(constants: Mapping[str, np.ndarray], model: Any) -> dict[str, np.ndarray]:
    """The package's constants by the names of the network's parameters, those that were not folded into others."""
    found = {}
    for name, _ in model.named_parameters():
        for ending in ("", "_to_fp16", "_to_fp16_quantized", "_to_fp16_palettized"):
            key = f"p_network_{name.replace('.', '_')}{ending}"
            if key in constants:
                found[name] = constants[key]
    return found
