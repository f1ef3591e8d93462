"""Prefix caching: a network run again from any layer on, over what its earlier layers said once."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from sartor import paging
from sartor.model.hooks import removed_after
from sartor.model.network import embed, layers_of, through


class Tail:
    """A network and the hidden states of one set of rows in front of every layer.

    A probe that touches nothing before layer n costs only the layers from n on. Hooks and exchanged weights that are in place
    when it runs are obeyed.

    Attributes:
        states: what each layer reads, in the network's own precision: layers * rows * length * width numbers. dense: what the head reads.
    """

    @torch.no_grad()
    def __init__(self, model: Any, rows: Tensor) -> None:
        self.model = model
        self.states, self._arguments, self.dense = _noted(model, rows)

    @torch.no_grad()
    def hidden_from(self, layer: int) -> Float[Tensor, "n t w"]:
        """What the head reads, with everything before `layer` as it was."""
        state = self.states[layer]
        for module, arguments in zip(layers_of(self.model)[layer:], self._arguments[layer:], strict=True):
            state = module(state, **arguments)
        hidden: Tensor = self.model.model.norm(state)
        return hidden


def arguments_of(model: Any, rows: Tensor) -> list[dict[str, Any]]:
    """What transformers hands to every layer beside the hidden states, for rows like these: mask, rotary tables, ..."""
    return _noted(model, rows)[1]


@torch.no_grad()
def _noted(model: Any, rows: Tensor) -> tuple[list[Tensor], list[dict[str, Any]], Tensor]:
    states: list[Tensor] = []
    arguments: list[dict[str, Any]] = []

    def note(_: Any, args: tuple[Tensor, ...], named: dict[str, Any]) -> None:
        states.append(paging.kept(args[0]))
        arguments.append(named)

    handles = [layer.register_forward_pre_hook(note, with_kwargs=True) for layer in layers_of(model)]
    with removed_after(handles):
        hidden = through(model, embed(model, rows))
    return states, arguments, hidden
