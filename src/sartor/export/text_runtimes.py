"""The runtimes that run a language model, as a table: a job for one, in a process of its own."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sartor.errors import MissingExtra
from sartor.export import executorch_text as et
from sartor.export import lowering
from sartor.export.apart import answered
from sartor.memory import cores


@dataclass(frozen=True)
class Runtime:
    """A row: its name, the file that is written for it, its worker beside this file, the modules that it needs, and the pip command for them."""

    name: str
    file: str
    worker: str
    needs: tuple[str, ...]
    install: str


RUNTIMES = {
    "gguf": Runtime(
        "llama.cpp", "model.gguf", "llama_worker.py", ("xllamacpp",), "pip install xllamacpp==2026.10.11549"
    ),
    "onnx": Runtime(
        "ONNX Runtime", "model.onnx", "onnx_text_worker.py", ("onnxruntime",), "pip install onnxruntime==1.32.0"
    ),
    "executorch": Runtime(et.NAME, et.FILE, "executorch_text_worker.py", et.NEEDS, et.INSTALL),
}


def absent(runtime: str) -> str | None:
    """That a runtime is not installed, with the pip command for it; None where it is."""
    row = RUNTIMES[runtime]
    return f"{row.name} is not installed: {row.install}" if lowering.missing(row.needs) else None


def runtime_of(file: Path) -> str | None:
    """The runtime that runs such a file."""
    return next((name for name, row in RUNTIMES.items() if Path(row.file).suffix == file.suffix), None)


def run_job(runtime: str, file: Path, do: str, threads: int | None = None, **job: Any) -> dict[str, Any]:
    """Run one job of `text_jobs.JOBS` and return its result, with "seconds" and "peak_rss_bytes" of the process.

    Args:
        runtime: a row of RUNTIMES. threads: None for all cores.
    Raises:
        MissingExtra: the runtime is not installed. SartorError: it failed; its last words are in the message.
    """
    row = RUNTIMES[runtime]
    if said := absent(runtime):
        raise MissingExtra(said)
    spec = {"do": do, "file": str(file), "threads": threads or cores(), **job}
    command = [sys.executable, str(Path(__file__).with_name(row.worker))]  # by path: the package would load torch
    return answered(command, spec, f"{row.name} failed on {file.name}")
