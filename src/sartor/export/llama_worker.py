"""llama.cpp in a process of its own: a job as JSON on stdin, its result as JSON on stdout.

The prebuilt wheel xllamacpp contains all of libllama and exports its C interface; this file calls that through ctypes.
A process of its own keeps a crash of the runtime and its memory apart from ours, and makes its peak memory measurable.

Big C structs are treated as opaque: the library fills in its own defaults, we change only the leading integers of
`llama_context_params`, and only after checking that they hold the documented defaults.
"""

from __future__ import annotations

import ctypes as ct
import importlib.util
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
from worker import answer, measured  # by path, as this file is started: the package would load torch


class Opaque(ct.Structure):
    """Larger than any parameter struct of llama.cpp; the callee reads only as much as it knows."""

    _fields_ = (("words", ct.c_uint32 * 256),)


class Batch(ct.Structure):
    """llama_batch."""

    _fields_ = (
        ("n_tokens", ct.c_int32),
        ("token", ct.POINTER(ct.c_int32)),
        ("embd", ct.POINTER(ct.c_float)),
        ("pos", ct.POINTER(ct.c_int32)),
        ("n_seq_id", ct.POINTER(ct.c_int32)),
        ("seq_id", ct.POINTER(ct.POINTER(ct.c_int32))),
        ("logits", ct.POINTER(ct.c_int8)),
    )


LOG = ct.CFUNCTYPE(None, ct.c_int, ct.c_char_p, ct.c_void_p)
CONTEXT_DEFAULTS = {0: 512, 1: 2048, 2: 512, 3: 1}  # n_ctx, n_batch, n_ubatch, n_seq_max


def library() -> Any:
    """libllama out of the xllamacpp wheel, with the signatures that are used here."""
    spec = importlib.util.find_spec("xllamacpp")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("xllamacpp is not installed: pip install xllamacpp==2026.10.11549")
    file = next(Path(spec.submodule_search_locations[0]).glob("xllamacpp*.so"))
    lib = ct.CDLL(str(file))
    signatures: dict[str, tuple[Any, list[Any]]] = {
        "llama_log_set": (None, [LOG, ct.c_void_p]),
        "llama_backend_init": (None, []),
        "llama_model_default_params": (Opaque, []),
        "llama_context_default_params": (Opaque, []),
        "llama_model_load_from_file": (ct.c_void_p, [ct.c_char_p, Opaque]),
        "llama_init_from_model": (ct.c_void_p, [ct.c_void_p, Opaque]),
        "llama_model_get_vocab": (ct.c_void_p, [ct.c_void_p]),
        "llama_vocab_n_tokens": (ct.c_int32, [ct.c_void_p]),
        "llama_vocab_is_eog": (ct.c_bool, [ct.c_void_p, ct.c_int32]),
        "llama_set_n_threads": (None, [ct.c_void_p, ct.c_int32, ct.c_int32]),
        "llama_batch_init": (Batch, [ct.c_int32, ct.c_int32, ct.c_int32]),
        "llama_decode": (ct.c_int32, [ct.c_void_p, Batch]),
        "llama_get_logits": (ct.POINTER(ct.c_float), [ct.c_void_p]),
        "llama_get_memory": (ct.c_void_p, [ct.c_void_p]),
        "llama_memory_clear": (None, [ct.c_void_p, ct.c_bool]),
        "llama_tokenize": (
            ct.c_int32,
            [ct.c_void_p, ct.c_char_p, ct.c_int32, ct.POINTER(ct.c_int32), ct.c_int32, ct.c_bool, ct.c_bool],
        ),
        "llama_token_to_piece": (ct.c_int32, [ct.c_void_p, ct.c_int32, ct.c_char_p, ct.c_int32, ct.c_int32, ct.c_bool]),
    }
    for name, (result, arguments) in signatures.items():
        function = getattr(lib, name)
        function.restype, function.argtypes = result, arguments
    return lib


