"""Second moments of what every linear layer reads, on own and on generic text.

Sites: "attention" (read by q, k, v), "output" (read by o), "mlp" (read by gate and up), "down" (read by down).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sartor.model.network import anatomy, linears_of
from sartor.stages.likelihood import hidden_of, loss_of

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
    "mlp": "mlp.gate_proj",
    "down": "mlp.down_proj",
}
MOST = 10.0  # times the mean weight that one token may have
Site = tuple[int, str]
HEAD: Site = (-1, "head")  # where the last hidden state is read, while collecting


@dataclass(frozen=True)
class Moments:
    """C = E[z z^T] per (layer, site) and of the last hidden state, over `tokens` tokens; `tied`: the embedding is the head too."""

    c: dict[Site, Tensor]
    head: Tensor
    tokens: int
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


def second_moments(
    model: Any,
    rows: Int[Tensor, "n t"],
    other: Int[Tensor, "m t"] | None = None,
    rho: float = 0.0,
    tell: Callable[[float], None] = lambda share: None,
) -> Moments:
    """Run the rows through the model and collect every C, in fp32: (1 - rho) C(rows) + rho C(other).

    With few tokens of one's own a mixture with generic text beats own text alone, and it guards the rest.
    """
    return _collected(model, rows, other, rho, 8, _plain, tell)


def guided_moments(
    model: Any,
    rows: Int[Tensor, "n t"],
    other: Int[Tensor, "m t"] | None = None,
    rho: float = 0.0,
    tell: Callable[[float], None] = lambda share: None,
) -> Moments:
    """The same with every token weighed by how much the loss feels what its linears say: the gradient's norm at their outputs.

    After GuidedQuant (arXiv:2505.07004), whose weights are squared and apart for groups of outputs; here one weight a token
    and site, to the first power, at most MOST times the mean: heavier tails would leave few tokens to estimate C from.
    An error where nobody listens is free, so error feedback puts it there. C of the last hidden state stays plain.
    """
    return _collected(model, rows, other, rho, 2, _guided, tell)


Hear = Callable[[Site, Tensor], None]


def _collected(
    model: Any,
    rows: Tensor,
    other: Tensor | None,
    rho: float,
    batch: int,
    run: Callable[[Any, Tensor, Hear], Tensor],
    tell: Callable[[float], None],
) -> Moments:
    """One set of matrices for both texts: they are the largest thing in memory beside the model."""
    texts = [(rows, 1.0)] if other is None else [(rows, 1 - rho), (other, rho)]
    c: dict[Site, Tensor] = {}
    done, all_rows = 0, sum(len(text) for text, _ in texts)
    for text, share in texts:
        add = partial(_add_, c, share / text.numel())
        for part in text.split(batch):
            add(HEAD, run(model, part, add))
            done += len(part)
            tell(done / all_rows)
    return Moments(c, c.pop(HEAD), sum(text.numel() for text, _ in texts), anatomy(model).tied)


@torch.no_grad()
def _plain(model: Any, part: Tensor, hear: Hear) -> Tensor:
    with _listening(model, hear):
        return hidden_of(model, part)


def _guided(model: Any, part: Tensor, hear: Hear) -> Tensor:
    z: dict[Site, Tensor] = {}
    felt: dict[Site, Tensor] = {}
    with _listening(model, z.__setitem__), _feeling(model, felt):
        hidden = hidden_of(model, part, model.model.embed_tokens(part).detach().requires_grad_(True))
        loss_of(model, hidden, part).backward()
    for site, squared in felt.items():
        norm = squared.sqrt()
        weight = (norm / norm.mean().clamp_min(1e-30)).clamp_max(MOST)
        weight = (weight / weight.mean().clamp_min(1e-30)).sqrt()
        hear(site, z.pop(site).detach() * weight[..., None].to(hidden.dtype))
    return hidden.detach()


@contextmanager
def _listening(model: Any, hear: Hear) -> Iterator[None]:
    """`hear` is told what is read at every site."""
    handles = []
    for layer, name, module in linears_of(model):
        if READER[SITE_OF[name]] == name:
            told = lambda _, args, key=(layer, SITE_OF[name]): hear(key, args[0])  # noqa: E731
            handles.append(module.register_forward_pre_hook(told))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _feeling(model: Any, felt: dict[Site, Tensor]) -> Iterator[None]:
    """Squared norms of the gradients at the outputs of every site's linears, by token, once backward has run."""

    def watch(key: Site) -> Callable[[Any, Any, Tensor], None]:
        def add(gradient: Tensor) -> None:
            squared = gradient.float().square().sum(-1)
            felt[key] = felt[key] + squared if key in felt else squared

        return lambda _, args, out: out.register_hook(add) and None

    handles = [module.register_forward_hook(watch((layer, SITE_OF[name]))) for layer, name, module in linears_of(model)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _add_(c: dict[Site, Tensor], scale: float, site: Site, z: Float[Tensor, "b t n"]) -> None:
    z = z.flatten(0, 1)
    gram = (z.T @ z).float().mul_(scale)
    if site in c:
        c[site] += gram
    else:
        c[site] = gram
