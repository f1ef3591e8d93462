"""Closed-form repair of the weights that read what a cut has left.

W' = W + (A - W B) (B + lam diag B)^-1 with A = E[t z^T] and B = E[z z^T]: ridge regression of what is wanted, t, on what is left to read, z, shrunk
towards the weights as they are (*plain slicing*) with diagonal damping. The textbook form (damping by the mean diagonal, shrunk towards
zero) is a trap where a few channels carry massive activation (../docs/method.md); this form is ours.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

LAMBDA = 0.3  # pull towards the weights as they are, where nothing says how strong; from 0.1 to 1 it hardly matters (docs/log.md)
STRENGTHS = (0.1, 0.3, 1.0, 3.0, float("inf"))
Pair = tuple[Tensor, Tensor]


def refit(
    w: Float[Tensor, "*g out f"], a: Float[Tensor, "*g out f"], b: Float[Tensor, "*g f f"], lam: float
) -> Float[Tensor, "*g out f"]:
    """Weights that say `t` as well as their inputs allow; of several matrices at once, where there are groups.

    Args:
        w: the weights as they are. a: E[t z^T]. b: E[z z^T]. lam: damping, typically 0.1 to 1; infinity leaves w alone.
    """
    if lam == float("inf"):
        return w.clone()
    damped = b.clone()
    mean = float(b.diagonal(dim1=-2, dim2=-1).mean())
    damped.diagonal(dim1=-2, dim2=-1).mul_(1 + lam).clamp_min_(1e-12 + 1e-6 * mean)
    return w + torch.linalg.solve(damped, (a - w @ b).mT).mT


def strength(w: Float[Tensor, "*g out f"], seen: Pair, held: Pair) -> float:
    """The damping whose fit on `seen` says `t` best on `held`; infinity where any fit does harm there.

    Args:
        w: the weights as they are. seen, held: (a, b) as for `refit`, of text fitted on and of other text.
    """
    a, b = held

    def error(lam: float) -> float:
        new = refit(w, *seen, lam)
        return float(((new @ b) * new).sum() - 2 * (new * a).sum())

    return min(STRENGTHS, key=error)
