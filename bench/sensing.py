"""Which way of probing finds the units that matter: designs, recoveries and measurements against exact leave-one-out.

    python bench/sensing.py MODEL --data DIR [--generic DIR] [--on-generic] [--rows 4] [--block 64] [--spent 8 4 2 1]

For every number of probes (d/8, d/4, d/2 and d) the share found of the true highest tenth of all units and of the cheapest three tenths, which a cut would take, and what it cost in seconds. Masks
are drawn by five designs (one of them within segments of layers, so that what comes before need not run again) and read by four measurements; effects are recovered by solvers of seven kinds, towards four priors, and by
the one that foretells held-out masks best, that one with 90% intervals over masks drawn again. Beside them: scores that need no mask, and screened
leave-one-out (exact probes of the units that backward probes put highest). Needs scikit-learn (pip install -e '.[bench]'). Masks are cached.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ground_truth import found_share, generic_units, kept_file, leave_one_out, opened, probing_rows
from rivals import look
from scipy.linalg import hadamard
from scipy.optimize import nnls
from scipy.stats import spearmanr
from sklearn.linear_model import ElasticNet, Lasso, MultiTaskLasso, OrthogonalMatchingPursuit

from sartor.memory import keep_freed
from sartor.model.network import anatomy, masked
from sartor.model.tail import Tail
from sartor.stages.probe import Effects, Units, effects_of, unit_masks
from sartor.stages.sensitivity import feel
from sartor.stages.tokens import sample, training_rows
from sartor.stages.yardstick import Yardstick

SHARE = 0.03  # of all units that a mask takes
SPENT = (8, 4, 2, 1)  # d over each of these is a number of probes
FOLDS = 5  # of masks, to choose a strength by
ORDER = 64  # of Hadamard matrices
SEGMENTS = 6  # of the layers
AGAIN = 12  # times that masks are drawn anew from those there are
Array = np.ndarray


def bernoulli(units: Units, m: int, rng: np.random.Generator) -> Array:
    """Every unit off with the same probability, independently."""
    return (rng.random((m, len(units.layer))) < SHARE).astype(float)


def partition(units: Units, m: int, rng: np.random.Generator) -> Array:
    """Every unit off once a permutation; units of a layer are dealt round the masks, so that few of one meet."""
    group, probes = units.layer * 2 + units.kind, round(1 / SHARE)
    rows: list[Array] = []
    while len(rows) < m:
        block, offset = np.zeros((probes, len(group))), rng.integers(probes)
        for g in rng.permutation(int(group.max()) + 1):
            members = rng.permutation(np.flatnonzero(group == g))
            block[(offset + np.arange(len(members))) % probes, members] = 1
            offset += len(members)
        rows += list(block)
    return np.array(rows[:m])


def antithetic(units: Units, m: int, rng: np.random.Generator) -> Array:
    """Pairs: a random half of a random pool, and the pool's other half (Bonsai, arXiv:2402.05406)."""
    d = len(units.layer)
    size = max(1, round(SHARE * d))
    out = np.zeros((m + m % 2, d))
    for one, other in out.reshape(-1, 2, d):
        pool = rng.permutation(d)[: 2 * size]
        one[pool[:size]] = other[pool[size:]] = 1
    return out[:m]


def hadamard_groups(units: Units, m: int, rng: np.random.Generator) -> Array:
    """Rows of Hadamard matrices over groups of units: each matrix works on ORDER groups drawn anew (fewer where there are not so many units), half of them off."""
    d = len(units.layer)
    order = min(ORDER, 1 << (d.bit_length() - 1))
    width = max(1, round(2 * SHARE * d / order))
    rows: list[Array] = []
    while len(rows) < m:
        groups = rng.permutation(d)[: order * width].reshape(order, width)
        for signs in hadamard(order)[1:]:
            row = np.zeros(d)
            row[groups[signs < 0].ravel()] = 1
            rows.append(row)
    return np.array(rows[:m])


def segments(units: Units, m: int, rng: np.random.Generator) -> Array:
    """Every unit off once a permutation, a mask's all in one segment of the layers: it costs that segment and what comes after."""
    layers, size = int(units.layer.max()) + 1, max(1, round(SHARE * len(units.layer)))
    part = units.layer * min(SEGMENTS, layers) // layers
    rows: list[Array] = []
    while len(rows) < m:
        block: list[Array] = []
        for s in range(int(part.max()) + 1):
            members = rng.permutation(np.flatnonzero(part == s))
            for some in np.array_split(members, max(1, round(len(members) / size))):
                block.append(np.zeros(len(part)))
                block[-1][some] = 1
        rows += [block[i] for i in rng.permutation(len(block))]
    return np.array(rows[:m])


