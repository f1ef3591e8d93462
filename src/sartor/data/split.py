"""From documents to splits that share nothing: probe, train, validation, test.

Exact and near duplicates, and what mostly stands in other documents, are dropped before the split (the earliest stays, of undated files the shorter), so they cannot cross it. Documents are put
in order of time when most have one; otherwise whole files are shuffled with the seed. A few long files are cut into
consecutive parts that stay in order.
"""

from __future__ import annotations

import hashlib
import re
import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sartor.data.document import Document
from sartor.data.readers import Reading
from sartor.errors import DataError

SHARES = {"probe": 0.06, "train": 0.69, "validation": 0.05, "test": 0.20}
LEAST_CHARS = 40_000  # about 10,000 tokens; below it nothing in the report could be trusted
TRUSTED_TEST_DOCUMENTS = 30
PART_CHARS = 6_000
FEW_FILES = 12
SHINGLE = 5
LONG = 8  # words of a run
CONTAINED = 0.5  # of a document's runs, above which it is one of those that they stand in
BANDS, ROWS = 16, 4  # documents that share about half of their 5-word shingles meet in some band


@dataclass(frozen=True)
class Corpus:
    """The user's documents, split. `dropped` counts what was left out and why; `warnings` say what weakens the report."""

    probe: tuple[str, ...]
    train: tuple[str, ...]
    validation: tuple[str, ...]
    test: tuple[str, ...]
    dropped: dict[str, int]
    ordered_by_time: bool
    warnings: tuple[str, ...] = ()

    def counts(self) -> dict[str, int]:
        return {name: len(getattr(self, name)) for name in SHARES}

    def fingerprint(self) -> str:
        """sha256 over all documents, in the splits that they are in: it tells the very same data, and nothing about them."""
        digest = hashlib.sha256()
        for name in SHARES:
            for text in getattr(self, name):
                digest.update(text.encode("utf-8", "surrogatepass") + b"\0")
            digest.update(b"\1")
        return digest.hexdigest()


def split(reading: Reading, seed: int = 0) -> Corpus:
    """Split what was read.

    Raises:
        DataError: too little text for any trustworthy result.
    """
    dropped = Counter(reading.dropped)
    documents = drop_duplicates(reading.documents, dropped)
    documents, by_time, whole_files = _in_order(documents, seed)
    documents = drop_contained(documents, by_time or not whole_files, dropped)
    chars = sum(len(d.text) for d in documents)
    if chars < LEAST_CHARS:
        words = sum(len(d.text.split()) for d in documents)
        raise DataError(
            f"the data hold {words} words ({chars} characters) after duplicates are dropped, at least {LEAST_CHARS} characters "
            "(about 7,000 words) are needed to fit and to test a model: add more documents"
        )
    parts = _assign_by_size(documents, chars) if whole_files else _assign_in_order(documents, chars)
    empty = [k for k, v in parts.items() if not v]
    if empty:
        raise DataError(
            f"{len(documents)} documents are too few to fill the {', '.join(empty)} split: give more or smaller documents"
        )
    warnings = []
    if len(parts["test"]) < TRUSTED_TEST_DOCUMENTS:
        need = int(np.ceil(TRUSTED_TEST_DOCUMENTS / SHARES["test"]))
        warnings.append(
            f"only {len(parts['test'])} test documents: intervals speak of more text like these few, {need} documents or more would make them trustworthy"
        )
        parts["test"] = [p.text for text in parts["test"] for p in _parts(Document(text))]  # an interval takes several
    return Corpus(
        **{k: tuple(v) for k, v in parts.items()},
        dropped=dict(dropped),
        ordered_by_time=by_time,
        warnings=tuple(warnings),
    )


def _assign_by_size(documents: Sequence[Document], chars: int) -> dict[str, list[str]]:
    """Documents without an order: the longest first, each to the split that still lacks most."""
    parts: dict[str, list[str]] = {k: [] for k in SHARES}
    lacking = {k: share * chars for k, share in SHARES.items()}
    for d in sorted(documents, key=lambda d: -len(d.text)):
        k = max(lacking, key=lambda k: lacking[k])
        parts[k].append(d.text)
        lacking[k] -= len(d.text)
    return parts


def _assign_in_order(documents: Sequence[Document], chars: int) -> dict[str, list[str]]:
    """Consecutive documents to splits, by characters; the test set is the latest part, the future of the user."""
    bounds = np.cumsum([SHARES[k] for k in SHARES]) * chars
    parts: dict[str, list[str]] = {k: [] for k in SHARES}
    seen = 0
    for d in documents:
        middle = seen + len(d.text) / 2
        parts[list(SHARES)[int(np.searchsorted(bounds, middle).clip(0, 3))]].append(d.text)
        seen += len(d.text)
    return parts


