"""Who takes part: one row a contender, what it is, which files it makes and how."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path

import llamacpp_rivals as llama
from ablations import VARIANTS, fitted
from artifacts import MEASURING, Artifact
from onnxruntime_rival import RECIPES, built
from plain_tuning import PLAIN
from pruned_rivals import NAMES, pruned
from subject import Subject
from torchao_rival import TYPES, weight_only

from sartor.errors import InputError
from sartor.export.llama_quantizer import FTYPES

Make = Callable[[Subject, str, Path], Artifact]


@dataclass(frozen=True)
class Contender:
    """One row.

    Attributes:
        name: in tables and for --only. what: it is, in a few words. make: a file or a network of one kind, in a folder that is deleted afterwards.
        kinds: of files that it makes; None: one for each size asked for. version: raised when its code changes what it makes. trained: by the effort's seconds.
    """

    name: str
    what: str
    make: Make
    kinds: tuple[str, ...] | None
    version: str
    trained: bool = False

    def kinds_for(self, sizes: Sequence[str]) -> Sequence[str]:
        return sizes if self.kinds is None else self.kinds


def _rows() -> tuple[Contender, ...]:
    types = tuple(FTYPES)
    made = (
        Contender("original", "the original, F16 and plainly rounded to Q8_0", llama.original, llama.ORIGINAL, "1"),
        Contender("llama.cpp", "llama.cpp's quantizer without importance matrix", llama.quantized, types, "1"),
        Contender("llama.cpp, matrix", "with an importance matrix of the user's text", llama.with_matrix, types, "1"),
        Contender("llama.cpp, layers", "layers left out, then quantized with matrix", llama.without_layers, None, "1"),
        Contender(
            "tuned, llama.cpp", "fine-tuned as long as Sartor trains, then quantized with matrix",
            llama.tuned, llama.TUNED, f"1.{PLAIN}", trained=True,
        ),
        Contender("onnxruntime", "weight-only, by onnxruntime-genai's builder", built, tuple(RECIPES), "1"),
        Contender("torchao", "weight-only, in PyTorch", weight_only, TYPES, "1"),
    )  # fmt: skip
    cuts = (
        Contender(
            name, f"{title}: cut to the same bytes, fine-tuned as long", partial(pruned, name), None, f"1.{PLAIN}", True
        )
        for name, title in NAMES.items()
    )
    ours = (Contender(name, v.what, partial(fitted, name), None, "1", True) for name, v in VARIANTS.items())
    return *made, *cuts, *ours


CONTENDERS: dict[str, Contender] = {c.name: c for c in _rows()}


def chosen(only: Sequence[str], sizes: Sequence[str]) -> list[tuple[Contender, str]]:
    """(contender, kind) of all that `only` names: "torchao", "torchao/int8", "sartor*"; of all where it is empty.

    Raises:
        InputError: a name that fits nothing.
    """
    every = [(c, kind) for c in CONTENDERS.values() for kind in c.kinds_for(sizes)]

    def named(pattern: str, c: Contender, kind: str) -> bool:
        return any(fnmatchcase(x, pattern) for x in (c.name, f"{c.name}/{kind}"))

    for pattern in only:
        if not any(named(pattern, *cell) for cell in every):
            raise InputError(f"there is no contender '{pattern}': take some of {'; '.join(CONTENDERS)}, or NAME/KIND")
    return [cell for cell in every if not only or any(named(pattern, *cell) for pattern in only)]


def depends_on(contender: Contender, kind: str, subject: Subject) -> dict[str, object]:
    """All that a cell's figures depend on."""
    return subject.about(contender.trained) | {
        "contender": contender.name,
        "kind": kind,
        "version": contender.version,
        "measuring": MEASURING,
    }