DESIGNS: dict[str, Callable[[Units, int, np.random.Generator], Array]] = {
    "partition": partition,
    "Bernoulli": bernoulli,
    "antithetic": antithetic,
    "Hadamard": hadamard_groups,
    "segments": segments,
}


def readings(model: Any, sha: str, units: Units, rows: torch.Tensor, design: str, m: int) -> dict[str, Array]:
    """All measurements of the first m masks of a design; `seconds` in all."""
    file = kept_file("masks", sha, torch.cat(list(units.order.values())), units.size, rows, design, m)
    if not file.exists():
        removed = DESIGNS[design](units, m, np.random.default_rng(0))
        tail = Tail(model, rows)
        stick = Yardstick(model, rows, tail.dense)
        started, found = time.monotonic(), []
        for i, mask in enumerate(removed):
            with masked(model, *unit_masks(model, units, mask)):
                found.append(
                    stick.read(tail.hidden_from(int(units.layer[mask > 0].min(initial=anatomy(model).layers - 1))))
                )
            if i % 50 == 49:
                print(f"{design}: mask {i + 1} of {m}", file=sys.stderr, flush=True)
        np.savez(
            file,
            removed=removed,
            seconds=np.array(time.monotonic() - started),
            vector=np.stack([r.vector for r in found]).astype(np.float16),
            **{k: np.array([getattr(r, k).mean() for r in found]) for k in ("kl", "loss", "hidden")},
        )
    return dict(np.load(file))


@dataclass(frozen=True)
class Solver:
    """Effects from masks, what they measured and a prior: `solve(masks, measured, prior, strength)`, at the strength of best rank correlation on held-out masks, in FOLDS folds."""

    solve: Callable[[Array, Array, Array, float], Array]
    strengths: tuple[float, ...]

    def judged(self, a: Array, y: Array, prior: Array) -> tuple[float, float]:
        """(the best rank correlation on held-out masks, its strength)."""
        fold, worth = np.arange(len(y)) % FOLDS, []
        for s in self.strengths:
            held = np.zeros(len(y))
            for f in range(FOLDS):
                held[fold == f] = a[fold == f] @ self.solve(a[fold != f], y[fold != f], prior, s)
            worth.append(float(np.nan_to_num(spearmanr(held, y).statistic)))
        best = int(np.argmax(worth))
        return worth[best], self.strengths[best]

    def __call__(self, a: Array, y: Array, prior: Array) -> Array:
        return self.solve(a, y, prior, self.judged(a, y, prior)[1])


def _centred(a: Array, y: Array) -> tuple[Array, Array]:
    """A unit that is the same in all masks becomes nothing: no mask tells of it, and what rounding would leave of it could be scaled to anything."""
    return np.where(np.ptp(a, 0) > 0, a - a.mean(0), 0.0), y - y.mean(0)


def _least_squares(a: Array, y: Array, s: float) -> Array:
    """Ridge in as many unknowns as there are masks, at a share s of a mask's mean square; nothing where all masks are alike."""
    gram = a @ a.T
    strength = s * np.trace(gram) / len(y) or 1.0
    return a.T @ np.linalg.solve(gram + strength * np.eye(len(y)), y)


def ridge(a: Array, y: Array, prior: Array, s: float) -> Array:
    """Towards nothing."""
    return _least_squares(*_centred(a, y), s)


def ridge_to_prior(a: Array, y: Array, prior: Array, s: float) -> Array:
    """Every unit away from what is thought of it beforehand, p, at a cost of (x - p)^2 / p^2: the posterior mean of a Gaussian of that width."""
    return prior * (1 + _least_squares(*_centred(a * prior, y - a @ prior), s))


def _emptying(a: Array, y: Array) -> float:
    """The strength of LASSO from which on it leaves nothing; any where nothing is there to leave."""
    a, y = _centred(a, y)
    return float(np.abs(a.T @ y).max()) / len(y) or 1.0


def lasso(a: Array, y: Array, prior: Array, s: float) -> Array:
    return Lasso(alpha=s * _emptying(a, y), max_iter=2000).fit(a, y).coef_


def debiased(a: Array, y: Array, prior: Array, s: float) -> Array:
    """LASSO's support, then least squares on it."""
    found = np.flatnonzero(lasso(a, y, prior, s))
    out = np.zeros(a.shape[1])
    if len(found):
        out[found] = ridge(a[:, found], y, prior[found], 1e-3)
    return out


def elastic(a: Array, y: Array, prior: Array, s: float) -> Array:
    return ElasticNet(alpha=2 * s * _emptying(a, y), l1_ratio=0.5, max_iter=2000).fit(a, y).coef_


def non_negative(a: Array, y: Array, prior: Array, s: float) -> Array:
    scale = np.sqrt(s * (a**2).sum() / len(y))
    return nnls(np.vstack([a, scale * np.eye(a.shape[1])]), np.concatenate([y, np.zeros(a.shape[1])]))[0]


