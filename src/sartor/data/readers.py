"""From files to documents: one reader a format, in one table.

A reader turns a file into documents and never raises on its content; what cannot be used is dropped and counted under
a reason. Names and paths stay here: a `Document` carries only its text and, where the format has one, its time.
"""

from __future__ import annotations

import csv
import email
import email.policy
import email.utils
import io
import mailbox
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from sartor.data.chats import WHATSAPP, read_json, read_jsonl, read_whatsapp
from sartor.data.document import Document
from sartor.errors import DataError

MAX_FILE_BYTES = 256 << 20
MBOX, MAILDIR = ".mbox", {"cur", "new"}
PICTURES = {".jpg", ".jpeg", ".png", ".gif", ".webp", ".heic", ".bmp", ".tif", ".tiff"}
ADDRESS = re.compile(r"[\w.+-]+@[\w-]+(\.[\w-]+)+")


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
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file() and not _hidden(p, path))
    for file in files:
        _read_file(file, reading)
    if not reading.documents:
        raise DataError(_why_nothing(files, reading))
    return reading


def _hidden(p: Path, root: Path) -> bool:
    """Files and folders whose name begins with a dot, but for the folders of a Maildir++ (".Sent")."""
    parts = p.relative_to(root).parts
    mail = p.parent.name in MAILDIR and (p.parent.parent / "cur").is_dir()
    return any(part.startswith(".") and not (mail and n == len(parts) - 3) for n, part in enumerate(parts))


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
        if suffix == MBOX:  # read a mail at a time, however large it is
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
            reading.documents.append(document)
        else:
            reading.dropped["empty documents"] += 1


def decode(raw: bytes) -> str | None:
    """UTF-8 (with or without mark), UTF-16 with mark, else Latin-1; None when the bytes do not look like text."""
    if raw[:2] in (b"\xff\xfe", b"\xfe\xff"):
        text = raw.decode("utf-16", errors="replace")
    elif b"\0" in raw[:65536]:
        return None
    else:
        try:
            text = raw.decode("utf-8-sig")
        except UnicodeDecodeError:
            text = raw.decode("latin-1")
    sample = text[:20000]
    odd = sum(1 for c in sample if (ord(c) < 32 and c not in "\t\n\r\f\x1b") or 127 <= ord(c) < 160 or c == "\ufffd")
    return None if odd > 0.02 * max(1, len(sample)) else text.replace("\r\n", "\n").replace("\r", "\n")


def _pick(path: Path, suffix: str, text: str) -> Reader:
    if path.parent.name in MAILDIR and (path.parent.parent / "cur").is_dir():
        return read_mail
    if suffix not in READERS and text.startswith("From ") and re.search(r"^(Date|Subject): ", text[:4000], re.M):
        return read_mbox
    if suffix in {".txt", ""} and WHATSAPP.search(text[:2000]):
        return read_whatsapp
    return READERS.get(suffix, read_plain)


Reader = Callable[[str, Path], Iterator[Document]]


def read_plain(text: str, _: Path) -> Iterator[Document]:
    yield Document(text)


class _Visible(HTMLParser):
    """The text a browser would show, with line breaks at block elements."""

    HIDDEN = frozenset({"script", "style", "head", "noscript", "template"})
    BLOCKS = frozenset(
        {
            "p",
            "div",
            "br",
            "li",
            "tr",
            "h1",
            "h2",
            "h3",
            "h4",
            "h5",
            "h6",
            "section",
            "article",
            "pre",
            "table",
            "ul",
            "ol",
        }
    )

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[str] = []
        self.depth = 0

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        if tag in self.HIDDEN:
            self.depth += 1
        if tag in self.BLOCKS:
            self.parts.append("\n\n" if tag == "p" or tag[0] == "h" else "\n")

    def handle_endtag(self, tag: str) -> None:
        if tag in self.HIDDEN:
            self.depth = max(0, self.depth - 1)

    def handle_data(self, data: str) -> None:
        if not self.depth:
            self.parts.append(data)


def html_to_text(text: str) -> str:
    parser = _Visible()
    parser.feed(text)
    lines = (" ".join(line.split()) for line in "".join(parser.parts).split("\n"))
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip()


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


def read_mail(text: str, _: Path) -> Iterator[Document]:
    yield _mail(email.message_from_string(text, policy=email.policy.default))


def read_mbox(text: str, path: Path) -> Iterator[Document]:
    for message in mailbox.mbox(path, factory=None, create=False):
        yield _mail(email.message_from_bytes(message.as_bytes(), policy=email.policy.default))


def _mail(message: Any) -> Document:
    """Subject and own words: quotes, signatures, list footers and addresses go, they are other people's."""
    part = message.get_body(preferencelist=("plain", "html"))
    body = ""
    if part is not None:
        raw = part.get_payload(decode=True) or b""
        body = decode(raw) or ""
        if part.get_content_type() == "text/html":
            body = html_to_text(body)
    try:
        when = email.utils.parsedate_to_datetime(str(message["Date"])).timestamp()
    except (TypeError, ValueError, OverflowError):
        when = None
    own = own_words(body)
    subject = re.sub(r"\s+", " ", str(message["Subject"] or "")).strip()
    return Document(ADDRESS.sub("[address]", f"{subject}\n\n{own}" if own else ""), when)


def own_words(body: str) -> str:
    """The part of a mail that its sender wrote."""
    lines: list[str] = []
    for line in body.split("\n"):
        if re.match(r"--\s*$|_{20,}\s*$|-{5,}\s*Original Message", line):
            break
        if re.match(r"\s*[>|]", line):
            continue
        if re.match(r"\s*(On .{5,120}|.{3,80}) (wrote|writes|said):\s*$", line):
            continue
        lines.append(line.rstrip())
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip()


READERS: dict[str, Reader] = {
    ".html": read_html,
    ".htm": read_html,
    ".csv": read_csv,
    ".tsv": read_csv,
    ".json": read_json,
    ".jsonl": read_jsonl,
    ".ndjson": read_jsonl,
    ".eml": read_mail,
    MBOX: read_mbox,
}
