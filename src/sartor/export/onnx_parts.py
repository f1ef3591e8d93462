"""What all ONNX files that Sartor writes are made of: nodes, stored tensors by name, and a file that is whole or not there."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sartor.errors import MissingExtra, OutputError
from sartor.files import whole_file

OPSET, IR, CONTRIB = 17, 8, "com.microsoft"
FLOAT, UINT8, INT8, UINT16, INT32, INT64, HALF = (
    1,
    2,
    3,
    4,
    6,
    7,
    10,
)  # onnx.TensorProto.DataType, known before onnx is loaded
LARGEST = 2**31 - 1  # bytes of a protobuf message
Spec = tuple[int, tuple[int, ...]]  # data type and shape of a stored tensor
Part = tuple[list[Any], dict[str, Spec]]  # nodes, and the tensors that they read, by name


def onnx_package() -> Any:
    """The package onnx, or MissingExtra."""
    try:
        import onnx
    except ImportError as error:
        raise MissingExtra("onnx is not installed: pip install onnx==1.23.2") from error
    return onnx


def node(op: str, inputs: list[str], outputs: list[str], domain: str = "", **attributes: Any) -> Any:
    return onnx_package().helper.make_node(op, inputs, outputs, domain=domain, **attributes)


def framed(inputs: Mapping[str, tuple[int, list[Any]]], outputs: Mapping[str, tuple[int, list[Any]]]) -> Any:
    """A file without nodes and tensors.

    Args:
        inputs, outputs: {name: (data type, shape; a name stands for any size)}.
    """
    onnx, value = onnx_package(), onnx_package().helper.make_tensor_value_info
    ends = [[value(name, *spec) for name, spec in side.items()] for side in (inputs, outputs)]
    graph = onnx.GraphProto(name="sartor", input=ends[0], output=ends[1])
    opsets = [onnx.helper.make_opsetid("", OPSET), onnx.helper.make_opsetid(CONTRIB, 1)]
    return onnx.ModelProto(ir_version=IR, producer_name="sartor", opset_import=opsets, graph=graph)


def store(file: Any, name: str, array: np.ndarray, spec: Spec) -> None:
    """Add a tensor to the file, as raw bytes, little end first."""
    raw = np.ascontiguousarray(array).astype(array.dtype.newbyteorder("<"), copy=False).tobytes()
    file.graph.initializer.add(dims=spec[1], data_type=spec[0], name=name, raw_data=raw)


def save(path: Path, file: Any) -> None:
    """Write the file.

    Raises:
        OutputError: it would be larger than a single ONNX file can be.
    """
    size = sum(len(t.raw_data) for t in file.graph.initializer)
    if size > LARGEST:
        raise OutputError(f"the weights take {size / 1e9:.1f} GB, more than the 2.1 GB of one ONNX file: take gguf")
    with whole_file(path) as part:
        part.write_bytes(file.SerializeToString(deterministic=True))