class Llama:
    """One loaded model and one context."""

    def __init__(self, path: str, threads: int, context: int = 2048) -> None:
        self.lib = library()
        self.lines: list[str] = []
        self._log = LOG(lambda level, text, _: self.lines.append(text.decode(errors="replace")) if level >= 3 else None)
        self.lib.llama_log_set(self._log, None)
        self.lib.llama_backend_init()
        self.model = self.lib.llama_model_load_from_file(path.encode(), self.lib.llama_model_default_params())
        if not self.model:
            raise SystemExit(f"llama.cpp cannot load {Path(path).name}: {' '.join(''.join(self.lines[-3:]).split())}")
        params = self.lib.llama_context_default_params()
        if any(params.words[i] != v for i, v in CONTEXT_DEFAULTS.items()):
            raise SystemExit(
                "this build of xllamacpp has another llama_context_params: pip install xllamacpp==2026.10.11549"
            )
        params.words[0], params.words[1] = context, context
        self.context = self.lib.llama_init_from_model(self.model, params)
        if not self.context:
            raise SystemExit(f"llama.cpp cannot make a context: {' '.join(''.join(self.lines[-3:]).split())}")
        self.lib.llama_set_n_threads(self.context, threads, threads)
        self.vocab = self.lib.llama_model_get_vocab(self.model)
        self.size = self.lib.llama_vocab_n_tokens(self.vocab)
        self.batch = self.lib.llama_batch_init(context, 0, 1)

    def clear(self) -> None:
        self.lib.llama_memory_clear(self.lib.llama_get_memory(self.context), True)

    def decode(self, ids: list[int], start: int, every: bool) -> np.ndarray:
        """Logits (n, vocab) at every position, or (1, vocab) at the last one."""
        b = self.batch
        b.n_tokens = len(ids)
        for i, token in enumerate(ids):
            b.token[i], b.pos[i], b.n_seq_id[i], b.logits[i] = token, start + i, 1, int(every or i == len(ids) - 1)
            b.seq_id[i][0] = 0
        code = self.lib.llama_decode(self.context, b)
        if code:
            raise SystemExit(f"llama.cpp failed to decode (code {code}): {' '.join(''.join(self.lines[-3:]).split())}")
        rows = len(ids) if every else 1
        return np.ctypeslib.as_array(self.lib.llama_get_logits(self.context), (rows, self.size))

    def tokenize(self, text: str) -> list[int]:
        raw = text.encode()
        out = (ct.c_int32 * (len(raw) + 8))()
        n = self.lib.llama_tokenize(self.vocab, raw, len(raw), out, len(out), False, True)
        return list(out[: max(0, n)])

    def piece(self, token: int) -> bytes:
        out = ct.create_string_buffer(256)
        n = self.lib.llama_token_to_piece(self.vocab, token, out, 256, 0, False)
        return out.raw[: max(0, n)]


def job_score(llama: Llama, job: dict[str, Any]) -> dict[str, Any]:
    """-log p of tokens 1, 2, ... of every window."""
    nats = []
    for ids in job["windows"]:
        llama.clear()
        logits = llama.decode(ids, 0, True)[:-1]
        top = logits.max(1)
        total = top + np.log(np.exp(logits - top[:, None]).sum(1, dtype=np.float64))
        nats.append((total - logits[np.arange(len(ids) - 1), ids[1:]]).round(6).tolist())
    return {"nats": nats}


def job_tokenize(llama: Llama, job: dict[str, Any]) -> dict[str, Any]:
    return {"ids": [llama.tokenize(t) for t in job["texts"]]}


def job_speed(llama: Llama, job: dict[str, Any]) -> dict[str, Any]:
    """Best of `repeats` of a prompt of ids and of `generate` greedy tokens after it, tokens per second."""
    prompt, generate = job["ids"], job["generate"]
    best_prompt = best_generate = 0.0
    for _ in range(job["repeats"]):
        llama.clear()
        t = time.perf_counter()
        token = int(llama.decode(prompt, 0, False)[0].argmax())
        best_prompt = max(best_prompt, len(prompt) / (time.perf_counter() - t))
        t = time.perf_counter()
        for i in range(generate):
            token = int(llama.decode([token], len(prompt) + i, False)[0].argmax())
        best_generate = max(best_generate, generate / (time.perf_counter() - t))
    return {"prompt_tokens_per_s": best_prompt, "generate_tokens_per_s": best_generate}


def job_generate(llama: Llama, job: dict[str, Any]) -> dict[str, Any]:
    """Text after a prompt; sampled at `temperature` over the most likely `top_p`, streamed to stderr as it comes."""
    rng = np.random.default_rng(job["seed"])
    ids = llama.tokenize(job["prompt"])
    if job.get("before") is not None:
        ids = [job["before"], *ids]
    logits, done, said = llama.decode(ids, 0, False)[0], len(ids), b""
    for _ in range(job["tokens"]):
        token = _sample(logits, job["temperature"], job["top_p"], rng)
        if llama.lib.llama_vocab_is_eog(llama.vocab, token) or token == job.get("before"):
            break
        said += llama.piece(token)
        logits, done = llama.decode([token], done, False)[0], done + 1
    return {"text": said.decode(errors="replace")}


def _sample(logits: np.ndarray, temperature: float, top_p: float, rng: np.random.Generator) -> int:
    if temperature <= 0:
        return int(logits.argmax())
    p = np.exp((logits - logits.max()) / temperature, dtype=np.float64)
    order = np.argsort(-p)
    p = p[order] / p.sum()
    count = int(np.searchsorted(np.cumsum(p), top_p)) + 1
    return int(order[rng.choice(count, p=p[:count] / p[:count].sum())])


JOBS = {"score": job_score, "tokenize": job_tokenize, "speed": job_speed, "generate": job_generate}


def work(job: dict[str, Any]) -> dict[str, Any]:
    """One job, and the seconds that it took."""
    started = time.perf_counter()
    longest = max([len(w) for w in job.get("windows", [])] + [len(job.get("ids", [])) + job.get("generate", 0), 512])
    llama = Llama(
        job["file"],
        job["threads"],
        context=min(8192, 256 * math.ceil((longest + 1) / 256)) if job["do"] != "generate" else 2048,
    )
    return JOBS[job["do"]](llama, job) | {"seconds": time.perf_counter() - started}


if __name__ == "__main__":
    answer(measured(work))
