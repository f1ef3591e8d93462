"""Closed-form repair of the weights that read what was removed.

W' = W[:,S] + W[:,R] C[R,S] (C[S,S] + lam diag(C[S,S]))^-1: ridge regression of the removed inputs on the kept ones,
shrunk towards *plain slicing* with diagonal damping. The textbook form (damping by the mean diagonal, shrunk towards
zero) is a trap where a few channels carry massive activation (../docs/method.md); this form is ours.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def compensate(
    w: Float[Tensor, "out f"], c: Float[Tensor, "f f"], keep: Bool[Tensor, " f"], lam: float
) -> Float[Tensor, "out s"]:
    """Weights of the consumer once only the inputs in `keep` are left.

    Args:
        w: consumer. c: E[z z^T] of its inputs. keep: True where the input stays. lam: damping, typically 0.1 to 1;
        infinity is plain slicing.
    """
    s = keep.nonzero().flatten()
    r = (~keep).nonzero().flatten()
    if not len(r) or lam == float("inf"):
        return w[:, s].clone()
    css = c[s][:, s].clone()
    css.diagonal().mul_(1 + lam).clamp_min_(1e-8)
    crs = c[r][:, s]
    solved = torch.linalg.solve(css, crs.T)  # (s, r)
    return w[:, s] + w[:, r] @ solved.T


def lost(
    w: Float[Tensor, "out f"], c: Float[Tensor, "f f"], keep: Bool[Tensor, " f"], new: Float[Tensor, "out s"]
) -> float:
    """E||W z - W' z_S||^2 under C, the local damage of the cut after repair."""
    full = w.clone()
    full[:, keep] -= new
    return float((full @ c * full).sum())


def obs_shrink(c: Float[Tensor, "f f"], damp: float = 0.1) -> Float[Tensor, " f"]:
    """Share of each input's second moment that the other inputs cannot explain: 1 / (C_jj [C^-1]_jj), in (0, 1].

    The factor by which Optimal Brain Surgeon's cost is below that of plain removal (ZipLM, arXiv:2302.04089).
    """
    d = c.diagonal().clamp_min(1e-12)
    correlation = c / (d.sqrt()[:, None] * d.sqrt()[None, :])
    correlation.diagonal().add_(damp)
    return (1.0 / torch.linalg.inv(correlation).diagonal() - damp).clamp(0.02, 1.0)
