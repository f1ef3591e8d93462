"""What a text needs of a model, and how far that can be trusted: backward probes, their check, and every part left out alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from sartor.effort import EFFORTS
from sartor.model.network import anatomy
from sartor.stages.probe import Effects, Units, Worth, check, effects_of, without_parts
from sartor.stages.sensitivity import feel
from sartor.stages.tokens import sample, training_rows

Tell = Callable[[str, float, str], None]


@dataclass(frozen=True)
class Texts:
    """What the stages read: the user's splits and the generic reference's."""

    probe: Sequence[str]
    train: Sequence[str]
    validation: Sequence[str]
    generic_probe: Sequence[str]
    generic_train: Sequence[str]


Compute = Callable[[], dict[str, Any]]
Recall = Callable[[str, Tensor, int, Compute], dict[str, Any]]


def anew(what: str, rows: Tensor, seed: int, compute: Compute) -> dict[str, Any]:
    """Nothing is remembered."""
    return compute()


def sense(
    dense: Any, tokenizer: Any, texts: Texts, effort: str, seed: int, tell: Tell, recall: Recall = anew
) -> tuple[Effects, Effects]:
    """What the user's text and generic text need of every unit.

    Args:
        dense: in bf16. recall: given what is to be measured, on which rows, with which seed and how, returns it, from an earlier job where it can.
    """
    rows = training_rows(texts.train, tokenizer), training_rows(texts.generic_train, tokenizer)
    return felt(dense, rows, effort, seed, lambda share, note: tell("probe", 0.8 * share, note), recall)


def felt(
    model: Any,
    rows: tuple[Tensor, Tensor],
    effort: str,
    seed: int,
    tell: Callable[[float, str], None],
    recall: Recall = anew,
) -> tuple[Effects, Effects]:
    """Backward probes on some of the user's rows and of generic ones."""

    def on(rows: Tensor, start: float, name: str) -> Effects:
        told = lambda share: tell(start + 0.5 * share, f"gradients on {name}")  # noqa: E731
        measure = lambda: effects_of(anatomy(model), feel(model, rows, seed, told), seed).to_dict()  # noqa: E731
        return Effects.from_dict(recall("effects", rows, seed, measure))

    many = EFFORTS[effort].felt_rows
    user, generic = sample(rows[0], many, seed), sample(rows[1], many // 2, seed)
    return on(user, 0.0, "the user's text"), on(generic, 0.5, "generic text")


def worth_of(dense: Any, tokenizer: Any, texts: Texts, units: Units, effort: str, seed: int, tell: Tell) -> Worth:
    """Whether the units' effects foretell what random cuts cost on the user's probe split."""
    e = EFFORTS[effort]
    told = lambda share, note: tell("probe", 0.8 + 0.2 * share, note)  # noqa: E731
    return check(dense, units, probe_rows(texts.probe, tokenizer, e.probe_rows, seed), e.checks, seed, told)


def probe_rows(texts: Sequence[str], tokenizer: Any, n: int, seed: int) -> Tensor:
    return sample(training_rows(texts, tokenizer), n, seed)


def explain(
    dense: Any, tokenizer: Any, texts: Texts, effort: str, seed: int, tell: Tell, recall: Recall = anew
) -> dict[str, Any]:
    """Every sub-layer left out alone, on text that shaped nothing: {"user" or "generic": {part: by layer, [share, low, high]}}."""

    def without(of: Sequence[str], start: float) -> dict[str, Any]:
        rows = probe_rows(of, tokenizer, 2 * EFFORTS[effort].probe_rows, seed)
        told = lambda share, note: tell("explain", start + share / 2, note)  # noqa: E731
        return recall("without", rows, seed, lambda: without_parts(dense, rows, seed, told))

    return {"user": without(texts.probe, 0.0), "generic": without(texts.generic_probe, 0.5)}
