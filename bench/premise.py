"""Do different people need different parts of a model? Personal against generic importance, beside what two halves of one text agree on.

    python bench/premise.py MODEL --data DIR [DIR ...] --generic DIR [--rows 128] [--exact-rows 16]

Four grains: whole sub-layers (exact leave-one-out), query groups, blocks of 64 FFN channels, and the rounding of every matrix to four bits (all from
backward probes, each matrix's rounding error being one more direction to feel). For every user: the rank correlation of importance on that text with importance on generic
text, with a 95% interval over rows; beside it the *ceiling*, the correlation of two halves of one text (geometric mean of both texts'); and the ratio of both, what is left once sampling noise is
taken out. Then the same for the units that matter most (highest tenth) and least (the lowest three tenths, which a cut would take). Cached by content hash.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ground_truth import at_least, found_share, generic_units, kept_file, opened
from scipy.stats import rankdata
from torch import Tensor

from sartor.memory import keep_freed
from sartor.model.network import anatomy, linears_of, tracked
from sartor.model.tail import Tail
from sartor.numerics.grids import GRIDS, search_scales, snap
from sartor.stages.bits import BASE
from sartor.stages.likelihood import drawn_gradients
from sartor.stages.probe import Units, left_out
from sartor.stages.sensitivity import BATCH, feel
from sartor.stages.tokens import sample, training_rows
from sartor.stages.yardstick import Yardstick

DRAWS = 200
ORDERED = 64  # rows of generic text that `generic_units` orders channels by
Array = np.ndarray
LEAST = 2  # rows of a text: they are halved
GRAINS = ("sub-layers, left out", "query groups", "blocks of channels", "matrices at four bits")


def of_matrices(model: Any, rows: Tensor) -> Array:
    """(rows, matrices): by how much a row's log-likelihood, of labels drawn from the model, changes to first order with every matrix rounded to BASE."""
    grid, generator = GRIDS[BASE], torch.Generator().manual_seed(0)
    felt: dict[int, list[Tensor]] = {}

    def watch(i: int, error: Tensor) -> Callable[[Any, Any, Tensor], None]:
        def at(module: Any, args: tuple[Tensor], out: Tensor) -> None:
            said = (args[0].detach() @ error.T).detach()
            out.register_hook(lambda g: felt.setdefault(i, []).append((g * said).float().sum((1, 2))) and None)

        return at

    handles = []
    for i, (_, _, module) in enumerate(linears_of(model)):
        w = module.weight.data.float()
        error = (snap(w, search_scales(w, None, grid), grid) - w).to(module.weight.dtype)
        handles.append(module.register_forward_hook(watch(i, error)))
    for part in rows.split(BATCH):
        hidden = tracked(model, part)
        hidden.backward(drawn_gradients(model, hidden.detach(), generator))
    for handle in handles:
        handle.remove()
    return torch.stack([torch.cat(felt[i]) for i in sorted(felt)], 1).numpy()


def measured(model: Any, sha: str, units: Units, rows: Tensor, exact: Tensor, name: str) -> dict[str, Array]:
    """Importance row by row at every grain; its mean over rows is the importance."""
    file = kept_file("premise", sha, torch.cat(list(units.order.values())), rows, exact)
    if not file.exists():
        print(f"{name}: gradients", file=sys.stderr, flush=True)
        a, felt = anatomy(model), feel(model, rows)
        groups = torch.cat(
            [felt.sketch[n, "output"].reshape(len(rows), a.groups[n], -1).sum(-1) for n in range(a.layers)], 1
        )
        blocks = torch.cat(
            [
                felt.sketch[n, "down"][:, units.order[n]].reshape(len(rows), -1, units.size).sum(-1)
                for n in range(a.layers)
            ],
            1,
        )
        print(f"{name}: rounding", file=sys.stderr, flush=True)
        matrices = of_matrices(model, rows)
        print(f"{name}: sub-layers left out", file=sys.stderr, flush=True)
        tail = Tail(model, exact)
        stick = Yardstick(model, exact, tail.dense)
        parts = np.stack([stick.read(hidden).kl for _, _, hidden in left_out(model, tail)], 1)
        found = (parts, groups.square().numpy(), blocks.square().numpy(), matrices**2)
        np.savez(file, **dict(zip(GRAINS, found, strict=True)))
    return dict(np.load(file))