def _in_order(documents: list[Document], seed: int) -> tuple[list[Document], bool, bool]:
    """(documents in order, whether that is of time, whether they are files without one). Of dated ones those without a date go into the middle, where they are trained on."""
    dated = sorted((d for d in documents if d.when is not None), key=lambda d: d.when or 0.0)
    if len(dated) > 0.8 * len(documents):
        rest = [d for d in documents if d.when is None]
        first = np.cumsum([len(d.text) for d in dated]) <= SHARES["probe"] * sum(len(d.text) for d in documents)
        start = int(first.sum()) + 1
        return dated[:start] + rest + dated[start:], True, False
    if len(documents) >= FEW_FILES:
        order = np.random.default_rng(seed).permutation(len(documents))
        return [documents[i] for i in order], False, True
    return [part for d in documents for part in _parts(d)], False, False


def _parts(d: Document) -> list[Document]:
    """Consecutive parts of at most PART_CHARS, cut at blank lines where there are any."""
    pieces, now = [], ""
    for paragraph in re.split(r"(?<=\n\n)", d.text):
        if now and len(now) + len(paragraph) > PART_CHARS:
            pieces.append(now)
            now = ""
        now += paragraph
        while len(now) > PART_CHARS:
            pieces.append(now[:PART_CHARS])
            now = now[PART_CHARS:]
    return [Document(p, d.when) for p in [*pieces, now] if p.strip()]


def drop_duplicates(documents: Sequence[Document], dropped: Counter[str]) -> list[Document]:
    """Documents without exact and near duplicates; counts what it drops."""
    seen: set[str] = set()
    unique = []
    for d in documents:
        key = " ".join(d.text.split()).lower()
        if key in seen:
            dropped["exact duplicates"] += 1
        else:
            seen.add(key)
            unique.append(d)
    keep = _not_near([d.text for d in unique])
    dropped["near duplicates"] += len(unique) - sum(keep)
    if not dropped["near duplicates"]:
        del dropped["near duplicates"]
    return [d for d, k in zip(unique, keep, strict=True) if k]


def drop_contained(documents: list[Document], in_order: bool, dropped: Counter[str]) -> list[Document]:
    """Documents without those that mostly stand in others, as a merged copy of all notes or a file's older version do, whatever their length; counts what it drops.

    Args:
        in_order: earlier ones stay; else shorter ones.
    """
    order = range(len(documents)) if in_order else sorted(range(len(documents)), key=lambda i: len(documents[i].text))
    marks = [_marks(documents[i].text) for i in order]
    of = np.repeat(np.arange(len(marks)), [len(m) for m in marks])
    _, first, where = np.unique(np.concatenate(marks), return_index=True, return_inverse=True)
    old = of[first][where] < of  # the same words stood in a document before this one
    share = np.bincount(of, old, len(marks)) / np.maximum(np.bincount(of, minlength=len(marks)), 1)
    lost = {i for i, s in zip(order, share, strict=True) if s > CONTAINED}
    if lost:
        dropped["documents that mostly stand in others"] += len(lost)
    return [d for i, d in enumerate(documents) if i not in lost]


def _marks(text: str) -> np.ndarray:
    """A number for every run of LONG words."""
    words = np.array([zlib.crc32(w.encode()) for w in text.lower().split()], np.uint64)
    if len(words) < LONG:
        return np.zeros(0, np.uint64)
    runs = np.lib.stride_tricks.sliding_window_view(words, LONG)
    weights = np.random.default_rng(2).integers(1, 1 << 63, LONG, dtype=np.uint64) | np.uint64(1)
    found: np.ndarray = (runs * weights).sum(1, dtype=np.uint64)  # modulo 2^64
    return found


def _not_near(texts: Sequence[str]) -> list[bool]:
    """MinHash over 5-word shingles with banding (Broder 1997); candidates are confirmed by their signatures."""
    rng = np.random.default_rng(1)
    a, b = rng.integers(0, 1 << 63, (2, BANDS * ROWS), dtype=np.uint64) * np.uint64(2) + np.uint64(1)
    buckets: dict[tuple[int, bytes], list[int]] = {}
    signatures: list[np.ndarray | None] = []
    keep = []
    for n, text in enumerate(texts):
        words = text.lower().split()
        if len(words) < 2 * SHINGLE:
            signatures.append(None)
            keep.append(True)
            continue
        hashes = np.array(
            [zlib.crc32(" ".join(words[i : i + SHINGLE]).encode()) for i in range(len(words) - SHINGLE + 1)],
            dtype=np.uint64,
        )
        signature = ((hashes[:, None] * a + b) >> np.uint64(32)).min(0)  # multiply-shift, modulo 2^64
        keys = [(band, signature[band * ROWS : (band + 1) * ROWS].tobytes()) for band in range(BANDS)]
        rivals = {m for key in keys for m in buckets.get(key, ())}
        near = any(float((signature == signatures[m]).mean()) > 0.6 for m in rivals)
        keep.append(not near)
        signatures.append(signature)
        if not near:
            for key in keys:
                buckets.setdefault(key, []).append(n)
    return keep
