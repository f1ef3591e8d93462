"""Measuring vision artifacts in ONNX Runtime, user and generic side by side, and the control arms."""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sartor.clock import versions
from sartor.effort import PICTURE_EFFORTS
from sartor.errors import ParityError
from sartor.export import onnx_file, onnxrt
from sartor.job import Job
from sartor.numerics.metrics import mean_interval, wilson
from sartor.picture_job import THREADS, TIMED, WEIGHTS, PreparedPictures
from sartor.pictures import Fitted, Pictures, fit_pictures
from sartor.probing import Tell
from sartor.stages.head import choose_head, with_head
from sartor.stages.tune import TuneConfig

PARITY_PICTURES = 64
PARITY = 0.98  # least cosine of features: activations are rounded to eight bits in the runtime, not in PyTorch
NONE = TuneConfig(0.0), TuneConfig(0.0)


@dataclass(frozen=True)
class Originals:
    """The original as files: all layers with a head at their end in fp32 and in eight bits, and read where its features are clearest (quality is measured on that)."""

    whole: Path
    whole_int8: Path
    read: Path

    @staticmethod
    def written(p: PreparedPictures, folder: Path) -> Originals:
        whole = p.dense
        if p.head.depth < p.depth:
            at_end = choose_head(p.whole, p.album.train.pixels, p.labels[0], p.classes, first=p.depth)
            whole = with_head(p.whole, at_end)
        files = Originals(folder / "whole.onnx", folder / "whole-int8.onnx", folder / "read.onnx")
        onnx_file.write(files.whole, whole, "fp32")
        onnx_file.write(files.whole_int8, whole, WEIGHTS)
        onnx_file.write(files.read, p.dense, "fp32")
        return files


@dataclass(frozen=True)
class Answers:
    """What a file says of the test pictures, in its runtime."""

    right: np.ndarray
    nats: np.ndarray
    said: np.ndarray
    features: np.ndarray

    @property
    def accuracy(self) -> float:
        return float(self.right.mean())


def answers(file: Path, pixels: Tensor, labels: Tensor) -> Answers:
    found = onnxrt.outputs(file, pixels.numpy())
    log_p = torch.log_softmax(torch.tensor(found["logits"]).float(), -1)
    said = log_p.argmax(-1)
    nats = -log_p.gather(1, labels[:, None])[:, 0]
    return Answers((said == labels).numpy(), nats.numpy(), said.numpy(), found["features"])


