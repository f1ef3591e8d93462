"""fp32 master weights beside the network that runs in bf16 with their snapped values, and the step that trains them.

A step computes bf16 gradients at the snapped weights, applies them to the masters, and snaps again: the straight-through estimator (Bengio et al. 2013,
arXiv:1308.3432) at no extra cost in the graph. Scales stay as the quantizer chose them.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from sartor import paging
from sartor.numerics.grids import Grid, snap
from sartor.numerics.schedule import affordable_batch

LATER = 0.5  # power of time that weights count with in their mean


@dataclass
class Latents:
    """fp32 master weights: tensors on a grid with their scales, and free ones (norms, biases).

    exact: matrices are kept in fp32, as where a layer scale is folded into rows too small for fp16.
    """

    masters: dict[str, Tensor]
    scales: dict[str, Tensor] = field(default_factory=dict)
    grids: dict[str, Grid] = field(default_factory=dict)
    exact: bool = False

    def value(self, name: str) -> Tensor:
        """The weights as the runtime will see them."""
        if name in self.grids:
            return snap(self.masters[name], self.scales[name], self.grids[name])
        return self.masters[name]

    def halved(self) -> dict[str, Tensor]:
        """The masters in fp16 (vectors in fp32): half the room, and a cell of any grid here is far wider than the rounding."""
        return {n: paging.copied(t, self.halved_dtype(n)) for n, t in self.masters.items()}

    def halved_dtype(self, name: str) -> torch.dtype:
        return torch.float16 if self.masters[name].ndim > 1 and not self.exact else torch.float32


def free(model: Any) -> Latents:
    """A network's weights as they are, on no grid."""
    return Latents({n: p.data for n, p in model.named_parameters()})


@torch.no_grad()
def put_(model: Any, latents: Latents) -> None:
    """Let the network run on these weights, in place: on the masters themselves where they are free and of its dtype, so that a step needs no copy of them; else on their snapped values in its own."""
    for name, p in model.named_parameters():
        if name not in latents.masters:
            continue
        master = latents.masters[name]
        if name not in latents.grids and master.dtype == p.dtype:
            p.data = master
        else:
            p.copy_(latents.value(name))
        paging.let_go(p.data, master)


class Mean:
    """The mean of the masters that a training has been at, the later the heavier: the t-th counts as t to the power of LATER.

    Polynomial-decay averaging (Shamir and Zhang 2013, arXiv:1212.1824, section 4), which needs no length to be known ahead. While the rate is high, weights circle around what
    they have learnt and carry what the last rows alone said; their mean does not (docs/log.md).
    """

    def __init__(self, latents: Latents) -> None:
        self.latents, self.count = (
            replace(latents, masters={n: paging.copied(t) for n, t in latents.masters.items()}),
            0,
        )

    def add_(self, latents: Latents) -> None:
        self.count += 1
        self.moved_(latents, (1 + LATER) / (self.count + LATER))

    @torch.no_grad()
    def moved_(self, latents: Latents, share: float) -> Latents:
        """The mean, moved by this share of the way towards other weights."""
        for name, mean in self.latents.masters.items():
            mean.lerp_(latents.masters[name], share)
            paging.let_go(mean, latents.masters[name])
        return self.latents


class Rows:
    """Rows dealt in a seeded order, epoch after epoch, never twice in an epoch."""

    def __init__(self, count: int, seed: int) -> None:
        self.count, self.generator, self.order = (
            count,
            torch.Generator().manual_seed(seed),
            torch.empty(0, dtype=torch.long),
        )

    def deal(self, n: int) -> Tensor:
        while len(self.order) < n:
            self.order = torch.cat([self.order, torch.randperm(self.count, generator=self.generator)])
        dealt, self.order = self.order[:n], self.order[n:]
        return dealt


class Batches:
    """How many rows the next step takes: as many as leave time for enough steps (`affordable_batch`), at the speed since this was made; and how far the training is.

    Attributes:
        many: rows of the step to come. seen: rows of all steps so far.
    """

    def __init__(self, first: int, least: int, most: int, steps: int, seconds: float, rows: int = 0) -> None:
        """Args: first: rows of the step before any speed is known. least, most: rows of a step. steps, seconds: how many there shall be, in which time; rows: of the whole training, where those end it instead."""
        if rows:  # then speed is of no consequence
            first = least = most = affordable_batch(min(least, most), most, steps, rows, 1.0)
        self.least, self.most, self.steps, self.seconds, self.rows = min(least, most), most, steps, seconds, rows
        self.many, self.seen, self.started = min(first, most), 0, time.monotonic()

    def stepped(self) -> None:
        """To be called after every step."""
        self.seen += self.many
        if not self.rows:
            speed = self.seen / (time.monotonic() - self.started)
            self.many = affordable_batch(self.least, self.most, self.steps, speed, self.seconds)

    def done(self, seconds: float, before: float) -> float:
        """The share of the training that is done.

        Args:
            seconds: since it began. before: trained ahead of an interruption.
        """
        return self.seen / self.rows if self.rows else seconds / max(self.seconds - before, 1e-9)


