"""Vision transformers as ExecuTorch programs (.pte) whose matrices, products and activations XNNPACK computes; layer norms and copies are ExecuTorch's own.

Whole pixels (uint8) are read as they are. At eight bits the linear layers have a scale a row, and their inputs are rounded as the file runs. The patches stay in fp32: XNNPACK takes
their convolution at eight bits when it is lowered, and fails when it runs (1.5.1: "Propagating input shapes failed"). A convolutional network is lowered with the grids that it has (`graph_program.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram

from sartor.export.graph_program import OnGrids
from sartor.export.lowering import exported, lower, lower_program
from sartor.model.graph import Graph

NAME, NEEDS, INSTALL = "ExecuTorch", ("executorch", "torchao"), "pip install executorch==1.5.1 torchao==0.18.0"
PIXELS = torch.uint8


def prepare(program: ExportedProgram, folder: Path) -> ExportedProgram:
    return program


def _write32(program: ExportedProgram, path: Path) -> None:
    import executorch.kernels.quantized  # noqa: F401  what XNNPACK leaves of whole numbers is ExecuTorch's own
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower

    edge = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()])
    path.write_bytes(edge.to_executorch().buffer)


def _write8(program: ExportedProgram, path: Path) -> None:
    """A program that is on grids already is lowered as it is."""
    if any("quantized_decomposed" in str(node.target) for node in program.graph.nodes):
        return _write32(program, path)
    from executorch.backends.xnnpack.quantizer import xnnpack_quantizer
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    assert program.example_inputs is not None
    pixels: Any = program.example_inputs[0]
    config = xnnpack_quantizer.get_symmetric_quantization_config(is_per_channel=True, is_dynamic=True)
    quantizer = xnnpack_quantizer.XNNPACKQuantizer().set_operator_type(torch.ops.aten.linear.default, config)
    observed = prepare_pt2e(program.module(), quantizer)
    observed(*pixels)  # it only has to run: weights are known, activations are rounded later
    _write32(torch.export.export(convert_pt2e(observed), pixels), path)


WEIGHTS: dict[str, Callable[[ExportedProgram, Path], None]] = {"fp32": _write32, "int8": _write8}


def write(files: Mapping[str, Path], model: Any) -> dict[str, dict[str, Any]]:
    """Write a .pte for each kind of WEIGHTS in `files`; returns and raises as `lowering.lower`."""
    if not isinstance(model, Graph) or "int8" not in files:
        return lower("executorch", files, model)
    others = {weights: file for weights, file in files.items() if weights != "int8"}
    made = lower("executorch", others, model) if others else {}
    if why := _unable(model):
        return {"int8": {"failed": why}} | made
    program = lambda of: exported(OnGrids(model), model.size, of.PIXELS)  # noqa: E731
    return lower_program("executorch", {"int8": files["int8"]}, program, {}) | made


def _unable(graph: Graph) -> str | None:
    """Why a network of convolutions cannot be had at eight bits, if so."""
    if graph.rounding is None:
        return "a convolutional network has int8 once it was fitted to it: take fp32"
    convs = [m for m in graph.modules() if isinstance(m, torch.nn.Conv2d)]
    if any(node.op == "concat" for node in graph.nodes) or any(1 < m.groups < m.in_channels for m in convs):
        return (
            "its int8 program of grouped convolutions or concatenations is lowered and does not load (1.5.1): take fp32"
        )
    return None