def alike(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Cosine of features, picture by picture."""
    return np.asarray((one * other).sum(-1) / np.linalg.norm(one, axis=-1) / np.linalg.norm(other, axis=-1))


def measure_pictures(
    p: PreparedPictures, originals: Originals, artifact: Path, held: Any, tell: Tell
) -> dict[str, Any]:
    """Everything that is measured on the artifact itself and on the original, in ONNX Runtime, in one run.

    Args:
        held: PyTorch's network with the artifact's exact weights.
    """
    test, labels = p.album.test.pixels, p.labels[2]
    tell("measure", 0.0, "the artifact on held-out photos")
    ours = answers(artifact, test, labels)
    parity = check_parity(ours, held, test)
    tell("measure", 0.4, "the original on held-out photos")
    theirs = answers(originals.read, test, labels)
    tell("measure", 0.7, "speed and memory")
    files = {"whole": originals.whole, "int8": originals.whole_int8, "read": originals.read, "artifact": artifact}
    times = onnxrt.speeds(files, test[:TIMED].numpy(), THREADS)
    mine = times["artifact"]
    return {
        "kind": "pictures",
        "runtime": "ONNX Runtime",
        "bytes": {
            "artifact": artifact.stat().st_size,
            "original_fp16": p.original_fp16,
            "budget": p.budget_bytes,
            "dense_fp32": originals.whole.stat().st_size,
            "dense_int8": originals.whole_int8.stat().st_size,
        },
        "user": _user(p, ours, theirs),
        "generic": _generic(p, artifact, originals.read),
        "speed": {
            "seconds": mine["seconds"],
            "low": mine["low"],
            "high": mine["high"],
            "dense_seconds": times["whole"]["seconds"],
            "dense_int8_seconds": times["int8"]["seconds"],
            "dense_read_seconds": times["read"]["seconds"],
            "threads": THREADS,
        },
        "peak_rss_bytes": onnxrt.peak(artifact, test[:TIMED].numpy(), THREADS),
        "dense_peak_rss_bytes": onnxrt.peak(originals.whole, test[:TIMED].numpy(), THREADS),
        "parity": parity,
        "data": {
            "pictures": p.album.counts(),
            "classes": p.classes,
            "labelled": p.labelled,
            "dropped": p.album.dropped,
        },
        "head": {"depth": p.head.depth, "of": p.depth, "nats": p.head.nats},
        "versions": versions("sartor", "torch", "onnx", "onnxruntime", "pillow"),
    }


def _user(p: PreparedPictures, ours: Answers, theirs: Answers) -> dict[str, Any]:
    """The user's side: accuracy, or without labels how alike the features are."""
    same = {"pictures": len(ours.said), "agreement": float((ours.said == theirs.said).mean())}
    if not p.labelled:
        cosine = alike(ours.features, theirs.features)
        low, high = mean_interval(cosine)
        mean = float(cosine.mean())
        told = {"metric": "feature agreement", "dense": 1.0, "dense_ci95": [1.0, 1.0], "artifact": mean}
        return told | same | {"ci95": [low, high], "change": mean - 1, "change_ci95": [low - 1, high - 1]}
    return same | {
        "metric": "accuracy",
        "dense": theirs.accuracy,
        "artifact": ours.accuracy,
        "dense_ci95": list(wilson(theirs.right)),
        "ci95": list(wilson(ours.right)),
        "change": ours.accuracy - theirs.accuracy,
        "change_ci95": list(mean_interval(ours.right * 1.0 - theirs.right)),
        "nats": float(ours.nats.mean()),
        "dense_nats": float(theirs.nats.mean()),
    }


def _generic(p: PreparedPictures, artifact: Path, original: Path) -> dict[str, Any] | None:
    pixels = p.generic.test
    if not len(pixels):
        return None
    cosine = alike(*(onnxrt.outputs(f, pixels.numpy())["features"] for f in (artifact, original)))
    return {
        "metric": "feature agreement",
        "artifact": float(cosine.mean()),
        "ci95": list(mean_interval(cosine)),
        "pictures": len(pixels),
    }


def check_parity(ours: Answers, held: Any, test: Tensor) -> dict[str, Any]:
    """Parity of the file with PyTorch (fp32, the artifact's exact weights).

    Raises:
        ParityError: beyond the stated tolerance.
    """
    some = test[:PARITY_PICTURES]
    with torch.no_grad():
        features = held.features(some)
        said = held.head(features).argmax(-1).numpy()
    worst = float(alike(ours.features[: len(some)], features.numpy()).min())
    if worst < PARITY:
        raise ParityError(
            f"the ONNX file's features have a cosine of {worst:.4f} to PyTorch's, at least {PARITY} was expected: please report this"
        )
    return {"cosine": worst, "same_answers": float((ours.said[: len(some)] == said).mean()), "pictures": len(some)}


def picture_controls(
    p: PreparedPictures, job: Job, made: Fitted, originals: Originals, artifact: Path, tell: Tell
) -> list[dict[str, Any]]:
    """What a user would pick instead: the runtime's own eight bits, the adapted original at eight bits; and the same bytes with generic calibration."""
    test, labels = p.album.test.pixels, p.labels[2]
    ours = answers(artifact, test, labels)
    rows = []
    with tempfile.TemporaryDirectory() as tmp:
        file = Path(tmp) / "control.onnx"

        def row(name: str, compared: Answers | None, seconds: float | None = None, note: str = "") -> Answers:
            found = answers(file, test, labels)
            rows.append(_row(name, file, found, compared, seconds, note))
            return found

        tell("controls", 0.0, "the original, read at its end")
        file.write_bytes(originals.whole.read_bytes())
        row("the original with a head at its end, fp32", ours)
        onnxrt.quantize(originals.read, file)
        row("ONNX Runtime's own 8 bits of the original", ours)
        onnx_file.write(file, made.teacher.float(), WEIGHTS)
        row("the original adapted to your photos, 8 bits, nothing cut", ours)
        if len(p.generic.train):
            generic = Pictures(
                p.generic.train,
                torch.zeros(len(p.generic.train), dtype=torch.long),
                *p.pictures.judged,
                p.generic.train,
            )
            mine = p.pictures
            note = "" if job.controls == "full" else "before recovery"
            compared: Answers | None = None
            for n, (name, pictures) in enumerate((("personal", mine), ("generic", generic))):
                started = time.monotonic()
                tell("controls", 0.1 + 0.4 * n, f"same bytes, {name} calibration")
                plan = replace(made.plan, settled=False)
                recover = PICTURE_EFFORTS[job.effort].recover if job.controls == "full" else NONE[1]
                arm = fit_pictures(made.teacher.float(), plan, pictures, p.costs, job.effort, (NONE[0], recover))
                onnx_file.write(file, arm.model, WEIGHTS)
                compared = row(f"same bytes, {name} calibration", compared, time.monotonic() - started, note)
    return rows


def _row(
    name: str, file: Path, found: Answers, ours: Answers | None, seconds: float | None, note: str
) -> dict[str, Any]:
    against = (
        {}
        if ours is None
        else {
            "change": ours.accuracy - found.accuracy,
            "change_ci95": list(mean_interval(ours.right * 1.0 - found.right)),
        }
    )
    told = {"name": name, "bytes": file.stat().st_size, "accuracy": found.accuracy, "ci95": list(wilson(found.right))}
    return told | {"change": None, "change_ci95": None, "seconds": seconds, "note": note} | against
