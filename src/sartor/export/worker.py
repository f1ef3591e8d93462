"""The far side of a job in a process of its own: it comes as JSON on stdin, its result goes as JSON on stdout.

Nothing here loads the package: workers are started by path, and the package would load torch.
"""

from __future__ import annotations

import json
import os
import resource
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

Work = Callable[[dict[str, Any]], dict[str, Any]]


def peak_memory() -> int:
    """Peak resident bytes of this process; ru_maxrss would count its parent's pages from before the exec."""
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def answer(work: Work) -> None:
    """Read one job, print one result, and end the process."""
    job = json.load(sys.stdin)
    out = os.dup(1)
    os.dup2(2, 1)  # whatever the runtime prints must not mix with the result
    result = work(job)
    with os.fdopen(out, "w") as f:
        json.dump(result, f)
    os._exit(0)  # skip the runtime's own tear-down


def measured(work: Work) -> Work:
    """The same, with the peak memory of the process in the result."""
    return lambda job: work(job) | {"peak_rss_bytes": peak_memory()}
