"""ExecuTorch and LiteRT files, and the reading of Core ML packages, in a process of its own: a job as JSON on stdin, its result as JSON on stdout.

One picture at a time. Pictures come and results go as numpy files.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import coreml_reader  # by path, as this file is started: the package would load torch
import numpy as np
from worker import answer, measured

sys.path.pop(0)  # this folder, whose executorch.py would stand before the package of that name
WARM_UP = 3  # runs before the clock counts
OUTPUTS = ("logits", "features")
Run = Callable[[np.ndarray], dict[str, np.ndarray]]


def _named(found: list[np.ndarray]) -> dict[str, np.ndarray]:
    """Logits only where there is a head."""
    return dict(zip(OUTPUTS[-len(found) :], found, strict=True))


def load_executorch(file: str, threads: int) -> Run:
    """The runtime's Python side takes torch's tensors, so torch is in memory too."""
    try:
        import executorch.kernels.quantized  # noqa: F401  operators on whole numbers that XNNPACK leaves
        import torch
        from executorch.extension.pybindings.portable_lib import _unsafe_reset_threadpool
        from executorch.runtime import Runtime
    except ImportError as error:
        raise SystemExit("ExecuTorch is not installed: pip install executorch==1.5.1 torchao==0.18.0") from error
    _unsafe_reset_threadpool(threads)
    program = Runtime.get().load_program(file)
    method = program.load_method("forward")

    def run(pixels: np.ndarray, program: Any = program) -> dict[str, np.ndarray]:
        return _named([y.numpy().copy() for y in method.execute((torch.from_numpy(pixels),))])

    return run


def load_litert(file: str, threads: int) -> Run:
    try:
        from ai_edge_litert.interpreter import Interpreter
    except ImportError as error:
        raise SystemExit("LiteRT is not installed: pip install ai-edge-litert==2.3.0") from error
    interpreter = Interpreter(model_path=file, num_threads=threads)
    interpreter.allocate_tensors()
    signature = interpreter.get_signature_runner()
    name = next(iter(signature.get_input_details()))

    def run(pixels: np.ndarray) -> dict[str, np.ndarray]:
        found = signature(**{name: pixels})
        return _named([found[key] for key in sorted(found)])  # output_0, output_1

    return run


LOAD: dict[str, Callable[[str, int], Run]] = {
    "executorch": load_executorch,
    "litert": load_litert,
    "coreml": coreml_reader.load,
}


def job_run(job: dict[str, Any]) -> dict[str, Any]:
    """All outputs of all pictures into the file `out`, and the median of seconds a picture."""
    run, pixels = LOAD[job["runtime"]](job["file"], job["threads"]), np.load(job["pixels"])
    parts = [run(pixels[n : n + 1]) for n in range(len(pixels))]
    np.savez(job["out"], **{name: np.concatenate([p[name] for p in parts]) for name in parts[0]})  # type: ignore[arg-type]
    times = []
    for n in range(WARM_UP + job["rounds"] if job["rounds"] else 0):
        picture = pixels[n % len(pixels)][None]
        started = time.perf_counter()
        run(picture)
        times.append(time.perf_counter() - started)
    return {"seconds": float(np.median(times[WARM_UP:])) if times else None}


def job_constants(job: dict[str, Any]) -> dict[str, Any]:
    """Every tensor of numbers in a Core ML package into the file `out`."""
    np.savez(job["out"], **coreml_reader.constants(job["file"]))
    return {}


JOBS = {"run": job_run, "constants": job_constants}


def work(job: dict[str, Any]) -> dict[str, Any]:
    """One job; what goes wrong is said in one line that names no folder."""
    try:
        return JOBS[job["do"]](job)
    except Exception as error:
        said = " ".join(f"{type(error).__name__}: {error}".replace(job["file"], Path(job["file"]).name).split())
        raise SystemExit(said[:300]) from error


if __name__ == "__main__":
    answer(measured(work))
