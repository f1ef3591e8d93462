"""Running an ONNX file in ONNX Runtime, each job in a process of its own."""

from __future__ import annotations

import importlib.util
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from jaxtyping import UInt8
from torch import Tensor

from sartor.errors import MissingExtra
from sartor.export.apart import answered
from sartor.memory import cores

BATCH = 1  # as it is used: activations are quantized by what they share a batch with


def available() -> bool:
    return importlib.util.find_spec("onnxruntime") is not None


def run_job(do: str, files: dict[str, Path], pixels: UInt8[np.ndarray, "n 3 s s"], **job: Any) -> dict[str, Any]:
    """Run one job of `onnx_worker` on these pictures and return its result; the pictures lie in a private folder as long as it runs.

    Raises:
        MissingExtra: the runtime is not installed. SartorError: it failed; its last words are in the message.
    """
    if not available():
        raise MissingExtra("ONNX Runtime is not installed: pip install onnxruntime==1.32.0")
    # by path: the package would load torch
    command = [sys.executable, str(Path(__file__).with_name("onnx_worker.py"))]
    with tempfile.TemporaryDirectory() as folder:
        np.save(Path(folder) / "pixels.npy", pixels)
        paths = {"pixels": f"{folder}/pixels.npy", "out": f"{folder}/out.npz"}
        named = {name: str(file) for name, file in files.items()}
        spec = {"do": do, "files": named, "file": next(iter(named.values())), "threads": cores()}
        failed = f"ONNX Runtime failed on {', '.join(f.name for f in files.values())}"
        result = answered(command, spec | paths | job, failed)
        if Path(paths["out"]).exists():
            with np.load(paths["out"]) as found:
                result["outputs"] = dict(found)
        return result


def outputs(file: Path, pixels: UInt8[np.ndarray, "n 3 s s"]) -> dict[str, np.ndarray]:
    """Features (n, 2w), and logits (n, classes) where there is a head, in the runtime."""
    return run_job("outputs", {"file": file}, pixels, batch=BATCH)["outputs"]


def speeds(
    files: dict[str, Path], pixels: UInt8[np.ndarray, "n 3 s s"], threads: int = 2, rounds: int = 30
) -> dict[str, dict[str, float]]:
    """{name: seconds a picture (the median; quartiles `low` and `high`), `speedup` of medians over the first file}, one picture at a time, the files interleaved."""
    return run_job("speed", files, pixels, threads=threads, rounds=rounds)["files"]


def peak(file: Path, pixels: UInt8[np.ndarray, "n 3 s s"], threads: int = 2) -> int:
    """Peak bytes of a process that loads the file and classifies the pictures one by one (Python, numpy and the runtime included)."""
    return int(run_job("memory", {"file": file}, pixels, threads=threads)["peak_rss_bytes"])


def quantize(file: Path, out: Path, pixels: UInt8[Tensor, "n 3 s s"] | None = None) -> None:
    """ONNX Runtime's own quantization of a file to eight bits, a scale a column: what a user would do without Sartor. Dynamic, as for transformers; static, as for convolutions, where there are pictures to see ranges on."""
    import logging

    from onnxruntime.quantization import QuantType, quantize_dynamic, quantize_static

    logging.getLogger().setLevel(logging.ERROR)  # it warns of pre-processing on the root logger
    if pixels is not None:
        feeds = iter([{"pixels": one[None]} for one in pixels.numpy()])
        reader: Any = SimpleNamespace(get_next=lambda: next(feeds, None))
        kinds = {"activation_type": QuantType.QUInt8, "weight_type": QuantType.QInt8}
        quantize_static(file, out, reader, per_channel=True, **kinds)
        return
    extra = {"DefaultTensorType": 1}  # of what com.microsoft operators say: fp32
    quantize_dynamic(file, out, per_channel=True, weight_type=QuantType.QInt8, extra_options=extra)
