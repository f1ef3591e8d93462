"""Writing a model as GGUF that stock llama.cpp loads, and knowing its size before it is written."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sartor import paging
from sartor.errors import SourceError
from sartor.model.families import LINEARS, NORMS, REPAIRS, Family, family_of
from sartor.model.network import Anatomy, anatomy
from sartor.numerics.grids import GRIDS, encode, tensor_bytes
from sartor.stages.masters import Latents

ALIGNMENT = 32
LONGEST = 8192  # tokens of context


def is_uniform(a: Anatomy) -> bool:
    return len(set(a.groups)) == 1 and len(set(a.ffn)) == 1 and a.groups[0] > 0 and a.ffn[0] > 0


def architecture(family: Family, a: Anatomy) -> str:
    """The llama.cpp architecture that can express these sizes."""
    if is_uniform(a):
        return family.gguf
    if family.gguf_flexible is None:
        raise SourceError(f"llama.cpp cannot express unequal layers of '{family.model_type}'")
    for n in range(a.layers):
        if (
            a.groups[n] and not a.ffn[n]
        ):  # measured: deci leaves out such a layer's attention, too, and crashes where it is the last
            raise SourceError(f"layer {n} has attention without FFN, which llama.cpp cannot express")
    return family.gguf_flexible


def _header(config: Any, a: Anatomy, tokenizer: Any, name: str) -> Any:
    """A gguf writer that holds all metadata and no tensor yet."""
    import gguf

    family = family_of(config.model_type)
    writer = gguf.GGUFWriter(path=None, arch=architecture(family, a))
    writer.add_name(name)
    writer.add_block_count(a.layers)
    writer.add_context_length(context_length(config))
    writer.add_embedding_length(a.width)
    uniform = is_uniform(a)
    writer.add_feed_forward_length(a.ffn[0] if uniform else list(a.ffn))
    heads = [g * a.queries_per_group for g in a.groups]
    writer.add_head_count(heads[0] if uniform else heads)
    writer.add_head_count_kv(a.groups[0] if uniform else list(a.groups))
    writer.add_key_length(a.head_dim)
    writer.add_value_length(a.head_dim)
    writer.add_rope_dimension_count(a.head_dim)
    writer.add_rope_freq_base(rope_base(config))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(a.vocab)
    _add_tokenizer(writer, tokenizer, a.vocab)
    return writer


def context_length(config: Any) -> int:
    """Tokens that a file is made for."""
    return min(int(config.max_position_embeddings), LONGEST)


def rope_base(config: Any) -> float:
    """The base of the rotary positions' frequencies; SourceError where they are scaled."""
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type", "default") != "default":
        raise SourceError(
            f"the model scales its rotary positions ({rope['rope_type']}): Sartor exports plain ones so far"
        )
    return float(rope.get("rope_theta", getattr(config, "rope_theta", 10000.0)))


def _add_tokenizer(writer: Any, tokenizer: Any, vocab: int) -> None:
    spec = json.loads(tokenizer.backend_tokenizer.to_str())
    words = {i: t for t, i in spec["model"]["vocab"].items()}
    kinds = dict.fromkeys(words, 1)
    for token in spec["added_tokens"]:
        words[token["id"]] = token["content"]
        kinds[token["id"]] = 3 if token["special"] else 4
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre_tokenizer(spec))
    writer.add_token_list([words.get(i, f"[PAD{i}]") for i in range(vocab)])
    writer.add_token_types([kinds.get(i, 5) for i in range(vocab)])
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in spec["model"]["merges"]])
    if tokenizer.bos_token_id is not None:
        writer.add_bos_token_id(tokenizer.bos_token_id)
    if tokenizer.eos_token_id is not None:
        writer.add_eos_token_id(tokenizer.eos_token_id)
    if tokenizer.pad_token_id is not None:
        writer.add_pad_token_id(tokenizer.pad_token_id)
    first = tokenizer("a").input_ids[:1]
    writer.add_add_bos_token(first == [tokenizer.bos_token_id])
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)


def pre_tokenizer(spec: Mapping[str, Any]) -> str:
    """llama.cpp's name of the way text is cut before merging."""
    pre = json.dumps(spec.get("pre_tokenizer"))
    if spec["model"]["type"] != "BPE" or "ByteLevel" not in pre:
        raise SourceError("the tokenizer is not byte-level BPE: Sartor exports only that kind so far")
    digits, split = '"Digits"' in pre, '"Split"' in pre
    if digits and split:
        raise SourceError("the tokenizer sets digits apart and splits by rules of its own: Sartor does not know it")
    if "p{Lu}" in pre:
        return "gpt-4o" if "{1,3}" in pre else "tekken"
    if "{1,3}" in pre:
        return "llama-bpe"
    return "smollm" if digits else "qwen2" if split else "gpt-2"


def header_bytes(config: Any, a: Anatomy, tokenizer: Any, name: str) -> int:
    """Exact bytes before the first tensor, metadata and tensor table together."""
    writer = _header(config, a, tokenizer, name)
    for tensor, shape, dtype in _tensor_table(config, a):
        writer.add_tensor_info(tensor, list(shape), np.dtype(dtype), int(np.prod(shape)))
    with tempfile.TemporaryDirectory() as folder:
        writer.write_header_to_file(Path(folder) / "x.gguf")
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        writer.close()
        return _aligned((Path(folder) / "x.gguf").stat().st_size)


