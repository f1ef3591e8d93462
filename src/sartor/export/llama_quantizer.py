"""The control arm: llama.cpp's own quantizer with an importance matrix (extra: llama-cpp-python, built from source)."""

from __future__ import annotations

import ctypes
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from sartor.errors import MissingExtra, SartorError
from sartor.model.families import LINEARS
from sartor.stages.calibrate import SITE_OF, Moments

# llama_ftype numbers of llama.h
FTYPES = {"Q2_K": 10, "IQ3_XXS": 23, "Q3_K_M": 12, "IQ4_XS": 30, "Q4_0": 2, "IQ4_NL": 25, "Q4_K_M": 15, "Q8_0": 7}
PIP = 'pip install "sartor[llamacpp]" (builds llama-cpp-python from source, about 7 minutes on two cores)'


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


def quantize(source: Path, target: Path, kind: str, matrix: Mapping[str, np.ndarray] | None, threads: int = 2) -> int:
    """Quantize a GGUF file with llama.cpp and return the bytes of the result.

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
    code = llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), params)
    if code or not target.exists():
        raise SartorError(f"llama.cpp's quantizer failed on {kind} (code {code})")
    return target.stat().st_size
