"""From a user's picture files to arrays of one size, with labels where there are any.

A bad file never stops the reading: it is dropped and counted under a reason in words. File names stay here: a `Gallery`
carries pixels, class names and digests. Colour profiles are not applied; pixels are taken as sRGB.
"""

from __future__ import annotations

import hashlib
import re
import warnings
from collections import Counter
from collections.abc import Hashable, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Int64, UInt8
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from sartor.data.labels import count, named_in
from sartor.data.readers import PICTURES
from sartor.errors import DataError

MOST = 4_000  # photos; at 224 pixels they take 0.6 GB
MOST_PIXELS = 64_000_000
LEAST_SIDE = 8
LEAST_PHOTOS = 24  # to fit a model and to test it
LEAST_CLASS = 4  # photos of a class, below which nothing can be split off it
THREADS = 2
DRAFT = 2  # a JPEG is decoded at the smallest scale with at least this many times the pixels needed along a side
SUFFIXES = PICTURES | {"", ".jpe", ".jfif", ".heif", ".avif", ".ppm", ".pgm", ".tga", ".jp2"}
FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "PPM", "TGA", "JPEG2000", "AVIF")  # none runs a program
PARTS = {"train": "train", "training": "train", "test": "test", "testing": "test"} | dict.fromkeys(
    ("validation", "valid", "val"), "validation"
)
DATES = re.compile(r"(19|20)\d\d([-_. ]?\d\d){0,2}|\d{3}[A-Z_]{5}")  # 2023, 2023-05, and 100APPLE of cameras

BOMB = "over 64 megapixels"
TINY = "under 8 pixels"
DAMAGED = "truncated or damaged"
NO_PICTURE = "no picture that Pillow can open"
HEIC = "HEIC, which Pillow cannot open: export as JPEG"
UNREAD = "not readable: check its permissions"
SEVERAL = "animations or files of several pages (only their first picture was taken)"
DEEP = "photos of more than 8 bits a colour (rounded to 8)"
INKS = "photos in CMYK (their colours are near, not exact)"
MAY_BE_SEVERAL = ("GIF", "WEBP", "PNG", "TIFF", "AVIF")  # not the MPO of cameras: there the first picture is the photo
WAY_OUT = {
    BOMB: ": save a smaller copy",
    TINY: f": give photos of at least {LEAST_SIDE} pixels a side",
    DAMAGED: ": copy or export it again",
    NO_PICTURE: ": give JPEG, PNG, WebP, GIF, BMP or TIFF",
}


@dataclass(frozen=True)
class Gallery:
    """What was read, in file order.

    Attributes:
        labels: indices into classes, or None; classes: sorted, empty without labels. part: the split that the owner put a photo in.
        exact: sha256 of its pixels. dropped: files left out, by reason, and what else was noticed.
    """

    pixels: UInt8[Tensor, "n 3 s s"]
    labels: Int64[Tensor, " n"] | None
    classes: tuple[str, ...]
    part: list[str | None]
    exact: tuple[str, ...]
    dropped: Counter[str]

    def without(self, exact: Set[str]) -> Gallery:
        """What is left when photos with these digests go."""
        keep = np.array([e not in exact for e in self.exact], bool)
        labels = None if self.labels is None else self.labels[torch.tensor(keep)]
        kept = [i for i, k in enumerate(keep) if k]
        parts, exacts = [self.part[i] for i in kept], tuple(self.exact[i] for i in kept)
        return replace(
            self,
            pixels=self.pixels[torch.tensor(keep)],
            labels=labels,
            part=parts,
            exact=exacts,
        )


class _Entry(NamedTuple):
    file: Path
    name: str | None  # of its class
    part: str | None


