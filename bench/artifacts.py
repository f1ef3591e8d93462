"""What contenders make, and how it is measured: the same windows and the same clock for all, each in its own runtime."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from subject import Subject

from sartor import evaluate
from sartor.clock import versions
from sartor.evaluate import HeldOut
from sartor.export import llamacpp
from sartor.numerics.metrics import Score
from sartor.stages.measure import score_of
from sartor.stages.tokens import encode_windows

MEASURING = 1  # version of `figures`: part of what every cell depends on
COPIED = 1 << 28  # bytes of the array whose copy measures the memory: far more than any cache holds
COPIES = 3


@dataclass(frozen=True)
class Artifact:
    """A model that is ready to run.

    Attributes:
        bytes: of the file. seconds: that it took to make. runtime: whose. scores: (user, generic) coding length of held-out windows there; speed: tokens per second after these ids, and peak memory. read: bytes of weights that one generated token needs.
        note: what a reader must know.
    """

    bytes: int
    seconds: float
    tokenizer: Any
    runtime: str
    scores: Callable[[HeldOut], tuple[Score, Score]]
    speed: Callable[[Sequence[int]], Mapping[str, float]]
    read: int
    note: str = ""


def gguf_artifact(file: Path, tokenizer: Any, seconds: float, note: str = "") -> Artifact:
    """A file for llama.cpp."""
    scores, speed = partial(evaluate.in_runtime, file, tokenizer=tokenizer), partial(llamacpp.speed, file)
    return Artifact(file.stat().st_size, seconds, tokenizer, "llama.cpp", scores, speed, weight_bytes(file), note)


Ask = Callable[
    ..., dict[str, Any]
]  # of a worker that holds one model: a job of `text_jobs.JOBS` by keywords, its result


def scored(ask: Ask, tokenizer: Any, windows: HeldOut) -> tuple[Score, Score]:
    """(user, generic) coding length in a worker."""
    user, generic = (encode_windows(w, tokenizer) for w in (windows.user, windows.generic))
    nats = [torch.tensor(n) for n in ask(do="score", windows=[list(w.ids) for w in (*user, *generic)])["nats"]]
    return score_of(user, nats[: len(user)]), score_of(generic, nats[len(user) :])


def timed(ask: Ask, ids: Sequence[int]) -> dict[str, float]:
    """Tokens per second after these ids in a worker, and its peak memory."""
    return ask(do="speed", ids=list(ids), generate=64, repeats=2)


def weight_bytes(file: Path) -> int:
    """Bytes of weights that a generated token needs: all of them, but of an embedding that is not the head too only one row."""
    import gguf

    size = {t.name: int(t.n_bytes) for t in gguf.GGUFReader(file).tensors}
    return sum(size.values()) - (size["token_embd.weight"] if "output.weight" in size else 0)


def copied() -> dict[str, float]:
    """What the memory moves, read and written together: the best of some copies of a large array, with torch's threads."""
    one = torch.ones(COPIED // 4)
    other, best = torch.empty_like(one), float("inf")
    for _ in range(COPIES):
        started = time.perf_counter()
        other.copy_(one)
        best = min(best, time.perf_counter() - started)
    return {"bytes_per_s": 2 * COPIED / best}


def figures(artifact: Artifact, subject: Subject) -> dict[str, Any]:
    """A cell: quality beside the original's, paired by document; speed and memory beside llama.cpp's Q8_0 of the original, in turns; where the memory's speed would let it get."""
    theirs = subject.reference()
    ours = artifact.scores(subject.windows)
    ids = evaluate.prompt_ids(subject.windows, artifact.tokenizer)
    speed = evaluate.in_turns(
        {
            "": partial(artifact.speed, ids),
            "dense_": partial(llamacpp.speed, subject.dense.q8_0, ids),
            "memory_": copied,
        }
    )
    return {
        "bytes": artifact.bytes,
        "seconds": artifact.seconds,
        "runtime": artifact.runtime,
        "user": evaluate.figures("user", ours[0], theirs[0]),
        "generic": evaluate.figures("generic", ours[1], theirs[1]),
        "speed": speed,
        "read_bytes_per_token": artifact.read,
        "share_of_bandwidth": artifact.read * speed["generate_tokens_per_s"] / speed["memory_bytes_per_s"],
        "note": artifact.note,
        "versions": versions("torch", "transformers", "xllamacpp", "llama-cpp-python", "torchao"),
        "scores": [asdict(s) for s in ours],
    }
