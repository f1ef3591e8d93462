"""What a network looks like: one row a family.

A row names the parts that the stages cut and the architectures that llama.cpp knows them by. A new Llama-type family
is a new row. `gguf_flexible` is the llama.cpp architecture that accepts sizes that differ from layer to layer.
"""

from __future__ import annotations

from dataclasses import dataclass

from sartor.errors import SourceError


@dataclass(frozen=True)
class Family:
    """One row of the table.

    Attributes:
        model_type: transformers' name. gguf: llama.cpp's architecture for equal layers.
        gguf_flexible: llama.cpp's architecture for unequal layers, or None.
        permute_qk: llama.cpp stores q and k with interleaved rotary pairs.
        extras: further tensors of a layer, {transformers name: gguf name}.
    """

    model_type: str
    gguf: str
    gguf_flexible: str | None
    permute_qk: bool
    extras: tuple[tuple[str, str], ...] = ()


FAMILIES: dict[str, Family] = {
    row.model_type: row
    for row in (
        Family("llama", "llama", "deci", True),
        Family("mistral", "llama", "deci", True),
        Family(
            "qwen2",
            "qwen2",
            None,
            False,
            (
                ("self_attn.q_proj.bias", "attn_q.bias"),
                ("self_attn.k_proj.bias", "attn_k.bias"),
                ("self_attn.v_proj.bias", "attn_v.bias"),
            ),
        ),
        Family(
            "qwen3",
            "qwen3",
            None,
            False,
            (("self_attn.q_norm.weight", "attn_q_norm.weight"), ("self_attn.k_norm.weight", "attn_k_norm.weight")),
        ),
    )
}

# transformers name inside a layer -> gguf name inside a block; the order in which a file lists them
LINEARS: dict[str, str] = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
ATTENTION = tuple(n for n in LINEARS if n.startswith("self_attn"))
MLP = tuple(n for n in LINEARS if n.startswith("mlp"))
NORMS: dict[str, str] = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}


def family_of(model_type: str) -> Family:
    if model_type not in FAMILIES:
        raise SourceError(f"the model is of type '{model_type}': Sartor knows {', '.join(FAMILIES)} so far")
    return FAMILIES[model_type]
