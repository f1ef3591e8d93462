"""Measuring vision artifacts in ONNX Runtime, user and generic side by side, and the control arms."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sartor.carving import CALIBRATED, carving_of
from sartor.clock import versions
from sartor.effort import picture_effort_of
from sartor.errors import ParityError
from sartor.export import onnxrt, seen
from sartor.job import Job
from sartor.map_view import THREADS, TIMED
from sartor.model.network import clone
from sartor.model.precision import computing
from sartor.numerics.metrics import cosines, mean_interval, paired_interval, wilson
from sartor.picture_job import WEIGHTS, PreparedPictures
from sartor.picture_view import View, smaller
from sartor.pictures import Fitted, Pictures, fit_pictures
from sartor.probing import Tell
from sartor.stages.head import choose_head, with_head
from sartor.stages.tune import TuneConfig

PARITY_PICTURES = 64
PARITY = 0.98  # least cosine of features: activations are rounded to eight bits in the runtime, not in PyTorch
EXACT_PICTURES, EXACT = 8, 0.9999  # the same for the original in fp32
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
            at_end = choose_head(p.whole, p.album.train.pixels, p.labels[0], p.classes, first=p.depth, own=p.own)
            whole = with_head(p.whole, at_end)
        files = Originals(folder / "whole.onnx", folder / "whole-int8.onnx", folder / "read.onnx")
        seen.write(files.whole, whole, "fp32")
        seen.write(files.whole_int8, carving_of(whole).eight(whole, p.album.train.pixels), WEIGHTS)
        seen.write(files.read, p.dense, "fp32")
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


def measure_pictures(
    p: PreparedPictures, side: int, originals: Originals, artifact: Path, held: Any, tell: Tell
) -> dict[str, Any]:
    """Everything that is measured on the artifact itself and on the original, in ONNX Runtime, in one run.

    Args:
        side: of the pictures that the artifact reads. held: PyTorch's network with the artifact's exact weights.
    """
    test, labels = p.album.test.pixels, p.labels[2]
    tell("measure", 0.0, "the artifact on held-out photos")
    ours = answers(artifact, smaller(test, side), labels)
    parity = check_parity(ours, held, smaller(test, side))
    tell("measure", 0.4, "the original on held-out photos")
    theirs = answers(originals.read, test, labels)
    check_original(theirs, p.dense, test)
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
        "generic": _generic(p, side, artifact, originals.read),
        "speed": {
            "seconds": mine["seconds"],
            "low": mine["low"],
            "high": mine["high"],
            "dense_seconds": times["whole"]["seconds"],
            "dense_int8_seconds": times["int8"]["seconds"],
            "dense_read_seconds": times["read"]["seconds"],
            "threads": THREADS,
        },
        "peak_rss_bytes": onnxrt.peak(artifact, smaller(test[:TIMED], side).numpy(), THREADS),
        "dense_peak_rss_bytes": onnxrt.peak(originals.whole, test[:TIMED].numpy(), THREADS),
        "parity": parity,
        "data": {
            "pictures": p.album.counts(),
            "classes": p.classes,
            "labelled": p.labelled,
            "dropped": p.album.dropped,
            "sha256": p.photos_sha256(),
        },
        "head": {
            "depth": p.head.depth,
            "of": p.depth,
            "nats": p.head.nats,
            "own_whole": p.head.own,
            "side": side,
            "of_side": test.shape[-1],
        },
        "versions": versions("sartor", "torch", "onnx", "onnxruntime", "pillow") | computing(),
    }


def _user(p: PreparedPictures, ours: Answers, theirs: Answers) -> dict[str, Any]:
    """The user's side: accuracy, or without labels how alike the features are."""
    same = {"pictures": len(ours.said), "agreement": float((ours.said == theirs.said).mean())}
    if not p.labelled:
        cosine = cosines(ours.features, theirs.features)
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
        "change_ci95": list(paired_interval(ours.right, theirs.right)),
        "nats": float(ours.nats.mean()),
        "dense_nats": float(theirs.nats.mean()),
        "by_class": _by_class(p.labels[2].numpy(), p.classes, ours, theirs),
    }


def _by_class(labels: np.ndarray, classes: int, ours: Answers, theirs: Answers) -> list[dict[str, Any]]:
    """Every class in the order of classes.json: held-out pictures, and how many of them were named right, with the interval of that share."""
    found = []
    for mine in (labels == c for c in range(classes)):
        right, ci = ours.right[mine], list(wilson(ours.right[mine])) if mine.any() else [0.0, 1.0]
        found.append(
            {
                "pictures": int(mine.sum()),
                "right": int(right.sum()),
                "ci95": ci,
                "dense_right": int(theirs.right[mine].sum()),
            }
        )
    return found


def _generic(p: PreparedPictures, side: int, artifact: Path, original: Path) -> dict[str, Any] | None:
    pixels = p.generic.test
    if not len(pixels):
        return None
    seen = (artifact, smaller(pixels, side)), (original, pixels)
    cosine = cosines(*(onnxrt.outputs(file, x.numpy())["features"] for file, x in seen))
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
    worst = float(cosines(ours.features[: len(some)], features.numpy()).min())
    if worst < PARITY:
        raise ParityError(
            f"the ONNX file's features have a cosine of {worst:.4f} to PyTorch's, at least {PARITY} was expected: please report this"
        )
    return {"cosine": worst, "same_answers": float((ours.said[: len(some)] == said).mean()), "pictures": len(some)}


