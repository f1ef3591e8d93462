"""Files and folders that are whole or not there."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A place to write to, that becomes `path` when the body ends well: a crash leaves the old file, and of two jobs that write the same each leaves a whole one."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        yield part
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def write_whole(path: Path, text: str) -> None:
    """The text as a file, in one piece."""
    with whole_file(path) as part:
        part.write_text(text)


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """A folder to fill, that becomes `path` when the body ends well. What another job has put there meanwhile stays, for someone may be reading it; what lacks any of this one's files is replaced."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(dir=path.parent))
    try:
        yield part
        if not path.exists() or any(not (path / f.name).exists() for f in part.iterdir()):
            shutil.rmtree(path, ignore_errors=True)
            try:
                part.rename(path)
            except OSError:
                if not path.exists():
                    raise
    finally:
        shutil.rmtree(part, ignore_errors=True)
