"""Does the sum of single effects foretell what a whole plan costs? With and without the interactions that backward probes give for nothing.

    python bench/additivity.py MODEL --data DIR [--generic DIR] [--rows 96]

30 random plans (any units) and 10 chosen ones (the cheapest units first), 10 to 40% of all units removed, without repair: KL to the dense model on
the user's probe split, against effects from rows of the training split. "Sum": of the units' effects. "Joint": the same with all pairs,
|sum of the units' sketches|^2. R^2 is of nats per token with one factor for all, and of their logarithm.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
from ground_truth import opened
from scipy.stats import spearmanr

from sartor.memory import keep_freed
from sartor.model.network import anatomy, masked
from sartor.stages.likelihood import kl_of, top_of
from sartor.stages.probe import Units, effects_of, order_units, unit_masks
from sartor.stages.sensitivity import Felt, feel
from sartor.stages.tokens import sample, training_rows

SHARES = np.linspace(0.1, 0.4, 10)
Array = np.ndarray


def plans(effects: Array, rng: np.random.Generator) -> tuple[Array, Array]:
    """(random, chosen): 1 where a unit is off."""
    random, chosen = np.zeros((30, len(effects))), np.zeros((10, len(effects)))
    for i, row in enumerate(random):
        row[rng.permutation(len(effects))[: round(SHARES[i % len(SHARES)] * len(effects))]] = 1
    for share, row in zip(SHARES, chosen, strict=True):
        row[np.argsort(effects)[: round(share * len(effects))]] = 1
    return random, chosen


def sketches(units: Units, felt: Felt, size: int) -> Array:
    """(rows, d): what every row's random direction sees of every unit."""
    columns: list[Any] = []
    for n, kind, i in zip(units.layer, units.kind, units.index, strict=True):
        if kind == 0:
            columns.append(felt.sketch[n, "output"][:, i * size : (i + 1) * size].sum(1))
        else:
            columns.append(felt.sketch[n, "down"][:, units.order[n][i * units.size : (i + 1) * units.size]].sum(1))
    return np.stack([c.numpy() for c in columns], 1)


def r2(predicted: Array, y: Array) -> tuple[float, float]:
    """Of the values with one factor, and of their logarithms with one."""
    factor = predicted @ y / (predicted @ predicted)
    ratio = np.log(y / predicted)
    return 1 - ((y - factor * predicted) ** 2).sum() / ((y - y.mean()) ** 2).sum(), 1 - ratio.var() / np.log(y).var()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--data", required=True)
    parser.add_argument("--generic")
    parser.add_argument("--rows", type=int, default=96)
    a = parser.parse_args()
    keep_freed()
    p, model = opened(a.model, a.data, a.generic)
    shape = anatomy(model)
    felt = feel(model, sample(training_rows(p.texts.train, p.tokenizer), a.rows, 0))
    effects = effects_of(shape, felt)
    units = order_units(effects)
    v = sketches(units, felt, shape.queries_per_group * shape.head_dim)
    rows = sample(training_rows(p.texts.probe, p.tokenizer), 8, 0)
    reference = top_of(model, rows)
    print(
        f"{Path(a.data).name}: {len(units.effects)} units, effects from {a.rows} rows, damage on {rows.numel()} other tokens",
        flush=True,
    )
    for name, masks in zip(("random", "chosen"), plans(units.effects, np.random.default_rng(0)), strict=True):
        y = np.empty(len(masks))
        for i, mask in enumerate(masks):
            with masked(model, *unit_masks(model, units, mask)):
                y[i] = kl_of(model, rows, reference)
        sums, joint = masks @ units.effects, ((masks @ v.T) ** 2).sum(1)
        for how, x in (("sum", sums), ("joint", joint)):
            raw, log = r2(x, y)
            print(
                f"{name:7s} plans, {how:6s} R2 {raw:6.3f}  of the logarithm {log:6.3f}  rank {spearmanr(x, y).statistic:.3f}  measured / foretold {np.median(y / x):.2f}",
                flush=True,
            )
        for i, share in list(enumerate(SHARES))[::3]:
            here = np.arange(len(masks)) % len(SHARES) == i
            print(
                f"  {share:.0%} removed: {y[here].mean():.3f} nats, sum {sums[here].mean():.3f}, joint {joint[here].mean():.3f}"
            )


if __name__ == "__main__":
    main()
