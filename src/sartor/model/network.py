"""How a transformer is put together, taken apart and made smaller.

A language model is transformers' own, a vision transformer ours (`vision.py`); Sartor only exchanges their linear layers for smaller ones. Grouped queries stay
whole: a *query group* is one key/value head with the query heads that read it, in a vision transformer one head. Attention without groups and MLPs without
channels are exchanged for `NoAttention` and `NoMlp`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from sartor import paging
from sartor.errors import SartorError, SourceError
from sartor.model.attention import register
from sartor.model.families import ATTENTION, LINEARS, family_of
from sartor.model.hooks import removed_after
from sartor.model.tokenizers import load_tokenizer
from sartor.model.vision import Vision
from sartor.tensors import files_of, read_tensors

GATE = "mlp.gate_proj"
BLOCK = 32  # FFN channels that are kept or removed together: one quantization block of the matrix that reads them


@dataclass(frozen=True)
class Anatomy:
    """The sizes of a model, layer by layer (counts of query groups and FFN channels).

    vocab: tokens, or classes of pictures. gated: the MLP multiplies what it reads by what a third matrix makes of it. keys: dimensions of every head's queries and keys, 0 where they have as many as its values.
    """

    family: str
    vocab: int
    width: int
    head_dim: int
    queries_per_group: int
    groups: tuple[int, ...]
    ffn: tuple[int, ...]
    tied: bool
    gated: bool = True
    keys: int = 0

    @property
    def layers(self) -> int:
        return len(self.groups)

    @property
    def key_dim(self) -> int:
        return self.keys or self.head_dim

    def linear_shapes(self, layer: int) -> dict[str, tuple[int, int]]:
        """(out, in) of every linear of the layer that exists."""
        g, f, w, d, r = self.groups[layer], self.ffn[layer], self.width, self.head_dim, self.queries_per_group
        k = self.key_dim
        shapes: dict[str, tuple[int, int]] = {}
        if g:
            shapes |= {
                "self_attn.q_proj": (g * r * k, w),
                "self_attn.k_proj": (g * k, w),
                "self_attn.v_proj": (g * d, w),
                "self_attn.o_proj": (w, g * r * d),
            }
        if f:
            shapes |= {"mlp.gate_proj": (f, w)} if self.gated else {}
            shapes |= {"mlp.up_proj": (f, w), "mlp.down_proj": (w, f)}
        return shapes

    def unit_parameters(self) -> tuple[int, int]:
        """Of a block of FFN channels, and of a query group."""
        dims = self.head_dim + self.key_dim
        return (2 + self.gated) * BLOCK * self.width, self.width * dims * (self.queries_per_group + 1)

    def parameters(self) -> int:
        linear = sum(o * i for n in range(self.layers) for o, i in self.linear_shapes(n).values())
        norms = self.width * (2 * self.layers + 1)
        return linear + norms + self.vocab * self.width * (1 if self.tied else 2)


class NoAttention(nn.Module):
    """An attention without heads: adds nothing to the residual stream."""

    def forward(self, hidden_states: Tensor, **_: Any) -> tuple[Tensor, None]:
        return torch.zeros_like(hidden_states), None


class NoMlp(nn.Module):
    """An MLP without channels."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x)


def layers_of(model: Any) -> Sequence[Any]:
    found: Sequence[Any] = model.model.layers
    return found


def linear(model: nn.Module, layer: int, name: str) -> nn.Linear:
    return layers_of(model)[layer].get_submodule(name)


def parameter(layer: int, name: str, kind: str = "weight") -> str:
    """The name that a linear's weight (or bias) has among the network's parameters."""
    return f"model.layers.{layer}.{name}.{kind}"


def linears_of(model: nn.Module) -> Iterator[tuple[int, str, nn.Linear]]:
    """(layer, name, module) of every linear that is there: layers may have lost their attention or MLP."""
    for layer in range(len(layers_of(model))):
        for name in (n for n in LINEARS if n != GATE or not isinstance(model, Vision)):
            if has_attention(model, layer) if name in ATTENTION else has_mlp(model, layer):
                yield layer, name, linear(model, layer, name)


