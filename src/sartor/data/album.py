"""From photos to splits that share nothing: train, validation, test.

Exact duplicates are dropped (the earliest stays), and near duplicates stay together: whole clusters are assigned, so that
none crosses a split. Where the owner has split the photos already, that split is kept.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Int64, UInt8
from scipy.sparse import csr_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor, nn

from sartor.data.photos import LEAST_CLASS, LEAST_PHOTOS, Gallery
from sartor.errors import DataError
from sartor.numerics.metrics import wilson

SHARES = {"train": 0.65, "validation": 0.15, "test": 0.20}
PARTS = tuple(SHARES)  # by index; of near duplicates in several parts of an owner's split, those in the last one stay
TRAIN, VALIDATION, TEST = range(3)
TRUSTED_TEST_PHOTOS = 60
TRUSTED_CLASS_PHOTOS = 10
SMALL = 32  # pixels of a side of small copies
# correlations of those of near duplicates: as they are, of what they have beside the mean of all, and as they are where that suffices
ALIKE, OWN, SAME = 0.985, 0.9, 0.999
FLAT = 0.5  # levels of 255 that the pixels of a copy scatter by at least
TRIMMED = (0.0, 0.01, 0.02, 0.03, 0.04)  # of a side, that may be cut off every edge of one of them
BLOCK = 512  # rows of correlations at a time: 16 MB for 4,000 photos


@dataclass(frozen=True)
class Part:
    """Photos in a seeded order; labels are indices into the album's classes, or None."""

    pixels: UInt8[Tensor, "n 3 s s"]
    labels: Int64[Tensor, " n"] | None


@dataclass(frozen=True)
class Album:
    """The user's photos, split. `dropped` counts what was left out and why; `warnings` say what weakens the report."""

    train: Part
    validation: Part
    test: Part
    classes: tuple[str, ...]
    dropped: dict[str, int]
    warnings: tuple[str, ...] = ()

    def counts(self) -> dict[str, int]:
        return {name: len(getattr(self, name).pixels) for name in SHARES}


def split(gallery: Gallery, seed: int = 0) -> Album:
    """Split what was read, stratified by class where there are classes.

    Raises:
        DataError: too few photos, or fewer than two classes, once duplicates and small classes are dropped.
    """
    rng = np.random.default_rng(seed)
    dropped = Counter(gallery.dropped)
    owner, warnings = _owner(gallery)
    labels = np.zeros(len(gallery.part), np.int64) if gallery.labels is None else gallery.labels.numpy()
    keep = _distinct(gallery.exact, labels, owner, dropped)
    if gallery.labels is not None:
        keep = _large_enough(keep, labels, dropped)
    clusters = near_duplicates(gallery.pixels)[keep]
    if owner is None:
        part = _assign(clusters, labels[keep], SHARES, rng)
    else:
        keep, clusters = _not_leaking(keep, clusters, owner, dropped)
        part = _kept_split(clusters, labels[keep], owner[keep], rng)
    once = _once_in_test(clusters, labels[keep], part)
    _count(dropped, "test photos nearly the same as another", int((~once).sum()))
    keep, part = keep[once], part[once]
    complete = np.ones(len(keep), bool) if gallery.labels is None else _complete(part, labels[keep])
    _count(dropped, "photos of classes that could not fill train and test", int((~complete).sum()))
    return _album(gallery, keep[complete], part[complete], dropped, warnings, rng)


def _count(dropped: Counter[str], why: str, n: int) -> None:
    if n:
        dropped[why] += n


def _once_in_test(
    clusters: Int[np.ndarray, " n"], labels: Int[np.ndarray, " n"], part: Int[np.ndarray, " n"]
) -> Bool[np.ndarray, " n"]:
    """All but the later photos of a cluster and class in the test: the pictures of one burst are named alike, and would count as so many answers."""
    test, once = np.flatnonzero(part == TEST), part != TEST
    once[test[np.unique(np.stack([clusters, labels])[:, test], axis=1, return_index=True)[1]]] = True
    return once


def _owner(gallery: Gallery) -> tuple[Int[np.ndarray, " n"] | None, list[str]]:
    """The owner's parts by index, or None: without a test, the validation photos are the test."""
    names = [name or "train" for name in gallery.part]
    if "test" not in names and "validation" not in names:
        return None, []
    owner = np.array([PARTS.index(name) for name in names])
    if "test" in names:
        return owner, []
    owner[owner == VALIDATION] = TEST
    return owner, ["there is no test folder: the validation photos were taken for the test"]


