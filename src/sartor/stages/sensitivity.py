"""What a network feels of its own units: probing from the other end.

A forward probe switches some units off and sees one change of the output. A backward probe draws one random direction in the space of
outputs and sees what *every* unit contributes to it: labels y are drawn from the model's own distribution at all positions of a row, and
r_u = sum_t z_u(t) . d/dz_u(t) log p(y) is by how much the row's log-likelihood would fall without unit u, to first order. Since E[r_u r_v] is the Fisher
inner product of the two cuts, rows of r are random projections of all effect vectors at once: E[r_u^2] / 2 is KL(dense || without u), and the
inner products are all pairwise interactions (the sampled-label estimate of a Gauss-Newton matrix: Martens 2014, arXiv:1412.1193, section 9).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from sartor.model.hooks import removed_after
from sartor.model.network import linears_of, tracked
from sartor.stages.calibrate import SITE_OF, Site
from sartor.stages.medium import medium_of

CUT = ("output", "down")  # sites whose inputs are units
BATCH = 4  # rows a pass; more need more memory and are no faster


@dataclass(frozen=True)
class Felt:
    """What the rows say of every input of o_proj and down_proj; sites as in `calibrate`, units in nats per token.

    Attributes:
        sketch: (rows * directions, f); the sum of squares over rows is an input's effect: true to all positions together, but from few draws.
        alone: (f,) the effect if no position knew of another: from very many draws, but biased. tokens: predictions behind it.
        directions: of every row, one after the other.
    """

    sketch: dict[Site, Float[Tensor, "n f"]]
    alone: dict[Site, Float[Tensor, " f"]]
    tokens: int
    directions: int = 1

    def effect(self, site: Site) -> Float[Tensor, " f"]:
        """The shape of the one and the size of the other: the best order of channels we know (docs/log.md)."""
        alone = self.alone[site]
        return alone * self.sketch[site].square().sum() / alone.sum().clamp_min(1e-30)

    def by_row(self, felt: Float[Tensor, "n k"]) -> Float[np.ndarray, "rows k"]:
        """What each row says of the effects of k things whose contributions in every direction are given; their mean over rows is the effect."""
        squares: np.ndarray = felt.square().numpy()
        rows = squares.reshape(-1, self.directions, squares.shape[1]).sum(1)
        return rows * len(rows)


def together(one: Felt, other: Felt) -> Felt:
    """What the rows of both say."""
    share = one.tokens / (one.tokens + other.tokens)
    sketch = {s: torch.cat([x * share**0.5, other.sketch[s] * (1 - share) ** 0.5]) for s, x in one.sketch.items()}
    alone = {s: share * x + (1 - share) * other.alone[s] for s, x in one.alone.items()}
    return Felt(sketch, alone, one.tokens + other.tokens, one.directions)


def feel(model: Any, rows: Tensor, seed: int = 0, tell: Callable[[float], None] = lambda share: None) -> Felt:
    """One forward pass over the rows, and a backward pass for each direction; `seed` is that of the directions."""
    medium, generator = medium_of(model), torch.Generator().manual_seed(seed)
    sites = [(layer, SITE_OF[name]) for layer, name, _ in linears_of(model) if SITE_OF[name] in CUT]
    sketch: dict[Site, list[Tensor]] = {site: [] for site in sites}
    alone: dict[Site, Tensor] = {site: torch.zeros(()) for site in sites}
    for at in range(0, len(rows), BATCH):
        part = rows[at : at + BATCH]
        found: dict[Site, list[Tensor]] = {site: [] for site in sites}
        with _catching(model, partial(_add_, found, alone)):
            hidden = tracked(model, part)
            for left in reversed(range(medium.directions)):
                hidden.backward(medium.gradients(model, hidden.detach(), generator), retain_graph=left > 0)
        for site, directions in found.items():
            sketch[site].append(torch.stack(directions, 1).flatten(0, 1))
        tell(min(1.0, (at + BATCH) / len(rows)))
    n = len(rows) * medium.positions(rows)
    share = 2 * n * medium.directions
    return Felt(
        {s: torch.cat(r) / share**0.5 for s, r in sketch.items()},
        {s: r / share for s, r in alone.items()},
        n,
        medium.directions,
    )


def _add_(found: dict[Site, list[Tensor]], alone: dict[Site, Tensor], site: Site, z: Tensor, gradient: Tensor) -> None:
    """What one direction says of what was read at a site."""
    felt = z * gradient
    found[site].append(felt.sum(1, dtype=torch.float32))
    alone[site] = alone[site] + torch.linalg.vector_norm(felt, dim=(0, 1), dtype=torch.float32).square()


@contextmanager
def _catching(model: Any, hear: Callable[[Site, Tensor, Tensor], None]) -> Iterator[None]:
    """`hear` is told what o_proj and down_proj read, and its gradient, on every way back."""

    def note(site: Site) -> Callable[[Any, tuple[Tensor, ...]], None]:
        def keep(_: Any, args: tuple[Tensor, ...]) -> None:
            if args[0].requires_grad:  # not where a layer will run once more on the way back
                args[0].register_hook(partial(hear, site, args[0].detach()))

        return keep

    handles = [
        module.register_forward_pre_hook(note((layer, SITE_OF[name])))
        for layer, name, module in linears_of(model)
        if SITE_OF[name] in CUT
    ]
    with removed_after(handles):
        yield
