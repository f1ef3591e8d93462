"""From files to documents: one reader a format, in one table.

A reader turns a file into documents and never raises on its content; what cannot be used is dropped and counted under
a reason. Names and paths stay here: a `Document` carries only its text and, where the format has one, its time.
"""

from __future__ import annotations

import csv
import io
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from sartor.data.chats import is_whatsapp, read_json, read_jsonl, read_whatsapp
from sartor.data.document import Document, decode
from sartor.data.mails import read_mail, read_mbox
from sartor.data.markup import html_to_text
from sartor.errors import DataError

MAX_FILE_BYTES = 256 << 20
MAILS, MAILDIR = (".eml", ".mbox"), {"cur", "new"}
PICTURES = {".jpg", ".jpeg", ".png", ".gif", ".webp", ".heic", ".bmp", ".tif", ".tiff"}


@dataclass
class Reading:
    """What was read: documents in file order, and how many were dropped for which reason."""

    documents: list[Document] = field(default_factory=list)
    dropped: Counter[str] = field(default_factory=Counter)
    files: int = 0


def read_folder(path: Path) -> Reading:
    """Read a file, a folder (recursively) or a maildir.

    Raises:
        DataError: nothing there, or nothing in it that is text.
    """
    path = path.expanduser()
    if not path.exists():
        raise DataError(f"no data at '{path.name}': give a file or a folder of texts, mails, chats or code")
    reading = Reading()
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file() and not _left_out(p, path))
    for file in files:
        _read_file(file, reading)
    if not reading.documents:
        raise DataError(_why_nothing(files, reading))
    return reading


def _in_maildir(p: Path) -> bool:
    return p.parent.name in MAILDIR and (p.parent.parent / "cur").is_dir()


def _left_out(p: Path, root: Path) -> bool:
    """Files and folders whose name begins with a dot, but for the folders of a Maildir++ (".Sent"); and what a mail server keeps beside the mails."""
    parts, mail = p.relative_to(root).parts, _in_maildir(p)
    hidden = any(part.startswith(".") and not (mail and n == len(parts) - 3) for n, part in enumerate(parts))
    return hidden or all((p.parent / name).is_dir() for name in MAILDIR)


def _why_nothing(files: list[Path], reading: Reading) -> str:
    if not files:
        return "the data folder is empty: put texts, mails, chats or code into it"
    if all(f.suffix.lower() in PICTURES for f in files):
        return f"the data folder holds {len(files)} pictures and no text, and the model is a language model: give it texts, mails, chats or code"
    reasons = ", ".join(f"{n} {why}" for why, n in reading.dropped.most_common())
    return f"no readable text in {len(files)} files ({reasons}): give texts, mails, chats or code in UTF-8 or Latin-1"


def _read_file(path: Path, reading: Reading) -> None:
    suffix = path.suffix.lower()
    if suffix in PICTURES:
        reading.dropped["pictures"] += 1
        return
    try:
        if suffix in MAILS or _in_maildir(path):  # the reader decodes mail by mail; a mailbox may be of any size
            text: str | None = ""
        elif path.stat().st_size > MAX_FILE_BYTES:
            reading.dropped["files over 256 MiB"] += 1
            return
        else:
            text = decode(path.read_bytes())
    except OSError:
        reading.dropped["unreadable files"] += 1
        return
    if text is None:
        reading.dropped["binary files"] += 1
        return
    reader = _pick(path, suffix, text)
    reading.files += 1
    try:
        found = list(reader(text, path))
    except OSError:
        reading.dropped["unreadable files"] += 1
        return
    except (ValueError, KeyError, TypeError, AttributeError, LookupError, RecursionError, csv.Error):
        reading.dropped["malformed files"] += 1
        return
    for document in found:
        if document.text.strip():
            whole = document.text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")  # no half letters
            reading.documents.append(replace(document, text=whole))
        else:
            reading.dropped[document.lacking] += 1


def _pick(path: Path, suffix: str, text: str) -> Reader:
    if _in_maildir(path):
        return read_mail
    if suffix not in READERS and text.startswith("From ") and re.search(r"^(Date|Subject): ", text[:4000], re.M):
        return read_mbox
    if suffix in {".txt", ""} and is_whatsapp(text):
        return read_whatsapp
    return READERS.get(suffix, read_plain)


Reader = Callable[[str, Path], Iterator[Document]]


def read_plain(text: str, _: Path) -> Iterator[Document]:
    yield Document(text)


def read_html(text: str, _: Path) -> Iterator[Document]:
    yield Document(html_to_text(text))


def read_csv(text: str, path: Path) -> Iterator[Document]:
    """Rows whose text columns are long are documents; a table of short cells is one document as it stands."""
    try:
        dialect = csv.Sniffer().sniff(text[:8192], delimiters=",;\t|")
    except csv.Error:
        dialect = csv.excel_tab() if path.suffix == ".tsv" else csv.excel()  # type: ignore[assignment]
    rows = list(csv.reader(io.StringIO(text), dialect))
    cells = [c for row in rows[1:] for c in row]
    if not cells or sum(len(c) for c in cells) / len(rows) < 40:
        yield Document(text)
        return
    for row in rows[1:]:
        yield Document("\n".join(c for c in row if not _number(c)))


def _number(cell: str) -> bool:
    return bool(re.fullmatch(r"[\s\d.,:%/+-]*", cell))


READERS: dict[str, Reader] = {
    ".html": read_html,
    ".htm": read_html,
    ".csv": read_csv,
    ".tsv": read_csv,
    ".json": read_json,
    ".jsonl": read_jsonl,
    ".ndjson": read_jsonl,
    ".eml": read_mail,
    ".mbox": read_mbox,
}
