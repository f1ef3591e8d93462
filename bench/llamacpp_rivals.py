"""llama.cpp as a rival: the original as it is, its quantizer with and without an importance matrix, its layer pruning, and its quantizer on a network fine-tuned first.

The importance matrix is of the user's own text: better than the generic one that published files are made with.
"""

from __future__ import annotations

import json
import math
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import cells
import numpy as np
from artifacts import Artifact, gguf_artifact
from plain_tuning import PLAIN, tuned_
from subject import MATRIX_ROWS, SEED, Subject
from torch import nn

from sartor import evaluate
from sartor.errors import MissingExtra, SartorError
from sartor.export import llama_quantizer
from sartor.export.llama_quantizer import FTYPES
from sartor.model.precision import running_dtype
from sartor.probing import probe_rows
from sartor.sources import cache_dir
from sartor.stages.likelihood import nats_of

ORIGINAL = ("F16", "Q8_0")
TUNED = ("F16", *FTYPES)
LAYERS_TYPE = "IQ4_NL"  # of what is left when layers go: the finest of its four-bit types for the bytes
LEFT_OUT_ROWS = 16  # of 256 tokens, of the user's probe split, that layers are left out on


def original(subject: Subject, kind: str, work: Path) -> Artifact:
    """The original's own weights in F16, or rounded to Q8_0 without anything more."""
    if kind == "Q8_0":
        return gguf_artifact(subject.dense.q8_0, subject.dense.tokenizer, 0.0)
    known = gguf_artifact(subject.dense.f16, subject.dense.tokenizer, 0.0)
    return replace(
        known, scores=lambda windows: subject.reference()
    )  # all are compared with it: it is measured already


def quantized(subject: Subject, kind: str, work: Path) -> Artifact:
    """Without an importance matrix; types that insist on one fail."""
    return _written(subject, subject.dense.f16, kind, None, work)


def with_matrix(subject: Subject, kind: str, work: Path) -> Artifact:
    """With one."""
    _insist()
    matrix, seconds = subject.shared("importance matrix", lambda: _matrix(subject, subject.half()))
    return _written(subject, subject.dense.f16, kind, matrix, work, seconds)


def without_layers(subject: Subject, size: str, work: Path) -> Artifact:
    """As many layers left out as the size asks for, those first whose loss alone costs the user's text least."""
    _insist()
    matrix, before = subject.shared("importance matrix", lambda: _matrix(subject, subject.half()))
    order, more = subject.shared("layers left out", lambda: layer_order(subject))
    started, limit = time.monotonic(), subject.budget(size)

    def bytes_without(many: int) -> int:
        return llama_quantizer.quantize(subject.dense.f16, file, LAYERS_TYPE, matrix, without=order[:many])

    file, gone = work / "pruned.gguf", 0
    size_now = whole = bytes_without(0)
    if whole > limit:
        gone = max(1, math.ceil((whole - limit) / (whole - bytes_without(1))))
        while gone < len(order) and (size_now := bytes_without(gone)) > limit:
            gone += 1
    if size_now > limit:
        raise SartorError(f"without all but one of its layers {LAYERS_TYPE} is still above {limit:,} bytes")
    seconds = time.monotonic() - started + before + more
    return gguf_artifact(file, subject.dense.tokenizer, seconds, f"{gone} layers of {len(order)} left out")


def tuned(subject: Subject, kind: str, work: Path) -> Artifact:
    """The original fine-tuned on the user's text for as long as Sartor trains, then quantized with an importance matrix of the tuned network."""
    if kind != "F16":
        _insist()
    file, matrix, seconds = tuned_files(subject)
    if kind == "F16":
        return gguf_artifact(file, subject.dense.tokenizer, seconds)
    return _written(subject, file, kind, matrix, work, seconds)


def tuned_files(subject: Subject) -> tuple[Path, Mapping[str, np.ndarray], float]:
    """(the tuned network in F16, its importance matrix, the seconds both took), trained once a user and kept for all types."""
    about = subject.about(trained=True) | {"contender": "tuned", "version": PLAIN, "rows": MATRIX_ROWS}
    folder = cache_dir() / "bench" / "tuned" / cells.digest(about)
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(dir=folder.parent))
        try:
            _tune_into(part, subject)
            part.rename(folder)
        finally:
            shutil.rmtree(part, ignore_errors=True)
    with np.load(folder / "matrix.npz") as kept:
        matrix = {name: kept[name] for name in kept.files}
    return folder / "model.gguf", matrix, json.loads((folder / "about.json").read_text())["seconds"]


def _tune_into(folder: Path, subject: Subject) -> None:
    started, network = time.monotonic(), subject.network()
    course = tuned_(network, subject)
    evaluate.write_plain(folder / "model.gguf", network, subject.tokenizer, "F16")
    np.savez(folder / "matrix.npz", **_matrix(subject, network.to(running_dtype())))
    told = {"seconds": time.monotonic() - started, "curve": course.curve, "tokens": course.tokens}
    (folder / "about.json").write_text(json.dumps(told))


def layer_order(subject: Subject) -> list[int]:
    """Layers, the first to go first: by the user's coding length with each left out alone, exactly."""
    model = subject.half()
    rows = probe_rows(subject.texts.probe, subject.tokenizer, LEFT_OUT_ROWS, SEED)
    cost = []
    for n in range(len(model.model.layers)):
        with _left_out(model, n):
            cost.append(float(nats_of(model, rows).mean()))
    return [int(n) for n in np.argsort(cost, kind="stable")]


@contextmanager
def _left_out(model: Any, layer: int) -> Iterator[None]:
    """The network without one layer; undone on the way out."""
    every = model.model.layers
    model.model.layers = nn.ModuleList(m for n, m in enumerate(every) if n != layer)
    try:
        yield
    finally:
        model.model.layers = every


def _insist() -> None:
    """Before any work that would be lost."""
    if not llama_quantizer.available():
        raise MissingExtra(f"llama.cpp's quantizer is not installed: {llama_quantizer.PIP}")


def _matrix(subject: Subject, network: Any) -> dict[str, np.ndarray]:
    return llama_quantizer.importance(subject.moments(network))


def _written(
    subject: Subject, source: Path, kind: str, matrix: Mapping[str, np.ndarray] | None, work: Path, before: float = 0.0
) -> Artifact:
    """A file of one type; before: seconds that what it is made from took."""
    started, file = time.monotonic(), work / f"{kind}.gguf"
    llama_quantizer.quantize(source, file, kind, matrix)
    return gguf_artifact(file, subject.dense.tokenizer, before + time.monotonic() - started)
