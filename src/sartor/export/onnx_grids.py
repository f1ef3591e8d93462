"""How an ONNX file holds llama.cpp's grids: the same numbers in about the same bytes.

ONNX Runtime multiplies by 4-bit weights that are evenly spaced and by 8-bit ones, a scale for 32 (MatMulNBits). Every weight of every grid here is a whole number from -127 to 127 times the scale
of its 32 weights, so each fits one of the two *exactly*. The file holds the few bits of the grid, and nodes that look them up in a table:

    codes (rows, blocks, words) --look up--> level + 128 (rows, blocks, 32)        scales fp16 --cast--> fp32 (rows, blocks)

All of it is constant, so ONNX Runtime computes it once, when it loads the file; only of a table of embeddings the rows that are read are looked up as the file runs.
What is stored is in order: words hold their weights from the low bits up.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from sartor.export.onnx_parts import FLOAT, INT32, UINT8, node
from sartor.numerics.grids import GRIDS, shared_steps

BLOCK, MIDDLE = 32, 128  # weights that share a scale in MatMulNBits; what stands for zero in its eight bits
WORD = (
    16  # bits looked up at once: words are int32 for a moment, when the file is loaded, half as many as bytes would be
)
Arrays = dict[str, np.ndarray]
Nodes = list[Any]


@dataclass(frozen=True)
class Held:
    """How one grid is held.

    Attributes:
        bits: of the weights that MatMulNBits reads; at 4 it reads the stored codes themselves.
        pack: (indices of levels (rows, blocks, 32), scales (rows, scales of the grid)) -> stored arrays, by the end of their names; all have the rows in front.
        tables: further arrays that `unfold` reads, the same for all tensors of the grid, by name.
        unfold: name -> nodes from NAME.codes (and more) to NAME.levels, uint8, level + 128 (rows, blocks, 32).
        scale: name -> nodes from NAME.d (and more) to NAME.scale, fp32 (rows, blocks).
    """

    bits: int
    pack: Callable[[np.ndarray, np.ndarray], Arrays]
    tables: Arrays
    unfold: Callable[[str], Nodes]
    scale: Callable[[str], Nodes]


def _packed(numbers: np.ndarray, bits: int, word: int = 8) -> np.ndarray:
    """Numbers below 2 ** bits, (..., n), in words of 8 or 16 bits (..., n * bits / word), the low bits first."""
    per = 8 // bits
    parts = numbers.astype(np.uint8).reshape(*numbers.shape[:-1], -1, per) << (bits * np.arange(per, dtype=np.uint8))
    return np.bitwise_or.reduce(parts, axis=-1).view(f"<u{word // 8}")


def _table(values: np.ndarray, bits: int, word: int = 8) -> np.ndarray:
    """(2 ** word, word / bits): what each word of `_packed` stands for, `values` being what each number does."""
    numbers = (np.arange(2**word)[:, None] >> (bits * np.arange(word // bits))) & (2**bits - 1)
    return values[numbers]


def _looked_up(stored: str, table: str, to: str, shape: str) -> Nodes:
    """What the words of `stored` stand for."""
    return [
        node("Cast", [stored], [f"{to}.numbers"], to=INT32),
        node("Gather", [table, f"{to}.numbers"], [f"{to}.found"], axis=0),
        node("Reshape", [f"{to}.found", shape], [to]),
    ]


SHAPES: Arrays = {"shape.block": np.array([0, 0, BLOCK]), "shape.halves": np.array([0, 0, 2, BLOCK // 2])}


def _own_scale(name: str) -> Nodes:
    return [node("Cast", [f"{name}.d"], [f"{name}.scale"], to=FLOAT)]


def _halves(scales: np.ndarray) -> np.ndarray:
    return scales.astype(np.float16)


def _pairs(grid: str, bits: int) -> Held:
    """Sixteen levels, four bits a weight, an fp16 scale for 32."""
    table, word = f"table.{grid}", 8 if bits == 4 else WORD
    levels = np.array(GRIDS[grid].levels) + MIDDLE
    return Held(
        bits,
        lambda codes, scales: {"codes": _packed(codes, 4, word), "d": _halves(scales)},
        {table: _table(levels, 4, word).astype(np.uint8)},
        lambda name: _looked_up(f"{name}.codes", table, f"{name}.levels", "shape.block"),
        _own_scale,
    )


def _pack_eight(codes: np.ndarray, scales: np.ndarray) -> Arrays:
    return {"codes": (codes.astype(np.int16) + 1).astype(np.uint8), "d": _halves(scales)}


def _pack_five(codes: np.ndarray, scales: np.ndarray) -> Arrays:
    return {"codes": _packed(codes & 15, 4, WORD), "high": _packed(codes >> 4, 1), "d": _halves(scales)}


def _unfold_five(name: str) -> Nodes:
    return [
        *_looked_up(f"{name}.codes", "table.Q5_0", f"{name}.low", "shape.block"),
        *_looked_up(f"{name}.high", "table.Q5_0.high", f"{name}.top", "shape.block"),
        node("Add", [f"{name}.low", f"{name}.top"], [f"{name}.levels"]),
    ]


def _steps(scales: np.ndarray, grid: str) -> tuple[np.ndarray, np.ndarray]:
    """(fp16 number of every 256 weights (rows, n, 1), its multiples int8 (rows, n, scales))."""
    d, steps = shared_steps(scales.reshape(len(scales), -1, GRIDS[grid].scales))
    return _halves(d)[..., None], (steps.astype(np.int16) - 32).astype(np.int8)


def _pack_iq4_xs(codes: np.ndarray, scales: np.ndarray) -> Arrays:
    d, steps = _steps(scales, "IQ4_XS")
    return {"codes": _packed(codes, 4, WORD), "d": d, "steps": steps}


def _times_steps(name: str) -> Nodes:
    """A scale is a multiple of the number that 256 weights have in common."""
    return [
        node("Cast", [f"{name}.d"], [f"{name}.common"], to=FLOAT),
        node("Cast", [f"{name}.steps"], [f"{name}.times"], to=FLOAT),
        node("Mul", [f"{name}.common", f"{name}.times"], [f"{name}.scales"]),
        node("Reshape", [f"{name}.scales", "shape.row"], [f"{name}.scale"]),
    ]


def _pack_q3_k(codes: np.ndarray, scales: np.ndarray) -> Arrays:
    d, steps = _steps(scales, "Q3_K")
    stored = {"codes": _packed(codes & 3, 2), "high": _packed(codes >> 2, 1)}
    return stored | {"d": d, "steps": steps.reshape(len(steps), -1, 2, 1)}


def _unfold_q3_k(name: str) -> Nodes:
    """Level times multiple is from -124 to 128: taken with the other sign, and the scale too, it fits eight bits around 128."""
    return [
        *_looked_up(f"{name}.codes", "table.Q3_K", f"{name}.low", "shape.halves"),
        *_looked_up(f"{name}.high", "table.Q3_K.high", f"{name}.top", "shape.halves"),
        node("Add", [f"{name}.low", f"{name}.top"], [f"{name}.level"]),
        node("Cast", [f"{name}.steps"], [f"{name}.times"], to=INT32),
        node("Mul", [f"{name}.level", f"{name}.times"], [f"{name}.product"]),
        node("Sub", ["table.Q3_K.middle", f"{name}.product"], [f"{name}.whole"]),
        node("Cast", [f"{name}.whole"], [f"{name}.eight"], to=UINT8),
        node("Reshape", [f"{name}.eight", "shape.block"], [f"{name}.levels"]),
    ]


def _minus_common(name: str) -> Nodes:
    return [
        node("Cast", [f"{name}.d"], [f"{name}.common"], to=FLOAT),
        node("Mul", [f"{name}.common", "table.Q3_K.minus"], [f"{name}.scales"]),
        node("Reshape", [f"{name}.scales", "shape.row"], [f"{name}.scale"]),
    ]


_ROW: Arrays = {"shape.row": np.array([0, -1])}
_FIVE: Arrays = {
    "table.Q5_0": _table(np.arange(16) - 16 + MIDDLE, 4, WORD).astype(np.uint8),
    "table.Q5_0.high": _table(np.array([0, 16]), 1).astype(np.uint8),
}
_Q3_K: Arrays = {
    "table.Q3_K": _table(np.arange(4) - 4, 2).astype(np.int32),
    "table.Q3_K.high": _table(np.array([0, 4]), 1).astype(np.int32),
    "table.Q3_K.middle": np.array(MIDDLE, np.int32),
    "table.Q3_K.minus": np.full(256 // BLOCK, -1, np.float32),
}
_XS = _pairs("IQ4_XS", 8)
HELD: dict[str, Held] = {
    "Q4_0": _pairs("Q4_0", 4),
    "IQ4_NL": _pairs("IQ4_NL", 8),
    "IQ4_XS": Held(8, _pack_iq4_xs, _XS.tables | _ROW, _XS.unfold, _times_steps),
    "Q5_0": Held(8, _pack_five, _FIVE, _unfold_five, _own_scale),
    "Q8_0": Held(
        8, _pack_eight, {}, lambda name: [node("Identity", [f"{name}.codes"], [f"{name}.levels"])], _own_scale
    ),
    "Q3_K": Held(8, _pack_q3_k, _Q3_K | _ROW, _unfold_q3_k, _minus_common),
}


def product(
    grid: str, stored: str, x: str, y: str, shape: tuple[int, int], bias: str, accuracy: int
) -> tuple[Nodes, Arrays]:
    """(nodes that multiply `x` by the stored matrix (out, in), and the tables that they read).

    Args:
        bias: name of the vector that is added, or "". accuracy: MatMulNBits' accuracy_level.
    """
    held, (o, i) = HELD[grid], shape
    direct = held.bits == 4
    weights = f"{stored}.{'codes' if direct else 'levels'}"
    sizes = {"N": o, "K": i, "bits": held.bits, "block_size": BLOCK, "accuracy_level": accuracy}
    inputs = [x, weights, f"{stored}.scale", *(["", "", bias] if bias else [])]
    nodes = [
        *([] if direct else held.unfold(stored)),
        *held.scale(stored),
        node("MatMulNBits", inputs, [y], "com.microsoft", **sizes),
    ]
    return nodes, {} if direct else held.tables | SHAPES


def rows_of(grid: str, stored: str, ends: list[str], ids: str, y: str) -> tuple[Nodes, Arrays]:
    """(nodes that read the rows `ids` (n,) of the stored table to `y` (n, blocks, 32), and the tables that they read); `ends` are the names that `pack` gave."""
    held = HELD[grid]
    nodes = [node("Gather", [f"{stored}.{end}", ids], [f"{y}.{end}"], axis=0) for end in ends]
    nodes += [
        *held.unfold(y),
        *held.scale(y),
        node("Cast", [f"{y}.levels"], [f"{y}.float"], to=FLOAT),
        node("Sub", [f"{y}.float", "table.middle"], [f"{y}.around"]),
        node("Unsqueeze", [f"{y}.scale", "axis.last"], [f"{y}.each"]),
        node("Mul", [f"{y}.around", f"{y}.each"], [y]),
    ]
    fixed: Arrays = {"table.middle": np.array(MIDDLE, np.float32), "axis.last": np.array([-1])}
    return nodes, held.tables | SHAPES | fixed