def read_photos(path: Path, size: int, labels: Path | None = None, loose: bool = False) -> Gallery:
    """Read a folder of photos: `<class>/**`, `{train,validation,test}/<class>/**`, any folder with a table of labels, or no labels.

    Args:
        size: pixels of a side. labels: rows of file name (relative to path) and class, with commas, semicolons or tabs between. loose: folders mean nothing.
    Raises:
        DataError: no photos, one photo, one class, or no class with four photos.
    """
    path = path.expanduser()
    if not path.is_dir():
        what = "one file" if path.exists() else "nothing"
        raise DataError(f"there is {what} at '{path.name}', a folder of photos is needed: give the folder itself")
    dropped: Counter[str] = Counter()
    files = _files(path, labels, dropped)
    if labels is not None and not labels.is_file():
        raise DataError(f"there is no table of labels at '{labels.name}': give a CSV of file,label")
    if loose:
        entries = [_Entry(file, None, None) for file in files]
    else:
        entries = _by_folder(path, files, dropped) if labels is None else _by_table(path, files, labels, dropped)
    _check(entries, dropped)
    return _read_all(_sample(entries, dropped), size, dropped)


def _files(path: Path, labels: Path | None, dropped: Counter[str]) -> list[Path]:
    """Files that may be pictures, sorted; with a table of labels, whatever the suffix."""
    found = [p for p in sorted(path.rglob("*")) if p.is_file() and not _hidden(p, path)]
    if labels is not None:
        return [p for p in found if not (labels.exists() and p.samefile(labels))]
    files = [p for p in found if p.suffix.lower() in SUFFIXES]
    if len(files) < len(found):
        dropped["files of other kinds than pictures"] += len(found) - len(files)
    return files


def _hidden(p: Path, root: Path) -> bool:
    return any(part.startswith(".") for part in p.relative_to(root).parts)


def _by_folder(path: Path, files: Sequence[Path], dropped: Counter[str]) -> list[_Entry]:
    """Labels and parts from where the files lie; those outside the layout that most files keep to are dropped."""
    folders = [p.relative_to(path).parts[:-1] for p in files]
    parts = [PARTS.get(f[0].lower()) if f else None for f in folders]
    tops = {f[0].lower() for f in folders if f}
    # a class may be called train: the owner's split is train beside validation or test, or train alone
    if "train" not in parts or (len(tops) > 1 and not {"validation", "test"} & set(parts)):
        return _classed([(p, f, None) for p, f in zip(files, folders, strict=True)], dropped)
    kept = [(p, f[1:], part) for p, f, part in zip(files, folders, parts, strict=True) if part]
    count(dropped, "photos outside the train, validation and test folders", len(files) - len(kept))
    return _classed(kept, dropped)


def _classed(kept: Sequence[tuple[Path, tuple[str, ...], str | None]], dropped: Counter[str]) -> list[_Entry]:
    """The first folder is the class, unless most photos lie in none or the folders are all dates."""
    inside = [(p, f[0], part) for p, f, part in kept if f]
    names = {name for _, name, _ in inside}
    dated = bool(names) and all(DATES.fullmatch(name) for name in names)
    if 2 * len(inside) <= len(kept) or dated:
        count(dropped, "folders that are dates and were taken for no classes", len(names) * dated)
        return [_Entry(p, None, part) for p, _, part in kept]
    count(dropped, "photos outside the class folders", len(kept) - len(inside))
    count(dropped, "class names that differ only in case (kept apart)", _twins(names))
    return [_Entry(*row) for row in inside]


def _by_table(path: Path, files: Sequence[Path], labels: Path, dropped: Counter[str]) -> list[_Entry]:
    names = [p.relative_to(path).as_posix() for p in files]
    found = named_in(labels, names, dropped)
    entries = [_Entry(p, found[n], None) for p, n in zip(files, names, strict=True) if n in found]
    unnamed = [p for p, n in zip(files, names, strict=True) if n not in found and p.suffix.lower() in SUFFIXES]
    count(dropped, "photos that the table of labels does not name", len(unnamed))
    count(dropped, "class names that differ only in case (kept apart)", _twins({e.name or "" for e in entries}))
    return entries


def _twins(names: set[str]) -> int:
    """How many names have another that differs only in case."""
    folded = Counter(name.casefold() for name in names)
    return sum(n for n in folded.values() if n > 1)


