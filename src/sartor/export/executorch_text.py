"""Language models as ExecuTorch programs (.pte), computed by XNNPACK.

Every matrix has eight bits and a scale a row: of an artifact that holds it in four, that loses little. The embedding's table has, too, and is stored beside the head, as XNNPACK keeps a form of its own of what
it multiplies by. (Four bits in groups: uneven levels, as IQ4_NL's, lose much on XNNPACK's even ones, and a file of uneven layers was not loaded, 1.5.1.)
The file's methods get_max_context_len, get_eos_ids and so on tell ExecuTorch's own runners of language models what CONFIG tells ours.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram

from sartor.errors import SartorError
from sartor.export import executorch as et
from sartor.export import lowering
from sartor.export.decoder import Decoder
from sartor.export.gguf_file import context_length
from sartor.model.network import anatomy, clone
from sartor.numerics.eight import held
from sartor.stages.masters import Latents

NAME, NEEDS, INSTALL = et.NAME, et.NEEDS, et.INSTALL
CONFIG = "executorch.json"
CONTEXT = 1024  # tokens that the buffers of keys and values have room for, at most
CHUNK = 128  # tokens of one call, at most
FILE = "model.pte"


def prepare(program: ExportedProgram, folder: Path) -> tuple[ExportedProgram, dict[str, Any]]:
    return program, json.loads((folder / lowering.FACTS).read_text())


def _lower(prepared: tuple[ExportedProgram, dict[str, Any]], path: Path) -> None:
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import EdgeCompileConfig, ExecutorchBackendConfig, to_edge_transform_and_lower
    from executorch.exir.backend.compile_spec_schema import CompileSpec
    from executorch.exir.backend.partitioner import DelegationSpec

    program, facts = prepared
    # its check would compute products of lengths with the example's length, and make that the only one; orders of dimensions need a pass of their own to go
    config = EdgeCompileConfig(_check_ir_validity=False, _skip_dim_order=True)
    xnnpack = XnnpackPartitioner()
    # with any such key XNNPACK 1.5.1 makes one of its seventeen passes over a program whose lengths are symbols: the same outputs in half of the time
    xnnpack.delegation_spec = DelegationSpec(
        xnnpack.delegation_spec.backend_id, [CompileSpec("dqlinear_partitioner", b"")]
    )
    lowered = {"partitioner": [xnnpack], "constant_methods": facts, "compile_config": config}
    edge = to_edge_transform_and_lower(program, **lowered)
    in_place = ExecutorchBackendConfig(run_reinplace_pass=True)  # else all keys and values are copied for every token
    path.write_bytes(edge.to_executorch(in_place).buffer)


WEIGHTS = {"int8": _lower}


def program(decoder: Decoder) -> ExportedProgram:
    """For 1 to CHUNK tokens at a time."""
    most = min(CHUNK, decoder.context)
    example = torch.zeros(1, most // 2, dtype=torch.long), torch.zeros(1, dtype=torch.long)
    shapes = {1: torch.export.Dim("n", min=1, max=most)}, None
    return lowering.nameless(torch.export.export(decoder.eval(), example, dynamic_shapes=shapes, strict=False))


def write(folder: Path, model: Any, tokenizer: Any, latents: Latents, context: int = CONTEXT) -> Path:
    """Write the file, its tokenizer and CONFIG into a folder; returns the file.

    Args:
        context: tokens that the file has room for, at most; the model's own length where that is shorter.
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
    file = folder / FILE

    def make(_: Any) -> ExportedProgram:
        return program(Decoder(model, latents, context))

    made = lowering.lower_program("executorch_text", {"int8": file}, make, facts)["int8"]
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


def dequantized(model: Any) -> Any:
    """A copy of a network, with the artifact's weights, whose matrices are those that the file stands for."""
    new = clone(model)
    for p in new.parameters():
        if p.ndim > 1:
            p.data = held(p.data)
    return new
