"""The runtimes that run a language model, as a table: a job for one, in a process of its own."""

from __future__ import annotations

import importlib.util
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sartor.errors import MissingExtra
from sartor.export.apart import answered


@dataclass(frozen=True)
class Runtime:
    """A row: its name, its worker beside this file, the module that it needs, and the pip command for that."""

    name: str
    worker: str
    module: str
    install: str


RUNTIMES = {
    "gguf": Runtime("llama.cpp", "llama_worker.py", "xllamacpp", "pip install xllamacpp==2026.10.11549"),
    "onnx": Runtime("ONNX Runtime", "onnx_text_worker.py", "onnxruntime", "pip install onnxruntime==1.32.0"),
}


def run_job(runtime: str, file: Path, do: str, threads: int | None = None, **job: Any) -> dict[str, Any]:
    """Run one job of `text_jobs.JOBS` and return its result, with "seconds" and "peak_rss_bytes" of the process.

    Args:
        runtime: a row of RUNTIMES. threads: None for all cores.
    Raises:
        MissingExtra: the runtime is not installed. SartorError: it failed; its last words are in the message.
    """
    row = RUNTIMES[runtime]
    if importlib.util.find_spec(row.module) is None:
        raise MissingExtra(f"{row.name} is not installed: {row.install}")
    spec = {"do": do, "file": str(file), "threads": threads or os.cpu_count() or 1, **job}
    command = [sys.executable, str(Path(__file__).with_name(row.worker))]  # by path: the package would load torch
    return answered(command, spec, f"{row.name} failed on {file.name}")