def _check(entries: Sequence[_Entry], dropped: Counter[str]) -> None:
    """Raises DataError when nothing can be learnt from these photos, whatever the split."""
    if len(entries) < 2:
        reasons = "; ".join(f"{n} {why}{WAY_OUT.get(why, '')}" for why, n in dropped.most_common())
        left = f" ({reasons})" if dropped else ("" if entries else " (the folder is empty)")
        got = "one photo" if entries else "no photo that can be read"
        raise DataError(
            f"{got} in the folder{left}, at least {LEAST_PHOTOS} are needed to fit and to test a model: give a folder of photos as JPEG, PNG or WebP"
        )
    sizes = Counter(e.name for e in entries if e.name is not None)
    if len(sizes) == 1:
        raise DataError(
            f"all {len(entries)} photos are of one class, two or more are needed: add a folder for each other class, "
            "or give that folder itself for photos without labels"
        )
    if sizes and max(sizes.values()) < LEAST_CLASS:
        raise DataError(
            f"none of the {len(sizes)} classes has {LEAST_CLASS} photos, the largest has {max(sizes.values())}: add photos, or put them into "
            "one folder for photos without labels"
        )


def _sample(entries: list[_Entry], dropped: Counter[str]) -> list[_Entry]:
    """At most MOST photos, as many of each class and part as its share, and LEAST_CLASS of each first; the same on every reading."""
    over = len(entries) - MOST
    if over <= 0:
        return entries
    strata: dict[Hashable, list[int]] = {}
    for i in np.random.default_rng(0).permutation(len(entries)):
        strata.setdefault((entries[i].name, entries[i].part), []).append(int(i))
    ranked = sorted(
        (r - LEAST_CLASS if r < LEAST_CLASS else r / len(members), i)
        for members in strata.values()
        for r, i in enumerate(members)
    )
    dropped[f"photos left out of a sample of {MOST:,}"] += over
    return [entries[i] for i in sorted(i for _, i in ranked[:MOST])]


def _read_all(entries: Sequence[_Entry], size: int, dropped: Counter[str]) -> Gallery:
    """Decode on THREADS threads into one block, in file order."""
    pixels = torch.empty(len(entries), 3, size, size, dtype=torch.uint8)
    read: list[_Entry] = []
    exact = []
    with warnings.catch_warnings(), ThreadPoolExecutor(THREADS) as pool:
        warnings.simplefilter("ignore")  # Pillow warns of odd metadata by file; what matters is counted
        for entry, (picture, told, digest) in zip(
            entries, pool.map(lambda e: _read(e.file, size), entries), strict=True
        ):
            dropped.update(told)
            if picture is None:
                continue
            pixels[len(read)] = picture
            read.append(entry)
            exact.append(digest)
    _check(read, dropped)
    classes = tuple(sorted({e.name for e in read if e.name is not None}))
    index = {name: i for i, name in enumerate(classes)}
    labels = torch.tensor([index[e.name] for e in read if e.name is not None], dtype=torch.int64) if classes else None
    count(dropped, "file names that differ only in case (kept)", _twins({str(e.file) for e in read}))
    part = [e.part for e in read]
    return Gallery(pixels[: len(read)], labels, classes, part, tuple(exact), dropped)


def _read(file: Path, size: int) -> tuple[Tensor | None, Sequence[str], str]:
    """Pixels; the reason why there are none, or what was noticed; digest."""
    picture, told = _load(file, size)
    if picture is None:
        return None, told, ""
    return picture, told, hashlib.sha256(picture.numpy().tobytes()).hexdigest()


def open_photo(file: Path, size: int) -> UInt8[Tensor, "3 s s"]:
    """The photo upright, on white, in 8-bit RGB, its shorter side `size` pixels and the middle cut out.

    Raises:
        DataError: damaged, no picture, over MOST_PIXELS or under LEAST_SIDE.
    """
    if not file.is_file():
        raise DataError(f"there is no file '{file.name}': give a photo")
    picture, told = _load(file, size)
    if picture is None:
        raise DataError(f"'{file.name}' is {told[0]}{WAY_OUT.get(told[0], '')}")
    return picture


