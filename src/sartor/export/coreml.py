"""Vision transformers as Core ML packages (.mlpackage, iOS 18 and macOS 15 on), made anywhere and run by Apple's systems alone.

The input is an RGB image as Core ML has it, so that an app gives it a picture; it reads whole pixels from 0 to 255. Everything is computed in fp16. int8: linear layers and patches
with a scale a row, activations as they are. int4: linear layers with a scale for every 32 inputs of a row, patches as at eight bits. (Palettes, sixteen values for every sixteen rows, are Core ML's other four bits: a fitted DINOv2-S said nonsense with them, docs/log.md.) Without a Mac, `edge_worker` reads the package's own program and weights back and computes them in PyTorch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
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
BLOCK = 32  # inputs of a row that share a scale at four bits


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


BY_BLOCK: dict[str, Any] = {"dtype": "int4", "granularity": "per_block", "block_size": BLOCK}


def _rounded(model: Any, path: Path, **linear: Any) -> None:
    """Patches and convolutions in eight bits with a scale an output, linear layers too unless something else is said."""
    import coremltools.optimize.coreml as cto

    rules = {
        op: cto.OpLinearQuantizerConfig(mode="linear_symmetric", weight_threshold=LEAST, **more)
        for op, more in (("linear", linear), ("conv", {}))
    }
    cto.linear_quantize_weights(model, cto.OptimizationConfig(op_type_configs=rules)).save(str(path))


WEIGHTS: dict[str, Callable[[Any, Path], None]] = {
    "fp16": lambda model, path: model.save(str(path)),
    "int8": _rounded,
    "int4": partial(_rounded, **BY_BLOCK),
}


def write(files: Mapping[str, Path], model: Any) -> dict[str, dict[str, Any]]:
    """Write a .mlpackage for each kind of WEIGHTS in `files`; returns and raises as `lowering.lower`."""
    return lower("coreml", files, model)


def named(constants: Mapping[str, np.ndarray], model: Any) -> dict[str, np.ndarray]:
    """The package's constants by the names of the network's parameters, those that were not folded into others."""
    found = {}
    for name, _ in model.named_parameters():
        for ending in ("", "_to_fp16", "_to_fp16_quantized"):
            key = f"p_network_{name.replace('.', '_')}{ending}"
            if key in constants:
                found[name] = constants[key]
    return found
