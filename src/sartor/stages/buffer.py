"""Step buffering: the plan's cuts in steps, each repaired, measured and committed.

A step removes its share of every layer's channels (query groups go last), on the statistics of the model as it is by
then, once for every strength of repair; the copy with the least real damage on validation is committed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from sartor.model.network import Anatomy, anatomy, clone
from sartor.plan import Plan
from sartor.stages.calibrate import Moments, mix, second_moments
from sartor.stages.measure import score
from sartor.stages.prune import cut_attention_, cut_mlp_
from sartor.stages.tokens import Window, sample

LAMBDAS = (0.1, 0.3, 1.0)


def mixed_moments(
    model: Any, rows: tuple[Tensor, Tensor], n: int, plan: Plan, tell: Callable[[float], None]
) -> Moments:
    user = second_moments(model, sample(rows[0], n // 2, plan.seed), tell=lambda s: tell(0.5 * s))
    generic = second_moments(model, sample(rows[1], n // 2, plan.seed), tell=lambda s: tell(0.5 + 0.5 * s))
    return mix(user, generic, plan.rho)


def prune(
    small: Any,
    plan: Plan,
    rows: tuple[Tensor, Tensor],
    validation: Sequence[Window],
    steps_wanted: int,
    sampled: int,
    tell: Callable[[float, str], None],
) -> tuple[Any, list[dict[str, float]]]:
    """The plan's cuts in steps: cheapest units first, statistics of the model as it is, repair, the strength that validates best.

    Each step cuts and repairs a copy for every strength and commits the one with the least real damage.
    """
    steps: list[dict[str, float]] = []
    whole = anatomy(small)
    removing = sum(
        whole.groups[n] - len(p.kept_groups()) + whole.ffn[n] - len(p.kept_channels())
        for n, p in enumerate(plan.layers)
    )
    if not removing:
        return small, steps
    position = [list(range(f)) for f in whole.ffn]
    for k in range(steps_wanted):
        tell(k / steps_wanted, f"step {k + 1} of {steps_wanted}: activations")
        moments = mixed_moments(clone(small, torch.bfloat16), rows, sampled, plan, lambda s: None)
        target = _keep_after(plan, whole, (k + 1) / steps_wanted)
        tried = []
        for lam in LAMBDAS:
            candidate = _cut(small, plan, target, position, moments, lam, last=k + 1 == steps_wanted)
            tried.append((score(clone(candidate, torch.bfloat16), validation).bits_per_byte, lam, candidate))
            tried.sort(key=lambda t: t[0])
            del tried[1:], candidate
        bpb, lam, small = tried[0]
        position = [sorted(set(p) & target[n]) for n, p in enumerate(position)]
        steps.append(
            {
                "step": k + 1,
                "channels": float(sum(len(p) for p in position)),
                "lam": lam,
                "validation_bits_per_byte": bpb,
            }
        )
        tell((k + 1) / steps_wanted, f"step {k + 1} of {steps_wanted}: validation {bpb:.3f} bits per byte")
    return small, steps


def _keep_after(plan: Plan, whole: Anatomy, share: float) -> list[set[int]]:
    """Channels that are left once `share` of every layer's removals is done; the plan's masks at the end."""
    out = []
    for n, layer in enumerate(plan.layers):
        kept = set(layer.kept_channels())
        gone = [c for c in range(whole.ffn[n]) if c not in kept]
        out.append(kept | set(gone[round(len(gone) * share) :]))
    return out


def _cut(
    small: Any, plan: Plan, target: list[set[int]], position: list[list[int]], moments: Moments, lam: float, last: bool
) -> Any:
    """A copy with the channels in `target` left (query groups go in the last step), repaired with strength lam."""
    new = clone(small)
    for n, layer in enumerate(plan.layers):
        cut_mlp_(new, n, [i for i, c in enumerate(position[n]) if c in target[n]], moments, lam)
        if last:
            cut_attention_(new, n, layer.kept_groups(), moments, lam)
    return new
