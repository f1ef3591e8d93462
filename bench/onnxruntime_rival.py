"""ONNX Runtime's own way from a language model to four and eight bits: onnxruntime-genai's model builder, its file run by ONNX Runtime."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from artifacts import Artifact, scored, timed
from subject import Subject

from sartor.errors import MissingExtra, SartorError
from sartor.export.text_runtimes import run_job

PIP = "pip install onnxruntime-genai==0.18.0 onnx-ir==1.1.0"


@dataclass(frozen=True)
class Recipe:
    """What the builder is asked for: its precision, and how it chooses levels."""

    precision: str
    algorithm: str
    note: str


RECIPES: Mapping[str, Recipe] = {
    "int4": Recipe("int4", "default", "blocks of 32, rounded to nearest"),
    "int4 k_quant": Recipe("int4", "k_quant", "scales searched as llama.cpp's k-quants are"),
    "int4 mixed": Recipe("int4", "k_quant_mixed", "the same, eight bits for the head and for some layers"),
    "int8": Recipe("int8", "default", "blocks of 32, rounded to nearest"),
}


def available() -> bool:
    """Whether the builder is installed, with what it needs."""
    return all(importlib.util.find_spec(module) for module in ("onnxruntime_genai", "onnx_ir"))


def built(subject: Subject, kind: str, work: Path) -> Artifact:
    """One file, with a cache of keys and values; embedding and head in one where the builder can share them."""
    if not available():
        raise MissingExtra(f"onnxruntime-genai is not installed: {PIP}")
    recipe, started = RECIPES[kind], time.monotonic()
    _build(subject.source.folder, work, recipe)
    seconds, tokenizer, file = time.monotonic() - started, subject.dense.tokenizer, work / "model.onnx"
    size = sum(f.stat().st_size for f in work.glob("model.onnx*"))  # weights lie beside the graph
    ask = partial(run_job, "onnx", file)
    scores, speed = partial(scored, ask, tokenizer), partial(timed, ask)
    return Artifact(size, seconds, tokenizer, "ONNX Runtime", scores, speed, read_bytes(file), recipe.note)


def _build(folder: Path, out: Path, recipe: Recipe) -> None:
    """In a process of its own, that may not reach the network.

    Raises:
        SartorError: it failed; its last line is in the message.
    """
    command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-m", "", "-i", str(folder), "-o", str(out)]
    command += ["-p", recipe.precision, "-e", "cpu", "-c", str(out / "cache")]
    command += ["--extra_options", f"algo_config={recipe.algorithm}"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    if done.returncode or not (out / "model.onnx").exists():
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise SartorError(f"onnxruntime-genai's builder failed: {last[:200]}")
    _with_head_size(out / "model.onnx", json.loads((out / "genai_config.json").read_text()))


def _with_head_size(file: Path, config: Mapping[str, Any]) -> None:
    """Name the size of keys and values, that the builder leaves open, in the file: our worker makes room for them by it. The weights lie in another file."""
    import onnx

    model = onnx.load(file, load_external_data=False)
    for value in model.graph.input:
        if value.name.startswith("past_key_values."):
            value.type.tensor_type.shape.dim[3].dim_value = config["model"]["decoder"]["head_size"]
    file.write_bytes(model.SerializeToString())


def read_bytes(file: Path) -> int:
    """Of the weights, what a generated token needs: of tables that only rows are taken from next to nothing."""
    import onnx

    graph = onnx.load(file).graph
    read = {name for node in graph.node if not node.op_type.startswith("Gather") for name in node.input}
    return sum(onnx.numpy_helper.to_array(t).nbytes for t in graph.initializer if t.name in read)