def embed(model: Any, rows: Tensor) -> Float[Tensor, "n t w"]:
    """What the first layer reads of rows of tokens, or of pictures."""
    embedded: Tensor = model.embed(rows) if isinstance(model, Vision) else model.model.embed_tokens(rows)
    return embedded


def through(model: Any, embedded: Float[Tensor, "n t w"]) -> Float[Tensor, "n t w"]:
    """What the head reads, from what the first layer does."""
    if isinstance(model, Vision):
        return model.model(embedded)
    hidden: Tensor = model.model(inputs_embeds=embedded, use_cache=False).last_hidden_state
    return hidden


def tracked(model: Any, rows: Tensor) -> Float[Tensor, "n t w"]:
    """The same from the rows, in a graph that begins at the first layer: what happens inside has gradients, though no parameter wants any."""
    return through(model, embed(model, rows).detach().requires_grad_(True))


def has_attention(model: nn.Module, layer: int) -> bool:
    return not isinstance(layers_of(model)[layer].self_attn, NoAttention)


def has_mlp(model: nn.Module, layer: int) -> bool:
    return not isinstance(layers_of(model)[layer].mlp, NoMlp)


def anatomy(model: nn.Module) -> Anatomy:
    config: Any = model.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    groups, ffn = [], []
    for i in range(len(layers_of(model))):
        groups.append(linear(model, i, "self_attn.v_proj").out_features // head_dim if has_attention(model, i) else 0)
        ffn.append(linear(model, i, "mlp.up_proj").out_features if has_mlp(model, i) else 0)
    if isinstance(model, Vision):
        sizes = tuple(groups), tuple(ffn)
        told = config.family, config.classes, config.hidden_size, head_dim, 1
        return Anatomy(*told, *sizes, tied=False, gated=False, keys=config.keys)
    family_of(config.model_type)
    return Anatomy(
        config.model_type,
        model.model.embed_tokens.num_embeddings,  # type: ignore[union-attr,arg-type]
        config.hidden_size,
        head_dim,
        config.num_attention_heads // config.num_key_value_heads,
        tuple(groups),
        tuple(ffn),
        bool(config.tie_word_embeddings),
    )


def refuse_incomplete(model: Any, told: Any) -> None:
    """Raises SourceError where weights were missing, that transformers makes up at random; told: its loading info."""
    missing = {n for n in told["missing_keys"] if not (model.config.tie_word_embeddings and n == "lm_head.weight")}
    if lacking := sorted(missing | {str(n) for n in told["mismatched_keys"]}):
        raise SourceError(
            f"{len(lacking)} weights are missing or of another size ({lacking[0]}): give all of the model's files"
        )


def _refuse_unknown(model: Any, tokenizer: Any) -> None:
    """Raises SourceError for what no stage or file here would keep."""
    config, family = model.config, family_of(model.config.model_type)
    for name, size in (("width", config.hidden_size), ("FFN", config.intermediate_size)):
        if size % BLOCK:
            raise SourceError(f"the model's {name} has {size} channels: Sartor needs a multiple of {BLOCK}")
    known = {extra for extra, _ in family.extras}
    biases = {
        n.split(".", 3)[3] for n, _ in model.named_parameters() if n.startswith("model.layers.") and n.endswith(".bias")
    }
    if other := sorted(biases - known):
        raise SourceError(
            f"the model's layers have biases ({other[0]}), which Sartor does not know in a {family.model_type}"
        )
    if getattr(config, "hidden_act", "silu") != "silu":
        raise SourceError(f"the model's FFN has {config.hidden_act} between its matrices: Sartor knows silu so far")
    if len(tokenizer) > config.vocab_size:
        raise SourceError(
            f"the tokenizer has {len(tokenizer)} tokens and the model {config.vocab_size}: they do not belong together"
        )


def load_dense(folder: Path) -> tuple[Any, Any]:
    """(model in fp32, tokenizer) from a transformers folder; safetensors only, no remote code. Within `paging` its weights lie on disk."""
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        family_of(config.model_type)
        tokenizer = load_tokenizer(folder)
        loaded: Any = (
            _in_pages(folder, config)
            if paging.on()
            else AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=torch.float32,
                use_safetensors=True,
                trust_remote_code=False,
                attn_implementation=register(),
                output_loading_info=True,
            )
        )
        model, told = loaded
        refuse_incomplete(model, told)
    except SartorError:
        raise
    except Exception as error:
        raise SourceError(
            f"the model in '{folder.name}' cannot be opened ({type(error).__name__}: {str(error)[:160]})"
        ) from error
    _refuse_unknown(model, tokenizer)
    model.eval().requires_grad_(False)  # whoever trains asks for gradients
    paging.layer_by_layer_(model.model.layers)
    return model, tokenizer


