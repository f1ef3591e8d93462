"""The decision: from measurements on the user's and on generic text to a `Plan` within the budget.

Bits first, then vocabulary, channels and query groups: four bits everywhere cost less damage per byte than any cut
that goes deeper. If the model at four bits is still too large, vocabulary rows, FFN blocks and query groups are
removed at one price per byte; if there is room, kinds of tensors get more bits at one price per byte.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sartor.errors import BudgetError
from sartor.model.families import LINEARS, family_of
from sartor.model.network import BLOCK, Anatomy, anatomy, clone, linear, shrink_vocabulary_
from sartor.model.vocabulary import can_trim, closed_order, count_tokens, trim_tokenizer
from sartor.numerics.allocate import Choice, Ladder, allocate
from sartor.numerics.grids import GRIDS, search_scales, snap, tensor_bytes
from sartor.plan import LayerPlan, Plan, to_mask
from sartor.stages.measure import score
from sartor.stages.probe import Probed, Units, damage
from sartor.stages.tokens import encode_windows

BASE = "IQ4_NL"
RICHER = ("Q5_0", "Q8_0")
LEAST_BLOCKS = 4  # FFN blocks that every layer keeps: below it the additive damage means nothing
ROWS_STEP = 512
TOKEN_OVERHEAD = 34  # bytes of metadata a token costs in GGUF, about; the plan is checked against the exact size
VOCABULARY_SIZES = (0.8, 0.65, 0.5, 0.38, 0.28, 0.2, 0.14)

Bytes = Callable[[Anatomy, Any, Mapping[str, str]], int]
Tell = Callable[[float, str], None]


@dataclass(frozen=True)
class Measured:
    """All that the decision rests on."""

    units: Units
    user: Probed
    generic: Probed
    vocabulary: list[int]
    vocabulary_base: int
    sizes: list[int]
    size_damage: list[float]
    embedding_damage: dict[str, float]
    kind_damage: dict[tuple[str, str], float]


def rank_vocabulary(
    tokenizer: Any, user: Sequence[str], generic: Counter[int], discount: int = 0
) -> tuple[list[int], int]:
    """Tokens by expected use: the user's rate, half the generic rate, and Zipf's law over the tokenizer's own order.

    The last term stands for words that neither text happens to hold. On one user's mails and a third of the vocabulary the
    three together cost 16% less of the lost bits per byte than the user's counts alone (docs/log.md). `discount` is taken off
    every count of the user's: with 1, the ranking is the one in which a word that occurs once did not occur.
    """
    own = count_tokens(tokenizer, user)
    total, other, n = max(1, sum(own.values())), max(1, sum(generic.values())), len(tokenizer)
    zipf = sum(1 / (r + 100) for r in range(n))
    rate = {i: max(own[i] - discount, 0) / total + 0.5 * generic[i] / other + 0.3 / (i + 100) / zipf for i in range(n)}
    return closed_order(tokenizer, rate)


def vocabulary_damage(
    model: Any, tokenizer: Any, order: Sequence[int], base: int, windows: list[list[tuple[int, str]]], tell: Tell
) -> tuple[list[int], list[float]]:
    """Coding length that smaller vocabularies add to the windows, in nats per original token; entry 0 is the whole."""
    whole = encode_windows(windows, tokenizer)
    tokens = sum(p.end - p.start for w in whole for p in w.pieces)
    nats = sum(score(model, whole).nats)
    sizes, lost = [len(order)], [0.0]
    for n, share in enumerate(VOCABULARY_SIZES):
        size = max(int(len(order) * share), base + 256)
        if size >= sizes[-1]:
            break
        smaller, ids = trim_tokenizer(tokenizer, order[:size])
        cut = clone(model)
        shrink_vocabulary_(cut, ids, {})
        sizes.append(size)
        lost.append(max(lost[-1], (sum(score(cut, encode_windows(windows, smaller)).nats) - nats) / tokens))
        tell((n + 1) / len(VOCABULARY_SIZES), f"vocabulary of {size}: +{lost[-1]:.3f} nats per token")
    return sizes, lost


@torch.no_grad()
def grid_damage(model: Any, names: Sequence[str], grid: str, rows: Tensor, reference: tuple[Tensor, Tensor]) -> float:
    """KL in nats per token when these parameters alone are rounded to the grid; the model comes back unchanged."""
    parameters = dict(model.named_parameters())
    old = {n: parameters[n].data for n in names}
    try:
        for n in names:
            w = old[n].float()
            parameters[n].data = snap(w, search_scales(w, None, GRIDS[grid], candidates=4), GRIDS[grid]).to(
                old[n].dtype
            )
        return damage(model, rows, reference)
    finally:
        for n in names:
            parameters[n].data = old[n]


def kinds_of(model: Any) -> dict[str, list[str]]:
    """{kind: parameter names}: the same linear in every layer."""
    a = anatomy(model)
    return {
        k: [f"model.layers.{n}.{k}.weight" for n in range(a.layers) if linear(model, n, k) is not None] for k in LINEARS
    }


def smallest_bytes(model: Any, tokenizer: Any, bytes_of: Bytes) -> int:
    """Bytes of the smallest file the ladders lead to; nobody would want the model, but it is the exact limit."""
    a = anatomy(model)
    flexible = family_of(a.family).gguf_flexible is not None
    rows = a.vocab
    if can_trim(tokenizer):
        order, base = closed_order(tokenizer, {})
        rows = max(int(len(order) * VOCABULARY_SIZES[-1]), base + 256)
        tokenizer = trim_tokenizer(tokenizer, order[:rows])[0]
    groups = tuple(0 for _ in a.groups) if flexible else a.groups
    least = replace(a, vocab=rows, groups=groups, ffn=tuple(LEAST_BLOCKS * BLOCK for _ in a.ffn))
    grids = {n: BASE for names in kinds_of(model).values() for n in names if _exists(n, least)}
    return bytes_of(least, tokenizer, grids | dict.fromkeys(embeddings_of(a), BASE))


def embeddings_of(a: Anatomy) -> list[str]:
    """Parameters with a row per token."""
    return ["model.embed_tokens.weight"] + ([] if a.tied else ["lm_head.weight"])


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
    embeddings = embeddings_of(a)
    best: tuple[float, dict[str, str], Choice] | None = None
    smallest = None
    for grid in (BASE, *RICHER):
        grids = {n: BASE for names in kinds_of(model).values() for n in names} | dict.fromkeys(embeddings, grid)
        need = bytes_of(a, tokenizer, grids) - budget
        ladders = _ladders(a, tokenizer, measured, grids, rho)
        if need <= 0:
            grids, extra = _enrich(model, a, grids, measured, -need)
            choice = Choice({ladder.name: 0 for ladder in ladders}, 0, extra, 0.0)
        else:
            choice = allocate(ladders, need)
            if choice.saved < need:
                smallest = min(smallest or 1 << 60, budget + need - choice.saved)
                continue
            choice = replace(choice, damage=choice.damage + sum(measured.kind_damage[k, BASE] for k in kinds_of(model)))
        total = choice.damage + measured.embedding_damage[grid]
        if best is None or total < best[0]:
            best = (total, grids, choice)
    if best is None:
        raise BudgetError(
            f"a budget of {budget:,} bytes cannot be reached: the smallest model Sartor would make of this one has about {smallest:,} bytes; ask for that or more",
            smallest,
        )
    return _plan(a, tokenizer, measured, budget, bytes_of, best, sha256, rho, seed, model.config.model_type)


def _ladders(a: Anatomy, tokenizer: Any, m: Measured, grids: Mapping[str, str], rho: float) -> list[Ladder]:
    effects = (1 - rho) * m.user.recovered.effects + rho * m.generic.recovered.effects
    ladders = [_vocabulary_ladder(a, m, grids["model.embed_tokens.weight"])] if can_trim(tokenizer) else []
    flexible = family_of(a.family).gguf_flexible is not None
    per_layer: list[np.ndarray] = []
    for n in range(a.layers):
        blocks = np.maximum.accumulate(effects[(m.units.layer == n) & (m.units.kind == 1)])[:-LEAST_BLOCKS]
        per_layer.append(blocks)
        if flexible:
            each = 2 * tensor_bytes(BASE, (BLOCK, a.width)) + tensor_bytes(BASE, (a.width, BLOCK))
            ladders.append(_ladder(f"mlp.{n}", np.full(len(blocks), each), blocks))
            groups = np.sort(effects[(m.units.layer == n) & (m.units.kind == 0)])
            size = a.queries_per_group * a.head_dim
            cost = 2 * tensor_bytes(BASE, (size, a.width)) + 2 * tensor_bytes(BASE, (a.head_dim, a.width))
            ladders.append(_ladder(f"attention.{n}", np.full(len(groups), cost), groups))
    if not flexible:  # llama.cpp wants equal layers: one ladder that takes one block from every layer
        depth = min(len(p) for p in per_layer)
        each = a.layers * (2 * tensor_bytes(BASE, (BLOCK, a.width)) + tensor_bytes(BASE, (a.width, BLOCK)))
        ladders.append(_ladder("mlp.all", np.full(depth, each), np.sum([p[:depth] for p in per_layer], axis=0)))
    return ladders


def _ladder(name: str, saved: np.ndarray, damage_: np.ndarray) -> Ladder:
    return Ladder(name, (0, *np.cumsum(saved).astype(int).tolist()), (0.0, *np.cumsum(np.maximum(damage_, 0)).tolist()))


def _vocabulary_ladder(a: Anatomy, m: Measured, grid: str) -> Ladder:
    """Rows in steps of 512, damage interpolated between the measured sizes."""
    row = (1 if a.tied else 2) * tensor_bytes(grid, (1, a.width)) + TOKEN_OVERHEAD
    counts = [m.sizes[0], *range(m.sizes[0] // ROWS_STEP * ROWS_STEP, m.sizes[-1] - 1, -ROWS_STEP)]
    counts = sorted(set(counts), reverse=True)
    lost = np.interp(counts, m.sizes[::-1], m.size_damage[::-1])
    return Ladder("vocabulary", tuple((counts[0] - c) * row for c in counts), (0.0, *lost[1:].tolist()))


def _enrich(model: Any, a: Anatomy, grids: dict[str, str], m: Measured, room: int) -> tuple[dict[str, str], float]:
    """Spend spare bytes on kinds of tensors: the ladder from eight bits down, at one price."""
    kinds = kinds_of(model)
    shapes = {k: [a.linear_shapes(n)[k] for n in range(a.layers)] for k in kinds}
    size = {(k, g): sum(tensor_bytes(g, s) for s in shapes[k]) for k in kinds for g in (BASE, *RICHER)}
    ladders, top = [], 0
    for k in kinds:
        steps = ("Q8_0", "Q5_0", BASE)
        top += size[k, "Q8_0"]
        ladders.append(
            Ladder(
                k,
                tuple(size[k, "Q8_0"] - size[k, g] for g in steps),
                tuple(m.kind_damage[k, g] - m.kind_damage[k, "Q8_0"] for g in steps),
            )
        )
    base = sum(size[k, BASE] for k in kinds)
    choice = allocate(ladders, top - base - room)
    chosen = {k: ("Q8_0", "Q5_0", BASE)[choice.step[k]] for k in kinds}
    damaged = sum(m.kind_damage[k, g] for k, g in chosen.items())
    return grids | {n: chosen[k] for k in kinds for n in kinds[k]}, damaged


def _plan(
    a: Anatomy,
    tokenizer: Any,
    m: Measured,
    budget: int,
    bytes_of: Bytes,
    best: tuple[float, dict[str, str], Choice],
    sha256: str,
    rho: float,
    seed: int,
    family: str,
) -> Plan:
    total, grids, choice = best
    layers, groups, ffn = _layer_plans(a, m, choice, rho)
    cut = replace(a, groups=tuple(groups), ffn=tuple(ffn))
    grids = {n: g for n, g in grids.items() if _exists(n, cut)}
    rows = _fit_vocabulary(cut, tokenizer, m, choice, budget, bytes_of, grids)
    kept = m.vocabulary[:rows] if rows < a.vocab else None
    smaller = tokenizer if kept is None else trim_tokenizer(tokenizer, kept)[0]
    size = bytes_of(replace(cut, vocab=rows), smaller, grids)
    worth = {
        f"{name}_{k}": float(v)
        for name, p in (("user", m.user), ("generic", m.generic))
        for k, v in (
            ("probes", p.probes),
            ("r2", p.recovered.r2),
            ("spearman", p.recovered.spearman),
            ("prior_r2", p.recovered.prior_r2),
            ("prior_spearman", p.recovered.prior_spearman),
            ("supported", p.recovered.supported),
        )
    }
    steps = {name: [float(s)] for name, s in choice.step.items()}
    return Plan(
        sha256,
        family,
        budget,
        size,
        to_mask(kept, a.vocab) if kept else None,
        layers,
        grids,
        total,
        choice.price,
        steps,
        worth,
        rho,
        seed,
    )


def _exists(parameter: str, a: Anatomy) -> bool:
    if not parameter.startswith("model.layers."):
        return True
    _, _, layer, rest = parameter.split(".", 3)
    return rest.removesuffix(".weight") in a.linear_shapes(int(layer))


def _layer_plans(
    a: Anatomy, m: Measured, choice: Choice, rho: float
) -> tuple[tuple[LayerPlan, ...], list[int], list[int]]:
    effects = (1 - rho) * m.user.recovered.effects + rho * m.generic.recovered.effects
    layers, groups, ffn = [], [], []
    for n in range(a.layers):
        blocks = choice.step.get(f"mlp.{n}", choice.step.get("mlp.all", 0))
        order = m.units.order[n].tolist()
        of_group = effects[(m.units.layer == n) & (m.units.kind == 0)]
        gone = np.argsort(of_group, kind="stable")[: choice.step.get(f"attention.{n}", 0)].tolist()
        kept = [g for g in range(a.groups[n]) if g not in gone]
        groups.append(len(kept))
        ffn.append(a.ffn[n] - blocks * BLOCK)
        user, generic, verdict = _diagnose(m, n)
        layers.append(
            LayerPlan(to_mask(kept, a.groups[n]), to_mask(order[blocks * BLOCK :], a.ffn[n]), user, generic, verdict)
        )
    return tuple(layers), groups, ffn


def _diagnose(m: Measured, n: int) -> tuple[dict[str, list[float]], dict[str, list[float]], dict[str, str]]:
    """[effect, low, high] of the layer's attention and MLP on either text, and what that makes them."""
    user: dict[str, list[float]] = {}
    generic: dict[str, list[float]] = {}
    verdict: dict[str, str] = {}
    for kind, name in ((0, "attention"), (1, "mlp")):
        here = (m.units.layer == n) & (m.units.kind == kind)
        for side, p in ((user, m.user), (generic, m.generic)):
            r = p.recovered
            side[name] = [float(r.effects[here].sum()), float(r.low[here].sum()), float(r.high[here].sum())]
        both = m.user.recovered.r2 > 0.3 and m.generic.recovered.r2 > 0.3
        (u, ul, uh), (g, gl, gh) = user[name], generic[name]
        if not both:
            verdict[name] = "undecided"
        elif ul > gh or uh < gl:
            verdict[name] = "personalized"
        else:
            verdict[name] = "generic" if abs(u - g) < 0.5 * max(u, g) else "undecided"
    return user, generic, verdict


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
    rows = min(len(m.vocabulary), a.vocab - (whole - budget) // row)
    for _ in range(20):
        rows = max(rows, m.vocabulary_base)
        size = bytes_of(replace(a, vocab=rows), trim_tokenizer(tokenizer, m.vocabulary[:rows])[0], grids)
        if 0 <= budget - size < 8 * row or (rows == m.vocabulary_base and size <= budget):
            return rows
        rows += (budget - size) // row  # floor division: too large a file always loses at least one row
    while size > budget:
        rows -= 16
        if rows < m.vocabulary_base:
            raise BudgetError(
                f"a budget of {budget:,} bytes cannot be reached with the whole alphabet; the nearest is {size:,} bytes",
                size,
            )
        size = bytes_of(replace(a, vocab=rows), trim_tokenizer(tokenizer, m.vocabulary[:rows])[0], grids)
    return rows