def alike(x: Array, y: Array) -> Array:
    """[rank correlation, share of the highest tenth in common, of the lowest three tenths]."""
    return np.array([np.corrcoef(rankdata(x), rankdata(y))[0, 1], found_share(x, y), found_share(-x, -y, 0.3)])


def beside(user: Array, generic: Array, rng: np.random.Generator) -> tuple[Array, Array, Array]:
    """(how alike halves of both texts are, its 95% interval over rows, the ceiling: how alike two halves of one text are, the geometric mean of both texts)."""

    def halves(x: Array, at: Array) -> tuple[Array, Array]:
        return x[at[: len(at) // 2]].mean(0), x[at[len(at) // 2 :]].mean(0)

    def once(u: Array, g: Array) -> tuple[Array, Array]:
        (u1, u2), (g1, g2) = halves(user, u), halves(generic, g)
        between = np.mean([alike(a, b) for a in (u1, u2) for b in (g1, g2)], 0)
        return between, np.sqrt(np.maximum(alike(u1, u2) * alike(g1, g2), 0))

    orders = [(rng.permutation(len(user)), rng.permutation(len(generic))) for _ in range(10)]
    between, ceiling = (np.mean(x, 0) for x in zip(*(once(u, g) for u, g in orders), strict=True))
    spread = [once(rng.choice(len(user), len(user)), rng.choice(len(generic), len(generic)))[0] for _ in range(DRAWS)]
    low, high = np.percentile(np.array(spread) - np.mean(spread, 0), [2.5, 97.5], axis=0)
    return between, np.stack([between + low, between + high]), ceiling


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--data", nargs="+", required=True)
    parser.add_argument("--generic")
    parser.add_argument("--rows", type=int, default=128, help="of 256 tokens, of the training split, for gradients")
    parser.add_argument("--exact-rows", type=int, default=16, help="for leaving out")
    a = parser.parse_args()
    for name, many in (("--rows", a.rows), ("--exact-rows", a.exact_rows)):
        if many < LEAST:
            parser.error(f"{name} is {many}: halves of them are compared, so it must be {LEAST} or more")
    keep_freed()
    found: dict[str, Mapping[str, Array]] = {}
    for data in a.data:
        p, model = opened(a.model, data, a.generic)
        units = generic_units(p, model, 64)
        for name, texts in (("generic", p.texts.generic_train), (Path(data).name, p.texts.train)):
            if name not in found:
                rows = training_rows(texts, p.tokenizer)
                at_least(ORDERED + LEAST, rows, name)
                few = sample(rows, a.exact_rows, 1)
                other = sample(rows, a.rows + ORDERED, 0)[ORDERED:]  # not those that the blocks were made by
                found[name] = measured(model, p.source.sha256, units, other, few, name)
    generic, rng = found.pop("generic"), np.random.default_rng(0)
    for grain in GRAINS:
        print(
            f"{grain} ({generic[grain].shape[1]}): rank correlation with generic [95%], ceiling, ratio; highest tenth, ceiling; lowest three tenths, ceiling"
        )
        for name, own in found.items():
            between, interval, ceiling = beside(own[grain], generic[grain], rng)
            print(
                f"  {name:18s} {between[0]:.2f} [{interval[0, 0]:.2f}, {interval[1, 0]:.2f}]  {ceiling[0]:.2f}  {between[0] / ceiling[0]:.2f}   "
                f"{between[1]:.2f}  {ceiling[1]:.2f}   {between[2]:.2f}  {ceiling[2]:.2f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