def _in_pages(folder: Path, config: Any) -> tuple[Any, dict[str, set[str]]]:
    """What `from_pretrained` says, with no more than one tensor in memory at a time."""
    from transformers import AutoModelForCausalLM

    if getattr(config, "quantization_config", None):
        raise SourceError(
            "the model's weights are quantized by a method of their own, which Sartor does not unpack through the disk: give them as fp16 or bf16, or allow more --memory"
        )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, attn_implementation=register())
    shapes = {n: p.shape for n, p in model.named_parameters(remove_duplicate=False)}
    state = {n: paging.copied(t, torch.float32) for n, t in read_tensors(*files_of(folder)) if n in shapes}
    other = {n for n, t in state.items() if t.shape != shapes[n]}
    model.load_state_dict({n: t for n, t in state.items() if n not in other}, strict=False, assign=True)
    model.tie_weights()
    rebuild_rotary_(model)
    return model, {"missing_keys": shapes.keys() - state.keys(), "mismatched_keys": other}


def clone(model: Any, dtype: torch.dtype | None = None) -> Any:
    """A copy that shares nothing with `model`."""
    return _with(model, lambda p: paging.copied(p, dtype if p.is_floating_point() else None), dtype)


def sharing(model: Any, dtype: torch.dtype | None = None) -> Any:
    """Another network that has the very weights of `model`, where they are of that dtype: parts and weights can be exchanged in it, but none may be written to."""
    return _with(model, lambda p: p if dtype in (None, p.dtype) else paging.copied(p, dtype), dtype)


def _with(model: Any, weights: Callable[[Tensor], Tensor], dtype: torch.dtype | None) -> Any:
    made = {id(p): nn.Parameter(weights(p.data), requires_grad=p.requires_grad) for p in model.parameters()}
    new = copy.deepcopy(model, made)
    return new.to(dtype) if dtype else new


def converted_(model: Any, dtype: torch.dtype) -> Any:
    """The model in another dtype, in place."""
    for p in model.parameters():
        if p.dtype != dtype:
            p.data = paging.copied(p.data, dtype)
    return model.to(dtype)


def _sliced(old: nn.Linear, rows: Tensor | None, columns: Tensor | None) -> nn.Linear:
    weight: Tensor = old.weight.data
    bias: Tensor | None = old.bias
    if rows is not None:
        weight, bias = weight[rows], None if bias is None else bias.data[rows]
    if columns is not None:
        weight = weight[:, columns]
    new = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    new.weight = nn.Parameter(paging.copied(weight), requires_grad=False)
    if bias is not None:
        new.bias = nn.Parameter(bias.clone(), requires_grad=False)
    return new


def query_rows(groups: Sequence[int], a: Anatomy) -> tuple[Tensor, Tensor]:
    """(columns of o_proj, rows of v_proj) that belong to the given query groups; where queries and keys are as wide as values also rows of q_proj and of k_proj."""
    size = a.queries_per_group * a.head_dim
    q = [torch.arange(g * size, (g + 1) * size) for g in groups]
    k = [torch.arange(g * a.head_dim, (g + 1) * a.head_dim) for g in groups]
    return torch.cat(q), torch.cat(k)