def check_original(theirs: Answers, dense: Any, test: Tensor) -> None:
    """The original's file says what PyTorch says: a fault of the export would flatter us.

    Raises:
        ParityError: it does not.
    """
    some = test[:EXACT_PICTURES]
    with torch.no_grad():
        worst = float(cosines(theirs.features[: len(some)], dense.features(some).numpy()).min())
    if worst < EXACT:
        raise ParityError(
            f"the original's ONNX file has features with a cosine of {worst:.5f} to PyTorch's, at least {EXACT} was expected: please report this"
        )


def picture_controls(
    p: PreparedPictures, view: View, job: Job, made: Fitted, originals: Originals, artifact: Path, tell: Tell
) -> list[dict[str, Any]]:
    """What a user would pick instead: the runtime's own eight bits, the adapted original at eight bits; and the same bytes with generic calibration."""
    test, labels = p.album.test.pixels, p.labels[2]
    ours = answers(artifact, view.seen(test), labels)
    with tempfile.TemporaryDirectory() as tmp:
        file = Path(tmp) / "control.onnx"

        def measured(pixels: Tensor) -> tuple[int, Answers]:
            return file.stat().st_size, answers(file, pixels, labels)

        def measured_arm(network: Any) -> tuple[int, Answers]:
            seen.write(file, network, seen.fitted_weights(network))
            return measured(view.seen(test))

        tell("controls", 0.0, "the original at eight bits, and adapted")
        file.write_bytes(originals.whole.read_bytes())
        rows = [_row("the original with a head at its end, fp32", *measured(test), ours)]
        some = p.album.train.pixels[:CALIBRATED] if carving_of(p.dense).rounds else None
        onnxrt.quantize(originals.read, file, some)
        rows.append(
            _row(f"ONNX Runtime's own 8 bits of the original's first {p.head.depth} layers", *measured(test), ours)
        )
        teacher = clone(made.teacher, torch.float32)
        seen.write(file, carving_of(teacher).eight(teacher, view.pictures.train), WEIGHTS)
        left = "nothing" if not view.narrow else f"nothing else than to {view.key_dim} dimensions to compare patches by"
        name = f"the original adapted to your photos, {{}}, {left} cut"
        rows.append(_row(name.format("8 bits"), *measured(view.seen(test)), ours))
        if job.controls == "full":
            seen.write(file, teacher, "fp32")
            rows.append(_row(name.format("fp32"), *measured(view.seen(test)), ours))
        if len(p.generic.train):
            shipped = artifact.stat().st_size, ours
            rows += _calibrated(view, job, made, shipped, measured_arm, tell)
    return rows


def _calibrated(
    view: View,
    job: Job,
    made: Fitted,
    shipped: tuple[int, Answers],
    measured: Callable[[Any], tuple[int, Answers]],
    tell: Tell,
) -> list[dict[str, Any]]:
    """The same bytes from the same adapted network, cuts and fit once on the user's pictures, which is what the job did, and once on generic ones; with recovery where all controls are wanted.

    Args:
        shipped, measured: (bytes, answers) of the artifact, and of a network's file.
    """
    full, generic = job.controls == "full", view.pictures.generic
    theirs = Pictures(generic, torch.zeros(len(generic), dtype=torch.long), *view.pictures.judged, generic)
    fitted = partial(_fitted_anew, view, job, made, full)
    before = None if made.plan.steps > 1 else made.unrecovered  # steps have recovered it already
    arms: dict[str, Callable[[], tuple[int, Answers]]] = {
        "personal": lambda: shipped if full else measured(before or fitted(view.pictures)),
        "generic": lambda: measured(fitted(theirs)),
    }
    rows: list[dict[str, Any]] = []
    compared: Answers | None = None
    for n, (name, arm) in enumerate(arms.items()):
        started, title = time.monotonic(), f"same bytes, {name} calibration"
        tell("controls", 0.1 + 0.4 * n, title)
        size, found = arm()
        seconds = None if name == "personal" else time.monotonic() - started  # that one the job made anyway
        note = "" if full else "before recovery"
        rows.append(_row(title, size, found, compared, seconds, note) | {"against": "personal"})
        compared = found
    return rows


def _fitted_anew(view: View, job: Job, made: Fitted, full: bool, pictures: Pictures) -> Any:
    """The adapted network settled, cut and fitted on these pictures, and recovered where `full`."""
    training = NONE[0], picture_effort_of(job.effort).recover if full else NONE[1]
    whole, plan = clone(made.teacher, torch.float32), replace(made.plan, settled=False, steps=1)
    steps = job.steps if full else 1
    return fit_pictures(whole, plan, pictures, view.costs, job.effort, training, steps=steps).model


def _row(
    name: str, size: int, found: Answers, ours: Answers | None, seconds: float | None = None, note: str = ""
) -> dict[str, Any]:
    told: dict[str, Any] = {"name": name, "bytes": size, "accuracy": found.accuracy, "ci95": list(wilson(found.right))}
    told |= {"change": None, "change_ci95": None, "seconds": seconds, "note": note}
    if ours is None:
        return told
    gain = list(paired_interval(ours.right, found.right))
    return told | {"change": ours.accuracy - found.accuracy, "change_ci95": gain}
