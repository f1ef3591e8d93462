"""One user of the benchmark: texts split and cut into windows once, the original in its runtime, and what several contenders share."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import cells
from torch import Tensor

from sartor import evaluate
from sartor.effort import effort_of
from sartor.job import Job, Prepared
from sartor.model.network import load_dense
from sartor.model.precision import running_dtype
from sartor.numerics.metrics import Score
from sartor.plan import parse_budget
from sartor.sources import Source
from sartor.stages.calibrate import Moments, second_moments
from sartor.stages.tokens import Window, cut_windows, encode_windows, sample, training_rows

REFERENCE = 1  # version of how the original is measured
MATRIX_ROWS = 32  # of 256 tokens, that an importance matrix is made from
SEED = 0


class Subject:
    """What every contender is given, and what it is measured by; the network itself is opened anew for each, which may spoil it.

    Attributes:
        name: the folder's. effort: name of the row of EFFORTS whose windows and seconds count. windows: held-out text. dense: the original's files.
    """

    def __init__(self, model: str, source: Source, data: Path, generic: Path | None, effort: str) -> None:
        self.name, self.effort = data.name, effort
        self.p = Prepared(
            Job(model, str(data), "50%", effort=effort, generic=str(generic) if generic else None, seed=SEED),
            lambda *_: None,
            source,
        )
        self.texts, self.tokenizer, self.source = self.p.texts, self.p.tokenizer, source
        self.windows = evaluate.held_out(self.p.user.test, self.p.generic.test, effort_of(effort).test_bytes)
        self.fingerprint = self.p.fingerprint()
        self.dense = evaluate.dense_reference(source, (self.p.model, self.p.tokenizer))
        self.p.release()
        self._shared: dict[str, tuple[Any, float]] = {}

    def about(self, trained: bool) -> dict[str, Any]:
        """What every figure of this user depends on; of what is trained, also the whole effort."""
        e = effort_of(self.effort)
        how = asdict(e) if trained else {"test_bytes": e.test_bytes}
        return {"model": self.source.sha256, "texts": self.fingerprint, "effort": how, "seed": SEED}

    def network(self) -> Any:
        """The original in fp32, opened anew."""
        return load_dense(self.source.folder)[0]

    def half(self) -> Any:
        """The original in bf16."""
        return self.network().to(running_dtype())

    def budget(self, size: str) -> int:
        """Bytes of a size such as 25%."""
        return parse_budget(size).bytes_of(self.p.original_fp16)

    def rows(self) -> Tensor:
        """The user's rows that may be learned from: as many texts as Sartor trains on."""
        return training_rows([*self.texts.train, *self.texts.probe], self.tokenizer)

    def validation(self) -> list[Window]:
        windows = cut_windows(self.texts.validation, effort_of(self.effort).validation_bytes)
        return encode_windows(windows, self.tokenizer)

    def moments(self, network: Any) -> Moments:
        """Of what the linears of a bf16 network read of the user's text: what an importance matrix is made of."""
        return second_moments(network, sample(training_rows(self.texts.train, self.tokenizer), MATRIX_ROWS, SEED))

    def reference(self) -> tuple[Score, Score]:
        """(user, generic) coding length under the original, F16 in llama.cpp, measured once for all contenders."""

        def compute() -> dict[str, Any]:
            scores = evaluate.in_runtime(self.dense.f16, self.windows, self.dense.tokenizer)
            return {"scores": [asdict(s) for s in scores]}

        about = self.about(trained=False) | {"contender": "reference", "version": REFERENCE}
        found = cells.known(about)
        if found is None:
            cells.keep(about, found := compute())
        user, generic = (Score(tuple(s["nats"]), tuple(s["size"])) for s in found["scores"])
        return user, generic

    def shared(self, name: str, compute: Callable[[], Any]) -> tuple[Any, float]:
        """(a result that several cells of this user need, the seconds it took whoever was first)."""
        if name not in self._shared:
            started = time.monotonic()
            self._shared[name] = compute(), time.monotonic() - started
        return self._shared[name]
