"""Sartor, and Sartor with one of its parts switched off."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from artifacts import Artifact, gguf_artifact
from subject import SEED, Subject
from torch import Tensor

from sartor.controls import public_texts
from sartor.effort import Training, effort_of
from sartor.errors import BudgetError
from sartor.export import gguf_file
from sartor.job import Prepared
from sartor.model.precision import running
from sartor.numerics.grids import GRIDS, search_scales
from sartor.pipeline import Fitting, apply_plan, measure
from sartor.plan import Plan
from sartor.probing import Texts
from sartor.progress import Progress
from sartor.sources import cache_dir
from sartor.stages import paper
from sartor.stages.bits import BASE
from sartor.stages.curves import Curves
from sartor.stages.decide import Measured, decide
from sartor.stages.masters import Latents
from sartor.stages.probe import order_units
from sartor.stages.words import whole
from sartor.storage import remembered
from sartor.surgery import Surgery

RHO = 0.3  # as the product's own default


@dataclass(frozen=True)
class Variant:
    """What differs from Sartor as it is.

    Attributes:
        what: it is, in a few words. texts: of whom. believed: what of all that was measured the decision may know. settled: cuts are not chosen anew on the adapted network.
        training: of the effort's own. fitting: how what is left gets onto its grids. steps: that the cuts are made in.
    """

    what: str
    texts: Callable[[Prepared], Texts] = lambda p: p.texts
    believed: Callable[[Measured, Subject], Measured] = lambda measured, subject: measured
    settled: bool = False
    training: Callable[[Training], Training] = lambda training: training
    fitting: Fitting = Surgery.fitted
    steps: int = 1


def fitted(name: str, subject: Subject, size: str, work: Path) -> Artifact:
    """One row of VARIANTS at one size: what `sartor compress` does, step by step."""
    v, p, budget, started = VARIANTS[name], subject.p, subject.budget(size), time.monotonic()
    texts, recall = v.texts(p), remembered(cache_dir() / "probes", subject.source.sha256)
    progress = Progress()
    dense = running(subject.network())
    measured = measure(dense, p.tokenizer, texts, budget, p.bytes_of, subject.effort, SEED, progress, recall)
    believed = v.believed(measured, subject)
    plan = decide(dense, p.tokenizer, believed, budget, p.bytes_of, subject.source.sha256, RHO, SEED)
    del dense
    made = apply_plan(
        subject.network, p.tokenizer, replace(plan, settled=v.settled), texts, subject.effort,
        v.training(effort_of(subject.effort).training), progress, steps=v.steps, fitting=v.fitting,
    )  # fmt: skip
    progress.end()
    file = work / "model.gguf"
    gguf_file.write_latents(file, made.model, made.tokenizer, made.latents, "sartor")
    if file.stat().st_size > budget:
        raise BudgetError(f"the file has {file.stat().st_size:,} bytes, more than the budget of {budget:,}")
    return gguf_artifact(file, made.tokenizer, time.monotonic() - started)


def uniform(m: Measured, subject: Subject) -> Measured:
    """No probing: every layer counts as the mean of all, and inside one the units of the least activations go first, so that all lose the same share.

    How much structure weighs against words and bits stays as it was measured.
    """
    order = paper.by_activation(subject.half(), subject.moments(subject.half()))
    channel, group = (
        _alike(of, first) for of, first in ((m.user.channel, order.channels), (m.user.group, order.groups))
    )
    flat = replace(m.user, channel=channel, group=group)
    poorer = {g: np.full(len(d), d.mean()) for g, d in m.poorer_damage.items()}
    return replace(m, user=flat, units=order_units(flat), poorer_damage=poorer, curves=_mean(m.curves))


def _mean(curves: Curves) -> Curves:
    """Of all layers, for every one of them; what was measured at other shares than the first layer's is left out."""
    found = Curves()
    for kind in {name.split(".")[0] for name in curves}:
        of = {name: np.array(c) for name, c in curves.items() if name.startswith(kind)}
        shares = next(iter(of.values()))[:, 0]
        ratios = [np.log(c[:, 1]) for c in of.values() if np.array_equal(c[:, 0], shares)]
        mean = np.stack([shares, np.exp(np.mean(ratios, 0))], 1).tolist()
        found |= dict.fromkeys(of, mean)
    return found


def _alike(effects: dict[int, Tensor], order: dict[int, Any]) -> dict[int, Tensor]:
    """The same sorted effects in every layer, dealt out in the given order; order: units of every layer, the first to go first."""
    profile = torch.stack([e.sort().values for e in effects.values()]).mean(0)
    dealt = {}
    for n, e in effects.items():
        dealt[n] = torch.empty_like(e)
        dealt[n][torch.as_tensor(order[n])] = profile
    return dealt


def all_words(m: Measured, subject: Subject) -> Measured:
    """The vocabulary stays whole."""
    return replace(m, words=whole(len(m.words.order)))


def one_grid(m: Measured, subject: Subject) -> Measured:
    """Four bits everywhere: no tensor may have more or fewer."""
    embedding = {g: d if g == BASE else float("inf") for g, d in m.embedding_damage.items()}
    kinds = {(k, g): d for (k, g), d in m.kind_damage.items() if g == BASE}
    return replace(m, embedding_damage=embedding, kind_damage=kinds, poorer_damage={})


def rounded(surgery: Surgery, small: Any, plan: Plan, many: int, tell: Callable[[float, str], None]) -> Latents:
    """No fit: every matrix as the cut left it, each weight to the nearest level of its grid."""
    values = {n: p.data.float().clone() for n, p in small.named_parameters()}
    grids = {n: GRIDS[g] for n, g in plan.grids.items() if n in values}
    return Latents(values, {n: search_scales(values[n], None, g) for n, g in grids.items()}, grids)


def without_recovery(t: Training) -> Training:
    """Adapted, then cut and fitted, and never trained again."""
    return replace(t, recover=replace(t.recover, seconds=0.0))


def without_teacher(t: Training) -> Training:
    """The cut network learns the user's text itself, not what the adapted one says of it."""
    return replace(t, lessons=0)


VARIANTS: dict[str, Variant] = {
    "sartor": Variant("Sartor as it is"),
    "sartor, uniform rates": Variant("without probing: the same share of every layer", believed=uniform, settled=True),
    "sartor, in steps": Variant(
        "cut in three steps of equal allowance, each healed and taken back where it costs more", steps=3
    ),
    "sartor, generic text": Variant("without personal statistics: generic text in the user's place", public_texts),
    "sartor, all words": Variant("without trimming the vocabulary", believed=all_words),
    "sartor, no fit": Variant("without repair and error feedback: cut and rounded", fitting=rounded),
    "sartor, no recovery": Variant("without training after the cut", training=without_recovery),
    "sartor, general 30%": Variant("--keep-general 0.3", lambda p: p.texts_with(0.3)),
    "sartor, general 60%": Variant("--keep-general 0.6", lambda p: p.texts_with(0.6)),
    "sartor, no teacher": Variant("after the cut it learns the text itself", training=without_teacher),
    "sartor, one grid": Variant("without mixed bits: four everywhere", believed=one_grid),
}
