"""ONNX Runtime in a process of its own: a job as JSON on stdin, its result as JSON on stdout.

A process of its own keeps a crash of the runtime and its memory apart from ours, and makes its peak memory measurable. Pictures come and results go as numpy files.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
from worker import answer, measured, peak_memory  # by path, as this file is started: the package would load torch

WARM_UP = 3  # runs before the clock counts


def load(file: str, threads: int) -> Any:
    """A session on the CPU; its waiting threads sleep, so that sessions beside each other do not take each other's time."""
    try:
        import onnxruntime as ort
    except ImportError as error:
        raise SystemExit("ONNX Runtime is not installed: pip install onnxruntime==1.32.0") from error
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads, options.log_severity_level = threads, 1, 4
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    # without instructions for eight bits (VNNI) an x86 processor adds products in sixteen bits, which overflow unnoticed: exactly instead, where that is so
    options.add_session_config_entry("session.x64quantprecision", "1")
    try:
        return ort.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    except Exception as error:
        said = " ".join(str(error).replace(file, Path(file).name).split())
        raise SystemExit(f"it cannot be loaded: {said[:200]}") from error


def classify(session: Any, pixels: np.ndarray) -> dict[str, np.ndarray]:
    """Every output of the network by name."""
    names = [o.name for o in session.get_outputs()]
    return dict(zip(names, session.run(names, {"pixels": pixels}), strict=True))


def job_outputs(job: dict[str, Any]) -> dict[str, Any]:
    """All outputs of all pictures, `batch` at a time, into the file `out`."""
    session, pixels = load(job["file"], job["threads"]), np.load(job["pixels"])
    parts = [classify(session, pixels[i : i + job["batch"]]) for i in range(0, len(pixels), job["batch"])]
    np.savez(job["out"], **{name: np.concatenate([p[name] for p in parts]) for name in parts[0]})  # type: ignore[arg-type]
    return {"pictures": len(pixels)}


def job_speed(job: dict[str, Any]) -> dict[str, Any]:
    """Seconds a picture at batch 1 of several files: each picture goes through all of them before the next one, now in one order, now in the other.

    Files may read pictures of different sizes: each gets the size it reads.
    """
    given = np.load(job["pixels"])
    sessions = {name: load(file, job["threads"]) for name, file in job["files"].items()}
    pixels = {name: sized(given, session.get_inputs()[0].shape[-1]) for name, session in sessions.items()}
    times: dict[str, list[float]] = {name: [] for name in sessions}
    for n in range(WARM_UP + job["rounds"]):
        i = n % len(given)
        for name in list(sessions)[:: 1 if n % 2 else -1]:
            started = time.perf_counter()
            classify(sessions[name], pixels[name][i : i + 1])
            times[name].append(time.perf_counter() - started)
    quartiles = {name: np.percentile(t[WARM_UP:], [25, 50, 75]).tolist() for name, t in times.items()}
    first = quartiles[next(iter(quartiles))][1]
    return {
        "files": {
            n: {"seconds": q[1], "low": q[0], "high": q[2], "speedup": first / q[1]} for n, q in quartiles.items()
        }
    }


def sized(pixels: np.ndarray, side: int) -> np.ndarray:
    """The pictures at another size, by the nearest pixel: good enough to take the time."""
    index = np.arange(side) * pixels.shape[-1] // side
    return np.ascontiguousarray(pixels[:, :, index][..., index])


def job_memory(job: dict[str, Any]) -> dict[str, Any]:
    """Peak memory of loading the file and classifying the pictures one by one, and the memory before that."""
    import onnxruntime  # noqa: F401  its code is not the file's

    pixels = np.load(job["pixels"])
    before = peak_memory()
    session = load(job["file"], job["threads"])
    for n in range(len(pixels)):
        classify(session, pixels[n : n + 1])
    return {"before_bytes": before}


JOBS = {"outputs": job_outputs, "speed": job_speed, "memory": job_memory}


if __name__ == "__main__":
    answer(measured(lambda job: JOBS[job["do"]](job)))