def omp(a: Array, y: Array, prior: Array, s: float) -> Array:
    return OrthogonalMatchingPursuit(n_nonzero_coefs=max(1, round(s * len(y)))).fit(a, y).coef_


TO_PRIOR = "ridge to a prior"
SOLVERS: dict[str, Solver] = {
    "ridge": Solver(ridge, (0.01, 0.1, 1.0, 10.0)),
    TO_PRIOR: Solver(ridge_to_prior, (0.01, 0.1, 1.0, 10.0, 100.0)),
    "LASSO": Solver(lasso, (0.3, 0.1, 0.03, 0.01, 0.003)),
    "LASSO, debiased": Solver(debiased, (0.3, 0.1, 0.03, 0.01)),
    "elastic net": Solver(elastic, (0.3, 0.1, 0.03, 0.01, 0.003)),
    "non-negative": Solver(non_negative, (0.001, 0.01, 0.1)),
    "OMP": Solver(omp, (0.05, 0.1, 0.2, 0.4)),
}


TO_ORDER = Solver(lambda a, y, prior, s: ridge_to_prior(a, y, priced(prior, a, y), s), SOLVERS[TO_PRIOR].strengths)


def priced(prior: Array, masks: Array, y: Array) -> Array:
    """A prior that knows only an order, in the unit that masks are measured in."""
    told = masks @ prior
    return prior * max(float(told @ y) / max(float(told @ told), 1e-30), 1e-12)


def from_vectors(a: Array, vectors: Array, jointly_sparse: bool) -> Array:
    """|v_u|^2 of effect vectors recovered from vector measurements: by ridge, or with one support for all coordinates (MMV)."""
    projection = np.random.default_rng(0).normal(size=(vectors.shape[1], 48)) / np.sqrt(48)
    y = vectors.astype(np.float32) @ projection
    centred, rest = _centred(a, y)
    if jointly_sparse:
        top = float(np.linalg.norm(centred.T @ rest, axis=1).max()) / len(y) or 1.0
        v = MultiTaskLasso(alpha=0.05 * top, max_iter=500).fit(a, y).coef_.T
    else:
        v = _least_squares(centred, rest, 0.1)
    return (v**2).sum(1)


def of_units(units: Units, e: Effects) -> Array:
    """Effects of given units."""
    return np.array(
        [
            float(e.group[n][i])
            if kind == 0
            else float(e.channel[n][units.order[n][i * units.size : (i + 1) * units.size]].sum())
            for n, kind, i in zip(units.layer, units.kind, units.index, strict=True)
        ]
    )


def recoveries(got: dict[str, Array], m: int, priors: dict[str, Array]) -> Iterator[tuple[str, Array, str]]:
    """(measurement and recovery, scores of all units, what else is known of it), from the first m masks of a design.

    Args:
        priors: the first in nats, the others orders only.
    """
    masks, kl = got["removed"][:m], got["kl"][:m]
    first = next(iter(priors.values()))
    ways = {f"KL, {name}": (solver, first) for name, solver in SOLVERS.items() if name != TO_PRIOR}
    ways |= {f"KL, ridge to {name}": (SOLVERS[TO_PRIOR] if p is first else TO_ORDER, p) for name, p in priors.items()}
    judged = {name: solver.judged(masks, kl, prior) for name, (solver, prior) in ways.items()}
    found = {name: solver.solve(masks, kl, prior, judged[name][1]) for name, (solver, prior) in ways.items()}
    yield from ((name, scores, "") for name, scores in found.items())
    best = max(judged, key=lambda name: judged[name][0])
    solver, prior = ways[best]
    sure = again(partial(solver.solve, prior=prior, s=judged[best][1]), masks, kl, found[best])
    yield "KL, what foretells held-out masks best", found[best], f"{best[4:]}; {sure}"
    for kind in ("loss", "hidden"):
        yield f"{kind}, LASSO", SOLVERS["LASSO"](masks, got[kind][:m], first), ""
    for sparse, name in ((False, "ridge"), (True, "jointly sparse")):
        yield f"vector, {name}", from_vectors(masks, got["vector"][:m], sparse), ""


