"""llama.cpp in a process of its own: a job as JSON on stdin, its result as JSON on stdout.

The prebuilt wheel xllamacpp contains all of libllama and exports its C interface; this file calls that through ctypes.
A process of its own keeps a crash of the runtime and its memory apart from ours, and makes its peak memory measurable.

Big C structs are treated as opaque: the library fills in its own defaults, we change only the leading integers of
`llama_context_params`, and only after checking that they hold the documented defaults.
"""

from __future__ import annotations

import ctypes as ct
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from text_jobs import timed  # by path, as this file is started: the package would load torch
from worker import answer, measured


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
        self.lib, self.room = library(), context
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
        return self._ids(text, False)

    def prompted(self, text: str) -> list[int]:
        return self._ids(text, True)

    def _ids(self, text: str, begun: bool) -> list[int]:
        raw = text.encode()
        out = (ct.c_int32 * (len(raw) + 8))()
        n = self.lib.llama_tokenize(self.vocab, raw, len(raw), out, len(out), begun, True)
        return list(out[: max(0, n)])

    def text(self, ids: Sequence[int]) -> str:
        """Pieces are bytes: a letter may be spelled by several tokens."""
        said = b""
        for token in ids:
            out = ct.create_string_buffer(256)
            n = self.lib.llama_token_to_piece(self.vocab, token, out, 256, 0, False)
            said += out.raw[: max(0, n)]
        return said.decode(errors="replace")

    def ends(self, token: int) -> bool:
        return bool(self.lib.llama_vocab_is_eog(self.vocab, token))


if __name__ == "__main__":
    answer(measured(timed(Llama)))
