"""Published prunings at equal bytes: cut until the file fits, repaired as the paper says, fine-tuned on the user's text for as long as Sartor trains.

Their files hold every matrix on one grid, Q8_0 or Q4_0: that of the two which lets more of the network stay.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

from artifacts import Artifact, gguf_artifact
from cuts import REPAIR, chosen, plan_of
from plain_tuning import tuned_
from rivals import RIVALS, Ranking, Seen, look
from subject import SEED, Subject

from sartor import evaluate
from sartor.errors import BudgetError, SartorError
from sartor.export.gguf_file import parameter_shapes
from sartor.model.families import family_of
from sartor.model.network import Anatomy, anatomy
from sartor.plan import Plan
from sartor.stages.tokens import sample, training_rows

GRIDS = ("Q8_0", "Q4_0")
ROWS = 128  # of 256 tokens, of the user's training split, that a method may look at
MOST = 0.95  # of the parameters of attention and FFN
HALVINGS = 12  # of the interval that the share which goes is searched in
BIAS = 128  # bytes of a file's table that a bias takes, at most
NAMES = {
    "wanda-sp": "Wanda-sp",
    "flap": "FLAP",
    "obs": "OBS (SlimGPT-like)",
    "block-drop": "block drop (ShortGPT)",
    "taylor": "Taylor",
    "magnitude": "magnitude",
}
BIASED = ("flap",)  # repaired with biases, which take room too


def pruned(name: str, subject: Subject, size: str, work: Path) -> Artifact:
    """One method (of NAMES) at one size."""
    seen, looking = seen_of(subject)
    ranking, sorting = subject.shared(f"ranking {name}", lambda: RIVALS[NAMES[name]](seen))
    started, network, limit = time.monotonic(), subject.network(), subject.budget(size)
    grid, plan, share = cut_to(anatomy(network), ranking, limit, partial(_file_bytes, subject, name in BIASED))
    cut = REPAIR[NAMES[name]](network, plan, seen)
    del network
    tuned_(cut, subject)
    file = work / "model.gguf"
    evaluate.write_plain(file, cut, subject.tokenizer, grid)
    if file.stat().st_size > limit:
        raise SartorError(
            f"{name} has {file.stat().st_size:,} bytes, {limit:,} were foretold at most: please report this"
        )
    seconds = time.monotonic() - started + looking + sorting
    return gguf_artifact(file, subject.tokenizer, seconds, f"{share:.0%} of attention and FFN gone, {grid}")


def cut_to(
    a: Anatomy, ranking: Ranking, limit: int, file_bytes: Callable[[Anatomy, str], int]
) -> tuple[str, Plan, float]:
    """(grid, what stays, share that goes): the least that makes the file fit, on the grid for which that is less; the finer one where neither loses anything.

    Args:
        file_bytes: at most so many has the file of a network of this anatomy on a grid.
    Raises:
        BudgetError: not even with MOST of it gone.
    """

    def plan_at(share: float) -> Plan:
        return plan_of(a, chosen(a, ranking, share), SEED)

    found = []
    for grid in GRIDS:
        share = least_share(lambda x, g=grid: file_bytes(after(a, plan_at(x)), g) <= limit)  # type: ignore[misc]
        if share is not None:
            found.append((share, grid))
    if not found:
        raise BudgetError(f"{limit:,} bytes cannot be reached even with {MOST:.0%} of attention and FFN gone")
    share, grid = min(found, key=lambda x: x[0])
    return grid, plan_at(share), share


def least_share(fits: Callable[[float], bool]) -> float | None:
    """The least share from 0 to MOST that fits, within MOST / 2^HALVINGS; None where none does."""
    if fits(0.0):
        return 0.0
    if not fits(MOST):
        return None
    low, high = 0.0, MOST
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (low, middle) if fits(middle) else (middle, high)
    return high


def after(a: Anatomy, plan: Plan) -> Anatomy:
    """What is left of a network."""
    groups = tuple(len(layer.kept_groups()) for layer in plan.layers)
    ffn = tuple(len(layer.kept_channels()) for layer in plan.layers)
    return replace(a, groups=groups, ffn=ffn)


def seen_of(subject: Subject) -> tuple[Seen, float]:
    """(what the methods look at, the seconds it took)."""

    def compute() -> Seen:
        rows = sample(training_rows(subject.texts.train, subject.tokenizer), ROWS, SEED)
        return look(subject.half(), rows)

    return subject.shared("seen by rivals", compute)


def _file_bytes(subject: Subject, biased: bool, a: Anatomy, grid: str) -> int:
    matrices = [n for n, shape in parameter_shapes(a, family_of(a.family)).items() if len(shape) == 2]
    biases = 2 * a.layers * (4 * a.width + BIAS) if biased else 0
    return subject.p.bytes_of(a, subject.tokenizer, dict.fromkeys(matrices, grid)) + biases
