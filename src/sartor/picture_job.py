"""A job on pictures: model and photos opened and checked, the head fitted, before any cut is decided."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sartor.data.album import Album, split
from sartor.data.photos import read_photos
from sartor.errors import DataError, InputError
from sartor.job import Job
from sartor.model.classifier import rows_for
from sartor.model.graph import Graph
from sartor.model.kinds import load_seer
from sartor.pictures import Pictures
from sartor.plan import parse_budget
from sartor.probing import Tell
from sartor.sources import Source
from sartor.stages.head import Head, choose_head, clustered, depths, with_head

WEIGHTS = "int8"


@dataclass(frozen=True)
class Generic:
    """Public pictures that stand for everyone else: some help to fit, the others are measured on."""

    train: Tensor
    test: Tensor


class PreparedPictures:
    """Model, photos and head of a job.

    Attributes:
        whole: the network as it came. dense: the same, as far as it is read, with the head. labelled: the classes are the user's, not clusters of their pictures.
        own: what the head that the network came with says of these classes, or None.
    """

    def __init__(self, job: Job, source: Source, tell: Tell, known: bool = True, depth: int | None = None) -> None:
        """Args: known: the head that the network came with may know classes by name. depth: where the network is read, as an earlier job found."""
        self.notes: list[str] = []  # that the report must say beside the model's and the photos' own
        self.budget = parse_budget(job.size, job.effort)
        self.source = source
        self.whole: Any = load_seer(source.folder)
        if job.steps > 1 and isinstance(self.whole, Graph):
            raise InputError("--steps is for transformers, and this is a convolutional network: leave it out")
        size = self.whole.size
        tell("open", 0.2, "photos")
        gallery = read_photos(Path(job.data), size, _labels(job))
        self.album: Album = split(gallery, job.seed)
        self.generic = generic_pictures(job.generic, size, job.seed, set(gallery.exact))
        del gallery
        tell("open", 0.6, "a head on features as they are")
        self.labelled = self.album.train.labels is not None
        self.labels, self.classes = self._classes(job.seed)
        self.own, note = (
            rows_for(source.folder, self.whole, source.classes, self.album.classes)
            if self.labelled and known
            else (None, "")
        )
        self.notes += [note] if note else []
        train = self.album.train.pixels
        self.head: Head = choose_head(
            self.whole, train, self.labels[0], self.classes, job.seed, depth, depth, own=self.own
        )
        self.dense = with_head(self.whole, self.head)
        self.parameters = sum(p.numel() for p in self.whole.parameters())
        self.original_fp16 = 2 * self.parameters
        self.budget_bytes = self.budget.bytes_of(self.original_fp16)

    def _classes(self, seed: int) -> tuple[tuple[Tensor, Tensor, Tensor], int]:
        """Labels of training, validation and test pictures, and how many classes: the user's, or clusters."""
        parts = self.album.train, self.album.validation, self.album.test
        if self.labelled:
            return tuple(p.labels for p in parts), len(self.album.classes)  # type: ignore[return-value]
        (train, validation, test), k = clustered(self.whole, [p.pixels for p in parts], seed)
        return (train, validation, test), k

    @property
    def pictures(self) -> Pictures:
        train, validation, _ = self.labels
        return Pictures(
            self.album.train.pixels, train, self.album.validation.pixels, validation, self.generic.train, self.labelled
        )

    def fingerprint(self) -> str:
        """sha256 over all that shapes a job: an interrupted one may only go on with the very same data."""
        digest = hashlib.sha256(self.photos_sha256().encode())
        digest.update(self.generic.train.numpy().tobytes() + self.generic.test.numpy().tobytes())
        for part in (self.own.weight, self.own.bias) if self.own else ():
            digest.update(part.numpy().tobytes())
        return digest.hexdigest()

    def photos_sha256(self) -> str:
        """The same over the user's photos, their labels and the splits that they are in."""
        return photos_sha256(self.album, self.labelled)

    @property
    def depth(self) -> int:
        """Places where the original can be read, one behind the other."""
        return depths(self.whole)


def photos_sha256(album: Album, labelled: bool) -> str:
    """sha256 over photos, the splits that they are in, and their labels where they have any: clusters follow from the photos, but for the last digits."""
    digest, parts = hashlib.sha256(), (album.train, album.validation, album.test)
    for part in parts:
        digest.update(part.pixels.numpy().tobytes())
    for part in parts if labelled else ():
        assert part.labels is not None
        digest.update(part.labels.numpy().tobytes())
    return digest.hexdigest()


def refuse_other_photos(
    report: dict[str, Any], album: Album, sha256: str, classes: Sequence[str], labelled: bool
) -> None:
    """Raises InputError for photos that the artifact of this report, with these classes, was not fitted to.

    Args:
        sha256: of `photos_sha256`.
    """
    was, known = report["data"], (album.classes if labelled else ())
    same = was["sha256"] == sha256 if "sha256" in was else album.counts() == was["pictures"]
    if tuple(classes) != tuple(known) or not same:
        raise InputError(
            "the photos or their classes are not those this artifact was fitted to, or are split differently: with others, what was held out would be mixed with what it learnt; give the same folder, and the same --labels where a file names them"
        )


def _labels(job: Job) -> Path | None:
    return Path(job.labels).expanduser() if job.labels else None


def generic_pictures(path: str | None, size: int, seed: int, own: Set[str]) -> Generic:
    """Public pictures, however they lie, most of them to fit with; none where there is no folder. Pictures that are the user's too are left out.

    Args:
        own: `Gallery.exact` of the user's.
    Raises:
        InputError: the folder holds too few pictures.
    """
    if path is None:
        return Generic(*(torch.zeros(0, 3, size, size, dtype=torch.uint8) for _ in range(2)))
    try:
        album = split(read_photos(Path(path), size, loose=True).without(own), seed)
    except DataError as error:
        raise InputError(f"--generic: {error}") from error
    return Generic(torch.cat([album.train.pixels, album.validation.pixels]), album.test.pixels)
