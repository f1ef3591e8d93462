"""Cells of the benchmark on disk: one JSON file each, found again by the content of everything that its figures depend on."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from sartor.errors import SartorError
from sartor.sources import cache_dir

FAILED = "failed"  # the entry that tells why there are no figures


def digest(about: Mapping[str, Any]) -> str:
    """A name for what a result depends on (anything that JSON can hold)."""
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:24]


def file_of(about: Mapping[str, Any]) -> Path:
    return cache_dir() / "bench" / "cells" / f"{digest(about)}.json"


def known(about: Mapping[str, Any]) -> dict[str, Any] | None:
    """What was found, or why it failed; None before it was tried."""
    file = file_of(about)
    return json.loads(file.read_text())["found"] if file.exists() else None


def keep(about: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    """Write it whole or not at all: a benchmark may be killed at any moment."""
    file = file_of(about)
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(f".{os.getpid()}.part")
    part.write_text(json.dumps({"about": about, "found": found}, indent=1))
    part.replace(file)


def measured(about: Mapping[str, Any], compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The figures, from an earlier run where it has them; {"failed": one line} where they cannot be had this time. What failed is tried again."""
    found = known(about)
    if found is None or FAILED in found:
        try:
            found = compute()
        except Exception as error:  # one contender's crash must not end a run of a day
            found = {FAILED: reason(error)}
        keep(about, found)
    return found


def reason(error: Exception) -> str:
    """Why, in one line."""
    lines = str(error).strip().splitlines()
    said = lines[0][:240] if lines else "no message"
    return said if isinstance(error, SartorError) else f"{type(error).__name__}: {said}"