def _load(file: Path, size: int) -> tuple[UInt8[Tensor, "3 s s"] | None, Sequence[str]]:
    """The pixels and what was noticed in words, or None and the reason why there are none."""
    try:
        with Image.open(file, formats=FORMATS) as image:
            width, height = image.size
            if width * height > MOST_PIXELS:
                return None, [BOMB]
            if min(width, height) < LEAST_SIDE:
                return None, [TINY]
            noticed, kind = _noticed(image), image.format
            image.draft(image.mode, (DRAFT * size, DRAFT * size))
            image.load()
            square = _square(_eight_bit(_upright(image)), size)
    except UnidentifiedImageError:
        return None, [_why_unknown(file)]
    except Image.DecompressionBombError:
        return None, [BOMB]
    except PermissionError:
        return None, [UNREAD]
    except Exception:  # Pillow's decoders raise nearly anything on damaged bytes, and one file must not end a job
        return None, [DAMAGED]
    noticed += [SEVERAL] if kind in MAY_BE_SEVERAL and _several(file) else []
    return torch.from_numpy(np.array(square)).permute(2, 0, 1).contiguous(), noticed


def _noticed(image: Image.Image) -> list[str]:
    """What of an image that is not decoded yet will be lost."""
    coded = str(getattr(image, "tile", ())[:1])  # says RGB;16B where the mode is RGB already
    deep = image.mode.startswith(("I", "F")) or ";16" in coded
    return [why for why, so in ((DEEP, deep), (INKS, image.mode == "CMYK")) if so]


def _several(file: Path) -> bool:
    """Whether more pictures follow the first; the file is opened anew, as looking for them may fail where the first is whole."""
    try:
        with Image.open(file, formats=FORMATS) as image:
            return bool(getattr(image, "is_animated", False))
    except Exception:
        return False


def _why_unknown(file: Path) -> str:
    """Phones also name HEIC files .jpg: the first bytes tell."""
    with file.open("rb") as f:
        head = f.read(12)
    brands = (b"heic", b"heix", b"hevc", b"heim", b"mif1", b"msf1")
    heic = file.suffix.lower() in {".heic", ".heif"} or (head[4:8] == b"ftyp" and head[8:] in brands)
    return HEIC if heic else NO_PICTURE


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # damaged metadata are no reason to lose a photo
        return image


def _eight_bit(image: Image.Image) -> Image.Image:
    """RGB or, where something shows through, RGBA."""
    if image.mode.startswith(("I", "F")):
        return Image.fromarray(_to_bytes(np.asarray(image))).convert("RGB")
    if "transparency" in image.info or image.mode in {"LA", "PA", "RGBA", "La", "RGBa"}:
        return image.convert("RGBA")
    return image.convert("RGB")


def _to_bytes(grey: np.ndarray) -> UInt8[np.ndarray, "h w"]:
    """Grey of 16 or 32 bits or of floats: the file does not say its white, so it is the first of 1 (floats), 255, 65535 that is not exceeded.

    Sixteen bits are always sixteen bits; beyond 65535, or below zero, the range that is there is stretched.
    """
    values = np.nan_to_num(grey.astype(np.float64), posinf=0.0, neginf=0.0)
    low, high = 0.0, 65535.0
    if grey.dtype.itemsize > 2:
        whites = [w for w in (1.0, 255.0, 65535.0) if values.max() <= w and (w > 1 or grey.dtype.kind == "f")]
        fits = bool(whites) and values.min() >= 0
        low, high = (0.0, whites[0]) if fits else (float(values.min()), float(values.max()))
    return ((values - low) / max(high - low, 1e-12) * 255).round().astype(np.uint8)


def _square(image: Image.Image, size: int) -> Image.Image:
    """The middle square, resized in one pass: a narrow strip never becomes a huge picture; then laid on white."""
    width, height = image.size
    side = min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    square = image.resize((size, size), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side))
    if square.mode == "RGBA":
        square = Image.alpha_composite(Image.new("RGBA", square.size, "white"), square)
    return square.convert("RGB")
