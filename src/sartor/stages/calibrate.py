"""Second moments of what every linear layer reads, on own and on generic text.

Sites: "attention" (read by q, k, v), "output" (read by o), "mlp" (read by gate and up), "down" (read by down).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sartor.model.network import anatomy, has_attention, has_mlp, linear
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


@dataclass(frozen=True)
class Moments:
    """C = E[z z^T] per (layer, site) and of the last hidden state, over `tokens` tokens."""

    c: dict[Site, Tensor]
    head: Tensor
    tokens: int

    def of(self, parameter: str) -> Tensor:
        """C of what this matrix reads; a tied embedding is the head above all."""
        site = site_of(parameter)
        return self.c[site] if site else self.head


def site_of(parameter: str) -> Site | None:
    """Where a linear of a layer reads; None for the embedding and the head."""
    if not parameter.startswith("model.layers."):
        return None
    _, _, layer, name = parameter.split(".", 3)
    return int(layer), SITE_OF[name.removesuffix(".weight")]


@torch.no_grad()
def second_moments(
    model: Any, rows: Int[Tensor, "n t"], batch: int = 8, tell: Callable[[float], None] = lambda share: None
) -> Moments:
    """Run the rows through the model and collect every C, in fp32."""
    c: dict[Site, Tensor] = {}
    head: list[Tensor] = []
    with _listening(model, lambda site, z: _add_(c, site, z)):
        for n, part in enumerate(rows.split(batch)):
            hidden = hidden_of(model, part).flatten(0, 1)
            head.append((hidden.T @ hidden).float())
            tell((n + 1) * batch / len(rows))
    tokens = rows.numel()
    return Moments({k: v / tokens for k, v in c.items()}, torch.stack(head).sum(0) / tokens, tokens)


def guided_moments(
    model: Any, rows: Int[Tensor, "n t"], batch: int = 4, tell: Callable[[float], None] = lambda share: None
) -> Moments:
    """C with every token weighed by how much the loss feels what its linears say: the norm of the gradient at their outputs.

    After GuidedQuant (arXiv:2505.07004), whose weights are squared and apart for groups of outputs; here one weight a token
    and site, to the first power, at most MOST times the mean: heavier tails would leave few tokens to estimate C from.
    An error where nobody listens is free, so error feedback puts it there. C of the last hidden state stays plain.
    """
    c: dict[Site, Tensor] = {}
    weights: dict[Site, float] = {}
    head: list[Tensor] = []
    for n, part in enumerate(rows.split(batch)):
        z: dict[Site, Tensor] = {}
        felt: dict[Site, Tensor] = {}
        with _listening(model, z.__setitem__), _feeling(model, felt):
            inputs = model.model.embed_tokens(part).detach().requires_grad_(True)
            hidden = hidden_of(model, part, inputs)
            loss_of(model, hidden, part).backward()
        for site, squared in felt.items():
            norm = squared.sqrt().flatten()
            weight = (norm / norm.mean().clamp_min(1e-30)).clamp_max(MOST)
            _add_(c, site, z[site].detach() * weight.sqrt().reshape(*part.shape, 1).to(z[site].dtype))
            weights[site] = weights.get(site, 0.0) + float(weight.sum())
        plain = hidden.detach().flatten(0, 1)
        head.append((plain.T @ plain).float())
        tell((n + 1) * batch / len(rows))
    tokens = rows.numel()
    return Moments({k: v / weights[k] for k, v in c.items()}, torch.stack(head).sum(0) / tokens, tokens)


@contextmanager
def _listening(model: Any, hear: Callable[[Site, Tensor], None]) -> Iterator[None]:
    """`hear` is told what is read at every site."""
    handles = []
    for layer in range(anatomy(model).layers):
        for site, name in READER.items():
            if has_attention(model, layer) if name.startswith("self_attn") else has_mlp(model, layer):
                told = lambda _, args, key=(layer, site): hear(key, args[0])  # noqa: E731
                handles.append(linear(model, layer, name).register_forward_pre_hook(told))
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

    handles = []
    for layer in range(anatomy(model).layers):
        for name, site in SITE_OF.items():
            module = linear(model, layer, name)
            if module is not None:
                handles.append(module.register_forward_hook(watch((layer, site))))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _add_(c: dict[Site, Tensor], site: Site, z: Float[Tensor, "b t n"]) -> None:
    z = z.flatten(0, 1)
    gram = (z.T @ z).float()
    if site in c:
        c[site] += gram
    else:
        c[site] = gram


def mix(user: Moments, generic: Moments, rho: float) -> Moments:
    """(1 - rho) C_user + rho C_generic: with few tokens a mixture beats own text alone, and it guards the rest.

    Takes the generic moments apart as it goes, so that never three sets are in memory.
    """
    blend: Callable[[Float[Tensor, "n n"], Float[Tensor, "n n"]], Tensor] = lambda a, b: (1 - rho) * a + rho * b  # noqa: E731
    return Moments(
        {k: blend(user.c.pop(k), generic.c.pop(k)) for k in list(user.c)},
        blend(user.head, generic.head),
        user.tokens + generic.tokens,
    )
