"""Every error Sartor raises on purpose, in one tree.

SartorError
├── InputError          what the user gave cannot be used
│   ├── SourceError     the model
│   ├── DataError       the user's documents
│   └── BudgetError     the size asked for (`nearest` holds the nearest reachable size in bytes)
├── MissingExtra        an optional package is not installed; the message has the pip command
├── OutputError         the place to write to
└── ParityError         an artifact disagrees with PyTorch beyond the stated tolerance

Each message says what was got, what was needed and the way out, on one line.
"""

from __future__ import annotations


class SartorError(Exception):
    """Root of the tree; the command line prints it as one line and exits with 2."""


class InputError(SartorError):
    """What the user gave cannot be used."""


class SourceError(InputError):
    """The model cannot be found, read or trusted."""


class DataError(InputError):
    """The user's documents cannot be read or are too few."""


class BudgetError(InputError):
    """The size asked for cannot be reached.

    Attributes:
        nearest: the nearest reachable size in bytes, or None when the request is malformed.
    """

    def __init__(self, message: str, nearest: int | None = None) -> None:
        super().__init__(message)
        self.nearest = nearest


class MissingExtra(SartorError):
    """An optional package is needed and absent."""


class OutputError(SartorError):
    """The output folder cannot be written without losing something."""


class ParityError(SartorError):
    """The exported artifact disagrees with PyTorch."""