def shrink_attention_(model: Any, layer: int, groups: Sequence[int]) -> None:
    """Keep only these query groups of the layer, in place."""
    block = layers_of(model)[layer]
    if not groups:
        block.self_attn = NoAttention()
        return
    a = anatomy(model)
    o, v = query_rows(groups, a)
    q, k = query_rows(groups, replace(a, head_dim=a.key_dim))
    attention = block.self_attn
    attention.q_proj, attention.o_proj = _sliced(attention.q_proj, q, None), _sliced(attention.o_proj, None, o)
    attention.k_proj, attention.v_proj = _sliced(attention.k_proj, k, None), _sliced(attention.v_proj, v, None)


def shrink_mlp_(model: Any, layer: int, channels: Tensor) -> None:
    """Keep only these FFN channels of the layer, in place."""
    block = layers_of(model)[layer]
    if not len(channels):
        block.mlp = NoMlp()
        return
    mlp = block.mlp
    for name in ("gate_proj", "up_proj"):
        if hasattr(mlp, name):
            setattr(mlp, name, _sliced(getattr(mlp, name), channels, None))
    mlp.down_proj = _sliced(mlp.down_proj, None, channels)


def shrink_vocabulary_(model: Any, ids: Tensor, special: dict[str, Any]) -> None:
    """Keep only these rows of the embedding (and of an untied head), in place; `special` are the new special ids."""
    rows = paging.kept(model.model.embed_tokens.weight.data[ids])
    embedding = nn.Embedding(len(ids), rows.shape[1], device="meta")
    embedding.weight = nn.Parameter(rows, requires_grad=False)
    head = None if model.config.tie_word_embeddings else _sliced(model.lm_head, ids, None)
    model.model.embed_tokens = embedding
    if head is None:
        head = nn.Linear(rows.shape[1], len(ids), bias=False, device="meta")
        head.weight = embedding.weight
    model.lm_head = head
    model.config.vocab_size = len(ids)
    model.model.vocab_size = model.vocab_size = len(ids)
    model.model.padding_idx = None
    for name, value in special.items():
        for config in (model.config, model.generation_config):
            setattr(config, name, value)


def rebuild_rotary_(model: Any) -> None:
    """Rotary tables are computed, not stored; on the meta device they were never filled."""
    rotary = model.model.rotary_emb
    model.model.rotary_emb = type(rotary)(config=model.config)


@contextmanager
def masked(
    model: Any, groups: dict[int, Bool[Tensor, " g"]], channels: dict[int, Bool[Tensor, " f"]]
) -> Iterator[None]:
    """The model with only the kept (True) query groups and FFN channels of the named layers; undone on the way out.

    Args:
        groups: {layer: keep-mask over its query groups}. channels: {layer: keep-mask over its FFN channels}.
    """
    a = anatomy(model)
    handles = []
    for layer, keep in groups.items():
        wide = keep.repeat_interleave(a.queries_per_group * a.head_dim)
        handles.append(linear(model, layer, "self_attn.o_proj").register_forward_pre_hook(_gate(wide)))
    for layer, keep in channels.items():
        handles.append(linear(model, layer, "mlp.down_proj").register_forward_pre_hook(_gate(keep)))
    with removed_after(handles):
        yield


def _gate(keep: Tensor) -> Any:
    def hook(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (args[0] * keep.to(args[0].dtype), *args[1:])

    return hook


def empty_like(config: Any, groups: Sequence[int], ffn: Sequence[int]) -> Any:
    """A network of the given sizes on the meta device, ready for `load_state_dict(assign=True)`."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    a = anatomy(model)
    for i in range(a.layers):
        if groups[i] != a.groups[i]:
            shrink_attention_(model, i, list(range(groups[i])))
        if ffn[i] != a.ffn[i]:
            shrink_mlp_(model, i, torch.arange(ffn[i]))
    return model
