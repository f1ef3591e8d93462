"""How much text probing needs, and what a cached generic profile saves the next user of the same model.

    python bench/second_user.py MODEL --data DIR [DIR ...] [--generic DIR] [--removed 0.3] [--profile 192] [--reference 256]

For 4 to 64 rows of 256 tokens: effects of those rows alone, mixed with generic ones (0.3), and recovered beside the generic profile (`probe.recovered`); with a soft
threshold instead of shrinkage for comparison. Rank correlation over all channels and groups with the effects of `--reference` other rows of the same user, and bits per byte of
the validation split once a share of the network is gone by that order, without any repair. Cells are cached. Results: a table on stdout.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from cuts import by_effects, chosen, plan_of, without_repair
from ground_truth import at_least, opened, remembered
from scipy.stats import spearmanr
from torch import Tensor

from sartor.memory import keep_freed
from sartor.model.network import anatomy
from sartor.model.precision import running_dtype
from sartor.stages.measure import score
from sartor.stages.probe import Effects, blended, effects_of, recovered, reliability
from sartor.stages.sensitivity import feel, together
from sartor.stages.tokens import cut_windows, encode_windows, sample, training_rows

ROWS = (4, 8, 16, 32, 64)
LEAST = 32  # other rows of the same user, where fewer than `--reference` are there


def flat(e: Effects) -> Tensor:
    return torch.cat([*e.channel.values(), *e.group.values()])


def soft(halves: tuple[Effects, Effects], generic: Effects) -> Effects:
    """A sparse difference: logarithms of ratios to generic effects, less one standard error, or none."""
    out = []
    for kind in ("channel", "group"):
        prior = getattr(generic, kind)
        ratios = [{n: (getattr(h, kind)[n] / prior[n]).log() for n in prior} for h in halves]
        error = float(torch.cat([ratios[0][n] - ratios[1][n] for n in prior]).square().mean()) ** 0.5 / 2
        mean = {n: (ratios[0][n] + ratios[1][n]) / 2 for n in prior}
        kept = {n: m.mean() + torch.nn.functional.softshrink(m - m.mean(), error) for n, m in mean.items()}
        out.append({n: prior[n] * k.exp() for n, k in kept.items()})
    return Effects(*out, {}, 0)


def one_user(
    model_name: str, data: str, generic: str | None, removed: float, profile_rows: int, reference: int
) -> None:
    """The table of one user."""
    p, model = opened(model_name, data, generic)
    shape = anatomy(model)
    validation = encode_windows(cut_windows(p.texts.validation, 24_576), p.tokenizer)
    rows = training_rows(p.texts.train, p.tokenizer)
    at_least(ROWS[-1] + min(reference, LEAST), rows, Path(data).name)
    own = sample(rows, reference + ROWS[-1], 0)
    few, others = own[: ROWS[-1]], own[ROWS[-1] :]
    said = sample(training_rows(p.texts.generic_train, p.tokenizer), profile_rows, 0)
    profile, truth = (effects_of(shape, feel(model, rows)) for rows in (said, others))
    dense = score(model, validation).bits_per_byte

    def tell(name: str, e: Effects) -> None:
        kept = chosen(shape, by_effects(e), removed)
        cut = lambda: without_repair(p.model, plan_of(shape, kept, 0)).to(running_dtype())  # noqa: E731
        run = lambda: score(cut(), validation).bits_per_byte  # noqa: E731
        cost = remembered(run, "second", json.dumps(kept), own, p.source.sha256) / dense - 1
        rank = spearmanr(flat(e), flat(truth)).statistic
        print(f"  {name:44s} rank {rank:.3f}  {cost:+.1%}", flush=True)

    print(f"{Path(data).name}: dense {dense:.3f} bits per byte; {removed:.0%} removed, no repair", flush=True)
    tell(f"{len(others)} other rows of the user", truth)
    tell(f"generic profile, {len(said)} rows", profile)
    for n in ROWS:
        halves = [feel(model, few[i * n // 2 : (i + 1) * n // 2], i) for i in (0, 1)]
        user, one, two = (effects_of(shape, f) for f in (together(*halves), *halves))
        alone, beside = reliability(one, two), reliability(one, two, profile)
        print(f" {n} rows, reliability {alone:.2f}, {beside:.2f} beside the profile", flush=True)
        tell(f"{n} rows alone", user)
        tell(f"{n} rows, mixed with 0.3 generic", blended(user, profile, 0.3))
        tell(f"{n} rows, recovered beside the profile", recovered(user, (one, two), profile))
        tell(f"{n} rows, the same with a soft threshold", soft((one, two), profile))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--data", nargs="+", required=True)
    parser.add_argument("--generic")
    parser.add_argument("--removed", type=float, default=0.3)
    parser.add_argument("--profile", type=int, default=192, help="rows of the generic profile")
    parser.add_argument("--reference", type=int, default=256, help="other rows of the same user")
    a = parser.parse_args()
    keep_freed()
    for data in a.data:
        one_user(a.model, data, a.generic, a.removed, a.profile, a.reference)


if __name__ == "__main__":
    main()
