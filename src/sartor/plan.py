"""A decision as data: what is kept, on which grid, and why. JSON in, JSON out."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

from sartor.errors import BudgetError, InputError

UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
EFFORTS = ("quick", "standard", "thorough")
METHODS = ("sartor", "paper")


@dataclass(frozen=True)
class Budget:
    """What the result may cost.

    Attributes:
        size: bytes of the file, or None with `share`. share: of the original's fp16 bytes, 0 < share < 1.
        effort: how long to work; quick, standard or thorough.
    """

    size: int | None = None
    share: float | None = None
    effort: str = "standard"

    def __post_init__(self) -> None:
        if (self.size is None) == (self.share is None):
            raise BudgetError("give the size as bytes or as a share of the original, not both")
        if self.share is not None and not 0 < self.share < 1:
            raise BudgetError(f"the share is {self.share:.0%}: it must lie between 0% and 100%")
        if self.effort not in EFFORTS:
            raise BudgetError(f"the effort is '{self.effort}': it must be one of {', '.join(EFFORTS)}")

    def text(self) -> str:
        """As a user would write it."""
        return f"{self.size}B" if self.size is not None else f"{100 * (self.share or 0)}%"

    def bytes_of(self, original_fp16: int) -> int:
        return self.size if self.size is not None else int(original_fp16 * (self.share or 0))


def parse_budget(text: str, effort: str = "standard") -> Budget:
    """'25%', '67MB', '48 MiB', '64000000B' to a Budget.

    Raises:
        BudgetError: no unit, or not a size at all.
    """
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z%]*)\s*", text)
    if not match:
        raise BudgetError(f"cannot read the size '{text}': write 25%, 67MB or 64MiB")
    number, unit = float(match[1]), match[2]
    if unit == "%":
        return Budget(share=number / 100, effort=effort)
    if unit.upper() not in UNITS:
        what = (
            f"has no unit (did you mean {text.strip()}MB or {text.strip()}%?)"
            if not unit
            else f"has the unknown unit '{unit}'"
        )
        raise BudgetError(f"the size '{text}' {what}: write 25%, 67MB or 64MiB")
    return Budget(size=int(number * UNITS[unit.upper()]), effort=effort)


def size_of(text: str, of: str) -> int:
    """Bytes of '4GB', '800 MiB'; `of`: what it is the size of.

    Raises:
        InputError: not a size.
    """
    try:
        found = parse_budget(text).size
    except BudgetError:
        found = None
    if not found:
        raise InputError(f"{of} is '{text}': it must be a size with its unit, as 4GB")
    return found


def to_mask(kept: Iterable[int], n: int) -> str:
    """Indices to a string "n:hex", bit i (from the left) set where i is kept."""
    bits = 0
    for i in kept:
        bits |= 1 << (n - 1 - i)
    return f"{n}:{bits:0{(n + 3) // 4}x}"


def from_mask(mask: str) -> list[int]:
    """The kept indices, ascending."""
    n, digits = mask.split(":")
    bits = bin(int(digits, 16))[2:].zfill(int(n))
    return [i for i, b in enumerate(bits) if b == "1"]


def is_full(mask: str) -> bool:
    """Whether everything is kept."""
    return len(from_mask(mask)) == int(mask.partition(":")[0])


@dataclass(frozen=True)
class LayerPlan:
    """What stays of one layer: query groups and FFN channels as masks, and what was measured about it.

    user, generic: effect of the whole layer's parts on either text, nats per token, {"attention": x, "mlp": x}, with
    intervals; verdict: personalized, generic or undecided.
    """

    groups: str
    channels: str
    user: dict[str, list[float]] = field(default_factory=dict)
    generic: dict[str, list[float]] = field(default_factory=dict)
    verdict: dict[str, str] = field(default_factory=dict)

    def kept_groups(self) -> list[int]:
        return from_mask(self.groups)

    def kept_channels(self) -> list[int]:
        return from_mask(self.channels)


@dataclass(frozen=True)
class Plan:
    """Everything `apply_plan` needs beside the model and the texts.

    Attributes:
        model_sha256: of the model it was made for. budget_bytes, predicted_bytes: of the file. vocabulary: mask of the
        kept tokens, or None for all. seen_again: mask of those the training text is spelled with. grids: parameter name -> grid.
        predicted_damage: nats per token before recovery. price: damage per byte of the last step. ladders: the step taken on each ladder. probing: what effects are worth. poorer_damage: of every layer's down_proj on coarser grids, None where they do not fit. rho: share of generic second moments.
        settled: the cuts are final; else `apply_plan` chooses which channels go, for the same bytes, once the network has adapted. method: sartor, or paper for the two-rate rule. steps: that the cuts were made in.
        curves: of a part ("mlp.3"), (share of its units gone, damage measured beside the sum of their effects), twice or more. gone: share of the layers' weights that was foretold to go, by which training was dealt out; None before it was.
    """

    model_sha256: str
    family: str
    budget_bytes: int
    predicted_bytes: int
    vocabulary: str | None
    seen_again: str | None
    layers: tuple[LayerPlan, ...]
    grids: dict[str, str]
    predicted_damage: float
    price: float
    ladders: dict[str, list[float]]
    probing: dict[str, float]
    poorer_damage: dict[str, list[float | None]]
    rho: float
    seed: int
    settled: bool = False
    method: str = "sartor"
    steps: int = 1
    curves: dict[str, list[list[float]]] = field(default_factory=dict)
    gone: float | None = None
    version: int = 3

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1)

    @staticmethod
    def from_json(text: str) -> Plan:
        """Raises InputError when the text is not a plan."""
        try:
            raw: dict[str, Any] = json.loads(text)
            layers = tuple(LayerPlan(**layer) for layer in raw.pop("layers"))
            return Plan(layers=layers, **raw)
        except (ValueError, TypeError, KeyError) as error:
            raise InputError(
                f"not a Sartor plan ({type(error).__name__}: {str(error)[:80]}): it was damaged, or made by another version; make it again with sartor compress, or sartor.make_plan"
            ) from error
