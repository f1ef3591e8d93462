"""Step buffering: the plan's cuts in steps, each repaired, measured and committed.

A step removes its share of every layer's channels (query groups go last), on the statistics of the model as it is by
then, and repairs what read them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from sartor.model.network import Anatomy, anatomy, clone
from sartor.plan import Plan
from sartor.stages.calibrate import Moments, second_moments
from sartor.stages.measure import score
from sartor.stages.prune import cut_attention_, cut_mlp_
from sartor.stages.tokens import Window, sample

LAMBDA = 0.3  # of the repair; 0.1 and 1.0 end within 0.1% of it (docs/log.md)


def mixed_moments(
    model: Any,
    rows: tuple[Tensor, Tensor],
    n: int,
    plan: Plan,
    tell: Callable[[float], None],
    collect: Callable[..., Moments] = second_moments,
) -> Moments:
    """Moments of the user's text and, to the plan's share, of generic text, from n rows in all."""
    own, generic = (sample(r, n // 2, plan.seed) for r in rows)
    return collect(model, own, generic, plan.rho, tell)


def prune_(
    small: Any,
    plan: Plan,
    rows: tuple[Tensor, Tensor],
    validation: Sequence[Window],
    steps_wanted: int,
    sampled: int,
    tell: Callable[[float, str], None],
) -> list[dict[str, float]]:
    """The plan's cuts in steps, in place: cheapest units first, statistics of the model as it is, repair; what each step did."""
    steps: list[dict[str, float]] = []
    whole = anatomy(small)
    removing = sum(
        whole.groups[n] - len(p.kept_groups()) + whole.ffn[n] - len(p.kept_channels())
        for n, p in enumerate(plan.layers)
    )
    if not removing:
        return steps
    position = [list(range(f)) for f in whole.ffn]
    for k in range(steps_wanted):
        tell(k / steps_wanted, f"step {k + 1} of {steps_wanted}: activations")
        moments = mixed_moments(clone(small, torch.bfloat16), rows, sampled, plan, lambda s: None)
        target = _keep_after(plan, whole, (k + 1) / steps_wanted)
        _cut_(small, plan, target, position, moments, last=k + 1 == steps_wanted)
        bpb = score(clone(small, torch.bfloat16), validation).bits_per_byte
        position = [sorted(set(p) & target[n]) for n, p in enumerate(position)]
        steps.append(
            {
                "step": k + 1,
                "channels": float(sum(len(p) for p in position)),
                "validation_bits_per_byte": bpb,
            }
        )
        tell((k + 1) / steps_wanted, f"step {k + 1} of {steps_wanted}: validation {bpb:.3f} bits per byte")
    return steps


def _keep_after(plan: Plan, whole: Anatomy, share: float) -> list[set[int]]:
    """Channels that are left once `share` of every layer's removals is done; the plan's masks at the end."""
    out = []
    for n, layer in enumerate(plan.layers):
        kept = set(layer.kept_channels())
        gone = [c for c in range(whole.ffn[n]) if c not in kept]
        out.append(kept | set(gone[round(len(gone) * share) :]))
    return out


def _cut_(
    small: Any, plan: Plan, target: list[set[int]], position: list[list[int]], moments: Moments, last: bool
) -> None:
    """Leave the channels in `target` (query groups go in the last step), and repair what read the others, in place."""
    for n, layer in enumerate(plan.layers):
        cut_mlp_(small, n, [i for i, c in enumerate(position[n]) if c in target[n]], moments, LAMBDA)
        if last:
            cut_attention_(small, n, layer.kept_groups(), moments, LAMBDA)
