"""torchao's weight-only quantization, in PyTorch, in a process of its own (`torch_worker.py`)."""

from __future__ import annotations

import importlib.util
import sys
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from artifacts import Artifact, scored, timed
from subject import Subject

from sartor.errors import MissingExtra
from sartor.export.apart import answered
from sartor.memory import cores

TYPES = ("int8", "int4")
PIP = "pip install torchao==0.18.0"
NOTE = "linears of the layers; the embedding, which is the head too, stays bf16; eager PyTorch in bf16; the file is without tokenizer"


def weight_only(subject: Subject, kind: str, work: Path) -> Artifact:
    """int8: a scale a row. int4: groups of 32 with scale and zero point, in the layout that PyTorch's CPU kernel reads."""
    if importlib.util.find_spec("torchao") is None:
        raise MissingExtra(f"torchao is not installed: {PIP}")
    ask = partial(_ask, {"folder": str(subject.source.folder), "kind": kind, "threads": cores()})
    started, file = time.monotonic(), work / "model.safetensors"
    read = ask(do="write", file=str(file))["read"]
    seconds, tokenizer = time.monotonic() - started, subject.dense.tokenizer
    scores, speed = partial(scored, ask, tokenizer), partial(timed, ask)
    return Artifact(file.stat().st_size, seconds, tokenizer, "PyTorch", scores, speed, read, NOTE)


def _ask(about: Mapping[str, Any], **job: Any) -> dict[str, Any]:
    command = [sys.executable, str(Path(__file__).with_name("torch_worker.py"))]
    return answered(command, {**about, **job}, f"torchao failed on {about['kind']}")
