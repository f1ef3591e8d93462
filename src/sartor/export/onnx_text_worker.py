"""ONNX Runtime with a language model, in a process of its own: a job as JSON on stdin, its result as JSON on stdout."""

from __future__ import annotations

import json
from functools import cached_property
from pathlib import Path

import numpy as np
from onnx_worker import load  # by path, as this file is started: the package would load torch
from spelling import Spelling
from text_jobs import timed
from worker import answer, measured


class OnnxText(Spelling):
    """A loaded file and its cache: keys and values have room for the whole context and stay where they are, so that no token copies what came before it."""

    def __init__(self, path: str, threads: int, context: int) -> None:
        import onnxruntime as ort

        self.folder, self.session, self.room = Path(path).parent, load(path, threads), context
        self.binding, self.cache = self.session.io_binding(), {}
        for given in self.session.get_inputs():
            if given.name.startswith("past_key_values."):
                empty = np.zeros((1, given.shape[1], context, given.shape[3]), np.float32)
                self.cache[given.name] = ort.OrtValue.ortvalue_from_numpy(empty)
        for name, value in self.cache.items():
            self.binding.bind_ortvalue_input(name, value)
            self.binding.bind_ortvalue_output(name.replace("past_key_values", "present"), value)
        self.masked = any(given.name == "attention_mask" for given in self.session.get_inputs())

    def clear(self) -> None:
        """Nothing to do: what stands behind the length that the mask tells is never read."""

    def decode(self, ids: list[int], start: int, every: bool) -> np.ndarray:
        self.binding.bind_cpu_input("input_ids", np.array([ids], np.int64))
        if self.masked:
            self.binding.bind_cpu_input("attention_mask", np.ones((1, start + len(ids)), np.int64))
        self.binding.bind_output("logits", "cpu")  # anew: it has another size each time
        self.session.run_with_iobinding(self.binding)
        logits: np.ndarray = self.binding.get_outputs()[-1].numpy()[0]
        return logits if every else logits[-1:]

    @cached_property
    def final(self) -> list[int | None]:
        """Tokens that end a text, as onnxruntime-genai reads them."""
        end = json.loads((self.folder / "genai_config.json").read_text())["model"]["eos_token_id"]
        return end if isinstance(end, list) else [end]

    def ends(self, token: int) -> bool:
        return token in self.final


if __name__ == "__main__":
    answer(measured(timed(OnnxText)))
