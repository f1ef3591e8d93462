"""A fitted language model as one module that keeps its keys and values: what phones' runtimes lower.

    ids (1, n), start (1,) -> [embedding] -> [attention -> mlp] x layers -> [norm -> head] -> logits (1, n, vocab)

Every layer has the key/value heads and the channels that it kept. Keys and values of all positions lie in buffers of a fixed length, and a mask says which of them a token sees, so that only n changes
from call to call. Matrices are whole numbers of eight bits with a scale a row; what they read is rounded to eight bits as the file runs.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.ao.quantization.fx._decomposed  # makes torch.ops.quantized_decomposed known
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from sartor.errors import SourceError
from sartor.export.gguf_file import rope_base
from sartor.export.onnx_text import EMBEDDING, HEAD, window_of
from sartor.model.network import anatomy, layers_of
from sartor.numerics.eight import rounded
from sartor.stages.masters import Latents

UNSEEN = -1e30  # added to what a token must not see: exp() of it is 0
WIDE = 4.0  # root mean squares
UNEVEN = 1.02  # ends as far apart from zero would put it between two steps, and every runtime would choose another one
rounding: Any = torch.ops.quantized_decomposed


def lookup(table: Tensor, at: Tensor) -> Tensor:
    """Rows of a table."""
    return functional.embedding(at, table)


def read_in_eight(x: Float[Tensor, "2 n i"]) -> Float[Tensor, "2 n i"]:
    """What is left of x in eight bits, a scale and a zero point a row."""
    scale, zero = rounding.choose_qparams_per_token_asymmetric(x, torch.int8)
    whole = rounding.quantize_per_token(x, scale, zero, -128, 127, torch.int8)
    return rounding.dequantize_per_token(whole, scale, zero, -128, 127, torch.int8, torch.float32)


class Spread(nn.Module):
    """A token's numbers as two rows that are rounded apart and whose products are added: those within WIDE of their size, and what single ones have beyond.

    One number a hundred times as large as the others would take the others' steps (SmolLM2: 0.20 nats a token with one row, 0.07 with two).
    """

    share: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("share", torch.full((1, width), 1 / width))

    def forward(self, x: Float[Tensor, "1 n i"]) -> Float[Tensor, "2 n i"]:
        most = torch.sqrt(functional.linear(x * x, self.share)) * WIDE
        within = torch.minimum(torch.maximum(x, -most), most * UNEVEN)
        return torch.cat([within, x - within])


class Matrix(nn.Module):
    """x times a matrix held in whole numbers, plus its bias where it has one."""

    levels: Tensor
    scales: Tensor
    zeros: Tensor
    bias: Tensor | None
    both: Tensor

    def __init__(self, weight: Float[Tensor, "o i"], bias: Tensor | None) -> None:
        super().__init__()
        levels, scales = rounded(weight)
        self.register_buffer("levels", levels)
        self.register_buffer("scales", scales)
        self.register_buffer("zeros", torch.zeros_like(scales, dtype=torch.int32))
        self.register_buffer("bias", bias)
        self.register_buffer("both", torch.ones(1, 2))

    def weight(self) -> Tensor:
        return rounding.dequantize_per_channel(self.levels, self.scales, self.zeros, 0, -127, 127, torch.int8)

    def forward(self, x: Float[Tensor, "2 n i"]) -> Float[Tensor, "1 n o"]:
        rows = functional.linear(read_in_eight(x), self.weight())
        added = functional.linear(rows.permute(1, 2, 0), self.both).permute(2, 0, 1)  # XNNPACK takes no sum of the two
        return added if self.bias is None else added + self.bias


class Norm(nn.Module):
    """x over the root of its mean square, times a vector."""

    scale: Tensor
    share: Tensor

    def __init__(self, scale: Tensor, eps: float) -> None:
        super().__init__()
        self.register_buffer("scale", scale)
        self.register_buffer("share", torch.full((1, len(scale)), 1 / len(scale)))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        mean = functional.linear(x * x, self.share)  # XNNPACK takes a product where it takes no mean
        return x * torch.rsqrt(mean + self.eps) * self.scale


class Parts:
    """What modules are made of, by the names of the weights."""

    def __init__(self, model: Any, latents: Latents) -> None:
        self.latents, self.eps = latents, float(model.config.rms_norm_eps)

    def vector(self, name: str) -> Tensor | None:
        found = self.latents.masters.get(name)
        return None if found is None else found.detach().float()

    def matrix(self, name: str) -> Matrix:
        return Matrix(self.latents.value(name), self.vector(name.removesuffix("weight") + "bias"))

    def norm(self, name: str) -> Norm:
        return Norm(self.latents.masters[name].detach().float(), self.eps)

    def head_norm(self, name: str) -> Norm | None:
        """Of queries or keys, in families that have one."""
        return self.norm(name) if name in self.latents.masters else None


def half_turn(size: int) -> Float[Tensor, "d d"]:
    """The matrix that makes (-second half, first half) of a head: XNNPACK multiplies by it where it cannot cut a head in two."""
    one, none = torch.eye(size // 2), torch.zeros(size // 2, size // 2)
    return torch.cat([torch.cat([none, -one], 1), torch.cat([one, none], 1)])


class Attention(nn.Module):
    """What the attention of a layer adds to the stream."""

    half_turn: Tensor
    keys: Tensor
    values: Tensor

    def __init__(self, parts: Parts, layer: int, groups: int, heads: int, size: int, context: int) -> None:
        super().__init__()
        name = f"model.layers.{layer}.self_attn"
        self.norm = parts.norm(f"model.layers.{layer}.input_layernorm.weight")
        self.q, self.k, self.v, self.o = (parts.matrix(f"{name}.{letter}_proj.weight") for letter in "qkvo")
        self.q_norm, self.k_norm = (parts.head_norm(f"{name}.{letter}_norm.weight") for letter in "qk")
        self.groups, self.heads, self.size = groups, heads, size
        self.read, self.adds = Spread(len(self.norm.scale)), Spread(heads * size)
        self.register_buffer("half_turn", half_turn(size))
        self.register_buffer("keys", torch.zeros(groups, size, context))
        self.register_buffer("values", torch.zeros(groups, context, size))

    def split(self, x: Tensor, heads: int, norm: Norm | None) -> Float[Tensor, "n h d"]:
        split = x.view(-1, heads, self.size)
        return split if norm is None else norm(split)

    def turned(self, x: Tensor, cosines: Float[Tensor, "n 1 d"], sines: Float[Tensor, "n 1 d"]) -> Tensor:
        """Heads (n, h, d) at their rotary positions."""
        return x * cosines + functional.linear(x, self.half_turn) * sines

    def forward(self, x: Tensor, at: Tensor, mask: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
        n, g, each = x.shape[1], self.groups, self.heads // self.groups
        normed = self.read(self.norm(x))
        q = self.turned(self.split(self.q(normed), self.heads, self.q_norm), cosines, sines) * self.size**-0.5
        k = self.turned(self.split(self.k(normed), g, self.k_norm), cosines, sines)
        v = self.split(self.v(normed), g, None)
        self.keys.index_copy_(2, at, k.permute(1, 2, 0))
        self.values.index_copy_(1, at, v.permute(1, 0, 2))
        asked = q.view(n, g, each, self.size).permute(1, 2, 0, 3).contiguous().view(g, -1, self.size)
        scores = torch.bmm(asked, self.keys).view(g, each, n, -1) + mask
        read = torch.bmm(torch.softmax(scores, -1).view(g, -1, self.keys.shape[2]), self.values).view(
            g, each, n, self.size
        )
        return self.o(self.adds(read.permute(2, 0, 1, 3).contiguous().view(1, n, self.heads * self.size)))


class Mlp(nn.Module):
    """What the MLP of a layer adds to the stream."""

    def __init__(self, parts: Parts, layer: int) -> None:
        super().__init__()
        name = f"model.layers.{layer}.mlp"
        self.norm = parts.norm(f"model.layers.{layer}.post_attention_layernorm.weight")
        self.gate, self.up, self.down = (parts.matrix(f"{name}.{n}_proj.weight") for n in ("gate", "up", "down"))
        self.read, self.adds = (Spread(m.levels.shape[1]) for m in (self.gate, self.down))

    def forward(self, x: Tensor) -> Tensor:
        normed = self.read(self.norm(x))
        return self.down(self.adds(functional.silu(self.gate(normed)) * self.up(normed)))


class Decoder(nn.Module):
    """The whole network; see above."""

    table: Tensor
    table_scales: Tensor
    cosines: Tensor
    sines: Tensor
    places: Tensor

    def __init__(self, model: Any, latents: Latents, context: int) -> None:
        """Args: context: tokens that there is room for.

        Raises:
            SourceError: an activation or a rotary scaling that is not known here.
        """
        super().__init__()
        if model.config.hidden_act != "silu":
            raise SourceError(
                f"the model's activation is {model.config.hidden_act}: Sartor writes silu to ExecuTorch so far"
            )
        rope_base(model.config)  # refuses what changes with the length of the text
        a, parts, self.context = anatomy(model), Parts(model, latents), context
        levels, scales = rounded(latents.value(EMBEDDING))
        self.register_buffer("table", levels)
        self.register_buffer("table_scales", scales[:, None])
        angles = torch.arange(context)[:, None] * model.model.rotary_emb.inv_freq.detach().float()
        self.register_buffer("cosines", angles.cos().repeat(1, 2))
        self.register_buffer("sines", angles.sin().repeat(1, 2))
        self.register_buffer("places", torch.arange(context))
        self.attentions, self.mlps, self.windows = nn.ModuleDict(), nn.ModuleDict(), dict[int, int | None]()
        for layer in range(len(layers_of(model))):
            if g := a.groups[layer]:
                self.windows[layer] = window_of(model.config, layer)
                heads = g * a.queries_per_group
                self.attentions[str(layer)] = Attention(parts, layer, g, heads, a.head_dim, context)
            if a.ffn[layer]:
                self.mlps[str(layer)] = Mlp(parts, layer)
        self.layers, self.norm = a.layers, parts.norm("model.norm.weight")
        self.read, self.head = Spread(a.width), parts.matrix(EMBEDDING if a.tied else HEAD)

    def mask(self, at: Int[Tensor, " n"], window: int | None) -> Float[Tensor, "n c"]:
        """0 where a token sees a place, UNSEEN elsewhere."""
        back = at[:, None] - self.places
        seen = back >= 0 if window is None else (back >= 0) & (back < window)
        return torch.where(seen, 0.0, UNSEEN)

    def forward(self, ids: Int[Tensor, "1 n"], start: Int[Tensor, " 1"]) -> Float[Tensor, "1 n v"]:
        at = self.places[: ids.shape[1]] + start
        x = lookup(self.table, ids).float() * lookup(self.table_scales, ids)
        cosines, sines = (lookup(table, at)[:, None] for table in (self.cosines, self.sines))
        masks = {w: self.mask(at, w) for w in dict.fromkeys(self.windows.values())}
        for layer in range(self.layers):
            if (name := str(layer)) in self.attentions:
                x = x + self.attentions[name](x, at, masks[self.windows[layer]], cosines, sines)
            if name in self.mlps:
                x = x + self.mlps[name](x)
        return self.head(self.read(self.norm(x)))
