"""The near side of a job in a process of its own (`worker.py`)."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from sartor.errors import SartorError


def answered(
    command: Sequence[str],
    job: Mapping[str, Any],
    failed: str,
    limit_s: float | None = None,
    late: str = "",
    env: Mapping[str, str] | None = None,
    said: Callable[[str], str] = lambda last: last[:300],
) -> dict[str, Any]:
    """The result of the job.

    Args:
        failed, late: what is said when it fails, or takes more than limit_s seconds. said: what of its last words may be repeated.
    Raises:
        SartorError: it failed or took too long.
    """
    try:
        done = subprocess.run(command, input=json.dumps(job), capture_output=True, text=True, env=env, timeout=limit_s)
    except subprocess.TimeoutExpired as error:
        raise SartorError(late) from error
    if done.returncode or not done.stdout:
        ended = [f"it was ended by signal {-done.returncode}"] if done.returncode < 0 else []
        last = [f"it ended with code {done.returncode}", *done.stderr.strip().splitlines(), *ended][-1]
        raise SartorError(f"{failed}: {said(last)}")
    return json.loads(done.stdout)
