"""Recovery: training on the grid, on own and generic text, towards the truth and the original.

The network that runs is bf16 and holds the *snapped* weights; fp32 master weights live beside it. A step computes
bf16 gradients at the snapped weights, applies them to the masters, and snaps again: the straight-through estimator
(Bengio et al. 2013, arXiv:1308.3432) at no extra cost in the graph. Scales stay as the quantizer chose them, masters
start at GPTQ's latent weights, so that training starts at the GPTQ solution.

On the user's rows the loss is cross entropy on the text mixed with KL to the dense model; on generic rows KL alone,
which is what keeps the model from forgetting. The best masters on validation are kept.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Int
from torch import Tensor

from sartor.numerics.grids import Grid, snap
from sartor.numerics.schedule import warm_then_cosine
from sartor.stages.likelihood import cross_entropy, hidden_of, kl_to_top, top_of
from sartor.stages.measure import score
from sartor.stages.tokens import Window

EMBEDDING = "embed_tokens"
WORSE = 1.02  # while the rate is high validation wanders: only a clear rise counts towards stopping early
PART = 2  # rows in one forward and backward pass: bounds the memory of activations


@dataclass(frozen=True)
class DistilConfig:
    """How to train.

    Attributes:
        seconds: wall-clock budget. rate: peak learning rate of AdamW. batch_rows: rows a step. user_share: share of user
        rows in a batch. rank: of the update, 0 for full. embedding_factor: the embedding's rate over the others'. kl: weight of KL to the dense model on user rows (1 - kl is the weight of the text itself).
        checks: how often validation is measured. patience: checks in a row clearly above the best before stopping.
    """

    seconds: float = 300.0
    rate: float = 5e-4
    batch_rows: int = 8
    user_share: float = 0.875
    kl: float = 0.0
    checks: int = 8
    patience: int = 3
    decay: float = 0.01  # of low-rank factors; full weights are not decayed
    rank: int = 0
    embedding_factor: float = 1.0

    def __post_init__(self) -> None:
        if self.seconds < 0 or not 0 <= self.user_share <= 1 or not 0 <= self.kl <= 1 or self.batch_rows < 1:
            raise ValueError(f"not a valid training: {self}")


@dataclass
class Latents:
    """fp32 master weights: tensors on a grid with their scales, and free ones (norms, biases)."""

    masters: dict[str, Tensor]
    scales: dict[str, Tensor] = field(default_factory=dict)
    grids: dict[str, Grid] = field(default_factory=dict)

    def value(self, name: str) -> Tensor:
        """The weights as the runtime will see them."""
        if name in self.grids:
            return snap(self.masters[name], self.scales[name], self.grids[name])
        return self.masters[name]

    def halved(self) -> dict[str, Tensor]:
        """The masters in fp16 (vectors in fp32): half the room, and a cell of any grid here is far wider than the rounding."""
        return {n: t.half() if t.ndim > 1 else t.clone() for n, t in self.masters.items()}


@dataclass(frozen=True)
class Trained:
    """What training did: validation bits per byte over time, tokens seen, seconds."""

    curve: tuple[tuple[float, float], ...]
    tokens: int
    seconds: float


@torch.no_grad()
def put_(model: Any, latents: Latents) -> None:
    """Write the snapped weights into the network, in place, in its own dtype."""
    for name, p in model.named_parameters():
        if name in latents.masters:
            p.copy_(latents.value(name))


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


def distil_(
    model: Any,
    latents: Latents,
    teacher: Any | None,
    user: Int[Tensor, "n t"],
    generic: Int[Tensor, "m t"],
    validation: Sequence[Window],
    config: DistilConfig,
    seed: int = 0,
    tell: Callable[[float, str], None] = lambda share, note: None,
    keep: Callable[[Latents], None] | None = None,
) -> Trained:
    """Train `model` (bf16) and `latents` in place for `config.seconds`; both end as the best on validation.

    Args:
        teacher: the dense model in bf16 with the same vocabulary; None trains on the text alone.
        user, generic: training rows. validation: windows of the user's validation documents.
        tell: called with the share done and a note. keep: called with the latents whenever validation improves.
    """
    started = time.monotonic()
    put_(model, latents)
    named = {n: p.requires_grad_(True) for n, p in model.named_parameters() if n in latents.masters}
    generator = torch.Generator().manual_seed(seed)
    optimizers = {n: _optimizer(latents.masters[n], config, generator) for n in named}
    own, other = Rows(len(user), seed), Rows(len(generic), seed + 1)
    n_user = round(config.batch_rows * config.user_share)
    watch = _Watch(model, latents, validation, keep)
    tokens = steps = 0
    while (share := (time.monotonic() - started) / max(config.seconds, 1e-9)) < 1 and watch.bad < config.patience:
        rows = torch.cat([user[own.deal(n_user)], generic[other.deal(config.batch_rows - n_user)]])
        loss = _backward(model, teacher, rows, n_user, config)
        _update_(named, optimizers, config.rate * warm_then_cosine(share), config.embedding_factor)
        put_(model, latents)
        steps, tokens = steps + 1, tokens + rows.numel()
        if share * config.checks >= len(watch.curve):
            watch.check(time.monotonic() - started)
        tell(share, f"step {steps}, loss {loss:.3f}, validation {watch.best_bpb:.3f} bits per byte")
    seconds = time.monotonic() - started
    watch.check(seconds)
    watch.restore_()
    put_(model, latents)
    model.requires_grad_(False)
    return Trained(tuple(watch.curve), tokens, seconds)


class _Watch:
    """Validation during training: keeps a copy of the best masters and counts checks without gain."""

    def __init__(
        self, model: Any, latents: Latents, validation: Sequence[Window], keep: Callable[[Latents], None] | None
    ) -> None:
        self.model, self.latents, self.validation, self.keep = model, latents, validation, keep
        self.best, self.best_bpb, self.bad = latents.halved(), score(model, validation).bits_per_byte, 0
        self.curve = [(0.0, self.best_bpb)]

    def check(self, seconds: float) -> None:
        bpb = score(self.model, self.validation).bits_per_byte
        self.curve.append((seconds, bpb))
        self.bad = self.bad + 1 if bpb > WORSE * self.best_bpb else 0
        if bpb < self.best_bpb:
            self.best_bpb = bpb
            for name, master in self.latents.masters.items():
                self.best[name].copy_(master.detach())
            if self.keep:
                self.keep(self.latents)

    def restore_(self) -> None:
        """The best masters back in place."""
        for name, best in self.best.items():
            self.latents.masters[name] = best.float()


class _Full:
    """One optimizer a tensor, so that only one fp32 gradient exists at a time."""

    def __init__(self, master: Tensor, config: DistilConfig) -> None:
        self.master = master
        self.optimizer = torch.optim.AdamW([master], lr=config.rate, betas=(0.9, 0.98), weight_decay=0.0, fused=True)

    def step(self, gradient: Tensor, rate: float) -> None:
        self.optimizer.param_groups[0]["lr"] = rate
        self.master.grad = gradient
        self.optimizer.step()
        self.master.grad = None


class _LowRank:
    """master = base + SCALE B A, B (out, r) from zero, A (r, in) from noise (LoRA, Hu et al. 2021, arXiv:2106.09685).

    The product is part of the latent weights, so it is folded in and snapped to the grid at every step.
    """

    SCALE = 2.0

    def __init__(self, master: Tensor, config: DistilConfig, generator: torch.Generator) -> None:
        self.master, self.base = master, master.clone()
        self.a = torch.randn(config.rank, master.shape[1], generator=generator) / master.shape[1] ** 0.5
        self.b = torch.zeros(master.shape[0], config.rank)
        self.optimizer = torch.optim.AdamW(
            [self.a, self.b], lr=config.rate, betas=(0.9, 0.98), weight_decay=config.decay, fused=True
        )

    def step(self, gradient: Tensor, rate: float) -> None:
        self.optimizer.param_groups[0]["lr"] = rate
        self.a.grad, self.b.grad = self.SCALE * (self.b.T @ gradient), self.SCALE * (gradient @ self.a.T)
        self.optimizer.step()
        torch.addmm(self.base, self.b, self.a, alpha=self.SCALE, out=self.master)


def _optimizer(master: Tensor, config: DistilConfig, generator: torch.Generator) -> _Full | _LowRank:
    return _LowRank(master, config, generator) if master.ndim > 1 and config.rank else _Full(master, config)


def _backward(model: Any, teacher: Any | None, rows: Tensor, n_user: int, config: DistilConfig) -> float:
    """One batch in parts of PART rows, forward and backward; returns the loss."""
    total = 0.0
    for mine, chunk in ((True, rows[:n_user]), (False, rows[n_user:])):
        for part in chunk.split(PART) if len(chunk) else ():
            loss = _loss(model, teacher, part, config.kl if mine else 1.0) * (len(part) / len(rows))
            loss.backward()
            total += float(loss.detach())
    return total


def _loss(model: Any, teacher: Any | None, rows: Tensor, kl: float) -> Tensor:
    """(1 - kl) cross entropy + kl KL(teacher || model), in nats per token; cross entropy alone without a teacher."""
    if teacher is None or kl == 0:
        return cross_entropy(model, rows)
    logits = model.lm_head(hidden_of(model, rows)[:, :-1].flatten(0, 1)).float()
    values, ids = top_of(teacher, rows)
    loss = kl * kl_to_top(logits, values[:, :-1].flatten(0, 1), ids[:, :-1].flatten(0, 1))
    return loss if kl == 1 else loss + (1 - kl) * F.cross_entropy(logits, rows[:, 1:].flatten())


def _update_(named: dict[str, Any], optimizers: dict[str, _Full | _LowRank], rate: float, factor: float) -> None:
    """Gradients of the running network to the masters, clipped to norm 1 over all, and one step."""
    norm = float(torch.stack([p.grad.float().norm() for p in named.values()]).norm())
    clip = min(1.0, 1.0 / max(norm, 1e-12))
    for name, p in named.items():
        gradient, p.grad = p.grad.float().mul_(clip), None
        optimizers[name].step(gradient, rate * (factor if EMBEDDING in name else 1.0))