def _distinct(
    exact: tuple[str, ...],
    labels: Int[np.ndarray, " n"],
    owner: Int[np.ndarray, " n"] | None,
    dropped: Counter[str],
) -> Int[np.ndarray, " k"]:
    """Indices without exact duplicates: the earliest stays, a test photo before others; of equal photos in several classes none."""
    order = range(len(exact)) if owner is None else np.argsort(-owner, kind="stable").tolist()
    classes: dict[str, set[int]] = {}
    for i, key in enumerate(exact):
        classes.setdefault(key, set()).add(int(labels[i]))
    seen: set[str] = set()
    keep = []
    for i in order:
        if len(classes[exact[i]]) > 1:
            dropped["equal photos in several classes"] += 1
        elif exact[i] in seen:
            dropped["exact duplicates"] += 1
        else:
            seen.add(exact[i])
            keep.append(i)
    return np.array(sorted(keep), np.int64)


def _large_enough(
    keep: Int[np.ndarray, " n"], labels: Int[np.ndarray, " m"], dropped: Counter[str]
) -> Int[np.ndarray, " k"]:
    sizes = np.bincount(labels[keep], minlength=1)
    large = sizes[labels[keep]] >= LEAST_CLASS
    _count(dropped, f"photos of classes with fewer than {LEAST_CLASS} photos", int((~large).sum()))
    return keep[large]


def near_duplicates(pixels: UInt8[Tensor, "n 3 s s"]) -> Int[np.ndarray, " n"]:
    """The cluster of each photo: near duplicates are together, and so are the friends of friends.

    Near are two photos whose small copies correlate by ALIKE, as they are or with something cut off each edge of one, and so does, by OWN, what they have beside the mean of all photos: one outline, or the
    colour of water, is no likeness; copies that correlate by SAME need no such proof. How many are found, and what escapes: docs/method.md.
    """
    n = len(pixels)
    near = np.zeros((n, n), bool)
    whole = _small(pixels, 0.0)
    mean = whole.mean(0) if n else whole
    looks, own = _unit(whole), _unit(whole - mean)
    for share in TRIMMED:
        trimmed = _small(pixels, share) if share else whole
        theirs = _unit(trimmed), _unit(trimmed - mean)
        for start in range(0, n, BLOCK):
            block = slice(start, start + BLOCK)
            alike = theirs[0][block] @ looks.T
            near[block] |= (alike >= ALIKE) & ((alike >= SAME) | (theirs[1][block] @ own.T >= OWN))
    return connected_components(csr_array(near), directed=False)[1].astype(np.int64)


def _small(pixels: UInt8[Tensor, "n 3 s s"], trimmed: float) -> Float[np.ndarray, "n d"]:
    """Copies of SMALL pixels a side, that share of a side cut off each edge, each colour without its mean."""
    off = round(trimmed * pixels.shape[-1])
    middle = slice(off, pixels.shape[-1] - off)
    shrink = partial(nn.functional.interpolate, size=(SMALL, SMALL), mode="bilinear", antialias=True)
    blocks = [shrink(b[..., middle, middle].float()) for b in pixels.split(64)]
    small = torch.cat(blocks) if len(pixels) else torch.zeros(0, 3, SMALL, SMALL)
    return (small - small.mean((2, 3), keepdim=True)).flatten(1).numpy()


def _unit(small: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "n d"]:
    """Of length one; nothing where nothing is to be seen, so that it is like nothing."""
    length = np.linalg.norm(small, axis=1, keepdims=True)
    return np.where(length > FLAT * small.shape[1] ** 0.5, small / np.maximum(length, 1e-9), 0.0)


def _not_leaking(
    keep: Int[np.ndarray, " n"],
    clusters: Int[np.ndarray, " n"],
    owner: Int[np.ndarray, " m"],
    dropped: Counter[str],
) -> tuple[Int[np.ndarray, " k"], Int[np.ndarray, " k"]]:
    """Without the train and validation photos that are near a photo of a later part."""
    last = np.zeros(clusters.max(initial=0) + 1, np.int64)
    np.maximum.at(last, clusters, owner[keep])
    stays = owner[keep] == last[clusters]
    for part in (VALIDATION, TEST):
        lost = ~stays & (last[clusters] == part)
        _count(dropped, f"near duplicates of {PARTS[part]} photos outside {PARTS[part]}", int(lost.sum()))
    return keep[stays], clusters[stays]


def _kept_split(
    clusters: Int[np.ndarray, " n"], labels: Int[np.ndarray, " n"], owner: Int[np.ndarray, " n"], rng: Any
) -> Int[np.ndarray, " n"]:
    """The owner's parts; a validation that is missing is taken from train."""
    part = owner.copy()
    if not (owner == VALIDATION).any():
        train = owner == TRAIN
        part[train] = _assign(clusters[train], labels[train], {k: SHARES[k] for k in ("train", "validation")}, rng)
    return part


