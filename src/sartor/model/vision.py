"""One vision transformer for every family: what differs between them is folded into the weights when they are read (`checkpoints.py`).

Names and parts are those that the stages know from language models: `model.layers[n].self_attn.{q,k,v,o}_proj`, `.mlp.{up,down}_proj`, `.input_layernorm`,
`.post_attention_layernorm`, and `model.norm` in front of the head. So a head is a query group of one, and whatever probes, masks, cuts and fits one kind does the other.

    pixels -> patches + position, behind the prefix (class token, registers) -> [layer norm] -> layers -> layer norm -> pooled features -> head

Folded: layer scales into o_proj and down_proj; the patches' bias into the position table; the prefix tokens' positions into the prefix; the position table is resized to the
picture's size once.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

ACTIVATIONS: dict[str, Any] = {
    "gelu": nn.functional.gelu,
    "gelu_tanh": lambda x: nn.functional.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "relu": nn.functional.relu,
}
FEATURES = 2  # widths of the pooled features: the first prefix token beside the mean of all patches


@dataclass(frozen=True)
class VisionConfig:
    """What the weights do not say.

    Attributes:
        family: a row of `families.VISION`. size, patch: pixels of a side. prefix: tokens in front of the patches. activation: a row of ACTIVATIONS.
        first_norm: a layer norm in front of the first layer. mean, std: of the pixels, between 0 and 1. classes: rows of the head, 0 without. keys: dimensions of every head's queries and keys, 0 where they
        have as many as its values (`stages/narrow.py`).
    """

    family: str
    hidden_size: int
    num_attention_heads: int
    intermediate_size: int
    layers: int
    size: int
    patch: int
    prefix: int = 1
    activation: str = "gelu"
    eps: float = 1e-6
    first_norm: bool = False
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    classes: int = 0
    keys: int = 0

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def key_dim(self) -> int:
        return self.keys or self.head_dim

    @property
    def tokens(self) -> int:
        return self.prefix + (self.size // self.patch) ** 2

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1)

    @staticmethod
    def from_json(text: str) -> VisionConfig:
        raw: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in json.loads(text).items()}
        return VisionConfig(**raw)


class Attention(nn.Module):
    """Every head reads all tokens; its queries and keys may have fewer dimensions than its values."""

    def __init__(self, width: int, heads: int, head_dim: int, key_dim: int) -> None:
        super().__init__()
        self.head_dim, self.key_dim = head_dim, key_dim
        self.q_proj, self.k_proj = (nn.Linear(width, heads * key_dim) for _ in range(2))
        self.v_proj = nn.Linear(width, heads * head_dim)
        self.o_proj = nn.Linear(heads * head_dim, width)
        self.softmax = nn.Softmax(-1)  # a part of its own, so that what heads read can be looked at

    def forward(self, hidden_states: Float[Tensor, "n t w"]) -> tuple[Float[Tensor, "n t w"], None]:
        q, k, v = (
            p(hidden_states).unflatten(-1, (-1, size)).transpose(1, 2)
            for p, size in ((self.q_proj, self.key_dim), (self.k_proj, self.key_dim), (self.v_proj, self.head_dim))
        )
        # not torch's own function: for so few tokens its tiles cost twice the time on a CPU (docs/log.md)
        read = self.softmax((q * self.key_dim**-0.5) @ k.transpose(-1, -2)) @ v
        return self.o_proj(read.transpose(1, 2).flatten(2)), None


class Mlp(nn.Module):
    """Two layers and an activation between them."""

    def __init__(self, width: int, channels: int, activation: str) -> None:
        super().__init__()
        self.activation = activation
        self.up_proj, self.down_proj = nn.Linear(width, channels), nn.Linear(channels, width)

    def forward(self, x: Float[Tensor, "n t w"]) -> Float[Tensor, "n t w"]:
        return self.down_proj(ACTIVATIONS[self.activation](self.up_proj(x)))


class Layer(nn.Module):
    """Attention and MLP, each behind a norm, each added to the stream."""

    def __init__(self, c: VisionConfig) -> None:
        super().__init__()
        self.input_layernorm = nn.LayerNorm(c.hidden_size, c.eps)
        self.self_attn = Attention(c.hidden_size, c.num_attention_heads, c.head_dim, c.key_dim)
        self.post_attention_layernorm = nn.LayerNorm(c.hidden_size, c.eps)
        self.mlp = Mlp(c.hidden_size, c.intermediate_size, c.activation)

    def forward(self, x: Float[Tensor, "n t w"]) -> Float[Tensor, "n t w"]:
        x = x + self.self_attn(hidden_states=self.input_layernorm(x))[0]
        return x + self.mlp(self.post_attention_layernorm(x))


class Body(nn.Module):
    """From pixels to what the head reads."""

    def __init__(self, c: VisionConfig) -> None:
        super().__init__()
        w = c.hidden_size
        self.patches = nn.Conv2d(3, w, c.patch, c.patch, bias=False)
        self.prefix = nn.Parameter(torch.zeros(c.prefix, w))
        self.position = nn.Parameter(torch.zeros(c.tokens - c.prefix, w))
        self.first_norm = nn.LayerNorm(w, c.eps) if c.first_norm else nn.Identity()
        self.layers = nn.ModuleList(Layer(c) for _ in range(c.layers))
        self.norm = nn.LayerNorm(w, c.eps)

    def embed(self, pixels: Float[Tensor, "n 3 s s"]) -> Float[Tensor, "n t w"]:
        """What the first layer reads."""
        patches = self.patches(pixels).flatten(2).transpose(1, 2) + self.position
        return self.first_norm(torch.cat([self.prefix.expand(len(pixels), -1, -1), patches], 1))

    def forward(self, embedded: Float[Tensor, "n t w"]) -> Float[Tensor, "n t w"]:
        for layer in self.layers:
            embedded = layer(embedded)
        return self.norm(embedded)


class Vision(nn.Module):
    """A vision transformer, with a head where it has classes.

    block_scales: {parameter: scales of its blocks (out, blocks)} of matrices that lie on the grid of four bits (`numerics/four.py`); none before they are rounded.
    """

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Body(config)
        self.head = nn.Linear(FEATURES * config.hidden_size, config.classes) if config.classes else None
        self.block_scales: dict[str, Tensor] = {}
        self.fill_pixels_()

    @property
    def size(self) -> int:
        """Pixels of a side of the pictures."""
        return self.config.size

    @property
    def family(self) -> str:
        return self.config.family

    def fill_pixels_(self) -> None:
        """Normalization of pixels as one multiplication and addition; again by whoever made the network on the meta device."""
        mean, std = torch.tensor(self.config.mean, device="cpu"), torch.tensor(self.config.std, device="cpu")
        self.register_buffer("scale", (1 / (255 * std))[:, None, None], persistent=False)
        self.register_buffer("shift", (-mean / std)[:, None, None], persistent=False)

    def embed(self, pixels: UInt8[Tensor, "n 3 s s"]) -> Float[Tensor, "n t w"]:
        """What the first layer reads of pictures with pixels from 0 to 255."""
        scale: Any = self.scale
        return self.model.embed(pixels.to(scale.dtype) * scale + self.shift)

    def pool(self, hidden: Float[Tensor, "n t w"]) -> Float[Tensor, "n f"]:
        """Features: the class token beside the mean patch."""
        return torch.cat([hidden[:, 0], hidden[:, self.config.prefix :].mean(1)], -1)

    def features(self, pixels: UInt8[Tensor, "n 3 s s"]) -> Float[Tensor, "n f"]:
        return self.pool(self.model(self.embed(pixels)))

    def forward(self, pixels: UInt8[Tensor, "n 3 s s"]) -> Float[Tensor, "n c"]:
        """Logits of the classes, or features where there are none."""
        features = self.features(pixels)
        return features if self.head is None else self.head(features)


def cut_layers_(model: Vision, kept: Sequence[int]) -> None:
    """Keep only these layers, in place."""
    model.model.layers = nn.ModuleList(model.model.layers[n] for n in kept)