def again(solved: Callable[[Array, Array], Array], masks: Array, y: Array, whole: Array) -> str:
    """How little the order hangs on single masks, the recovery, its strength and its prior being given: rank correlation of the whole's scores with what masks drawn again, with replacement, say; mean and 90% interval (Efron 1979)."""
    rng = np.random.default_rng(0)
    drawn = (rng.integers(len(y), size=len(y)) for _ in range(AGAIN))
    agreed = [float(np.nan_to_num(spearmanr(solved(masks[i], y[i]), whole).statistic)) for i in drawn]
    low, high = np.quantile(agreed, (0.05, 0.95))
    return f"masks drawn again order them the same by {np.mean(agreed):.2f} [{low:.2f}, {high:.2f}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--data", required=True)
    parser.add_argument("--generic")
    parser.add_argument("--on-generic", action="store_true", help="probe the generic reference itself")
    parser.add_argument("--rows", type=int, default=4, help="of 256 tokens, for the truth as for every probe")
    parser.add_argument("--block", type=int, default=64)
    parser.add_argument("--spent", nargs="+", type=int, default=SPENT, help="numbers of probes: d over each of these")
    a = parser.parse_args()
    if min(a.spent) < 1:
        parser.error(f"--spent is {min(a.spent)}: d over it are drawn, so it must be 1 or more")
    keep_freed()
    warnings.filterwarnings("ignore")
    p, model = opened(a.model, a.data, a.generic)
    units = generic_units(p, model, a.block)
    d = len(units.layer)
    if (fewest := d // max(a.spent)) < 2 * FOLDS:
        sys.exit(
            f"d/{max(a.spent)} of {d} units are {fewest} masks: {2 * FOLDS} are needed, so take a smaller --block or --spent"
        )
    rows = probing_rows(p, a.on_generic, a.rows)
    exact = leave_one_out(model, p.source.sha256, units, rows, "truth")
    truth, each = exact["kl"].mean(1), float(exact["seconds"]) / d
    print(
        f"{'generic' if a.on_generic else Path(a.data).name}: {d} units, {rows.numel()} tokens a probe, {1 / each:.1f} units left out a second; share found of the true highest tenth, and of the cheapest three tenths",
        flush=True,
    )

    def tell(name: str, scores: Array, seconds: float, note: str = "") -> None:
        print(
            f"  {name:64s} {found_share(scores, truth):5.2f}  cheapest {found_share(-scores, -truth, 0.3):5.2f}  rank {spearmanr(scores, truth).statistic:5.2f}  {seconds:5.0f} s{note and '; ' + note}",
            flush=True,
        )

    own = training_rows(p.texts.generic_train if a.on_generic else p.texts.train, p.tokenizer)
    backward: dict[int, Array] = {}
    for n in (16, 64, 192):
        started = time.monotonic()
        backward[n] = of_units(units, effects_of(anatomy(model), feel(model, sample(own, n, 0))))
        tell(f"backward probes, {n} rows of other text", backward[n], time.monotonic() - started)
    started = time.monotonic()
    same = np.mean([of_units(units, effects_of(anatomy(model), feel(model, rows, s))) for s in range(16)], 0)
    tell("backward probes, the same rows 16 times", same, time.monotonic() - started)
    started = time.monotonic()
    seen = look(model, sample(own, 64, 0))
    looked = time.monotonic() - started
    per_channel = {
        "activations (Wanda-sp), 64 rows": lambda n, s, w: w.square().sum(0) * seen.moments.c[n, s].diagonal(),
        "Taylor, 64 rows": lambda n, s, w: seen.taylor[n, s].abs(),
        "Fisher of the text itself, 64 rows": lambda n, s, w: seen.fisher[n, s],
    }
    priors = {"backward effects": backward[64]}
    for name, score in per_channel.items():
        priors[name.split(" (")[0].split(",")[0]] = of = of_units(units, _as_effects(model, score))
        tell(name, of, looked)
    tell("random", np.random.default_rng(0).random(d), 0.0)
    for part in a.spent:
        m = d // part
        first = np.argsort(-backward[64])[:m]
        mixed = backward[64] * 1e-6
        mixed[first] += truth[first]
        tell(f"d/{part} = {m}: screened leave-one-out", mixed, m * each)
    for design in DESIGNS:
        got = readings(model, p.source.sha256, units, rows, design, d // min(a.spent))
        seconds = float(got["seconds"]) / len(got["removed"])
        print(f"  {design}: {len(got['removed'])} masks, {1 / seconds:.1f} a second", flush=True)
        for part in a.spent:
            m = d // part
            for name, scores, note in recoveries(got, m, priors):
                tell(f"d/{part} = {m}: {design}, {name}", scores, m * seconds, note)


def _as_effects(model: Any, score: Callable[[int, str, torch.Tensor], torch.Tensor]) -> Effects:
    """Scores of inputs in the shape of effects."""
    from sartor.model.network import linear

    a = anatomy(model)
    channel, group = {}, {}
    for n in range(a.layers):
        channel[n] = score(n, "down", linear(model, n, "mlp.down_proj").weight.data.float())
        group[n] = (
            score(n, "output", linear(model, n, "self_attn.o_proj").weight.data.float())
            .reshape(a.groups[n], -1)
            .sum(-1)
        )
    return Effects(channel, group, {}, 0)


if __name__ == "__main__":
    main()
