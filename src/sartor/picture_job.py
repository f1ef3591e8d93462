"""A job on pictures: model and photos opened and checked, the head fitted, before any cut is decided."""

from __future__ import annotations

import hashlib
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sartor.data.album import Album, split
from sartor.data.photos import read_photos
from sartor.errors import BudgetError, DataError, InputError
from sartor.export import onnx_file, onnxrt
from sartor.job import Job
from sartor.model.checkpoints import load_vision
from sartor.model.network import BLOCK, Anatomy, anatomy, clone, layers_of, shrink_attention_, shrink_mlp_
from sartor.pictures import Pictures
from sartor.plan import parse_budget
from sartor.probing import Tell
from sartor.sources import Source
from sartor.stages.allot import Costs, smallest
from sartor.stages.head import Head, choose_head, clustered, with_head

WEIGHTS = "int8"
TIMED, THREADS = 8, 2  # pictures, and threads, that time is measured with
MARGIN = 0.04  # of the time asked for: what is measured again in the end is a little different


@dataclass(frozen=True)
class Generic:
    """Public pictures that stand for everyone else: some help to fit, the others are measured on."""

    train: Tensor
    test: Tensor


class PreparedPictures:
    """Model, photos and head of a job.

    Attributes:
        whole: the network as it came. dense: the same, as far as it is read, with the head. labelled: the classes are the user's, not clusters of their pictures.
    """

    def __init__(self, job: Job, source: Source, tell: Tell) -> None:
        self.budget = parse_budget(job.size, job.effort)
        self.source = source
        self.whole: Any = load_vision(source.folder)
        size = self.whole.config.size
        tell("open", 0.2, "photos")
        self.album: Album = split(read_photos(Path(job.data).expanduser(), size, _labels(job)), job.seed)
        self.generic = generic_pictures(Path(job.generic).expanduser() if job.generic else None, size, job.seed)
        tell("open", 0.6, "a head on features as they are")
        self.labelled = self.album.train.labels is not None
        self.labels, self.classes = self._classes(job.seed)
        self.head: Head = choose_head(self.whole, self.album.train.pixels, self.labels[0], self.classes, job.seed)
        self.dense = with_head(self.whole, self.head)
        self.parameters = sum(p.numel() for p in self.whole.parameters())
        self.original_fp16 = 2 * self.parameters
        self.budget_bytes = self.budget.bytes_of(self.original_fp16)
        self.costs = Costs(self.bytes_of, self.budget_bytes)
        if job.faster:
            tell("open", 0.9, "how long heads and channels take in the runtime")
            self.costs = timed(self, job.faster)

    def _classes(self, seed: int) -> tuple[tuple[Tensor, Tensor, Tensor], int]:
        """Labels of training, validation and test pictures, and how many classes: the user's, or clusters."""
        parts = self.album.train, self.album.validation, self.album.test
        if self.labelled:
            return tuple(p.labels for p in parts), len(self.album.classes)  # type: ignore[return-value]
        clusters, k = clustered(self.whole, torch.cat([p.pixels for p in parts]), seed)
        return clusters.split([len(p.pixels) for p in parts]), k

    @property
    def pictures(self) -> Pictures:
        train, validation, _ = self.labels
        return Pictures(self.album.train.pixels, train, self.album.validation.pixels, validation, self.generic.train)

    def bytes_of(self, a: Anatomy) -> int:
        """Exact bytes of the ONNX file of such a model."""
        return onnx_file.file_bytes(self.dense.config, a, WEIGHTS)

    def fingerprint(self) -> str:
        """sha256 over the split photos: an interrupted job may only go on with the very same data."""
        digest = hashlib.sha256()
        for part in (self.album.train, self.album.validation, self.album.test):
            digest.update(part.pixels.numpy().tobytes())
        for labels in self.labels:
            digest.update(labels.numpy().tobytes())
        digest.update(self.generic.train.numpy().tobytes() + self.generic.test.numpy().tobytes())
        return digest.hexdigest()

    @property
    def depth(self) -> int:
        """Layers of the original."""
        return len(layers_of(self.whole))


def _labels(job: Job) -> Path | None:
    return Path(job.labels).expanduser() if job.labels else None


def generic_pictures(path: Path | None, size: int, seed: int) -> Generic:
    """Public pictures, most of them to fit with; none where there is no folder.

    Raises:
        InputError: the folder holds too few pictures.
    """
    if path is None:
        return Generic(*(torch.zeros(0, 3, size, size, dtype=torch.uint8) for _ in range(2)))
    try:
        album = split(read_photos(path, size), seed)
    except DataError as error:
        raise InputError(f"--generic: {error}") from error
    return Generic(torch.cat([album.train.pixels, album.validation.pixels]), album.test.pixels)


def timed(p: PreparedPictures, faster: float) -> Costs:
    """What heads and blocks of channels cost in the runtime, measured on files of this model: whole, with few channels, with few heads, and the original in fp32.

    What they may take is the original's time by `faster`, less what the file takes beside them, and a MARGIN.

    Raises:
        BudgetError: the rest of the file alone takes longer.
    """
    a = anatomy(p.dense)
    few = smallest(a)
    sizes = {"whole": a, "channels": replace(a, ffn=few.ffn), "heads": replace(a, groups=few.groups)}
    with tempfile.TemporaryDirectory() as tmp:
        files = {name: Path(tmp) / f"{name}.onnx" for name in (*sizes, "original")}
        for name, size in sizes.items():
            onnx_file.write(files[name], resized(p.dense, size), WEIGHTS)
        onnx_file.write(files["original"], p.whole, "fp32")
        times = onnxrt.speeds(files, p.album.train.pixels[:TIMED].numpy(), THREADS)
    second = {name: found["seconds"] for name, found in times.items()}
    block = (second["whole"] - second["channels"]) / (sum(a.ffn) - sum(few.ffn)) * BLOCK
    head = (second["whole"] - second["heads"]) / (sum(a.groups) - sum(few.groups))
    costs = Costs(p.bytes_of, p.budget_bytes, max(block, 0.0), max(head, 0.0))
    beside = second["whole"] - costs.seconds(a)
    limit = (1 - MARGIN) * second["original"] / faster - beside
    if limit < costs.seconds(few):
        most = second["original"] / (beside + costs.seconds(few))
        raise BudgetError(
            f"{faster:g} times as fast as the original cannot be reached: at most about {most:.1f}; ask for less with --faster"
        )
    return replace(costs, limit=limit)


def resized(model: Any, a: Anatomy) -> Any:
    """A copy with the first heads and channels of each layer: for its time, not its words."""
    small = clone(model)
    for n in range(a.layers):
        shrink_attention_(small, n, range(a.groups[n]))
        shrink_mlp_(small, n, torch.arange(a.ffn[n]))
    return small
