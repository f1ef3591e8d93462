"""What of the machine a job takes: cores, and what the C library does with the memory of freed tensors (glibc; elsewhere that does nothing)."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import sys
from pathlib import Path
from typing import Any

M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8  # malloc.h
MMAP_MAX, TRIM = 65_536, 1 << 26  # glibc's own number of mappings, and bytes that may lie free at the end of the heap


def cores() -> int:
    """Of the processor, as many as this process may run on: more threads than that wait for each other."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def available() -> float:
    """Bytes of memory that can be had without driving anything out, as far as the system says: else all that there is, or infinity where it does not say that either."""
    found = [float("inf")]
    with contextlib.suppress(AttributeError, OSError, ValueError):
        found.append(float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")))
    with contextlib.suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        found.append(1024.0 * int(next(x for x in lines if x.startswith("MemAvailable:")).split()[1]))
    with contextlib.suppress(OSError, ValueError):  # of a container; "max" is none
        found.append(float(int(Path("/sys/fs/cgroup/memory.max").read_text())))
    return min(found)


def lies_in_memory(folder: Path) -> bool:
    """Whether what is written there takes memory, as far as the system says (Linux's tmpfs; /tmp is one on many machines)."""
    kinds: dict[Path, str] = {}
    with contextlib.suppress(OSError):
        for line in Path("/proc/mounts").read_text().splitlines():
            _, place, kind, *_ = line.split(" ")
            kinds[Path(place.encode().decode("unicode_escape"))] = kind
    at = folder.resolve()
    return next((kinds[p] for p in (at, *at.parents) if p in kinds), "") in {"tmpfs", "ramfs"}


def _glibc(name: str) -> Any:
    return getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None


def keep_freed() -> None:
    """Keep the memory of freed tensors for the next ones.

    Else every large tensor is fetched from the system and zeroed again, four million page faults in six training steps; without them
    a step takes an eighth less time. And keep it in one pool: backward passes run in a thread of their own, which would have its own.
    """
    mallopt = _glibc("mallopt")
    if mallopt is not None:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
        mallopt(M_ARENA_MAX, 1)


def free_at_once() -> None:
    """Undo `keep_freed`: where memory is what there is too little of, freed tensors go back to the system, and the next ones cost time."""
    mallopt = _glibc("mallopt")
    if mallopt is not None:
        mallopt(M_MMAP_MAX, MMAP_MAX)
        mallopt(M_TRIM_THRESHOLD, TRIM)


def hand_back() -> None:
    """Hand what is free back to the system: between stages, whose tensors have other sizes and would not fit into the gaps."""
    gc.collect()
    trim = _glibc("malloc_trim")
    if trim is not None:
        trim(0)
