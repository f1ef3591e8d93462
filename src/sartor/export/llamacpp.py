"""Running a GGUF file in llama.cpp, each job in a process of its own."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sartor.errors import ParityError
from sartor.export import text_runtimes
from sartor.numerics.metrics import Score
from sartor.stages.measure import score_of
from sartor.stages.tokens import Window

# llama.cpp rounds activations to 8 bits in front of 4-bit weights, which moves single tokens (0.06 nats on average on
# SmolLM2-135M) but not their sum (0.002); a wrong layout moves both by whole nats.
TOLERANCE_NATS = 0.15
TOLERANCE_MEAN_NATS = 0.02


@dataclass(frozen=True)
class Parity:
    """Agreement of the artifact in its runtime with PyTorch on the same tokens, in nats per token."""

    tokens: int
    mean_difference: float
    mean_absolute: float
    largest: float
    tolerance: float = TOLERANCE_NATS
    tolerance_mean: float = TOLERANCE_MEAN_NATS


def available() -> bool:
    return importlib.util.find_spec("xllamacpp") is not None


def run_job(file: Path, do: str, threads: int | None = None, **job: Any) -> dict[str, Any]:
    """`text_runtimes.run_job` in llama.cpp."""
    return text_runtimes.run_job("gguf", file, do, threads, **job)


def nats(file: Path, windows: Sequence[Window]) -> list[torch.Tensor]:
    """-log p of tokens 1, 2, ... of every window, in the runtime."""
    result = run_job(file, "score", windows=[list(w.ids) for w in windows])
    return [torch.tensor(n) for n in result["nats"]]


def score(file: Path, windows: Sequence[Window]) -> Score:
    """Bits per byte in the runtime, by document."""
    return score_of(windows, nats(file, windows))


def speed(file: Path, ids: Sequence[int], generate: int = 64, repeats: int = 2) -> dict[str, float]:
    """Tokens per second and peak memory of the process that runs the file (the Python around it included)."""
    return run_job(file, "speed", ids=list(ids), generate=generate, repeats=repeats)


def parity(ours: Sequence[torch.Tensor], theirs: Sequence[torch.Tensor], runtime: str = "llama.cpp") -> Parity:
    """Compare -log p token by token: PyTorch's and the runtime's.

    Raises:
        ParityError: they differ by more than the tolerances.
    """
    difference = np.concatenate([(a.double() - b.double()).numpy() for a, b in zip(ours, theirs, strict=True)])
    found = Parity(
        len(difference), float(difference.mean()), float(np.abs(difference).mean()), float(np.abs(difference).max())
    )
    if not (found.mean_absolute <= TOLERANCE_NATS and abs(found.mean_difference) <= TOLERANCE_MEAN_NATS):
        raise ParityError(
            f"in {runtime} the artifact differs from PyTorch by {found.mean_absolute:.3f} nats per token (mean {found.mean_difference:+.3f}), "
            f"at most {TOLERANCE_NATS} (mean {TOLERANCE_MEAN_NATS}) are allowed: the file is not trustworthy, please report it"
        )
    return found
