"""Mails: what their sender wrote."""

from __future__ import annotations

import email
import email.policy
import email.utils
import mailbox
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sartor.data.document import Document, decode, decoded, unix
from sartor.data.markup import html_to_text

ADDRESS = re.compile(r"[\w.+-]+@[\w-]+(\.[\w-]+)+")
LATIN = {"iso-8859-1", "latin-1", "latin1"}  # what programs call Windows' Latin
# what Outlook puts over a mail that it quotes whole
QUOTED = re.compile(
    r"^\W{0,2}(?:From|Von|De|Da)\b ?:.+\n(?:.*\n){0,2}?\W{0,2}(?:Sent|Date|Gesendet|Datum|Envoy\u00e9|Enviado|Inviato)\b ?:",
    re.M,
)


def read_mail(_: str, path: Path) -> Iterator[Document]:
    yield _read(path.read_bytes())


def read_mbox(_: str, path: Path) -> Iterator[Document]:
    for message in mailbox.mbox(path, factory=None, create=False):
        yield _read(message.as_bytes())


def _read(raw: bytes) -> Document:
    try:
        return _mail(email.message_from_bytes(raw, policy=email.policy.default))
    except Exception:  # the parser raises nearly anything on broken mails, and one must not take the others along
        return Document("", lacking="malformed mails")


def _mail(message: Any) -> Document:
    """Subject and own words: quotes, signatures, list footers and addresses go, they are other people's."""
    part = message.get_body(preferencelist=("plain", "html"))
    body = ""
    if part is not None:
        body = _body(part)
        if part.get_content_type() == "text/html":
            body = html_to_text(body, quotes=False)
    try:
        when = email.utils.parsedate_to_datetime(str(message["Date"])).timestamp()
    except (TypeError, ValueError, OverflowError):
        when = None
    own = own_words(body)
    subject = re.sub(r"\s+", " ", str(message["Subject"] or "")).strip()
    return Document(ADDRESS.sub("[address]", f"{subject}\n\n{own}" if own else ""), when)


def _body(part: Any) -> str:
    """In the code that the mail names, where it is right."""
    raw, named = part.get_payload(decode=True) or b"", str(part.get_content_charset() or "ascii").lower()
    found = decoded(raw, "cp1252" if named in LATIN else named)
    return unix(found) if found is not None else decode(raw) or ""


def own_words(body: str) -> str:
    """The part of a mail that its sender wrote."""
    if quoted := QUOTED.search(body):
        body = body[: quoted.start()]
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
