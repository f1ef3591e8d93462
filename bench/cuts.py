"""Pruning alone: a share of FFN and attention removed, ours beside published methods, as it is and after recovery.

    pip install -e '.[bench]'
    python bench/cuts.py MODEL --data DIR [DIR ...] [--generic DIR] [--removed 0.2 0.3 0.4] [--seeds 0] [--rows 128] [--train 0] [--only Sartor FLAP]

Every method sees the same rows of the user's training split (and, where it uses them, the same generic rows), removes the same share of the
parameters of attention and FFN, and repairs as its paper says. Bits per byte of 48 KB of held-out test text, in PyTorch, with the user's and with
generic text; with `--train` also after recovery on so many rows, the same for all: KL to what the whole network says of the user's training split and of generic rows. 800 rows are about what a standard
job's recovery sees on two fast cores. Every cell is cached. Results: a table on stdout.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ground_truth import opened, remembered
from rivals import RIVALS, Ranking, Seen, look

from sartor.effort import EFFORTS
from sartor.memory import keep_freed
from sartor.model.network import BLOCK, Anatomy, anatomy, clone, linear, linears_of, query_rows
from sartor.model.precision import running, running_dtype
from sartor.numerics.allocate import Ladder, allocate
from sartor.numerics.compensate import refit
from sartor.plan import LayerPlan, Plan, to_mask
from sartor.stages.calibrate import Site
from sartor.stages.decide import LEAST_BLOCKS
from sartor.stages.distil import Anchor, DistilConfig, anchor, distil_, joined
from sartor.stages.fit import Evidence, evidence_of, fit
from sartor.stages.masters import free, put_
from sartor.stages.measure import score
from sartor.stages.probe import Effects, blended, effects_of, kept_groups, order_units, recovered
from sartor.stages.prune import cut_
from sartor.stages.sensitivity import feel, together
from sartor.stages.tokens import Window, cut_windows, encode_windows, sample, training_rows

TEST_BYTES = 49_152
CELLS = 3  # of the cache: what a method does has changed so often


def chosen(a: Any, r: Ranking, removed: float) -> list[tuple[list[int], list[int]]]:
    """Kept query groups and channels of every layer, so that `removed` of all parameters of attention and FFN go."""
    block, group = a.unit_parameters()
    blocks, groups = [0] * a.layers, [0] * a.layers
    if r.uniform:
        for n in range(a.layers):
            groups[n] = int(removed * a.groups[n])
        missing = removed * sum(a.groups[n] * group + a.ffn[n] // BLOCK * block for n in range(a.layers))
        want = round((missing - sum(groups) * group) / block)
        for i in range(want):  # llama.cpp cannot express attention without FFN: a block stays
            n = i % a.layers
            blocks[n] += blocks[n] + 1 < a.ffn[n] // BLOCK
    else:
        ladders = []
        for n in range(a.layers):
            b = np.cumsum(np.maximum.accumulate(r.blocks[n]))[: a.ffn[n] // BLOCK - LEAST_BLOCKS]
            ladders.append(Ladder(f"mlp.{n}", tuple(block * i for i in range(len(b) + 1)), (0.0, *b.tolist())))
            g = np.cumsum(np.sort(r.groups[n]))
            ladders.append(Ladder(f"attention.{n}", tuple(group * i for i in range(len(g) + 1)), (0.0, *g.tolist())))
        total = sum(x.saved[-1] + (LEAST_BLOCKS * block if x.name.startswith("mlp") else 0) for x in ladders)
        step = allocate(ladders, round(removed * total)).step
        blocks = [step[f"mlp.{n}"] for n in range(a.layers)]
        groups = [step[f"attention.{n}"] for n in range(a.layers)]
    kept = []
    for n in range(a.layers):
        kept.append((kept_groups(r.groups[n], groups[n]), sorted(r.order[n][blocks[n] * BLOCK :].tolist())))
    return kept


def plan_of(a: Any, kept: list[tuple[list[int], list[int]]], seed: int) -> Plan:
    layers = tuple(LayerPlan(to_mask(g, a.groups[n]), to_mask(c, a.ffn[n])) for n, (g, c) in enumerate(kept))
    return Plan("", a.family, 0, 0, None, None, layers, {}, 0.0, 0.0, {}, {}, {}, 0.3, seed)


def without_repair(model: Any, plan: Plan, seen: Seen | None = None) -> Any:
    cut = clone(model)
    cut_(cut, plan)
    return cut


def cut_inputs(a: Anatomy, plan: Plan) -> Iterator[tuple[Site, str, list[int]]]:
    """(site, matrix, its inputs that stay) of every matrix that reads what a plan cuts."""
    for n, layer in enumerate(plan.layers):
        groups = layer.kept_groups()
        yield (n, "output"), "self_attn.o_proj", query_rows(groups, a)[0].tolist() if groups else []
        yield (n, "down"), "mlp.down_proj", layer.kept_channels()


def with_bias(model: Any, plan: Plan, seen: Seen) -> Any:
    """FLAP's repair: what the removed inputs said on average becomes a bias."""
    biases = {}
    for (n, site), name, kept in cut_inputs(anatomy(model), plan):
        w = linear(model, n, name).weight.data
        gone = torch.ones(w.shape[1], dtype=torch.bool)
        gone[kept] = False
        biases[n, name] = w[:, gone] @ seen.means[n, site][gone]
    cut = clone(model)
    cut_(cut, plan)
    for n, name, module in linears_of(cut):
        if (n, name) in biases:
            module.bias = torch.nn.Parameter(biases[n, name], requires_grad=False)
    return cut


