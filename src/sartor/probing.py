"""What a text needs of a model, and how far that can be trusted: backward probes, their check, and every part left out alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sartor.effort import effort_of
from sartor.model.graph import Graph
from sartor.model.network import anatomy
from sartor.stages.maps import feel_maps, map_effects
from sartor.stages.medium import medium_of
from sartor.stages.probe import Effects, Units, Worth, check, effects_of, recovered, reliability, without_parts
from sartor.stages.sensitivity import Felt, feel, together
from sartor.stages.tokens import sample, training_rows

FIRST = 16  # rows that are felt at least
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
Enough = Callable[[dict[str, Any]], bool]
Recall = Callable[[str, Tensor, int, Compute, Enough], dict[str, Any]]


class Sensed(NamedTuple):
    """What was felt: the user's effects beside the generic profile, that, and the effects of two halves of the user's text by themselves."""

    user: Effects
    generic: Effects
    halves: tuple[Effects, Effects]


def always(kept: dict[str, Any]) -> bool:
    """Whatever is kept will do."""
    return True


def anew(what: str, rows: Tensor, seed: int, compute: Compute, enough: Enough = always) -> dict[str, Any]:
    """Nothing is remembered."""
    return compute()


def sense(
    dense: Any,
    tokenizer: Any,
    texts: Texts,
    effort: str,
    seed: int,
    tell: Tell,
    recall: Recall = anew,
    alone: bool = False,
) -> Sensed:
    """What the user's text, recovered beside generic text, and generic text need of every unit.

    Args:
        dense: in bf16. alone: the user's text is read until it tells the order by itself, for whoever wants to know about single units; a decision needs less. recall: given what is to be measured, on which rows, with which seed, how, and what of an earlier job would be enough, returns it, from an earlier job where it can.
    """
    rows = training_rows(texts.train, tokenizer), training_rows(texts.generic_train, tokenizer)
    e = effort_of(effort)
    generic = profile(dense, rows[1], effort, lambda share, note: tell("probe", 0.4 * share, note), recall)
    own = sample(rows[0], e.felt_rows, seed)
    told = lambda share: tell("probe", 0.4 + 0.4 * share, "gradients on the user's text")  # noqa: E731

    def measure() -> dict[str, Any]:
        found = sounded(dense, own, e.known, seed, told, None if alone else generic)
        return {str(i): x.to_dict() for i, x in enumerate(found)}

    raw = recall(
        f"halves{'-alone' * alone}-{e.known}", torch.cat([own.flatten(), rows[1].flatten()]), seed, measure, always
    )
    user, one, other = (Effects.from_dict(raw[str(i)]) for i in range(3))
    return Sensed(recovered(user, (one, other), generic), generic, (one, other))


def profile(
    dense: Any, rows: Tensor, effort: str, tell: Callable[[float, str], None], recall: Recall = anew
) -> Effects:
    """What generic text needs: the same for all users of a model, so that one measurement, of whoever was first, serves them all.

    Args:
        rows: all of the generic text; of them as many are read as it takes.
    """
    e = effort_of(effort)
    read = sample(rows, e.felt_rows, 0)
    tokens = (len(read) - 1) * medium_of(dense).positions(read)  # where one is left over, it is not read
    told = lambda share: tell(share, "gradients on generic text")  # noqa: E731
    measure = lambda: sounded(dense, read, e.known, 0, told)[0].to_dict()  # noqa: E731
    return Effects.from_dict(
        recall("profile", rows, 0, measure, lambda kept: kept["known"] >= e.known or kept["tokens"] >= tokens)
    )


def felt(
    model: Any, rows: tuple[Tensor, Tensor], effort: str, seed: int, tell: Callable[[float, str], None]
) -> tuple[Effects, Effects]:
    """Backward probes on the user's rows and on generic ones, each for itself."""
    e = effort_of(effort)
    user, generic = (
        sounded(model, sample(r, e.felt_rows, seed), e.known, seed, partial(_halfway, tell, start, name))[0]
        for r, start, name in zip(rows, (0.0, 0.5), ("the user's text", "generic text"), strict=True)
    )
    return user, generic


def _halfway(tell: Callable[[float, str], None], start: float, name: str, share: float) -> None:
    tell(start + 0.5 * share, f"gradients on {name}")


def sounded(
    model: Any, rows: Tensor, known: float, seed: int, tell: Callable[[float], None], generic: Effects | None = None
) -> tuple[Effects, Effects, Effects]:
    """Effects on as many of the rows as it takes, and those of the two halves: twice as many again until the order of all units is known well enough.

    Args:
        known: least reliability of the order (`reliability`), or all rows. generic: a profile that the effects will be `recovered` beside: what it tells needs not be read again.
    """
    rows = rows.reshape(2, -1) if len(rows) == 1 else rows
    look, effects = _looks(model)
    n = min(FIRST, len(rows))

    def read(start: int, end: int) -> Felt:
        return look(
            model, rows[start:end], seed + start, lambda share: tell((start + share * (end - start)) / len(rows))
        )

    halves = [read(0, n // 2), read(n // 2, n)]
    while True:
        one, other = (effects(h) for h in halves)
        told = reliability(one, other, generic)
        if told >= known or n + 1 >= len(rows):
            break
        more = min(2 * n, len(rows))
        middle = (n + more) // 2
        halves, n = [together(halves[0], read(n, middle)), together(halves[1], read(middle, more))], more
    tell(1.0)
    return replace(effects(together(*halves)), known=told), one, other


def _looks(model: Any) -> tuple[Callable[..., Felt], Callable[[Felt], Effects]]:
    """How a network is felt, and what that makes the effects of its units."""
    return (feel_maps, map_effects) if isinstance(model, Graph) else (feel, partial(effects_of, anatomy(model)))


def worth_of(
    dense: Any, tokenizer: Any, texts: Texts, units: Units, effort: str, seed: int, tell: Tell, recall: Recall = anew
) -> Worth:
    """Whether the units' effects foretell what random cuts cost on the user's probe split."""
    e, rows = effort_of(effort), probe_rows(texts.probe, tokenizer, effort_of(effort).probe_rows, seed)
    told = lambda share, note: tell("probe", 0.8 + 0.2 * share, note)  # noqa: E731
    about = torch.cat([rows.flatten().double(), torch.from_numpy(units.effects)])
    measure = lambda: asdict(check(dense, units, rows, e.checks, seed, told))  # noqa: E731
    return Worth(**recall(f"check-{e.checks}", about, seed, measure, always))


def probe_rows(texts: Sequence[str], tokenizer: Any, n: int, seed: int) -> Tensor:
    return sample(training_rows(texts, tokenizer), n, seed)


def explain(
    dense: Any, tokenizer: Any, texts: Texts, effort: str, seed: int, tell: Tell, recall: Recall = anew
) -> dict[str, Any]:
    """Every sub-layer left out alone, on text that shaped nothing: {"user" or "generic": {part: by layer, [share, low, high]}}."""

    def without(of: Sequence[str], start: float) -> dict[str, Any]:
        rows = probe_rows(of, tokenizer, 2 * effort_of(effort).probe_rows, seed)
        told = lambda share, note: tell("explain", start + share / 2, note)  # noqa: E731
        return recall("without", rows, seed, lambda: without_parts(dense, rows, told), always)

    return {"user": without(texts.probe, 0.0), "generic": without(texts.generic_probe, 0.5)}
