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
from sartor.stages.likelihood import hidden_of

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


@dataclass(frozen=True)
class Moments:
    """C = E[z z^T] per (layer, site) and of the last hidden state, over `tokens` tokens."""

    c: dict[tuple[int, str], Tensor]
    head: Tensor
    tokens: int


@torch.no_grad()
def second_moments(
    model: Any, rows: Int[Tensor, "n t"], batch: int = 8, tell: Callable[[float], None] = lambda share: None
) -> Moments:
    """Run the rows through the model and collect every C, in fp32."""
    c: dict[tuple[int, str], Tensor] = {}
    head: list[Tensor] = []
    with _listening(model, c):
        for n, part in enumerate(rows.split(batch)):
            hidden = hidden_of(model, part).flatten(0, 1)
            head.append((hidden.T @ hidden).float())
            tell((n + 1) * batch / len(rows))
    tokens = rows.numel()
    return Moments({k: v / tokens for k, v in c.items()}, torch.stack(head).sum(0) / tokens, tokens)


@contextmanager
def _listening(model: Any, c: dict[tuple[int, str], Tensor]) -> Iterator[None]:
    handles = []
    for layer in range(anatomy(model).layers):
        for site, name in READER.items():
            if has_attention(model, layer) if name.startswith("self_attn") else has_mlp(model, layer):
                handles.append(linear(model, layer, name).register_forward_pre_hook(_collect(c, (layer, site))))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _collect(c: dict[tuple[int, str], Tensor], key: tuple[int, str]) -> Any:
    def hook(_: Any, args: tuple[Tensor, ...]) -> None:
        z = args[0].flatten(0, 1)
        gram = (z.T @ z).float()
        if key in c:
            c[key] += gram
        else:
            c[key] = gram

    return hook


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
