"""What a reader finds."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Document:
    """One document of the user. `when` is seconds since 1970 or None."""

    text: str
    when: float | None = None
