"""A Core ML package read back and computed in PyTorch in fp32: a check of its program and its weights where Core ML itself does not run.

Only what coremltools makes of a vision transformer or a plain convolutional network is known here: a table of operations, one row each (Core ML's MIL, the names of its arguments).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np


def _program(file: str) -> Any:
    """The main function of the package."""
    try:
        import coremltools as ct
        from coremltools.converters.mil.frontend.milproto.load import load as load_program
    except ImportError as error:
        raise SystemExit("Core ML's tools are not installed: pip install coremltools==9.0") from error
    model = ct.models.MLModel(file, skip_model_load=True)
    spec = model.get_spec()
    found = load_program(spec, specification_version=spec.specificationVersion, file_weights_dir=model.weights_dir)
    return found.functions["main"]


def _is_constant(op: Any) -> bool:
    return op.op_type == "const" or op.op_type.startswith("constexpr_")


def _constant(op: Any) -> Any:
    """Rounded weights as the numbers that they stand for."""
    return op.outputs[0].val if op.op_type == "const" else op.materialized_val_inference()


def constants(file: str) -> dict[str, np.ndarray]:
    """Every tensor of numbers in the package by name."""
    found = {op.name: _constant(op) for op in _program(file).operations if _is_constant(op)}
    return {name: v for name, v in found.items() if isinstance(v, np.ndarray) and v.dtype.kind == "f"}


def _slice(x: Any, a: dict[str, Any]) -> Any:
    cuts: list[Any] = []
    for n in range(x.ndim):
        begin, end = (
            None if a.get(f"{side}_mask") is not None and a[f"{side}_mask"][n] else int(a[side][n])
            for side in ("begin", "end")
        )
        squeeze = a.get("squeeze_mask") is not None and a["squeeze_mask"][n]
        cuts.append((begin or 0) if squeeze else slice(begin, end, None if a.get("stride") is None else a["stride"][n]))
    return x[tuple(cuts)]


def _operations() -> dict[str, Callable[[dict[str, Any]], Any]]:
    import torch
    from torch.nn import functional as F

    def norm(a: dict[str, Any]) -> Any:
        assert list(a["axes"]) == [-1]
        return F.layer_norm(a["x"], a["gamma"].shape, a["gamma"], a["beta"], float(a["epsilon"]))

    def ints(values: Any) -> list[int]:
        return [int(v) for v in values]

    def padded(a: dict[str, Any], value: float) -> Any:
        """Its padding is (top, bottom, left, right), where it is not computed from sizes."""
        if str(a["pad_type"]) == "valid":
            return a["x"]
        assert str(a["pad_type"]) == "custom"
        top, bottom, left, right = ints(a["pad"])
        return F.pad(a["x"], (left, right, top, bottom), value=value)

    def conv(a: dict[str, Any]) -> Any:
        sizes = ints(a["strides"]), 0, ints(a.get("dilations", (1, 1))), int(a.get("groups", 1))
        return F.conv2d(padded(a, 0.0), a["weight"], a.get("bias"), *sizes)

    approximate = {"EXACT": "none", "TANH_APPROXIMATION": "tanh"}
    return {
        "cast": lambda a: a["x"],
        "add": lambda a: a["x"] + a["y"],
        "mul": lambda a: a["x"] * a["y"],
        "linear": lambda a: F.linear(a["x"], a["weight"], a.get("bias")),
        "conv": conv,
        "clip": lambda a: a["x"].clamp(float(a["alpha"]), float(a["beta"])),
        "thresholded_relu": lambda a: torch.where(a["x"] >= float(a["alpha"]), a["x"], 0.0),
        "relu6": lambda a: F.relu6(a["x"]),
        "sigmoid_hard": lambda a: (float(a["alpha"]) * a["x"] + float(a["beta"])).clamp(0, 1),
        "max_pool": lambda a: F.max_pool2d(padded(a, -float("inf")), ints(a["kernel_sizes"]), ints(a["strides"])),
        "batch_norm": lambda a: F.batch_norm(
            a["x"], a["mean"], a["variance"], a["gamma"], a["beta"], eps=float(a["epsilon"])
        ),
        "layer_norm": norm,
        "matmul": lambda a: (a["x"].mT if a["transpose_x"] else a["x"]) @ (a["y"].mT if a["transpose_y"] else a["y"]),
        "softmax": lambda a: torch.softmax(a["x"], int(a["axis"])),
        "gelu": lambda a: F.gelu(a["x"], approximate=approximate[str(a["mode"])]),
        "sigmoid": lambda a: torch.sigmoid(a["x"]),
        "relu": lambda a: torch.relu(a["x"]),
        "reshape": lambda a: a["x"].reshape(ints(a["shape"])),
        "transpose": lambda a: a["x"].permute(ints(a["perm"])),
        "expand_dims": lambda a: a["x"][
            tuple(None if n in ints(a["axes"]) else slice(None) for n in range(a["x"].ndim + 1))
        ],
        "concat": lambda a: torch.cat(a["values"], int(a["axis"])),
        "slice_by_index": lambda a: _slice(a["x"], a),
        "reduce_mean": lambda a: a["x"].mean(ints(a["axes"]), bool(a["keep_dims"])),
    }


def load(file: str, threads: int) -> Callable[[np.ndarray], dict[str, np.ndarray]]:
    """pixels (1, 3, s, s) -> outputs by name."""
    import torch

    torch.set_num_threads(threads)
    main, table = _program(file), _operations()
    steps = [op for op in main.operations if not _is_constant(op)]
    if unknown := {op.op_type for op in steps} - table.keys():
        raise SystemExit(f"the package holds {', '.join(sorted(unknown))}, which is not known here")
    known = {op.outputs[0].name: _tensor(_constant(op)) for op in main.operations if _is_constant(op)}

    def run(pixels: np.ndarray) -> dict[str, np.ndarray]:
        values: dict[str, Any] = known | {"pixels": torch.from_numpy(pixels).float()}
        for op in steps:
            values[op.outputs[0].name] = table[op.op_type](_arguments(op, values))
        return {output.name: values[output.name].numpy() for output in main.outputs}

    return run


def _tensor(value: Any) -> Any:
    import torch

    return (
        torch.from_numpy(np.array(value, np.float32)) if getattr(value, "dtype", np.dtype(int)).kind == "f" else value
    )


def _arguments(op: Any, values: dict[str, Any]) -> dict[str, Any]:
    return {
        name: [values[v.name] for v in given] if isinstance(given, (list, tuple)) else values[given.name]
        for name, given in op.inputs.items()
        if given is not None
    }
