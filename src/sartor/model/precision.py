"""Which numbers networks run and train in on this machine."""

from __future__ import annotations

import time
from functools import cache

import torch

TOKENS, INPUTS, OUTPUTS = 512, 576, 1536  # of the product that is timed
TURNS = 3


@cache
def running_dtype() -> torch.dtype:
    """bf16 where the processor multiplies it faster than fp32; found out once a process, in a third of a second at most.

    Processors without instructions for bf16 emulate it, at a ninth of the speed of fp32 (docs/log.md): there everything runs in fp32.
    """
    return torch.bfloat16 if _seconds(torch.bfloat16) < _seconds(torch.float32) else torch.float32


def arithmetic() -> str:
    """Its name, for reports."""
    return {torch.bfloat16: "bf16", torch.float32: "fp32"}[running_dtype()]


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