def by_moments(model: Any, plan: Plan, seen: Seen) -> Any:
    """Least squares on the dense network's own activations, every reader for itself."""
    new = {}
    for (n, site), name, kept in cut_inputs(anatomy(model), plan):
        w, c = linear(model, n, name).weight.data, seen.moments.c[n, site]
        if kept and len(kept) < w.shape[1]:
            new[n, name] = refit(w[:, kept], w @ c[:, kept], c[kept][:, kept], 0.1)
    cut = clone(model)
    cut_(cut, plan)
    for (n, name), w in new.items():
        linear(cut, n, name).weight.data = w
    return cut


REPAIR: dict[str, Callable[[Any, Plan, Seen], Any]] = {
    "random": without_repair,
    "magnitude": without_repair,
    "Taylor": without_repair,
    "Wanda-sp": without_repair,
    "FLAP": with_bias,
    "OBS (SlimGPT-like)": by_moments,
    "block drop (ShortGPT)": without_repair,
    "the paper's rule (our reading)": by_moments,
}


def by_effects(e: Effects) -> Ranking:
    units, layers = order_units(e), sorted(e.channel)
    return Ranking(
        units.order, {n: units.of(n, "mlp") for n in layers}, {n: units.of(n, "attention") for n in layers}, False
    )


def stream_repaired(model: Any, plan: Plan, evidence: Evidence) -> Any:
    small = clone(model)
    cut_(small, plan)
    put_(small, fit(small, running(model), evidence, {}))
    return small


# whose text says what goes, and what the rest is fitted on: either text, "dense" for closed form on the whole network's own activations, "none"
OURS = {
    "Sartor": ("recovered", "both"),
    "Sartor, effects from own text only": ("mine", "both"),
    "Sartor, effects mixed": ("mixed", "both"),
    "Sartor, effects and repair from own text": ("mine", "mine"),
    "Sartor, effects and repair from generic text": ("theirs", "theirs"),
    "Sartor, repair on the dense stream": ("recovered", "dense"),
    "Sartor, no repair": ("recovered", "none"),
}


@dataclass(frozen=True)
class Arm:
    """What a method would take out, and how it repairs what is left. evidence: that the fit to the residual stream rests on, in arms that are repaired so."""

    ranking: Ranking
    repair: Callable[[Any, Plan, Seen], Any]
    evidence: Evidence | None = None


