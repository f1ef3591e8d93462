"""ExecuTorch with a language model, in a process of its own: a job as JSON on stdin, its result as JSON on stdout."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
from spelling import Spelling  # by path, as this file is started: the package would load more
from text_jobs import timed
from worker import answer, measured

sys.path.pop(0)  # this folder, whose executorch.py would stand before the package of that name
FACTS = "executorch.json"


class ExecutorchText(Spelling):
    """A loaded file, whose keys and values lie in its own buffers; the runtime's Python side takes torch's tensors, so torch is in memory too."""

    def __init__(self, path: str, threads: int, context: int) -> None:
        try:
            from executorch.extension.pybindings.portable_lib import _unsafe_reset_threadpool
            from executorch.runtime import Runtime
        except ImportError as error:
            raise SystemExit("ExecuTorch is not installed: pip install executorch==1.5.1 torchao==0.18.0") from error
        self.folder = Path(path).parent
        if not (self.folder / FACTS).exists():
            raise SystemExit(f"{FACTS} is not beside it: copy all files that sartor export wrote")
        facts = json.loads((self.folder / FACTS).read_text())
        self.room, self.chunk, self.final = facts["context_length"], facts["most_tokens"], facts["eos_token_ids"]
        _unsafe_reset_threadpool(threads)
        try:
            self.program = Runtime.get().load_program(path)
            self.method = self.program.load_method("forward")
        except Exception as error:
            said = " ".join(str(error).replace(path, Path(path).name).split())
            raise SystemExit(f"it cannot be loaded: {said[:200]}") from error

    def clear(self) -> None:
        """Nothing to do: what stands behind a token's place is never seen."""

    def decode(self, ids: list[int], start: int, every: bool) -> np.ndarray:
        import torch

        if start + len(ids) > self.room:
            raise SystemExit(
                f"{start + len(ids)} tokens are more than the {self.room} that it was made for: give a shorter text or generate fewer tokens"
            )
        found = []
        for n in range(0, len(ids), self.chunk):
            part, place = torch.tensor([ids[n : n + self.chunk]]), torch.tensor([start + n])
            logits: np.ndarray = self.method.execute((part, place))[0][0].numpy()
            found.append(logits.copy() if every else logits[-1:].copy())  # the next call writes where these lie
        return np.concatenate(found if every else found[-1:])

    def ends(self, token: int) -> bool:
        return token in self.final


if __name__ == "__main__":
    answer(measured(timed(ExecutorchText)))
