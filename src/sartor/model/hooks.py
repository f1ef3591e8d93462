"""Hooks that go when the work they were for is done."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch.utils.hooks import RemovableHandle


@contextmanager
def removed_after(handles: Iterable[RemovableHandle]) -> Iterator[None]:
    """The hooks of these handles while the body runs, error or not."""
    handles = list(handles)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
