"""The control arm: llama.cpp's own quantizer with an importance matrix (extra: llama-cpp-python, built from source)."""

from __future__ import annotations

import ctypes
import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from sartor.errors import MissingExtra, SartorError
from sartor.model.families import LINEARS
from sartor.stages.calibrate import SITE_OF, Moments

# llama_ftype numbers of llama.h: every type for plain networks, those of three bits and less first
FTYPES = {
    **{"IQ1_S": 24, "IQ1_M": 31, "IQ2_XXS": 19, "IQ2_XS": 20, "IQ2_S": 28, "IQ2_M": 29, "Q2_K_S": 21, "Q2_K": 10},
    **{"IQ3_XXS": 23, "IQ3_XS": 22, "IQ3_S": 26, "IQ3_M": 27, "Q3_K_S": 11, "Q3_K_M": 12, "Q3_K_L": 13},
    **{"IQ4_XS": 30, "IQ4_NL": 25, "Q4_0": 2, "Q4_1": 3, "Q4_K_S": 14, "Q4_K_M": 15},
    **{"Q5_0": 8, "Q5_1": 9, "Q5_K_S": 16, "Q5_K_M": 17, "Q6_K": 18, "Q8_0": 7},
}
PIP = "pip install llama-cpp-python==0.3.36 (builds from source, about 7 minutes on two cores)"


def available() -> bool:
    return importlib.util.find_spec("llama_cpp") is not None


def importance(moments: Moments) -> dict[str, np.ndarray]:
    """Mean squared input of every linear, by llama.cpp tensor name: what llama-imatrix would collect."""
    out: dict[str, np.ndarray] = {}
    for (layer, site), c in moments.c.items():
        for name, short in LINEARS.items():
            if SITE_OF[name] == site:
                out[f"blk.{layer}.{short}.weight"] = _floats(c.diagonal())
    return out


def _floats(t: Tensor) -> np.ndarray:
    return np.ascontiguousarray(t.float().numpy(), dtype=np.float32)


def quantize(
    source: Path,
    target: Path,
    kind: str,
    matrix: Mapping[str, np.ndarray] | None,
    threads: int = 2,
    without: Sequence[int] = (),
) -> int:
    """Quantize a GGUF file with llama.cpp and return the bytes of the result.

    Args:
        kind: of FTYPES. matrix: from `importance`. without: layers that are left out.
    Raises:
        MissingExtra: llama-cpp-python is not there. SartorError: the quantizer refused.
    """
    if not available():
        raise MissingExtra(f"llama.cpp's quantizer is not installed: {PIP}")
    import llama_cpp

    @llama_cpp.llama_log_callback
    def quiet(level: int, text: bytes, data: Any) -> None:
        """llama.cpp's log is not ours."""

    llama_cpp.llama_log_set(quiet, ctypes.c_void_p(0))
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.nthread = FTYPES[kind], threads
    if matrix:
        entries = (llama_cpp.llama_model_imatrix_data * (len(matrix) + 1))()
        for i, (name, values) in enumerate(matrix.items()):
            entries[i].name = name.encode()
            entries[i].data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
            entries[i].size = len(values)
        params.imatrix = ctypes.cast(entries, ctypes.POINTER(llama_cpp.llama_model_imatrix_data))
    if without:
        gone = (ctypes.c_int32 * (len(without) + 1))(*sorted(without), -1)  # ascending, -1 ends it
        params.prune_layers = ctypes.cast(gone, ctypes.POINTER(ctypes.c_int32))
    code = llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), params)
    if code or not target.exists():
        raise SartorError(f"llama.cpp's quantizer failed on {kind} (code {code})")
    return target.stat().st_size
