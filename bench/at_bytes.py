"""The end that counts: who chooses what goes, and how the rest is repaired, at equal bytes of the file, everything else the same.

    pip install -e '.[bench]'
    python bench/at_bytes.py MODEL --data DIR [DIR ...] [--generic DIR] [--sizes 25% 18% 15%] [--seeds 0] [--rows 128] [--train 800] [--nearest] [--only Sartor FLAP]

For each size Sartor's plan says which words stay and on which grid the embedding is; the trimmed network adapts on `--train` rows, once for all arms. Then every method looks at the same rows
of that network, removes units until the file fits with everything else on four bits (IQ4_NL), repairs as its paper says, is rounded with our error feedback (`--nearest`: without, as error feedback goes column by column, which a GPU waits for) and recovers on `--train` rows more, on its grids. Bits
per byte of 48 KB of held-out test text, in PyTorch: rounded, and recovered. Every cell is cached. Results: a table on stdout.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from cuts import (
    CELLS,
    TEST_BYTES,
    Arm,
    Lesson,
    asked,
    chosen,
    computed,
    counted,
    ours,
    plan_of,
    published,
    show,
    users,
    with_bias,
    without_repair,
)
from ground_truth import remembered
from pruned_rivals import BIAS, after, least_share
from rivals import Seen, look

from sartor.effort import EFFORTS
from sartor.job import Prepared
from sartor.model.network import Anatomy, anatomy
from sartor.model.precision import running
from sartor.numerics.grids import GRIDS, search_scales
from sartor.pipeline import kept_back, measure, own_rows, trim
from sartor.plan import Plan, parse_budget
from sartor.stages.bits import all_on_base, embeddings_of
from sartor.stages.decide import decide
from sartor.stages.distil import anchor, distil_, joined
from sartor.stages.fit import Evidence, evidence_of, fit
from sartor.stages.masters import Latents, free, put_
from sartor.stages.measure import score
from sartor.stages.tokens import Window, cut_windows, encode_windows, sample, training_rows

RHO = 0.3


@dataclass(frozen=True)
class Ground:
    """What all arms of one size start from.

    Attributes:
        network: trimmed and adapted, in fp32. grids: of every matrix. limit: bytes that the file may have, bytes_of what it has. own, generic: rows that methods look at. windows: test text of the user's and generic. nearest: every weight goes to the nearest level, without error feedback.
    """

    network: Any
    grids: Mapping[str, str]
    limit: int
    bytes_of: Callable[[Any], int]
    own: torch.Tensor
    generic: torch.Tensor
    windows: tuple[Sequence[Window], Sequence[Window]]
    lesson: Lesson
    nearest: bool


def plans_of(p: Prepared, dense: Any, sizes: Sequence[str]) -> dict[str, Plan]:
    """Sartor's, for sizes below the one at which everything fits with more than four bits."""
    limits = {size: parse_budget(size).bytes_of(p.original_fp16) for size in sizes}
    tell = lambda stage, share, note: print(f"  {stage}: {note}", file=sys.stderr, flush=True)  # noqa: E731
    measured = measure(dense, p.tokenizer, p.texts, min(limits.values()), p.bytes_of, "standard", tell=tell)
    return {
        size: decide(dense, p.tokenizer, measured, limit, p.bytes_of, p.source.sha256, RHO, 0)
        for size, limit in limits.items()
    }


def ground_of(p: Prepared, plan: Plan, rows: int, train: int, seed: int, nearest: bool) -> Ground:
    """The trimmed network, adapted on `train` rows."""
    e = EFFORTS["standard"]  # not fitted to this machine's pace
    small, fitted = trim(p.model, p.tokenizer, plan)
    learned, unseen = kept_back(own_rows(p.tokenizer, fitted, plan, p.texts), rows, seed)
    generic = sample(training_rows(p.texts.generic_train, fitted), e.rows, seed)
    validation = encode_windows(cut_windows(p.texts.validation, e.validation_bytes), fitted)
    student = running(small)
    dense_said = anchor(student, generic)
    latents = free(small)
    config = counted(e.training.adapt, train)
    distil_(student, latents, learned, dense_said, validation, config, seed)
    for name, weight in small.named_parameters():
        weight.data = latents.masters[name]
    heard = sample(learned, min(e.training.lessons, train), seed)  # no more than can be learnt from
    said = joined(anchor(student, heard), dense_said)
    grids = all_on_base(small) | {n: plan.grids[n] for n in embeddings_of(anatomy(small))}
    windows = tuple(encode_windows(cut_windows(t, TEST_BYTES), fitted) for t in (p.user.test, p.generic.test))
    return Ground(
        small, grids, plan.budget_bytes, lambda a: p.bytes_of(a, fitted, grids), sample(unseen, rows, seed), sample(training_rows(p.texts.generic_train, fitted), rows, seed),
        windows, Lesson(said, validation, counted(e.training.recover, train), seed), nearest,
    )  # fmt: skip