class Kept(Protocol):
    """Where the best weights of a training are kept: on disk they take no memory, and outlive an interruption."""

    def save(self, latents: Latents, seconds: float, state: Mapping[str, Any] | None = None) -> None:
        """Keep these instead, trained for so long; `state`: JSON that tells what else was reached with them."""

    def load(self) -> tuple[Latents, float] | None:
        """What was saved last, and how long it had been trained; None before anything was."""

    def state(self) -> dict[str, Any]:
        """What was told with it; nothing before anything was."""


class InMemory:
    """For whoever has no folder."""

    def __init__(self) -> None:
        self._last: tuple[Latents, float] | None = None
        self._state: dict[str, Any] = {}

    def save(self, latents: Latents, seconds: float, state: Mapping[str, Any] | None = None) -> None:
        self._last, self._state = (replace(latents, masters=latents.halved()), seconds), dict(state or {})

    def load(self) -> tuple[Latents, float] | None:
        return self._last

    def state(self) -> dict[str, Any]:
        return self._state


class Adam:
    """AdamW, one a tensor, so that only one fp32 gradient exists at a time.

    Args:
        relative: rates are shares of the size of what they move, row by row of a matrix. With a layer scale folded in, rows differ a hundredfold, and a step that
        suits the large ones wipes out the others.
    """

    def __init__(self, master: Tensor, rate: float, relative: bool = False) -> None:
        self.master, self.size = master, _size_of(master) if relative else None
        self.moved = master if self.size is None else torch.zeros_like(master)
        self.optimizer = torch.optim.AdamW([self.moved], lr=rate, betas=(0.9, 0.98), weight_decay=0.0, fused=True)
        # made now: at the first step it would settle in the gaps that activations had left, and the next step's would find none
        self.optimizer.state[self.moved] = {
            "step": torch.zeros(()),
            "exp_avg": paging.zeros(master.shape),
            "exp_avg_sq": paging.zeros(master.shape),
        }

    def step(self, gradient: Tensor, rate: float) -> None:
        self.optimizer.param_groups[0]["lr"] = rate
        self.moved.grad = gradient
        self.optimizer.step()
        self.moved.grad = None
        if self.size is not None:
            self.master.addcmul_(self.moved, self.size)
            self.moved.zero_()
        state = self.optimizer.state[self.moved]
        paging.let_go(self.master, state["exp_avg"], state["exp_avg_sq"])


LEAST = 0.01  # of the size of the whole tensor: rows that are smaller move as if they had this one


def _size_of(w: Tensor) -> Tensor:
    """Root mean square, of every row of a matrix or of a whole vector, in its shape."""
    over = tuple(range(1, w.ndim)) if w.ndim > 1 else 0
    least = max(LEAST * float(w.square().mean().sqrt()), 1e-8)
    return w.square().mean(over, keepdim=True).sqrt().clamp_min(least)


def update_(named: Mapping[str, Any], optimizers: Mapping[str, Adam], rate: float) -> None:
    """Gradients of the running network to the masters, clipped to norm 1 over all, and one step."""
    named = {n: p for n, p in named.items() if p.grad is not None}  # the norm in front of a lost attention has none
    norm = float(torch.stack([_norm(p.grad) for p in named.values()]).norm())
    clip = min(1.0, 1.0 / max(norm, 1e-12))
    for name, p in named.items():
        optimizers[name].step(p.grad.float().mul_(clip), rate)
        p.grad = paging.emptied(p.grad)


def _norm(gradient: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(gradient, dtype=torch.float32)
    paging.let_go(gradient)
    return norm


def gradients_(named: Mapping[str, Any]) -> None:
    """Room for the gradients of a training, where it is to be on disk; in memory every pass makes its own."""
    if paging.on():
        for p in named.values():
            p.grad = paging.zeros(p.shape, p.dtype)
