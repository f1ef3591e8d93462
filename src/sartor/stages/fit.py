"""After a cut: every matrix goes onto its grid, and those that write to the residual stream first make up for what is missing from it.

Layer by layer, two networks read the same rows: the whole one, and the cut one as far as it is done, cut and rounded. Each matrix is rounded with error
feedback on what it will really read. o_proj and down_proj are first fitted to the difference between their *own* stream and the whole one's, so that
each layer also takes up what those before it got wrong, by cuts as by rounding, whether or not it lost anything itself. The usual form of this (targets
from the whole network's matrix, inputs from the cut one, each matrix for itself) knows nothing of the stream and made things worse (docs/log.md).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sartor import paging
from sartor.model.families import ATTENTION, MLP
from sartor.model.hooks import removed_after
from sartor.model.network import anatomy, embed, has_attention, has_mlp, layers_of, linear, parameter, sharing
from sartor.model.tail import arguments_of
from sartor.numerics.compensate import LAMBDA, refit, strength
from sartor.numerics.four import NAMED
from sartor.numerics.gptq import gptq
from sartor.numerics.grids import snap
from sartor.paging import each, kept
from sartor.stages.calibrate import Heard, Site, heard, unheard
from sartor.stages.masters import Latents

EMBEDDING = "model.embed_tokens.weight"
BATCH = 8  # rows a pass; the last of each judges how strong the fit may be


@dataclass(frozen=True)
class Evidence:
    """What is fitted on.

    Attributes:
        rows: of the user and generic ones, shuffled. weight: of each row; they sum to 1. heard: how much the loss feels of every token.
    """

    rows: Tensor
    weight: Float[Tensor, " n"]
    heard: Heard


def evidence_of(
    model: Any,
    own: Tensor,
    generic: Tensor,
    rho: float,
    tell: Callable[[float], None] = lambda share: None,
    listened: bool = True,
) -> Evidence:
    """Rows of both texts, the generic ones with `rho` of all weight; either may be empty.

    Args:
        listened: what the model's loss feels of each token is found out. After a deep cut that is worth 0.2 to 0.3%, and as much time in training more (docs/log.md).
    """
    texts = [(r, share / len(r)) for r, share in ((own, 1 - rho), (generic, rho)) if len(r)]
    total, many = sum(len(r) * w for r, w in texts), sum(len(r) for r, _ in texts)
    said, done = [], 0
    for rows, of_each in texts:
        weight = torch.full((len(rows),), of_each / total)
        start, width = done / many, len(rows) / many
        told = partial(_inside, tell, start, width)
        said.append((rows, weight, heard(model, rows, weight, told) if listened else unheard(model, rows, weight)))
        done += len(rows)
    order = torch.randperm(
        many, generator=torch.Generator().manual_seed(0)
    )  # so that rows of either text judge the fit
    tokens = {site: torch.cat([h.tokens[site] for _, _, h in said])[order] for site in said[0][2].tokens}
    head = torch.stack([h.head for _, _, h in said]).sum(0)
    rows, weight = (torch.cat(x)[order] for x in ([r for r, _, _ in said], [w for _, w, _ in said]))
    return Evidence(rows, weight, Heard(tokens, head))


def _inside(tell: Callable[[float], None], start: float, width: float, share: float) -> None:
    tell(start + width * share)


@torch.no_grad()
def fit(
    small: Any,
    whole: Any,
    evidence: Evidence,
    grids: Mapping[str, str],
    tell: Callable[[float, str], None] = lambda share, note: None,
) -> Latents:
    """Weights of the cut network, on their grids, that keep the whole one's residual stream.

    Args:
        small: the cut network in fp32, left as it is. whole: what it was cut from, in the precision to run in.
        grids: {parameter name: grid name}; what is absent stays free (fp32).
    """
    fitting = _Fitting(small, sharing(small, next(whole.parameters()).dtype), evidence, grids)
    tied = anatomy(small).tied  # then the embedding is the head above all; an untied one is only looked up
    if EMBEDDING in grids:
        fitting.round_([EMBEDDING], evidence.heard.head if tied else torch.eye(small.config.hidden_size))
    parts = evidence.rows.split(BATCH)
    arguments = {n: arguments_of(whole, evidence.rows[:n]) for n in {len(part) for part in parts}}
    theirs, ours = ([kept(embed(network, part)) for part in parts] for network in (whole, fitting.running))
    last = len(layers_of(small))
    for n in range(last):
        ours, theirs = fitting.layer(layers_of(whole)[n], n, ours, theirs, arguments)
        tell((n + 1) / last, f"layer {n}")
    if "lm_head.weight" in grids and not tied:
        read = [kept(fitting.running.model.norm(x)) for x in each(ours)]
        fitting.round_(["lm_head.weight"], fitting.moments(read, None))
    return fitting.result()


class _Fitting:
    """The pass as it stands: `running` is the cut network with everything that is done."""

    def __init__(self, small: Any, running: Any, evidence: Evidence, grids: Mapping[str, str]) -> None:
        self.small, self.running, self.evidence, self.grids = small, running, evidence, grids
        self.parameters = dict(small.named_parameters())
        self.latents = Latents({})

    def result(self) -> Latents:
        done = self.latents.masters
        self.latents.masters = {
            n: done[n] if n in done else paging.copied(p.data, torch.float32) for n, p in self.parameters.items()
        }
        return self.latents

    def layer(
        self, other: Any, n: int, ours: list[Tensor], theirs: list[Tensor], arguments: Mapping[int, Any]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Both streams behind layer n, which is done on the way."""
        block = layers_of(self.running)[n]
        middles, ends = [], []
        for x in each(theirs):
            with _read(other.post_attention_layernorm) as middle:
                ends.append(kept(other(x, **arguments[len(x)][n])))
            middles.append(kept(middle[0]))
        if has_attention(self.running, n):
            normed = [kept(block.input_layernorm(x)) for x in each(ours)]
            self.readers(n, ATTENTION[:-1], normed, (n, "attention"))
            with _ended_before(block.self_attn, "o_proj"):
                read = [kept(block.self_attn(hidden_states=x, **arguments[len(x)][n])[0]) for x in each(normed)]
            ours = self.writer(n, ATTENTION[-1], read, ours, middles, (n, "output"))
        if has_mlp(self.running, n):
            normed = [kept(block.post_attention_layernorm(x)) for x in each(ours)]
            self.readers(n, MLP[:-1], normed, (n, "mlp"))
            with _ended_before(block.mlp, "down_proj"):
                read = [kept(block.mlp(x)) for x in each(normed)]
            ours = self.writer(n, MLP[-1], read, ours, ends, (n, "down"))
        for done in (block, other, layers_of(self.small)[n]):
            paging.let_go_of(done)
        return ours, ends

    def readers(self, n: int, names: Sequence[str], read: list[Tensor], site: Site) -> None:
        """Matrices that read the stream: onto their grids; a network that sees has no gate."""
        there = [full for name in names if (full := parameter(n, name)) in self.parameters]
        if any(full in self.grids for full in there):
            self.round_(there, self.moments(read, site))

    def writer(
        self, n: int, name: str, read: list[Tensor], stream: list[Tensor], wanted: list[Tensor], site: Site
    ) -> list[Tensor]:
        """The stream once the matrix has written to it, fitted to `wanted` and on its grid; a bias is fitted with it, as the weights of an input that is always one."""
        old, new = linear(self.small, n, name), linear(self.running, n, name)
        w = old.weight.data.float()
        if biased := old.bias is not None:
            w = torch.cat([w, old.bias.data.float()[:, None]], 1)
        a, b = torch.zeros(2, *w.shape), torch.zeros(2, w.shape[1], w.shape[1])
        for z, x, target, scale in zip(each(read), each(stream), each(wanted), self.scales(site, read), strict=True):
            z = torch.cat([z, torch.ones_like(z[..., :1])], -1) if biased else z
            z, missing = z * scale, (target - x).to(z.dtype) * scale
            for i, rows in enumerate((slice(0, len(z) - 1), slice(len(z) - 1, None)) if len(z) > 1 else (slice(None),)):
                flat = z[rows].flatten(0, 1)
                a[i] += (missing[rows].flatten(0, 1).T @ flat).float()
                b[i] += (flat.T @ flat).float()
        lam = strength(w, (a[0], b[0]), (a[1], b[1])) if b[1].any() else LAMBDA
        fitted, both = refit(w, a.sum(0), b.sum(0), lam), b.sum(0)
        if biased:
            self.put_(parameter(n, name, "bias"), fitted[:, -1])
            fitted, both = fitted[:, :-1], both[:-1, :-1]
        self.put_(parameter(n, name), fitted)
        self.round_([parameter(n, name)], both, {parameter(n, name): fitted})
        return [kept(x + new(z)) for z, x in zip(each(read), each(stream), strict=True)]

    def scales(self, site: Site | None, read: list[Tensor]) -> Iterator[Tensor]:
        """Roots of the weights of all tokens, part by part."""
        weight = (self.evidence.weight / read[0].shape[1])[:, None]
        if site in self.evidence.heard.tokens:
            weight = weight * self.evidence.heard.tokens[site]
        dtype = next(self.running.parameters()).dtype
        return (w.sqrt()[..., None].to(dtype) for w in weight.split(BATCH))

    def moments(self, read: list[Tensor], site: Site | None) -> Float[Tensor, "f f"]:
        c = torch.zeros(())
        for z, scale in zip(each(read), self.scales(site, read), strict=True):
            flat = (z * scale).flatten(0, 1)
            c = c + (flat.T @ flat).float()
        return c

    def put_(self, name: str, w: Tensor) -> None:
        self.latents.masters[name] = kept(w)
        running = self.running.get_parameter(name)
        running.data = kept(self.latents.masters[name].to(running.dtype))

    def round_(self, names: Sequence[str], c: Tensor, weights: Mapping[str, Tensor] | None = None) -> None:
        """Matrices that read the same go onto their grids, those of one grid in one sweep: rows do not depend on each other."""
        weights = weights or {n: self.parameters[n].data.float() for n in names}
        for grid in {self.grids[n] for n in names if n in self.grids}:
            some = [n for n in names if self.grids.get(n) == grid]
            q = gptq(torch.cat([weights[n] for n in some]), c, NAMED[grid])
            sizes = [len(weights[n]) for n in some]
            for name, latent, scales in zip(some, q.latent.split(sizes), q.scales.split(sizes), strict=True):
                self.put_(name, snap(latent, scales, NAMED[grid]))
                self.latents.masters[name], self.latents.scales[name] = paging.copied(latent), paging.copied(scales)
                self.latents.grids[name] = NAMED[grid]


@contextmanager
def _read(module: nn.Module) -> Iterator[list[Tensor]]:
    """What the module reads while the body runs."""
    found: list[Tensor] = []
    with removed_after([module.register_forward_pre_hook(lambda _, args: found.append(args[0]))]):
        yield found


@contextmanager
def _ended_before(module: nn.Module, name: str) -> Iterator[None]:
    """The module says what its last matrix reads while the body runs: what that would make of it is not computed."""
    last = getattr(module, name)
    setattr(module, name, nn.Identity())
    try:
        yield
    finally:
        setattr(module, name, last)