def cut_to_fit(ground: Ground, arm: Arm, seed: int) -> tuple[Plan, float]:
    """(what stays, share of attention and FFN that goes): the least that makes the file fit."""
    a = anatomy(ground.network)
    plan_at = lambda share: plan_of(a, chosen(a, arm.ranking, share), seed)  # noqa: E731
    share = least_share(lambda x: file_bytes(ground, after(a, plan_at(x)), arm) <= ground.limit)
    if share is None:
        sys.exit(f"at_bytes: {ground.limit:,} bytes cannot be reached by cuts alone with these words: ask for more")
    return plan_at(share), share


def file_bytes(ground: Ground, a: Anatomy, arm: Arm) -> int:
    """Of a network of these sizes, at most, with the biases that an arm's repair adds."""
    biases = 2 * a.layers * (4 * a.width + BIAS) if arm.repair is with_bias else 0
    return ground.bytes_of(a) + biases


def cell(ground: Ground, plan: Plan, arm: Arm, seen: Seen, evidence: Evidence) -> list[float]:
    """Bits per byte of the user's and of generic text, rounded; the same recovered; seconds.

    Args:
        evidence: that an arm without its own is rounded on, towards its own repaired self.
    """
    started, grids = time.monotonic(), {} if ground.nearest else ground.grids
    if arm.evidence:
        cut = without_repair(ground.network, plan)
        latents = fit(cut, running(ground.network), arm.evidence, grids)
    else:
        cut = arm.repair(ground.network, plan, seen)
        latents = free(cut) if ground.nearest else fit(cut, running(cut), evidence, grids)
    if ground.nearest:
        latents = to_nearest(latents, ground.grids)
    student = running(cut)
    home = next(student.parameters()).device  # the fit leaves on the processor what it has done
    latents = replace(latents, masters=_at(home, latents.masters), scales=_at(home, latents.scales))
    put_(student, latents)
    found = [score(student, w).bits_per_byte for w in ground.windows]
    lesson = ground.lesson
    distil_(student, latents, None, lesson.said, lesson.validation, lesson.config, lesson.seed)
    found += [score(student, w).bits_per_byte for w in ground.windows]
    return [*found, time.monotonic() - started]


def to_nearest(latents: Latents, names: Mapping[str, str]) -> Latents:
    """The same weights on grids, the scales searched."""
    grids = {n: GRIDS[g] for n, g in names.items() if n in latents.masters}
    return replace(
        latents, scales={n: search_scales(latents.masters[n], None, g) for n, g in grids.items()}, grids=grids
    )


def _at(home: torch.device, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: t.to(home) for name, t in tensors.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=["25%", "18%", "15%"])
    parser.add_argument("--train", type=int, default=800, help="rows of adaptation, and of recovery")
    parser.add_argument("--nearest", action="store_true", help="rounded without error feedback")
    a = asked(parser)
    for p, dense, _, base in users(a):
        make = partial(plans_of, p, dense, a.sizes)
        key = CELLS, p.source.sha256, p.fingerprint(), sorted(a.sizes), EFFORTS["standard"].curve_rows
        plans = remembered(lambda make=make: {s: plan.to_json() for s, plan in make().items()}, "plans", *key)
        for size, plan in plans.items():
            for seed in a.seeds:
                at_size(p, Plan.from_json(plan), size, base, seed, a)


def at_size(p: Prepared, plan: Plan, size: str, base: Sequence[float], seed: int, a: argparse.Namespace) -> None:
    """All arms of one user, seed and size, on stdout."""
    ground = ground_of(p, plan, a.rows, a.train, seed, a.nearest)
    whole = running(ground.network)
    show(f"{size}, seed {seed}:", ("adapted", ""), [score(whole, w).bits_per_byte for w in ground.windows], base)
    seen = look(whole, ground.own)
    evidence = evidence_of(whole, ground.own, ground.generic[: len(ground.generic) // 2], RHO, listened=not a.nearest)
    arms = ours(ground.network, ground.own, ground.generic, seed, a.only) | published(seen, a.only)
    for name, arm in arms.items():
        kept, share = cut_to_fit(ground, arm, seed)
        masks = json.dumps([(layer.groups, layer.channels) for layer in kept.layers])
        key = (
            CELLS,
            p.source.sha256,
            name,
            size,
            masks,
            ground.own,
            ground.generic,
            a.train,
            a.nearest,
            seed,
            computed(),
        )
        *found, seconds = remembered(partial(cell, ground, kept, arm, seen, evidence), "at-bytes", *key)
        size_now = file_bytes(ground, after(anatomy(ground.network), kept), arm)
        note = f"; {share:.0%} gone, {size_now:,} bytes"
        show(f"{size}, seed {seed}: {name:46s}", ("rounded", f"trained on {a.train}"), found, base, note)
        print(f"  ({seconds:.0f} s)", file=sys.stderr)


if __name__ == "__main__":
    main()