def _aligned(n: int) -> int:
    return (n + ALIGNMENT - 1) // ALIGNMENT * ALIGNMENT


def file_bytes(header: int, a: Anatomy, config: Any, grids: Mapping[str, str]) -> int:
    """Bytes of the whole file with the given grids, exact."""
    family = family_of(config.model_type)
    total = header
    for name, shape in parameter_shapes(a, family).items():
        if len(shape) == 1:
            total += _aligned(4 * shape[0])
        else:
            total += _aligned(tensor_bytes(grids.get(name, "F16"), (shape[0], shape[1])))
    return total


def parameter_shapes(a: Anatomy, family: Family) -> dict[str, tuple[int, ...]]:
    """transformers parameter names and shapes, in the order of the file."""
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (a.vocab, a.width)}
    if not a.tied:
        shapes["lm_head.weight"] = (a.vocab, a.width)
    shapes["model.norm.weight"] = (a.width,)
    for layer in range(a.layers):
        prefix = f"model.layers.{layer}."
        linears = a.linear_shapes(layer)
        if a.groups[layer]:
            shapes[prefix + "input_layernorm.weight"] = (a.width,)
            for extra, _ in family.extras:
                of = extra.rsplit(".", 1)[0].replace("_norm", "_proj")
                shapes[prefix + extra] = (a.head_dim,) if "_norm" in extra else (linears[of][0],)
        if a.ffn[layer]:
            shapes[prefix + "post_attention_layernorm.weight"] = (a.width,)
        for name, shape in linears.items():
            shapes[prefix + name + ".weight"] = shape
    return shapes


def gguf_name(parameter: str, family: Family) -> str:
    if not parameter.startswith("model.layers."):
        return {
            "model.embed_tokens.weight": "token_embd.weight",
            "model.norm.weight": "output_norm.weight",
            "lm_head.weight": "output.weight",
        }[parameter]
    _, _, layer, rest = parameter.split(".", 3)
    extra = dict((*family.extras, *REPAIRS)).get(rest)
    if extra:
        return f"blk.{layer}.{extra}"
    inner = rest.removesuffix(".weight")
    return f"blk.{layer}.{(LINEARS | NORMS)[inner]}.weight"


def _tensor_table(config: Any, a: Anatomy) -> Iterator[tuple[str, tuple[int, ...], str]]:
    family = family_of(config.model_type)
    for name, shape in parameter_shapes(a, family).items():
        yield gguf_name(name, family), shape, "float32" if len(shape) == 1 else "float16"


def permute_rows(w: np.ndarray, head_dim: int) -> np.ndarray:
    """transformers' half-split rotary pairs to llama.cpp's interleaved ones (rows of q and k)."""
    return np.ascontiguousarray(w.reshape(-1, 2, head_dim // 2, *w.shape[1:]).swapaxes(1, 2).reshape(w.shape))


def write(
    path: Path,
    model: Any,
    tokenizer: Any,
    values: Mapping[str, Tensor],
    scales: Mapping[str, Tensor],
    grids: Mapping[str, str],
    name: str,
) -> int:
    """Write the file and return its bytes.

    Args:
        values: parameter name -> weights, latent or snapped; biases of REPAIRS may be among them. scales: of those on a grid. grids: grid of each; others F16/F32.
    """

    a, config = anatomy(model), model.config
    family = family_of(config.model_type)
    writer = _header(config, a, tokenizer, name)
    shapes = parameter_shapes(a, family)
    repairs = {n: tuple(v.shape) for n, v in values.items() if n.endswith(tuple(name for name, _ in REPAIRS))}
    for parameter, shape in (shapes | repairs).items():
        stored, dtype, raw = _stored(shape, grids.get(parameter))
        size = int(np.prod(stored)) * dtype.itemsize
        writer.add_tensor_info(gguf_name(parameter, family), stored, dtype, size, raw_dtype=raw)
    writer.write_header_to_file(path)
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for parameter, shape in (shapes | repairs).items():  # one tensor at a time is in memory
        tensor, grid = values[parameter].detach(), grids.get(parameter)
        if grid in GRIDS:
            data = encode(tensor.float(), scales[parameter], GRIDS[grid])
        else:
            data = tensor.to(torch.float32 if len(shape) == 1 else torch.float16).numpy()
        if family.permute_qk and parameter.endswith(("q_proj.weight", "k_proj.weight")):
            data = permute_rows(data, a.head_dim)
        writer.write_tensor_data(data)
        paging.let_go(tensor)
    writer.close()
    return path.stat().st_size


def _stored(shape: tuple[int, ...], grid: str | None) -> tuple[tuple[int, ...], np.dtype[Any], Any]:
    """(shape, dtype, GGML's type) of a tensor as numpy holds it in front of the file."""
    import gguf

    if grid in GRIDS:
        row = tensor_bytes(grid, (1, shape[1]))
        return (shape[0], row), np.dtype(np.uint8), gguf.GGMLQuantizationType[grid]
    return shape, np.dtype(np.float32 if len(shape) == 1 else np.float16), None


def write_latents(path: Path, model: Any, tokenizer: Any, latents: Latents, name: str) -> int:
    """`write` of a network whose weights are these."""
    grids = {n: g.name for n, g in latents.grids.items()}
    return write(path, model, tokenizer, latents.masters, latents.scales, grids, name)
