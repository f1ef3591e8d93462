"""Files of networks that see, whatever they are made of: a vision transformer (`onnx_file.py`) or a convolutional network (`graph_file.py`)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sartor.errors import InputError
from sartor.export import graph_file, onnx_file
from sartor.model.graph import Graph
from sartor.model.network import clone
from sartor.numerics.eight import held
from sartor.stages.eight import unrounded

GRAPH_WEIGHTS = ("fp32", "int8")


def fitted_weights(model: Any) -> str:
    """The weights that a fitted network's file has: those of its grids."""
    return "int4" if getattr(model, "block_scales", None) else "int8"


def write(path: Path, model: Any, weights: str) -> None:
    """Write the ONNX file.

    Raises:
        InputError: there are no such weights, or none for this network: one of convolutions has eight bits once it was fitted to them. MissingExtra: onnx is not installed.
    """
    if isinstance(model, Graph):
        return graph_file.write(path, _as(model, weights))
    return onnx_file.write(path, model, weights)


def dequantized(model: Any, weights: str) -> Any:
    """A copy whose weights, in fp32, are those that the file stands for; one of convolutions rounds its values as the file does."""
    if not isinstance(model, Graph):
        return onnx_file.dequantized(model, weights)
    new = _as(model, weights)
    layers: list[Any] = list(new.layers.values()) if weights == "int8" else []
    for layer in layers:
        layer.weight.data = held(layer.weight)
    return new


def _as(model: Graph, weights: str) -> Graph:
    if weights not in GRAPH_WEIGHTS or (weights == "int8" and not model.rounding):
        raise InputError(
            f"a convolutional network is not written with {weights} weights like this: take {' or '.join(GRAPH_WEIGHTS)}; int8 of one that was fitted"
        )
    new: Graph = clone(model)
    return new if weights == "int8" else unrounded(new)