def _assign(
    clusters: Int[np.ndarray, " n"], labels: Int[np.ndarray, " n"], shares: dict[str, float], rng: Any
) -> Int[np.ndarray, " n"]:
    """Whole clusters to parts: the largest first, each to the part that lacks most of its classes, ties to the emptiest part."""
    weight = np.array([shares[name] for name in PARTS if name in shares])
    weight /= weight.sum()
    table = _by_cluster(clusters, labels)
    lacking = weight[:, None] * table.sum(0)
    filled = np.zeros(len(weight))
    where = np.zeros(len(table), np.int64)
    sizes = table.sum(1)
    order = rng.permutation(len(table))
    for c in order[np.argsort(-sizes[order], kind="stable")]:
        need = lacking @ table[c] / sizes[c] - 1e-6 * filled / weight
        where[c] = int(need.argmax())
        lacking[where[c]] -= table[c]
        filled[where[c]] += sizes[c]
    _mend_(where, table, len(weight) - 1)
    return where[_index(clusters)]


def _index(clusters: Int[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
    return np.unique(clusters, return_inverse=True)[1]


def _by_cluster(clusters: Int[np.ndarray, " n"], labels: Int[np.ndarray, " n"]) -> Float[np.ndarray, "c k"]:
    """Photos of each cluster, by class."""
    index = _index(clusters)
    table = np.zeros((index.max(initial=-1) + 1, labels.max(initial=0) + 1))
    np.add.at(table, (index, labels), 1)
    return table


def _mend_(where: Int[np.ndarray, " c"], table: Float[np.ndarray, "c k"], last: int) -> None:
    """A class that train or the last part misses gets its smallest cluster whose move takes no other class out of both."""
    for to in (TRAIN, last) if last == TEST else (TRAIN,):
        for k in np.flatnonzero(table.sum(0)):
            if table[where == to, k].sum():
                continue
            mine = np.flatnonzero(table[:, k])
            for c in mine[np.argsort(table[mine].sum(1), kind="stable")]:
                rest = (where == where[c]) & (np.arange(len(where)) != c)
                if where[c] == VALIDATION or (table[rest].sum(0) > 0)[table[c] > 0].all():
                    where[c] = to
                    break


def _complete(part: Int[np.ndarray, " n"], labels: Int[np.ndarray, " n"]) -> Bool[np.ndarray, " n"]:
    """Whose class is both in train and in test."""
    both = set(labels[part == TRAIN].tolist()) & set(labels[part == TEST].tolist())
    return np.isin(labels, list(both))


def _album(
    gallery: Gallery,
    keep: Int[np.ndarray, " n"],
    part: Int[np.ndarray, " n"],
    dropped: Counter[str],
    warnings: list[str],
    rng: Any,
) -> Album:
    found = {name: keep[part == i] for i, name in enumerate(PARTS)}
    _enough(found, gallery, keep)
    labels, classes = gallery.labels, gallery.classes
    if labels is not None:
        old = np.unique(labels.numpy()[keep])
        classes = tuple(classes[i] for i in old)
        warnings = warnings + _few_shot(np.bincount(labels.numpy()[found["test"]], minlength=len(gallery.classes))[old])
    if len(found["test"]) < TRUSTED_TEST_PHOTOS:
        need = int(np.ceil(TRUSTED_TEST_PHOTOS / SHARES["test"]))
        warnings = [
            f"only {len(found['test'])} test photos: intervals are wide, {need} photos or more would make them trustworthy",
            *warnings,
        ]
    parts = {}
    for name, index in found.items():
        index = rng.permutation(index)
        mine = None if labels is None else labels.new_tensor(np.searchsorted(old, labels.numpy()[index]))
        parts[name] = Part(gallery.pixels[index], mine)
    return Album(**parts, classes=classes, dropped=dict(dropped), warnings=tuple(warnings))


def _enough(found: dict[str, Int[np.ndarray, " n"]], gallery: Gallery, keep: Int[np.ndarray, " n"]) -> None:
    if len(keep) < LEAST_PHOTOS:
        raise DataError(
            f"{len(keep)} of {len(gallery.part)} photos remain once duplicates and small classes are dropped, at least {LEAST_PHOTOS} are needed "
            "to fit and to test a model: add more photos"
        )
    if gallery.labels is not None and len(set(gallery.labels.numpy()[keep].tolist())) < 2:
        raise DataError(
            f"one class of {len(gallery.classes)} remains once duplicates and small classes are dropped, two are needed: add photos to the others"
        )
    empty = [name for name, index in found.items() if not len(index)]
    if empty:
        raise DataError(
            f"{len(keep)} photos have too few distinct ones to fill the {', '.join(empty)} split: add photos that are no copies of each other"
        )


def _few_shot(tested: Int[np.ndarray, " k"]) -> list[str]:
    few = int((tested < TRUSTED_CLASS_PHOTOS).sum())
    if not few:
        return []
    least = wilson(np.ones(TRUSTED_CLASS_PHOTOS, bool))[0]
    return [
        f"{few} of {len(tested)} classes have fewer than {TRUSTED_CLASS_PHOTOS} test photos: what is said of a single one of them has a wide interval ({TRUSTED_CLASS_PHOTOS} right of {TRUSTED_CLASS_PHOTOS} may still mean {least:.0%})"
    ]
