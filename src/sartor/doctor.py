"""What is installed, what is missing, and the pip command for it."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import shutil
from collections.abc import Iterator

import torch

from sartor.export import coreml, executorch, litert, llama_quantizer
from sartor.memory import cores
from sartor.model.precision import pace, running_dtype
from sartor.sources import cache_dir

EXTRAS = {
    "torch": "pip install torch==2.13.0",
    "transformers": "pip install transformers==5.23.0",
    "accelerate": "pip install accelerate==1.15.0",
    "gguf": "pip install gguf==0.19.0",
    "xllamacpp": "pip install xllamacpp==2026.10.11549",
    "onnxruntime": "pip install onnxruntime==1.32.0",
    "onnx": "pip install onnx==1.23.2",
    "PIL": "pip install pillow",
    "executorch": f"{executorch.INSTALL}   (optional: sartor export --to executorch)",
    "litert_torch": f"{litert.INSTALL}   (optional: sartor export --to litert-int8)",
    "coremltools": f"{coreml.INSTALL}   (optional: sartor export --to coreml-int8)",
    "llama_cpp": f"{llama_quantizer.PIP}   (optional: llama.cpp's quantizer for the control arms)",
}


SLOWER = ": a slow machine, where standard and thorough look at fewer rows, and what is trained sees less text in the same time"


def lines() -> Iterator[str]:
    """One line a package, a tool and a fact about the processor."""
    for module, pip in EXTRAS.items():
        there = importlib.util.find_spec(module) is not None
        name = {"llama_cpp": "llama-cpp-python", "PIL": "pillow", "litert_torch": "litert-torch"}.get(module, module)
        yield (f"{name:16s} {importlib.metadata.version(name) if there else 'missing: ' + pip}")
    yield (
        f"{'npm':16s} {'found' if shutil.which('npm') else 'missing: install Node.js (only to fetch the default generic text)'}"
    )
    generic = cache_dir() / "generic" / "brown"
    yield (f"{'generic text':16s} {'cached' if generic.exists() else 'missing: sartor fetch-generic'}")
    bf16 = "faster" if running_dtype() == torch.bfloat16 else "slower"
    yield f"{'processor':16s} {cores()} cores, bf16 {bf16} than fp32{SLOWER if pace() < 1 else ''}"