def ours(model: Any, own: torch.Tensor, generic: torch.Tensor, seed: int, only: Sequence[str] | None) -> dict[str, Arm]:
    """Sartor's arms: as it is, and with parts exchanged; None for `only`: all."""
    asked = {name: how for name, how in OURS.items() if name in (only or OURS)}
    if not asked:
        return {}
    half, a = running(model), anatomy(model)
    halves = [feel(half, r, seed) for r in own.chunk(2)]
    user, one, two, other = (effects_of(a, f) for f in (together(*halves), *halves, feel(half, generic, seed)))
    effects = {"mine": user, "theirs": other, "mixed": blended(user, other, 0.3)}
    effects["recovered"] = recovered(user, (one, two), other)
    few = generic[: len(generic) // 2]
    texts = {"both": (own, few, 0.3), "mine": (own, few[:0], 0.0), "theirs": (generic, few[:0], 0.0)}
    evidence = {key: evidence_of(half, *texts[key]) for key in {repair for _, repair in asked.values()} & texts.keys()}
    repairs = {"dense": by_moments, "none": without_repair}
    repairs |= {key: lambda m, plan, seen, e=e: stream_repaired(m, plan, e) for key, e in evidence.items()}
    return {
        name: Arm(by_effects(effects[felt]), repairs[repair], evidence.get(repair))
        for name, (felt, repair) in asked.items()
    }


def published(seen: Seen, only: Sequence[str] | None) -> dict[str, Arm]:
    """The others' arms; None for `only`: all."""
    return {name: Arm(rank(seen), REPAIR[name]) for name, rank in RIVALS.items() if name in (only or RIVALS)}


@dataclass(frozen=True)
class Lesson:
    """What a cut network is trained on: rows and what the whole one says of them, and text of the user's that judges."""

    said: Anchor
    validation: Sequence[Window]
    config: DistilConfig
    seed: int


def lesson_of(p: Any, dense: Any, rows: int, seed: int) -> Lesson:
    """A standard job's, but for what ends it: so many rows instead of seconds."""
    e = EFFORTS["standard"]  # not fitted to this machine's pace
    own = sample(training_rows(p.texts.train, p.tokenizer), e.training.lessons, seed)
    generic = sample(training_rows(p.texts.generic_train, p.tokenizer), e.rows, seed)
    validation = encode_windows(cut_windows(p.texts.validation, e.validation_bytes), p.tokenizer)
    return Lesson(
        joined(anchor(dense, own), anchor(dense, generic)), validation, counted(e.training.recover, rows), seed
    )


def counted(config: DistilConfig, rows: int) -> DistilConfig:
    """A training that ends after so many rows, whatever time that takes."""
    return replace(config, seconds=math.inf, rows=rows)


def cell(
    model: Any,
    plan: Plan,
    repair: Callable[..., Any],
    seen: Seen,
    windows: tuple[Sequence[Window], Sequence[Window]],
    lesson: Lesson | None,
) -> list[float]:
    """Bits per byte of the user's and of generic text, the same after training where there is a lesson, and seconds."""
    started = time.monotonic()
    cut = repair(model, plan, seen)
    found = [score(running(cut), w).bits_per_byte for w in windows]
    if lesson:
        small = running(cut)
        distil_(small, free(cut), None, lesson.said, lesson.validation, lesson.config, lesson.seed)
        found += [score(small, w).bits_per_byte for w in windows]
    return [*found, time.monotonic() - started]


def told(found: Sequence[float], base: Sequence[float]) -> str:
    """Of the user's text and of generic text, beside the whole network."""
    return "  ".join(
        f"{name} {x:.3f} ({x / b - 1:+.1%})" for name, x, b in zip(("user", "generic"), found, base, strict=True)
    )


def asked(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """What was asked, with the options that every comparison of arms has."""
    parser.add_argument("model")
    parser.add_argument("--data", nargs="+", required=True)
    parser.add_argument("--generic")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--rows", type=int, default=128, help="of 256 tokens, that a method may look at")
    parser.add_argument("--only", nargs="+", help="names of arms; all where it is left out")
    a = parser.parse_args()
    if unknown := set(a.only or ()) - {*RIVALS, *OURS}:
        parser.error(f"there is no arm '{unknown.pop()}': take some of {', '.join((*OURS, *RIVALS))}")
    return a


def users(a: argparse.Namespace) -> Iterator[tuple[Any, Any, tuple[Sequence[Window], Sequence[Window]], list[float]]]:
    """(the job, the network as it runs, windows of the user's and of generic test text, what it needs for them), user by user."""
    keep_freed()
    for data in a.data:
        p, dense = opened(a.model, data, a.generic)
        user, general = (encode_windows(cut_windows(t, TEST_BYTES), p.tokenizer) for t in (p.user.test, p.generic.test))
        base = [score(dense, w).bits_per_byte for w in (user, general)]
        print(f"{Path(data).name}: dense {base[0]:.3f}, generic {base[1]:.3f} bits per byte", flush=True)
        yield p, dense, (user, general), base


def computed() -> str:
    """In what, and where, networks are computed here: part of what a cell is kept under."""
    return f"{running_dtype()} on {torch.get_default_device()}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--removed", nargs="+", type=float, default=[0.2, 0.3, 0.4])
    parser.add_argument("--train", type=int, default=0, help="rows of recovery")
    a = asked(parser)
    for p, dense, windows, base in users(a):
        for seed in a.seeds:
            own = sample(training_rows(p.texts.train, p.tokenizer), a.rows, seed)
            generic = sample(training_rows(p.texts.generic_train, p.tokenizer), a.rows, seed)
            shape, seen = anatomy(p.model), look(dense, own)
            lesson = lesson_of(p, dense, a.train, seed) if a.train else None
            arms = ours(p.model, own, generic, seed, a.only) | published(seen, a.only)
            for removed in a.removed:
                for name, arm in arms.items():
                    kept = chosen(shape, arm.ranking, removed)
                    key = CELLS, p.source.sha256, name, json.dumps(kept), own, generic, a.train, seed, computed()
                    run = partial(cell, p.model, plan_of(shape, kept, seed), arm.repair, seen, windows, lesson)
                    *found, seconds = remembered(run, "cut", *key)
                    show(
                        f"{removed:.0%} removed, seed {seed}: {name:46s}", ("cut", f"trained on {a.train}"), found, base
                    )
                    print(f"  ({seconds:.0f} s)", file=sys.stderr)


def show(what: str, stages: tuple[str, str], found: Sequence[float], base: Sequence[float], note: str = "") -> None:
    """A line for each stage that was measured."""
    for stage, of in zip(stages, (found[:2], found[2:]), strict=True):
        if of:
            print(f"{what} {stage:16s} {told(of, base)}{note}", flush=True)


if __name__ == "__main__":
    main()
