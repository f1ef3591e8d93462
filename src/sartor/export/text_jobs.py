"""What is asked of any runtime that runs a language model: score windows, generate, take the time.

By path, as the workers that read it are started: the package would load torch.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np

LONGEST = 8192  # tokens of context


class Runner(Protocol):
    """A loaded model with a context that grows as it decodes. room: tokens that it can hold."""

    room: int

    def clear(self) -> None:
        """Forget what was decoded."""

    def decode(self, ids: list[int], start: int, every: bool) -> np.ndarray:
        """Logits (n, vocab) at every position, or (1, vocab) at the last one, of ids at positions start, start + 1, ..."""

    def tokenize(self, text: str) -> list[int]:
        """Token ids, nothing put in front."""

    def prompted(self, text: str) -> list[int]:
        """Token ids behind what the model's tokenizer puts in front of a text, if anything."""

    def text(self, ids: Sequence[int]) -> str:
        """What these tokens spell."""

    def ends(self, token: int) -> bool:
        """Whether a generation stops at this token."""


def job_score(runner: Runner, job: dict[str, Any]) -> dict[str, Any]:
    """-log p of tokens 1, 2, ... of every window."""
    nats = []
    for ids in job["windows"]:
        runner.clear()
        logits = runner.decode(ids, 0, True)[:-1]
        top = logits.max(1)
        total = top + np.log(np.exp(logits - top[:, None]).sum(1, dtype=np.float64))
        nats.append((total - logits[np.arange(len(ids) - 1), ids[1:]]).round(6).tolist())
    return {"nats": nats}


def job_logits(runner: Runner, job: dict[str, Any]) -> dict[str, Any]:
    """All logits of every window, into the file `out`, one array a window."""
    found = []
    for ids in job["windows"]:
        runner.clear()
        found.append(runner.decode(ids, 0, True).copy())
    np.savez(job["out"], *found)
    return {"windows": len(found)}


def job_tokenize(runner: Runner, job: dict[str, Any]) -> dict[str, Any]:
    return {"ids": [runner.tokenize(t) for t in job["texts"]]}


def job_speed(runner: Runner, job: dict[str, Any]) -> dict[str, Any]:
    """Best of `repeats` of a prompt of ids and of `generate` greedy tokens after it, tokens per second."""
    prompt, generate = job["ids"], job["generate"]
    best_prompt = best_generate = 0.0
    for _ in range(job["repeats"]):
        runner.clear()
        t = time.perf_counter()
        token = int(runner.decode(prompt, 0, False)[0].argmax())
        best_prompt = max(best_prompt, len(prompt) / (time.perf_counter() - t))
        t = time.perf_counter()
        for i in range(generate):
            token = int(runner.decode([token], len(prompt) + i, False)[0].argmax())
        best_generate = max(best_generate, generate / (time.perf_counter() - t))
    return {"prompt_tokens_per_s": best_prompt, "generate_tokens_per_s": best_generate}


def job_generate(runner: Runner, job: dict[str, Any]) -> dict[str, Any]:
    """Text after a prompt, and the ids of both; sampled at `temperature` over the most likely `top_p`."""
    rng = np.random.default_rng(job["seed"])
    before = job.get("before")
    ids = runner.prompted(job["prompt"]) if before is None else [before, *runner.tokenize(job["prompt"])]
    if not ids:
        raise SystemExit("the prompt is empty: give the beginning of a text")
    if len(ids) >= runner.room:
        raise SystemExit(f"the prompt has {len(ids)} tokens and at most {runner.room - 1} fit: give a shorter one")
    said: list[int] = []
    logits = runner.decode(ids, 0, False)[0]
    while len(said) < job["tokens"] and len(ids) + len(said) < runner.room:  # what is said when it is full is not lost
        token = _sample(logits, job["temperature"], job["top_p"], rng)
        if runner.ends(token) or token == before:
            break
        said.append(token)
        logits = runner.decode([token], len(ids) + len(said) - 1, False)[0]
    return {"text": runner.text(said), "ids": ids + said}


def _sample(logits: np.ndarray, temperature: float, top_p: float, rng: np.random.Generator) -> int:
    if temperature <= 0:
        return int(logits.argmax())
    p = np.exp((logits - logits.max()) / temperature, dtype=np.float64)
    order = np.argsort(-p)
    p = p[order] / p.sum()
    count = min(int(np.searchsorted(np.cumsum(p), top_p)) + 1, len(p))  # the sum may stay below one
    return int(order[rng.choice(count, p=p[:count] / p[:count].sum())])


JOBS = {
    "score": job_score,
    "logits": job_logits,
    "tokenize": job_tokenize,
    "speed": job_speed,
    "generate": job_generate,
}


def timed(load: Callable[[str, int, int], Runner]) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """A worker's job, with the seconds that it took; load: (file, threads, tokens of context) -> what runs it."""

    def work(job: dict[str, Any]) -> dict[str, Any]:
        started = time.perf_counter()
        runner = load(job["file"], job["threads"], room(job))
        return JOBS[job["do"]](runner, job) | {"seconds": time.perf_counter() - started}

    return work


def room(job: dict[str, Any]) -> int:
    """Tokens of context that a job takes; of a prompt not more than it has bytes."""
    asked = [len(w) for w in job.get("windows", [])] + [len(job.get("ids", [])) + job.get("generate", 0), 512]
    asked.append(len(job.get("prompt", "").encode()) + 1 + job.get("tokens", 0))
    return min(LONGEST, -(-(max(asked) + 1) // 256) * 256)
