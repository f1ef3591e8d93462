"""Writing a language model as ONNX with a cache of keys and values, for ONNX Runtime.

    input_ids -> [embedding] -> [attention -> mlp] x layers -> [norm -> head] -> logits

Inputs and outputs are named as onnxruntime-genai and transformers.js name them: input_ids, attention_mask, past_key_values.N.key and .value; logits, present.N.key and .value. N counts the layers
that have an attention left, and each has as many key/value heads as it kept. The weights are those of the GGUF file, exactly (`onnx_grids.py`); a tied head and the embedding are stored once.
At accuracy 4, MatMulNBits rounds what a matrix reads to 8 bits, 32 numbers a scale, as llama.cpp does.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from sartor.errors import SourceError
from sartor.export.gguf_file import context_length, rope_base
from sartor.export.onnx_grids import HELD, rows_of
from sartor.export.onnx_grids import product as grid_product
from sartor.export.onnx_parts import CONTRIB, FLOAT, HALF, INT8, INT32, INT64, UINT8, UINT16, framed, node, save, store
from sartor.model.network import Anatomy, anatomy, layers_of
from sartor.numerics.grids import indices
from sartor.stages.masters import Latents

MODEL, CONFIG = "model.onnx", "genai_config.json"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
STORED = {
    "uint16": UINT16,
    "float32": FLOAT,
    "float16": HALF,
    "int64": INT64,
    "int32": INT32,
    "int8": INT8,
    "uint8": UINT8,
}
FULL, ROUNDED = 1, 4  # MatMulNBits' accuracy_level: what a matrix reads stays fp32, or is rounded to 8 bits


@dataclass
class Draft:
    """A file in the making: its nodes and stored arrays, and what they are made of."""

    model: Any
    latents: Latents
    accuracy: int
    nodes: list[Any] = field(default_factory=list)
    arrays: dict[str, np.ndarray] = field(default_factory=dict)
    ends: dict[str, list[str]] = field(default_factory=dict)  # of what is stored for a matrix on a grid

    def add(self, op: str, inputs: list[str], output: str, domain: str = "", **attributes: Any) -> str:
        """One node of one output, whose name comes back."""
        self.nodes.append(node(op, inputs, [output], domain, **attributes))
        return output

    def vector(self, name: str) -> str:
        """A norm or a bias, stored in fp32."""
        self.arrays[name] = self.latents.masters[name].detach().float().numpy()
        return name

    def matrix(self, name: str) -> None:
        """Store a matrix (out, in) as its grid is held, one without a grid in fp16, as in the GGUF file; once."""
        if name in self.ends:
            return
        latent, grid = self.latents.masters[name].detach(), self.latents.grids.get(name)
        if grid is None:
            stored = {"half": latent.half().numpy()}
        else:
            scales = self.latents.scales[name]
            levels = indices(latent.float(), scales, grid).numpy().reshape(len(latent), -1, 32)
            stored = HELD[grid.name].pack(levels, scales.numpy())
        self.ends[name] = list(stored)
        self.arrays |= {f"{name}.{end}": array for end, array in stored.items()}

    def product(self, name: str, x: str, y: str, bias: str = "") -> str:
        """x times the matrix `name`, plus the vector `bias` where there is one."""
        self.matrix(name)
        grid, (o, i) = self.latents.grids.get(name), self.latents.masters[name].shape
        added = self.vector(bias) if bias in self.latents.masters else ""
        if grid is not None:
            nodes, tables = grid_product(grid.name, name, x, y, (o, i), added, self.accuracy)
            self.nodes, self.arrays = self.nodes + nodes, self.arrays | tables
            return y
        whole = self.add("Cast", [f"{name}.half"], f"{name}.whole", to=FLOAT)
        turned = self.add("Transpose", [whole], f"{name}.turned", perm=[1, 0])
        found = self.add("MatMul", [x, turned], f"{y}.product" if added else y)
        return self.add("Add", [found, added], y) if added else found

    def norm(self, name: str, x: str, y: str) -> str:
        """x over the root of its mean square, times the vector `name`."""
        eps = float(self.model.config.rms_norm_eps)
        return self.add("SimplifiedLayerNormalization", [x, self.vector(name)], y, axis=-1, epsilon=eps)


def _frame(a: Anatomy) -> Any:
    cached = [g for g in a.groups if g]
    batch, past, total = "batch_size", "past_sequence_length", "total_sequence_length"

    def pairs(prefix: str, length: str) -> dict[str, tuple[int, list[Any]]]:
        ends = [(f"{prefix}.{n}.{end}", g) for n, g in enumerate(cached) for end in ("key", "value")]
        return {name: (FLOAT, [batch, g, length, a.head_dim]) for name, g in ends}

    inputs: dict[str, tuple[int, list[Any]]] = {"input_ids": (INT64, [batch, "sequence_length"])}
    inputs |= {"attention_mask": (INT64, [batch, total])} if cached else {}
    outputs: dict[str, tuple[int, list[Any]]] = {"logits": (FLOAT, [batch, "sequence_length", a.vocab])}
    return framed(inputs | pairs("past_key_values", past), outputs | pairs("present", total))


def _embedding(d: Draft, a: Anatomy) -> str:
    d.matrix(EMBEDDING)
    d.arrays |= {"shape.flat": np.array([-1]), "width": np.array([a.width])}
    ids = d.add("Reshape", ["input_ids", "shape.flat"], "ids")
    grid = d.latents.grids.get(EMBEDDING)
    if grid is None:
        half = d.add("Gather", [f"{EMBEDDING}.half", ids], "embedding.half", axis=0)
        d.add("Cast", [half], "embedding", to=FLOAT)
    else:
        nodes, tables = rows_of(grid.name, EMBEDDING, d.ends[EMBEDDING], ids, "embedding")
        d.nodes, d.arrays = d.nodes + nodes, d.arrays | tables
    shape = d.add("Concat", [d.add("Shape", ["input_ids"], "asked"), "width"], "stream", axis=0)
    return d.add("Reshape", ["embedding", shape], "embedded")


def _positions(d: Draft) -> None:
    """The lengths that attention asks for, and its rotary tables: constants, that the runtime computes when it loads the file."""
    rope_base(d.model.config)  # refuses what changes with the length of the text
    rotary: Any = d.model.model.rotary_emb
    d.arrays |= {
        "one": np.array(1),
        "axis.one": np.array([1]),
        "position.first": np.array(0, np.float32),
        "position.step": np.array(1, np.float32),
        "position.end": np.array(context_length(d.model.config), np.float32),
        "rotary": rotary.inv_freq.detach().float().numpy()[None],
    }
    attended = d.add("ReduceSum", ["attention_mask", "axis.one"], "attended", keepdims=0)
    last = d.add("Sub", [attended, "one"], "last")
    d.add("Cast", [last], "lengths", to=INT32)
    total = d.add("Gather", [d.add("Shape", ["attention_mask"], "mask.shape"), "one"], "total")
    d.add("Cast", [total], "length", to=INT32)
    places = d.add("Range", ["position.first", "position.end", "position.step"], "places")
    column = d.add("Unsqueeze", [places, "axis.one"], "column")
    angles = d.add("Mul", [column, "rotary"], "angles")
    d.add("Cos", [angles], "cosines")
    d.add("Sin", [angles], "sines")


def window_of(config: Any, layer: int) -> int | None:
    """Tokens that a token of this layer looks back on, itself counted, or None for all."""
    kinds = getattr(config, "layer_types", None)
    found: int | None = getattr(config, "sliding_window", None)
    return found if kinds is None or kinds[layer] == "sliding_attention" else None


def _attention(d: Draft, a: Anatomy, layer: int, cached: int, x: str) -> str:
    """What the attention of a layer adds to the stream; `cached` counts the attentions before it."""
    name, at = f"model.layers.{layer}.self_attn", f"{layer}.attention"
    groups, heads = a.groups[layer], a.groups[layer] * a.queries_per_group
    normed = d.norm(f"model.layers.{layer}.input_layernorm.weight", x, f"{at}.normed")
    read = {}
    for letter, count in (("q", heads), ("k", groups), ("v", groups)):
        read[letter] = d.product(f"{name}.{letter}_proj.weight", normed, f"{at}.{letter}", f"{name}.{letter}_proj.bias")
        if f"{name}.{letter}_norm.weight" in d.latents.masters:
            d.arrays |= {
                f"shape.heads.{count}": np.array([0, 0, count, a.head_dim]),
                "shape.flat3": np.array([0, 0, -1]),
            }
            split = d.add("Reshape", [read[letter], f"shape.heads.{count}"], f"{at}.{letter}.heads")
            one = d.norm(f"{name}.{letter}_norm.weight", split, f"{at}.{letter}.normed")
            read[letter] = d.add("Reshape", [one, "shape.flat3"], f"{at}.{letter}.flat")
    past, present = ([f"{side}.{cached}.{end}" for end in ("key", "value")] for side in ("past_key_values", "present"))
    sizes = {"num_heads": heads, "kv_num_heads": groups, "do_rotary": 1, "rotary_interleaved": 0}
    window = window_of(d.model.config, layer)
    sizes |= {} if window is None else {"local_window_size": window}
    inputs = [*read.values(), *past, "lengths", "length", "cosines", "sines"]
    d.nodes.append(node("GroupQueryAttention", inputs, [f"{at}.read", *present], CONTRIB, **sizes))
    return d.product(f"{name}.o_proj.weight", f"{at}.read", f"{at}.adds")


def _mlp(d: Draft, layer: int, x: str) -> str:
    """What the MLP of a layer adds to the stream."""
    name, at = f"model.layers.{layer}.mlp", f"{layer}.mlp"
    normed = d.norm(f"model.layers.{layer}.post_attention_layernorm.weight", x, f"{at}.normed")
    gate = d.product(f"{name}.gate_proj.weight", normed, f"{at}.gate")
    silu = d.add("QuickGelu", [gate], f"{at}.silu", CONTRIB, alpha=1.0)
    up = d.product(f"{name}.up_proj.weight", normed, f"{at}.up")
    return d.product(f"{name}.down_proj.weight", d.add("Mul", [silu, up], f"{at}.read"), f"{at}.adds")


def build(model: Any, latents: Latents, accuracy: int = ROUNDED) -> Any:
    """The onnx.ModelProto of a fitted network.

    Args:
        latents: its weights, and the grids that they are held on. accuracy: of the products, FULL or ROUNDED.
    Raises:
        MissingExtra: onnx is not installed. SourceError: an activation or a rotary scaling that is not known here.
    """
    if model.config.hidden_act != "silu":
        raise SourceError(f"the model's activation is {model.config.hidden_act}: Sartor writes silu to ONNX so far")
    a, d = anatomy(model), Draft(model, latents, accuracy)
    x, cached = _embedding(d, a), 0
    if any(a.groups):
        _positions(d)
    for layer in range(len(layers_of(model))):
        if a.groups[layer]:
            x = d.add("Add", [x, _attention(d, a, layer, cached, x)], f"{layer}.attention.stream")
            cached += 1
        if a.ffn[layer]:
            x = d.add("Add", [x, _mlp(d, layer, x)], f"{layer}.mlp.stream")
    d.product(EMBEDDING if a.tied else HEAD, d.norm("model.norm.weight", x, "normed"), "logits")
    file = _frame(a)
    file.graph.node.extend(d.nodes)
    for name, array in d.arrays.items():
        store(file, name, array, (STORED[str(array.dtype)], array.shape))
    return file


def write(folder: Path, model: Any, tokenizer: Any, latents: Latents, accuracy: int = ROUNDED) -> Path:
    """Write the file, its tokenizer and what onnxruntime-genai needs to know into an empty folder; returns the file.

    Raises:
        as `build`, and OutputError: it is larger than one ONNX file can be.
    """
    file = folder / MODEL
    save(file, build(model, latents, accuracy))
    tokenizer.save_pretrained(folder)
    (folder / CONFIG).write_text(json.dumps(_genai(model, tokenizer), indent=1))
    return file


def _genai(model: Any, tokenizer: Any) -> dict[str, Any]:
    """onnxruntime-genai's configuration. It has room for one number of heads: the first attention's. Where others have fewer or more, genai goes by the shapes in the file (0.18.0: tried)."""
    a, config = anatomy(model), model.config
    groups = next((g for g in a.groups if g), 0)
    length = context_length(config)
    sides = {"past": "past_key_values.%d.", "present": "present.%d."}
    names = {f"{side}_{end}_names": prefix + end for side, prefix in sides.items() for end in ("key", "value")}
    decoder = {
        "session_options": {"provider_options": []},
        "filename": MODEL,
        "head_size": a.head_dim,
        "hidden_size": a.width,
        "num_attention_heads": groups * a.queries_per_group,
        "num_hidden_layers": sum(g > 0 for g in a.groups),
        "num_key_value_heads": groups,
        "inputs": {
            "input_ids": "input_ids",
            "attention_mask": "attention_mask",
            **{k: v for k, v in names.items() if k.startswith("past")},
        },
        "outputs": {"logits": "logits", **{k: v for k, v in names.items() if k.startswith("present")}},
    }
    ends = tokenizer.eos_token_id
    pad = tokenizer.pad_token_id
    return {
        "model": {
            "type": config.model_type,
            "vocab_size": a.vocab,
            "context_length": length,
            "bos_token_id": tokenizer.bos_token_id if tokenizer.bos_token_id is not None else ends,
            "eos_token_id": ends,
            "pad_token_id": pad if pad is not None else ends,
            "decoder": decoder,
        },
        "search": {"do_sample": False, "max_length": length, "past_present_share_buffer": True},
    }
