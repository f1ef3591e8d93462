"""What a reader finds, and how bytes become text."""

from __future__ import annotations

from dataclasses import dataclass

SURE = 4  # letters of UTF-8 that are right for every one that is damaged: text in another code has hardly any


@dataclass(frozen=True)
class Document:
    """One document of the user. `when` is seconds since 1970 or None; `lacking`: what it counts as where it holds no text."""

    text: str
    when: float | None = None
    lacking: str = "empty documents"


def decode(raw: bytes) -> str | None:
    """UTF-8 (with or without mark, also where some letters are damaged), UTF-16 with mark, else Windows' Latin; None when the bytes do not look like text."""
    if raw[:2] in (b"\xff\xfe", b"\xfe\xff"):
        text = raw.decode("utf-16", errors="replace")
    elif b"\0" in raw[:65536]:
        return None
    else:
        text = raw.decode("utf-8-sig", errors="replace")
        damaged = text.count("\ufffd")
        if damaged and sum(c > "\x7f" for c in text) < (1 + SURE) * damaged:
            text = decoded(raw, "cp1252") or raw.decode("latin-1")
    sample = text[:20000]
    odd = sum(1 for c in sample if (ord(c) < 32 and c not in "\t\n\r\f\x1b") or 127 <= ord(c) < 160 or c == "\ufffd")
    return None if odd > 0.02 * max(1, len(sample)) else unix(text)


def decoded(raw: bytes, code: str) -> str | None:
    """The bytes in this code; None where it is unknown, or they are not."""
    try:
        return raw.decode(code)
    except (LookupError, UnicodeDecodeError):
        return None


def unix(text: str) -> str:
    """With line ends of one kind."""
    return text.replace("\r\n", "\n").replace("\r", "\n")
