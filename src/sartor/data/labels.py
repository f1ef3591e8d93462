"""Tables of labels: which photo is of which class."""

from __future__ import annotations

import csv
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from sartor.data.document import decode
from sartor.errors import DataError

FILE_HEADERS = {"file", "filename", "file_name", "image", "photo", "picture", "path"}
LABEL_HEADERS = {"label", "labels", "class", "category", "target", "tag"}


def named_in(table: Path, names: Sequence[str], dropped: Counter[str]) -> dict[str, str]:
    """File name -> class, for those of `names` (relative, with slashes) that rows of the table name.

    A name is matched as it stands, else whatever its case and accents' encoding, if only one file fits.

    Raises:
        DataError: the table cannot be read, or names none of the files.
    """
    exact, folded = set(names), _folded(names)
    found: dict[str, set[str]] = {}
    missing = 0
    for file, label in _rows(table, exact, dropped):
        wanted = file.strip().replace("\\", "/").removeprefix("./")
        fits = [wanted] if wanted in exact else folded.get(_fold(wanted), [])
        missing += not fits
        count(dropped, "rows whose file name fits several files", len(fits) > 1)
        count(dropped, "rows without a label", not label.strip())
        if len(fits) == 1 and label.strip():
            found.setdefault(fits[0], set()).add(label.strip())
    if missing and not found:
        raise DataError(
            f"none of the {missing} files named in '{table.name}' is in the folder: write their names relative to the folder given"
        )
    if not found:
        raise DataError(f"'{table.name}' labels no file: write a row 'file,label' for each photo")
    count(dropped, "rows whose file is missing", missing)
    count(dropped, "photos with several labels", sum(len(v) > 1 for v in found.values()))
    return {file: v.pop() for file, v in found.items() if len(v) == 1}


def _fold(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()


def _folded(names: Sequence[str]) -> dict[str, list[str]]:
    folded: dict[str, list[str]] = {}
    for name in names:
        folded.setdefault(_fold(name), []).append(name)
    return folded


def _rows(table: Path, names: set[str], dropped: Counter[str]) -> Iterator[tuple[str, str]]:
    """File and label of each row; a header is a first row with a header's words, or one that names no file and has no suffix."""
    text = decode(table.read_bytes()) if table.is_file() else None
    if text is None:
        raise DataError(f"'{table.name}' is no table of labels: give a CSV file with rows 'file,label'")
    lines = [line for line in text.splitlines() if line.strip()]
    comma = max(",;\t", key=lambda c: sum(c in line for line in lines))  # a tie goes to the comma
    try:
        rows = list(csv.reader(lines, delimiter=comma))
    except csv.Error:
        raise DataError(f"'{table.name}' is no table of labels: give a CSV file with rows 'file,label'") from None
    head = [cell.strip().lower() for cell in rows[0]] if rows else []
    file = next((i for i, cell in enumerate(head) if cell in FILE_HEADERS), 0)
    label = next((i for i, cell in enumerate(head) if cell in LABEL_HEADERS and i != file), 1)
    headed = bool(head) and rows[0][0] not in names and (bool(FILE_HEADERS & set(head)) or "." not in head[0])
    file, label = (file, label) if headed else (0, 1)
    for row in rows[headed:]:
        if len(row) > max(file, label):
            yield row[file], row[label]
        else:
            dropped["rows that are not 'file,label'"] += 1


def count(dropped: Counter[str], why: str, n: int) -> None:
    """Something was left out, or noticed, for this reason."""
    if n:
        dropped[why] += n
