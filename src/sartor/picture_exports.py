"""A fitted network that sees, written for other runtimes, reopened there, and compared with PyTorch on photos that were held out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sartor import picture_storage, storage
from sartor.data.album import split
from sartor.data.photos import read_photos
from sartor.export import runtimes, seen
from sartor.picture_job import photos_sha256, refuse_other_photos
from sartor.picture_view import smaller

COMPARED = 16  # photos whose features are compared and that are timed, where none were held out
HELD_OUT = 128  # at most


def export_pictures(folder: Path, to: str, out: Path) -> Path:
    """Write a saved artifact for a runtime: onnx (its exact weights), or a row of `runtimes.ROWS`; beside it `picture_storage.describe`, for whoever runs it.

    Raises:
        InputError: there is no such runtime. MissingExtra: its packages are not installed.
    """
    model, _, classes = picture_storage.load(folder)
    name = _row_name(to, model)
    row = runtimes.row_for(name, model)
    file = storage.claim_folder(out) / f"model{row.ending}"
    runtimes.write(name, file, model)
    picture_storage.describe(model, classes, out)
    return file


def _row_name(to: str, model: Any) -> str:
    """onnx is what a model is fitted as."""
    return f"onnx-{seen.fitted_weights(model)}" if to == "onnx" else to


def measure_exports(
    folder: Path, names: Sequence[str], photos: Path, out: Path, labels: Path | None = None
) -> list[dict[str, Any]]:
    """Write a saved artifact for these runtimes (none: for all), reopen each file in its own and compare it with PyTorch: `runtimes.measure_all`.

    Args:
        photos, labels: those that the model was fitted to, split as they were then; for an artifact that was saved from Python, any.
    Raises:
        InputError: other photos: what was held out would be mixed with what it learnt.
    """
    model, _, classes = picture_storage.load(folder)
    names = [_row_name(name, model) for name in names]
    for name in names:
        runtimes.row_for(name, model)
    pixels, named = _held_out(folder, photos, labels, model.size, classes)
    picture_storage.describe(model, classes, storage.claim_folder(out))
    return runtimes.measure_all(model, out, pixels, names or None, labels=named)


def _held_out(
    folder: Path, photos: Path, labels: Path | None, size: int, classes: Sequence[str]
) -> tuple[Tensor, Tensor | None]:
    """Test pictures and their labels, spread evenly; of an artifact without report some of all, without labels."""
    if not (folder / "report.json").exists():
        pixels = read_photos(photos, size, loose=True).pixels
        return pixels[torch.randperm(len(pixels), generator=torch.Generator().manual_seed(0))[:COMPARED]], None
    report = storage.report_of(folder)
    gallery = read_photos(photos, report["head"].get("of_side", size), labels)
    album = split(gallery, report["seed"])
    labelled = report["data"]["labelled"] and album.test.labels is not None
    refuse_other_photos(report, album, photos_sha256(album, labelled), classes, labelled)
    at = torch.linspace(0, len(album.test.pixels) - 1, min(HELD_OUT, len(album.test.pixels))).round().long()
    named = album.test.labels[at] if labelled and album.test.labels is not None else None
    return smaller(album.test.pixels[at], size), named
