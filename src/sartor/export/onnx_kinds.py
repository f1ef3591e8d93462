"""How a matrix (out, in) of a network that sees is stored in an ONNX file and multiplied.

At four bits nothing is multiplied by four bits: what is stored is unfolded to eight when ONNX Runtime loads the file (all of it is constant, so it is computed once), and runs as a file of eight bits does.

    codes (out, blocks, 16) + 256 x steps (out, blocks, 1) --look up two weights each--> int8 (out, in) --turned--> weight int8 (in, out), a scale a row

ONNX Runtime holds all that is computed while it loads, of all matrices, until it has done with them: so no number on the way is wider than it must be (docs/log.md).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float
from torch import Tensor

from sartor.export.onnx_parts import CONTRIB, FLOAT, INT8, INT32, INT64, UINT8, Spec, node
from sartor.numerics.eight import held, rounded
from sartor.numerics.four import BLOCK, FOUR, MOST, nearest_scales, packed, padded
from sartor.numerics.grids import snap

Scales = Float[Tensor, "o blocks"]


@dataclass(frozen=True)
class Kind:
    """One way.

    nodes: (name, input, output, out, in) -> what multiplies and adds the bias. specs: (out, in) -> what is stored, by the end of its name.
    pack: (matrix, scales of its blocks where they are known) -> the arrays of `specs`. hold: the same -> the matrix that these arrays stand for. tables: what the nodes of all matrices read, by name;
    made: nodes that make more of it.
    """

    nodes: Callable[[str, str, str, int, int], list[Any]]
    specs: Callable[[int, int], dict[str, Spec]]
    pack: Callable[[Tensor, Scales | None], dict[str, np.ndarray]]
    hold: Callable[[Tensor, Scales | None], Tensor]
    tables: Mapping[str, np.ndarray]
    made: Callable[[], list[Any]] = list


def product32(name: str, x: str, y: str, o: int, i: int) -> list[Any]:
    product = node("MatMul", [x, f"{name}.weight"], [f"{name}.product"])
    return [product, node("Add", [f"{name}.product", f"{name}.bias"], [y])]


def _product8(name: str, x: str, y: str, o: int, i: int) -> list[Any]:
    return [node("DynamicQuantizeMatMul", [x, f"{name}.weight", f"{name}.scale", "", f"{name}.bias"], [y], CONTRIB)]


def _product4(name: str, x: str, y: str, o: int, i: int) -> list[Any]:
    whole = f"{name}.whole"
    unfolded = [
        node("Cast", [f"{name}.codes"], [f"{name}.bytes"], to=INT32),
        node("Cast", [f"{name}.steps"], [f"{name}.numbers"], to=INT32),
        node("Mul", [f"{name}.numbers", "four.bytes"], [f"{name}.begins"]),
        node("Add", [f"{name}.begins", f"{name}.bytes"], [f"{name}.places"]),
        node("Gather", ["four.products", f"{name}.places"], [f"{name}.pairs"], axis=0),
        node("Reshape", [f"{name}.pairs", "four.rows"], [whole]),
    ]
    if i % BLOCK:
        unfolded.append(node("Slice", [whole, "four.first", f"{name}.inputs", "four.axis"], [f"{name}.filled"]))
        whole = f"{name}.filled"
    return [
        *unfolded,
        node("Transpose", [whole], [f"{name}.weight"], perm=[1, 0]),
        *_product8(name, x, y, o, i),
    ]


def _specs4(o: int, i: int) -> dict[str, Spec]:
    blocks = -(-i // BLOCK)
    stored: dict[str, Spec] = {"codes": (UINT8, (o, blocks, BLOCK // 2)), "steps": (INT8, (o, blocks, 1))}
    return stored | {"scale": (FLOAT, (o,))} | ({"inputs": (INT64, (1,))} if i % BLOCK else {})


def _pack8(weight: Tensor, scales: Scales | None) -> dict[str, np.ndarray]:
    numbers, scale = rounded(weight)
    return {"weight": numbers.T.numpy(), "scale": scale.numpy()}


def _pack4(weight: Tensor, scales: Scales | None) -> dict[str, np.ndarray]:
    codes, steps, units = packed(weight, nearest_scales(weight) if scales is None else scales)
    return {"codes": codes, "steps": steps, "scale": units, "inputs": np.array([weight.shape[1]])}


def _hold4(weight: Tensor, scales: Scales | None) -> Tensor:
    return snap(padded(weight), nearest_scales(weight) if scales is None else scales, FOUR)[:, : weight.shape[1]]


CODES = np.arange(256)
TABLES4: dict[str, np.ndarray] = {
    "four.levels": np.array(FOUR.levels, np.int8)[np.stack([CODES & 15, CODES >> 4], -1)],  # of the two codes of a byte
    "four.steps": np.concatenate([np.arange(MOST + 1), np.arange(-MOST, 0)]).astype(np.int32)[:, None, None],
    "four.pair": np.array([-1, 2]),
    "four.bytes": np.array(256, np.int32),
    "four.rows": np.array([0, -1]),
    "four.first": np.array([0]),
    "four.axis": np.array([1]),
}


def _products() -> list[Any]:
    """(31 * 256, 2): the two weights of every byte of codes at every step of a block: 0 to 15, then -15 to -1, which ONNX counts from the end."""
    return [
        node("Cast", ["four.levels"], ["four.wide"], to=INT32),
        node("Mul", ["four.steps", "four.wide"], ["four.weights"]),
        node("Reshape", ["four.weights", "four.pair"], ["four.pairs"]),
        node("Cast", ["four.pairs"], ["four.products"], to=INT8),
    ]


KINDS = {
    "fp32": Kind(
        product32,
        lambda o, i: {"weight": (FLOAT, (i, o))},
        lambda w, scales: {"weight": w.detach().float().T.numpy()},
        lambda w, scales: w.detach().float(),
        {},
    ),
    "int8": Kind(
        _product8,
        lambda o, i: {"weight": (INT8, (i, o)), "scale": (FLOAT, (o,))},
        _pack8,
        lambda w, scales: held(w),
        {},
    ),
    "int4": Kind(_product4, _specs4, _pack4, _hold4, TABLES4, _products),
}


def tables_of(kind: str) -> tuple[list[Any], dict[str, Spec]]:
    """(nodes, what is stored once) that all matrices of a kind read."""
    types = {"float32": FLOAT, "int64": INT64, "int32": INT32, "int8": INT8}
    stored = {name: (types[str(array.dtype)], array.shape) for name, array in KINDS[kind].tables.items()}
    return KINDS[kind].made(), stored
