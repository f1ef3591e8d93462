"""Which numbers networks run and train in on this machine, and how fast."""

from __future__ import annotations

import math
import time
from functools import cache
from typing import Any

import torch

from sartor.model.graph import Graph
from sartor.model.network import clone

TOKENS, INPUTS, OUTPUTS = 512, 576, 1536  # of the product that is timed
TURNS = 5
USUAL = 500e9  # operations a second, of two cores with instructions for bf16: what effort levels are made for
SLOWEST = 0.25  # pace that work is still fitted to


@cache
def running_dtype() -> torch.dtype:
    """bf16 where the processor multiplies it faster than fp32; found out once a process, in half a second at most.

    Processors without instructions for bf16 emulate it, at a ninth of the speed of fp32 (docs/log.md): there everything runs in fp32.
    """
    return torch.bfloat16 if _seconds(torch.bfloat16) < _seconds(torch.float32) else torch.float32


def running(model: Any) -> Any:
    """A copy that is looked at and trained: a graph of convolutions in fp32, as these are no faster in bf16 anywhere."""
    return clone(model, torch.float32 if isinstance(model, Graph) else running_dtype())


def computing() -> dict[str, str]:
    """What networks run in here and how fast, for reports."""
    return {"arithmetic": {torch.bfloat16: "bf16", torch.float32: "fp32"}[running_dtype()], "pace": f"{pace():g}"}


@cache
def pace() -> float:
    """How fast this machine is beside the one that effort levels are made for: 1, 1/2 or 1/4, so that two jobs on one machine agree."""
    speed = 2 * TOKENS * INPUTS * OUTPUTS / _seconds(running_dtype())
    return min(1.0, max(SLOWEST, 2.0 ** round(math.log2(speed / USUAL))))


@cache
@torch.no_grad()
def _seconds(dtype: torch.dtype) -> float:
    """Of one product, the best of some turns after one that warms up."""
    x, w = torch.ones(TOKENS, INPUTS, dtype=dtype), torch.ones(OUTPUTS, INPUTS, dtype=dtype)
    taken = []
    for _ in range(1 + TURNS):
        started = time.perf_counter()
        torch.nn.functional.linear(x, w)
        taken.append(time.perf_counter() - started)
    return min(taken[1:])
