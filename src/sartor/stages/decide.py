"""The decision: from measurements on the user's and on generic text to a `Plan` within the budget.

Bits first, then vocabulary, channels and query groups: four bits everywhere cost less damage per byte than any cut
that goes deeper. If the model at four bits is still too large, vocabulary rows, FFN blocks, query groups and the bits
of attention beyond four are given up at one price per byte; if there is room, kinds of tensors get more bits at one price per
byte.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from sartor.errors import BudgetError
from sartor.model.families import family_of
from sartor.model.network import BLOCK, Anatomy, anatomy, parameter
from sartor.model.vocabulary import can_trim, closed_order, trim_tokenizer
from sartor.numerics.allocate import Choice, Ladder, allocate
from sartor.numerics.grids import fits, tensor_bytes
from sartor.plan import LayerPlan, Plan, to_mask
from sartor.stages.bits import BASE, DOWN, RICHER, all_on_base, embeddings_of, kinds_of
from sartor.stages.curves import Curves, foretold
from sartor.stages.probe import Effects, Units, Worth, kept_groups, order_units
from sartor.stages.whose import diagnose
from sartor.stages.words import Words, least_size

LEAST_BLOCKS = 4  # FFN blocks that every layer keeps: below it the additive damage means nothing
ROWS_STEP = 512
TOKEN_OVERHEAD = 34  # bytes of metadata a token costs in GGUF, about; the plan is checked against the exact size
FINEST_FIRST = (*reversed(RICHER), BASE)

Bytes = Callable[[Anatomy, Any, Mapping[str, str]], int]


@dataclass(frozen=True)
class Measured:
    """All that the decision rests on; damages in nats per token.

    Attributes:
        units: what may go, with its effects on the user's text. user, generic: effects on either. worth: of the effects, on random masks. words: the vocabulary's ladder.
        embedding_damage: of the embedding on each grid. kind_damage: of one kind of linear in all layers on each grid. poorer_damage: of
        every layer's `down_proj` on each grid of POORER, beyond BASE. curves: what cuts cost once the rest is fitted, beside the sum of effects (`curves.measured_curves`); none: as the sum.
    """

    units: Units
    user: Effects
    generic: Effects
    worth: Worth
    words: Words
    embedding_damage: dict[str, float]
    kind_damage: dict[tuple[str, str], float]
    poorer_damage: dict[str, np.ndarray]
    curves: Curves = field(default_factory=dict)


def smallest_bytes(model: Any, tokenizer: Any, bytes_of: Bytes) -> int:
    """Bytes of the smallest file the ladders lead to; nobody would want the model, but it is the exact limit."""
    a = anatomy(model)
    flexible = family_of(a.family).gguf_flexible is not None
    rows = a.vocab
    if can_trim(tokenizer):
        order, base = closed_order(tokenizer, {})
        rows = least_size(len(order), base)
        tokenizer = trim_tokenizer(tokenizer, order[:rows])[0]
    groups = tuple(0 for _ in a.groups) if flexible else a.groups
    least = replace(a, vocab=rows, groups=groups, ffn=tuple(LEAST_BLOCKS * BLOCK for _ in a.ffn))
    grids = {n: BASE for names in kinds_of(model).values() for n in names if exists(n, least)}
    return bytes_of(least, tokenizer, grids | dict.fromkeys(embeddings_of(a), BASE))


def decide(
    model: Any, tokenizer: Any, measured: Measured, budget: int, bytes_of: Bytes, sha256: str, rho: float, seed: int
) -> Plan:
    """The plan of least predicted damage within `budget` bytes.

    Args:
        bytes_of: exact size of the file for (anatomy, tokenizer, grids).
    Raises:
        BudgetError: the smallest model that makes sense is still larger.
    """
    a = anatomy(model)
    mlps = _mlp_ladders(a, measured.units, measured.poorer_damage, measured.curves)
    cuts = _cut_ladders(a, measured, mlps)
    kinds = kinds_of(model)
    rich = {k: names for k, names in kinds.items() if (k, FINEST_FIRST[0]) in measured.kind_damage}
    rounding = sum(measured.kind_damage[k, FINEST_FIRST[0] if k in rich else BASE] for k in kinds)
    bits = _bits_ladders(a, measured, rich)
    best: tuple[float, dict[str, str], Choice] | None = None
    smallest = None
    for grid in (BASE, *RICHER):
        grids = all_on_base(model) | dict.fromkeys(embeddings_of(a), grid)
        room = budget - bytes_of(a, tokenizer, grids)
        vocabulary = [_vocabulary_ladder(a, measured, grid)] if can_trim(tokenizer) else []
        ladders = [*bits, *cuts, *vocabulary] if room < 0 else bits
        need = sum(ladder.saved[-1] for ladder in bits) - room
        choice = allocate(ladders, need)
        if choice.saved < need:
            smallest = min(smallest or 1 << 60, budget + need - choice.saved)
            continue
        grids |= {n: FINEST_FIRST[choice.step[k]] for k, names in rich.items() for n in names}
        total = choice.damage + rounding + measured.embedding_damage[grid]
        if best is None or total < best[0]:
            best = (total, grids, choice)
    if best is None:
        raise BudgetError(
            f"a budget of {budget:,} bytes cannot be reached: the smallest model Sartor would make of this one has about {smallest:,} bytes; ask for that or more",
            smallest,
        )
    return _plan(a, tokenizer, measured, mlps, budget, bytes_of, best, sha256, rho, seed, model.config.model_type)


@dataclass(frozen=True)
class Option:
    """One way to make MLPs smaller: blocks cut from each, and the grid of what is left of `down_proj`."""

    blocks: int
    grid: str
    saved: int
    damage: float


MlpLadders = dict[str, tuple[list[int], list[Option]]]


def mlp_options(
    a: Anatomy, units: Units, poorer: Mapping[str, np.ndarray], curves: Curves, layers: Sequence[int], gone: int = 0
) -> list[Option]:
    """All ways to make these layers' MLPs smaller by the same blocks, the smallest saving first; option 0 changes nothing.

    Args:
        gone: blocks that each of them has lost already: what is saved, and what it costs, counts from there.
    """
    cumulative = np.zeros(1)
    depth = min(a.ffn[n] for n in layers) // BLOCK - LEAST_BLOCKS
    for n in layers:
        cumulative = cumulative + np.array(foretold(units, n, "mlp", curves)[: max(gone, depth, 0) + 1])
    whole = sum(_mlp_bytes(a, a.ffn[n] - gone * BLOCK, BASE) for n in layers)
    options = []
    for b in range(gone, max(gone, depth) + 1):
        for grid in (BASE, *poorer):
            if all(fits(grid, a.ffn[n] - b * BLOCK) for n in layers):
                left = sum(_mlp_bytes(a, a.ffn[n] - b * BLOCK, grid) for n in layers)
                options.append(
                    Option(
                        b,
                        grid,
                        whole - left,
                        float(cumulative[b] - cumulative[gone] + _coarser(a, poorer, layers, b, grid)),
                    )
                )
    return sorted((o for o in options if np.isfinite(o.damage)), key=lambda o: (o.saved, o.damage))


def _coarser(a: Anatomy, poorer: Mapping[str, np.ndarray], layers: Sequence[int], blocks: int, grid: str) -> float:
    """Damage of the grid on what is left of `down_proj`, beyond BASE."""
    if grid == BASE:
        return 0.0
    return sum(poorer[grid][n] * (1 - blocks * BLOCK / a.ffn[n]) for n in layers)


def _mlp_bytes(a: Anatomy, channels: int, down: str) -> int:
    return 2 * tensor_bytes(BASE, (channels, a.width)) + tensor_bytes(down, (a.width, channels))


def _mlp_ladders(
    a: Anatomy, units: Units, poorer: Mapping[str, np.ndarray], curves: Curves, gone: Sequence[int] | None = None
) -> MlpLadders:
    """{ladder: (its layers, options)}; one for all layers where llama.cpp wants them equal. gone: blocks that each layer has lost already."""
    gone = gone or [0] * a.layers
    if family_of(a.family).gguf_flexible is not None:
        return {f"mlp.{n}": ([n], mlp_options(a, units, poorer, curves, [n], gone[n])) for n in range(a.layers)}
    every = list(range(a.layers))
    return {"mlp.all": (every, mlp_options(a, units, poorer, curves, every, max(gone)))}


def _cut_ladders(a: Anatomy, m: Measured, mlps: MlpLadders) -> list[Ladder]:
    """Ladders of MLPs and query groups; they are the same whatever grid the embedding has."""
    ladders = _ladders_of(mlps)
    if family_of(a.family).gguf_flexible is None:
        return ladders
    for n in range(a.layers):
        damage = foretold(m.units, n, "attention", m.curves)
        size = a.queries_per_group * a.head_dim
        cost = 2 * tensor_bytes(BASE, (size, a.width)) + 2 * tensor_bytes(BASE, (a.head_dim, a.width))
        ladders.append(Ladder(f"attention.{n}", tuple(cost * i for i in range(len(damage))), damage))
    return ladders


def _ladders_of(mlps: MlpLadders) -> list[Ladder]:
    return [
        Ladder(name, tuple(o.saved for o in options), tuple(o.damage for o in options))
        for name, (_, options) in mlps.items()
    ]


def _vocabulary_ladder(a: Anatomy, m: Measured, grid: str) -> Ladder:
    """Rows in steps of 512, damage interpolated between the measured sizes."""
    row = (1 if a.tied else 2) * tensor_bytes(grid, (1, a.width)) + TOKEN_OVERHEAD
    counts = [m.words.sizes[0], *range(m.words.sizes[0] // ROWS_STEP * ROWS_STEP, m.words.sizes[-1] - 1, -ROWS_STEP)]
    counts = sorted(set(counts), reverse=True)
    lost = np.interp(counts, m.words.sizes[::-1], m.words.lost[::-1])
    return Ladder("vocabulary", tuple((counts[0] - c) * row for c in counts), (0.0, *lost[1:].tolist()))


def _bits_ladders(a: Anatomy, m: Measured, kinds: Mapping[str, Sequence[str]]) -> list[Ladder]:
    """The bits of kinds of linears, from eight down to BASE."""
    ladders = []
    for k in kinds:
        shapes = [s[k] for n in range(a.layers) if k in (s := a.linear_shapes(n))]
        size = [sum(tensor_bytes(g, s) for s in shapes) for g in FINEST_FIRST]
        damage = [m.kind_damage[k, g] for g in FINEST_FIRST]
        ladders.append(Ladder(k, tuple(size[0] - s for s in size), tuple(d - damage[0] for d in damage)))
    return ladders


def _plan(
    a: Anatomy,
    tokenizer: Any,
    m: Measured,
    mlps: MlpLadders,
    budget: int,
    bytes_of: Bytes,
    best: tuple[float, dict[str, str], Choice],
    sha256: str,
    rho: float,
    seed: int,
    family: str,
) -> Plan:
    total, grids, choice = best
    blocks, grids = _chosen(a, mlps, choice, grids)
    layers, groups, ffn = _layer_plans(a, m, choice, blocks)
    cut = replace(a, groups=tuple(groups), ffn=tuple(ffn))
    grids = {n: g for n, g in grids.items() if exists(n, cut)}
    rows = _fit_vocabulary(cut, tokenizer, m, choice, budget, bytes_of, grids)
    kept = m.words.order[:rows] if rows < a.vocab else None
    again = m.words.seen_again(rows) if kept else None
    smaller = tokenizer if kept is None else trim_tokenizer(tokenizer, kept)[0]
    size = bytes_of(replace(cut, vocab=rows), smaller, grids)
    steps = {name: [float(s)] for name, s in choice.step.items()}
    return Plan(
        sha256,
        family,
        budget,
        size,
        to_mask(kept, a.vocab) if kept else None,
        to_mask(again, a.vocab) if again else None,
        layers,
        grids,
        total,
        choice.price,
        steps,
        worth_told(m),
        {g: [float(x) if np.isfinite(x) else None for x in d] for g, d in m.poorer_damage.items()},
        rho,
        seed,
        curves=m.curves,
    )


def worth_told(m: Measured) -> dict[str, float]:
    """What the plan says of its probing."""
    worth = {k: float(v) for k, v in asdict(m.worth).items()}
    return worth | {
        "user_tokens": float(m.user.tokens),
        "generic_tokens": float(m.generic.tokens),
        "known": m.user.known,
    }


def settle(plan: Plan, a: Anatomy, effects: Effects, gone: Sequence[int] | None = None) -> Plan:
    """The plan with its cuts chosen anew, for the same bytes, by what the network needs now that it has adapted.

    Vocabulary, bits elsewhere and the number of query groups in each layer stay; which groups go, how many blocks each MLP loses, which ones, and the grid of
    what is left of its `down_proj` follow the new effects.

    Args:
        a: anatomy of the trimmed network before any cut. effects: on the user's text. gone: blocks that each layer has lost already.
    """
    if gone and family_of(a.family).gguf_flexible is None:
        gone = [max(gone)] * a.layers
    units = order_units(effects)
    poorer = {g: np.array([np.inf if x is None else x for x in d]) for g, d in plan.poorer_damage.items()}
    mlps = _mlp_ladders(a, units, poorer, plan.curves, gone)
    grids = [plan.grids.get(parameter(n, DOWN), BASE) for n in range(a.layers)]
    saved = sum(
        _mlp_bytes(a, a.ffn[n], BASE) - _mlp_bytes(a, len(layer.kept_channels()), grids[n])
        for n, layer in enumerate(plan.layers)
    )
    for n, blocks in enumerate(gone or ()):
        saved -= _mlp_bytes(a, a.ffn[n], BASE) - _mlp_bytes(a, a.ffn[n] - blocks * BLOCK, BASE)
    choice = allocate(_ladders_of(mlps), saved)
    finer = {n: BASE if g in poorer else g for n, g in plan.grids.items()}
    taken, chosen = _chosen(a, mlps, choice, finer)
    layers = []
    for n, layer in enumerate(plan.layers):
        kept = kept_groups(units.of(n, "attention"), a.groups[n] - len(layer.kept_groups()))
        groups = to_mask(kept, a.groups[n])
        layers.append(replace(layer, groups=groups, channels=to_mask(_kept(units, n, taken[n]), a.ffn[n])))
    steps = plan.ladders | {name: [float(i)] for name, i in choice.step.items()}
    return replace(plan, layers=tuple(layers), grids=chosen, ladders=steps, settled=True)


def _kept(units: Units, n: int, blocks: int) -> list[int]:
    order: list[int] = units.order[n].tolist()
    return order[blocks * units.size :]


def exists(parameter: str, a: Anatomy) -> bool:
    if not parameter.startswith("model.layers."):
        return True
    _, _, layer, rest = parameter.split(".", 3)
    return rest.removesuffix(".weight") in a.linear_shapes(int(layer))


def _chosen(a: Anatomy, mlps: MlpLadders, choice: Choice, grids: Mapping[str, str]) -> tuple[list[int], dict[str, str]]:
    """Blocks cut from every layer, and the grids with those of `down_proj` as chosen."""
    blocks, chosen = [0] * a.layers, dict(grids)
    for name, (layers, options) in mlps.items():
        option = options[choice.step.get(name, 0)]
        for n in layers:
            blocks[n] = option.blocks
            if option.saved:
                chosen[parameter(n, DOWN)] = option.grid
    return blocks, chosen


def _layer_plans(
    a: Anatomy, m: Measured, choice: Choice, blocks: Sequence[int]
) -> tuple[tuple[LayerPlan, ...], list[int], list[int]]:
    layers, groups, ffn, said = [], [], [], diagnose(m.user, m.generic, m.worth)
    for n in range(a.layers):
        kept = kept_groups(m.units.of(n, "attention"), choice.step.get(f"attention.{n}", 0))
        groups.append(len(kept))
        ffn.append(a.ffn[n] - blocks[n] * BLOCK)
        channels = to_mask(_kept(m.units, n, blocks[n]), a.ffn[n])
        layers.append(LayerPlan(to_mask(kept, a.groups[n]), channels, *said[n]))
    return tuple(layers), groups, ffn


def _fit_vocabulary(
    a: Anatomy, tokenizer: Any, m: Measured, choice: Choice, budget: int, bytes_of: Bytes, grids: Mapping[str, str]
) -> int:
    """The most rows that fit the budget exactly, near what the ladder chose; never more than there are."""
    if not can_trim(tokenizer):
        return a.vocab
    whole = bytes_of(a, tokenizer, grids)
    if whole <= budget:
        return a.vocab
    row = (1 if a.tied else 2) * tensor_bytes(grids["model.embed_tokens.weight"], (1, a.width)) + TOKEN_OVERHEAD
    rows = min(len(m.words.order), a.vocab - (whole - budget) // row)
    for _ in range(20):
        rows = max(rows, m.words.base)
        size = bytes_of(replace(a, vocab=rows), trim_tokenizer(tokenizer, m.words.order[:rows])[0], grids)
        if 0 <= budget - size < 8 * row or (rows == m.words.base and size <= budget):
            return rows
        rows += (budget - size) // row  # floor division: too large a file always loses at least one row
    while size > budget:
        rows -= 16
        if rows < m.words.base:
            raise BudgetError(
                f"a budget of {budget:,} bytes cannot be reached with the whole alphabet; the nearest is {size:,} bytes",
                size,
            )
        size = bytes_of(replace(a, vocab=rows), trim_tokenizer(tokenizer, m.words.order[:rows])[0], grids)
    return rows
