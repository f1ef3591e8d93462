"""Language models as ExecuTorch programs (.pte), computed by XNNPACK.

int8: every matrix has a scale a row. int4: matrices that the artifact holds in four bits or fewer have a scale for 32 weights, the others a scale a row. Those on Q4_0 are the artifact's but for the scales,
which XNNPACK holds in bf16; all others are rounded again. The embedding's table has a scale a row and is stored beside the head, as XNNPACK keeps a form of its own of what it multiplies by.
The file's methods get_max_context_len, get_eos_ids and so on tell ExecuTorch's own runners of language models what CONFIG tells ours.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from sartor.errors import SartorError
from sartor.export import lowering
from sartor.export.decoder import GROUP, Decoder, Held
from sartor.export.gguf_file import context_length
from sartor.export.onnx_text import EMBEDDING, HEAD
from sartor.model.network import anatomy, clone
from sartor.numerics.eight import rounded
from sartor.numerics.grids import GRIDS, indices, search_scales
from sartor.stages.masters import Latents

NAME, NEEDS, INSTALL = "ExecuTorch", ("executorch", "torchao"), "pip install executorch==1.5.1 torchao==0.18.0"
CONFIG = "executorch.json"
CONTEXT = 1024  # tokens that the buffers of keys and values have room for, at most
CHUNK = 128  # tokens of one call, at most
FILES = {"int8": "model.pte", "int4": "model-int4.pte"}
FOUR = GRIDS["Q4_0"]


def eight(latents: Latents, name: str) -> Held:
    """A matrix in eight bits, a scale a row."""
    return rounded(latents.value(name))


def four(latents: Latents, name: str) -> Held:
    """A matrix in four bits where the artifact has it in as few, else in eight."""
    grid = latents.grids.get(name)
    if grid is None or len(grid.levels) > len(FOUR.levels):
        return eight(latents, name)
    w = latents.value(name).detach().float()
    own = latents.scales[name] if grid is FOUR else search_scales(w, None, FOUR)
    scales = own.reshape(len(w), -1).bfloat16().float()
    levels = indices(w, scales.view(own.shape), FOUR).view(w.shape) + FOUR.levels[0]
    return levels.to(torch.int8), scales


HOLD: dict[str, Callable[[Latents, str], Held]] = {"int8": eight, "int4": four}


def prepare(program: ExportedProgram, folder: Path) -> tuple[ExportedProgram, dict[str, Any]]:
    return program, json.loads((folder / lowering.FACTS).read_text())


def _lower(prepared: tuple[ExportedProgram, dict[str, Any]], path: Path) -> None:
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import EdgeCompileConfig, ExecutorchBackendConfig, to_edge_transform_and_lower

    program, facts = prepared
    # its check would compute products of lengths with the example's length, and make that the only one
    lax = EdgeCompileConfig(_check_ir_validity=False)
    lowered = {"partitioner": [XnnpackPartitioner()], "constant_methods": facts, "compile_config": lax}
    edge = to_edge_transform_and_lower(program, **lowered)
    in_place = ExecutorchBackendConfig(run_reinplace_pass=True)  # else all keys and values are copied for every token
    path.write_bytes(edge.to_executorch(in_place).buffer)


WEIGHTS = dict.fromkeys(FILES, _lower)


def program(decoder: Decoder) -> ExportedProgram:
    """For 1 to CHUNK tokens at a time."""
    most = min(CHUNK, decoder.context)
    example = torch.zeros(1, most // 2, dtype=torch.long), torch.zeros(1, dtype=torch.long)
    shapes = {1: torch.export.Dim("n", min=1, max=most)}, None
    return lowering.nameless(torch.export.export(decoder.eval(), example, dynamic_shapes=shapes, strict=False))


def write(folder: Path, model: Any, tokenizer: Any, latents: Latents, weights: str, context: int = CONTEXT) -> Path:
    """Write the file, its tokenizer and CONFIG into a folder; returns the file.

    Args:
        weights: one of FILES. context: tokens that the file has room for, at most; the model's own length where that is shorter.
    Raises:
        MissingExtra: ExecuTorch is not installed. SourceError: as `Decoder`. SartorError: it cannot be lowered.
    """
    context = min(context, context_length(model.config))
    ends = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else (ends or [0])[0]
    facts = {
        "get_max_seq_len": context,
        "get_max_context_len": context,
        "get_vocab_size": anatomy(model).vocab,
        "get_bos_id": first,
        "get_eos_ids": ends,
        "use_kv_cache": True,
        "enable_dynamic_shape": True,
    }
    file = folder / FILES[weights]

    def make(_: Any) -> ExportedProgram:
        return program(Decoder(model, latents, HOLD[weights], eight, context))

    made = lowering.lower_program("executorch_text", {weights: file}, make, facts)[weights]
    if "failed" in made:
        raise SartorError(f"ExecuTorch failed to lower the network: {made['failed']}")
    tokenizer.save_pretrained(folder)
    told = {
        "context_length": context,
        "most_tokens": min(CHUNK, context),
        "vocab_size": anatomy(model).vocab,
        "bos_token_id": first,
        "eos_token_ids": ends,
    }
    (folder / CONFIG).write_text(json.dumps(told, indent=1))
    return file


def _value(held: Held) -> Tensor:
    levels, scales = held
    each = scales[:, None] if scales.ndim == 1 else scales.repeat_interleave(GROUP, 1)
    return levels.float() * each


def dequantized(model: Any, latents: Latents, weights: str) -> Any:
    """A copy whose weights are those that the file stands for; a tied head is apart from the embedding, as there."""
    new, tied = clone(model), anatomy(model).tied
    new.lm_head.weight = nn.Parameter(new.lm_head.weight.data.clone(), requires_grad=False)
    for name, p in new.named_parameters():
        if p.ndim > 1:
            own = EMBEDDING if name == HEAD and tied else name
            p.data = _value(eight(latents, own) if name == EMBEDDING else HOLD[weights](latents, own))
    return new
