"""Second moments of what every linear layer reads, and how much the loss feels of it.

Sites: "attention" (read by q, k, v), "output" (read by o), "mlp" (read by gate and up), "down" (read by down).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from sartor import paging
from sartor.model.hooks import removed_after
from sartor.model.network import anatomy, embed, linears_of, through, tracked
from sartor.stages.medium import medium_of

SITE_OF: dict[str, str] = {
    "self_attn.q_proj": "attention",
    "self_attn.k_proj": "attention",
    "self_attn.v_proj": "attention",
    "self_attn.o_proj": "output",
    "mlp.gate_proj": "mlp",
    "mlp.up_proj": "mlp",
    "mlp.down_proj": "down",
}
READER = {
    "attention": "self_attn.q_proj",
    "output": "self_attn.o_proj",
    "mlp": "mlp.up_proj",
    "down": "mlp.down_proj",
}
MOST = 10.0  # times the mean weight that one token may have
HEAD_ROWS = 32  # of a text, that say what the head reads: 8,192 tokens for at most a few thousand numbers each
PASS = 2  # rows of a backward pass
Site = tuple[int, str]
HEAD: Site = (-1, "head")  # where the last hidden state is read, while collecting


@dataclass(frozen=True)
class Moments:
    """C = E[z z^T] per (layer, site) and of the last hidden state; `tied`: the embedding is the head too."""

    c: dict[Site, Tensor]
    head: Tensor
    tied: bool

    def of(self, parameter: str) -> Tensor:
        """C of what this matrix reads; a tied embedding is the head above all, an untied one is only looked up."""
        site = site_of(parameter)
        if site:
            return self.c[site]
        return self.head if self.tied or parameter == "lm_head.weight" else torch.eye(len(self.head))


def site_of(parameter: str) -> Site | None:
    """Where a linear of a layer reads; None for the embedding and the head."""
    if not parameter.startswith("model.layers."):
        return None
    _, _, layer, name = parameter.split(".", 3)
    return int(layer), SITE_OF[name.removesuffix(".weight")]


@torch.no_grad()
def second_moments(model: Any, rows: Tensor) -> Moments:
    """Run the rows through the model and collect every C, in fp32."""
    c: dict[Site, Tensor] = {}
    add = partial(_add_, c, 1 / rows.numel())
    for part in rows.split(8):
        with _listening(model, add):
            add(HEAD, through(model, embed(model, part)))
    return Moments(c, c.pop(HEAD), anatomy(model).tied)


@dataclass(frozen=True)
class Heard:
    """How much the loss feels of every token at every site, mean 1, (rows, length), none where nobody listened; head: E[h h^T] of the last hidden state."""

    tokens: dict[Site, Tensor]
    head: Tensor


def heard(
    model: Any,
    rows: Tensor,
    weight: Float[Tensor, " n"],
    tell: Callable[[float], None] = lambda share: None,
) -> Heard:
    """The norm of the loss's gradient at what the linears of a site say, token by token, at most MOST times the mean.

    After GuidedQuant (arXiv:2505.07004), whose weights are squared and apart for groups of outputs; here one weight a token
    and site, to the first power, and no heavier tails: they would leave few tokens to estimate C from.
    An error where nobody listens is free, so error feedback puts it there. C of the last hidden state stays plain.

    Args:
        weight: of each row in C of the last hidden state; they sum to 1.
    """
    generator = torch.Generator().manual_seed(0)
    norms: dict[Site, list[Tensor]] = {}
    head: dict[Site, Tensor] = {}
    for at in range(0, len(rows), PASS):
        part, felt = rows[at : at + PASS], dict[Site, Tensor]()
        with _feeling(model, felt):
            hidden = tracked(model, part)
            medium_of(model).listen(model, hidden, part, generator)
        for site, squared in felt.items():
            norms.setdefault(site, []).append(squared.sqrt())
        _add_(head, 1.0, HEAD, _weighed(hidden.detach(), weight[at : at + PASS]))
        tell(min(1.0, (at + PASS) / len(rows)))
    return Heard({site: _tamed(torch.cat(found)) for site, found in norms.items()}, head[HEAD])


@torch.no_grad()
def unheard(model: Any, rows: Tensor, weight: Float[Tensor, " n"]) -> Heard:
    """The last hidden state of at most HEAD_ROWS rows, and every token like all others: no backward pass, a sixth of the time."""
    few, head = weight[:HEAD_ROWS] * (len(rows) / min(len(rows), HEAD_ROWS)), dict[Site, Tensor]()
    for part, each in zip(rows[:HEAD_ROWS].split(8), few.split(8), strict=True):
        _add_(head, 1.0, HEAD, _weighed(through(model, embed(model, part)), each))
    return Heard({}, head[HEAD])


def _weighed(hidden: Float[Tensor, "b t w"], weight: Float[Tensor, " b"]) -> Float[Tensor, "b t w"]:
    """Times the root of each row's share for one position."""
    return hidden * (weight[:, None, None] / hidden.shape[1]).sqrt().to(hidden.dtype)


def _tamed(norm: Float[Tensor, "n t"]) -> Float[Tensor, "n t"]:
    weight = (norm / norm.mean().clamp_min(1e-30)).clamp_max(MOST)
    return weight / weight.mean().clamp_min(1e-30)


Hear = Callable[[Site, Tensor], None]


@contextmanager
def _listening(model: Any, hear: Hear) -> Iterator[None]:
    """`hear` is told what is read at every site."""
    handles = []
    for layer, name, module in linears_of(model):
        if READER[SITE_OF[name]] == name:
            told = lambda _, args, key=(layer, SITE_OF[name]): hear(key, args[0])  # noqa: E731
            handles.append(module.register_forward_pre_hook(told))
    with removed_after(handles):
        yield


@contextmanager
def _feeling(model: Any, felt: dict[Site, Tensor]) -> Iterator[None]:
    """Squared norms of the gradients at the outputs of every site's linears, by token, once backward has run."""

    def watch(key: Site) -> Callable[[Any, Any, Tensor], None]:
        def add(gradient: Tensor) -> None:
            squared = gradient.float().square().sum(-1)
            felt[key] = felt[key] + squared if key in felt else squared

        def hooked(_: Any, args: Any, out: Tensor) -> None:
            if out.requires_grad:  # not where a layer will run once more on the way back
                out.register_hook(add)

        return hooked

    handles = [module.register_forward_hook(watch((layer, SITE_OF[name]))) for layer, name, module in linears_of(model)]
    with removed_after(handles):
        yield


def _add_(c: dict[Site, Tensor], scale: float, site: Site, z: Float[Tensor, "b t n"]) -> None:
    z = z.flatten(0, 1)
    gram = (z.T @ z).float().mul_(scale)
    if site in c:
        c[site] += gram
        paging.let_go(c[site])
    else:
        c[site] = paging.kept(gram)
