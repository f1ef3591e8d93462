"""What a network looks like: one row a family.

A row names the parts that the stages cut and the architectures that llama.cpp knows them by. A new Llama-type family
is a new row. `gguf_flexible` is the llama.cpp architecture that accepts sizes that differ from layer to layer.

VISION is the same for vision transformers: a row says where a checkpoint keeps what `vision.py` needs.
"""

from __future__ import annotations

from dataclasses import dataclass, field

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

# biases that llama.cpp adds where a file has them; no network here comes with any, a repair may put them there
REPAIRS = (("self_attn.o_proj.bias", "attn_output.bias"), ("mlp.down_proj.bias", "ffn_down.bias"))

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


Channels = tuple[float, float, float]  # of red, green and blue, between 0 and 1
HALF: Channels = (0.5, 0.5, 0.5)
IMAGENET: tuple[Channels, Channels] = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CLIP: tuple[Channels, Channels] = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class VisionFamily:
    """One row: names in a checkpoint, behind whatever all of them begin with (`vit.`, `vision_model.`).

    Attributes:
        name: transformers' model_type, or "timm".
        patches, position, norm, first_norm: the patches' convolution, the position table, the norms around the layers.
        prefix: tokens in front of the patches, in order. positioned: how many of them have a row in the position table (None: all or none).
        layer: what names in layer {} begin with. inside: {our name: name there}. scales: {our name: layer scale of what it writes}.
        optional: names that a checkpoint may lack. unread: beginnings of names that are left alone: heads, masks, the text tower.
        antialias: the position table is resized so. mean, std: of the pixels, where the checkpoint does not say.
    """

    name: str
    patches: str
    position: str
    prefix: tuple[str, ...]
    layer: str
    inside: dict[str, str]
    norm: str = "layernorm"
    first_norm: str | None = None
    positioned: int | None = 1
    scales: dict[str, str] = field(default_factory=dict)
    optional: tuple[str, ...] = ()
    unread: tuple[str, ...] = ("pooler.", "classifier.", "decoder.", "embeddings.mask_token")
    classifier: tuple[str, ...] = ("classifier.",)
    antialias: bool = False
    mean: Channels = IMAGENET[0]
    std: Channels = IMAGENET[1]


QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_ATTENTION = dict(zip(QKV, (f"attention.attention.{n}" for n in ("query", "key", "value")), strict=True))
_BERT = {
    "input_layernorm": "layernorm_before",
    "post_attention_layernorm": "layernorm_after",
    **_ATTENTION,
    "self_attn.o_proj": "attention.output.dense",
    "mlp.up_proj": "intermediate.dense",
    "mlp.down_proj": "output.dense",
}
_DINO = {
    "input_layernorm": "norm1",
    "post_attention_layernorm": "norm2",
    **_ATTENTION,
    "self_attn.o_proj": "attention.output.dense",
    "mlp.up_proj": "mlp.fc1",
    "mlp.down_proj": "mlp.fc2",
}
_CLIP = {
    "input_layernorm": "layer_norm1",
    "post_attention_layernorm": "layer_norm2",
    **{n: n for n in QKV},
    "self_attn.o_proj": "self_attn.out_proj",
    "mlp.up_proj": "mlp.fc1",
    "mlp.down_proj": "mlp.fc2",
}
# attn.qkv is read as attn.q, attn.k and attn.v
_TIMM = {
    "input_layernorm": "norm1",
    "post_attention_layernorm": "norm2",
    **dict(zip(QKV, ("attn.q", "attn.k", "attn.v"), strict=True)),
    "self_attn.o_proj": "attn.proj",
    "mlp.up_proj": "mlp.fc1",
    "mlp.down_proj": "mlp.fc2",
}
_PATCHES, _POSITION, _CLASS = (
    f"embeddings.{n}" for n in ("patch_embeddings.projection", "position_embeddings", "cls_token")
)
_REGISTERS, _DISTILLED = "embeddings.register_tokens", "embeddings.distillation_token"
_LAMBDA = {"self_attn.o_proj": "layer_scale1.lambda1", "mlp.down_proj": "layer_scale2.lambda1"}
_GAMMA = {"self_attn.o_proj": "ls1.gamma", "mlp.down_proj": "ls2.gamma"}
_HEADS = ("cls_classifier.", "distillation_classifier.", *VisionFamily.unread)
_TEXT = ("text_model.", "text_projection.", "visual_projection.", "logit_scale", "classifier.")


def _clip(name: str) -> VisionFamily:
    e = "embeddings."
    return VisionFamily(
        name,
        e + "patch_embedding",
        e + "position_embedding.weight",
        (e + "class_embedding",),
        "encoder.layers.{}.",
        _CLIP,
        norm="post_layernorm",  # there of the class token alone, here of all tokens: a departure that pooled patches need
        first_norm="pre_layrnorm",
        optional=(e + "patch_embedding.bias",),
        unread=(*_TEXT, e + "position_ids"),
        classifier=(),  # it reads the mean of patches that no norm has seen
        mean=CLIP[0],
        std=CLIP[1],
    )


def _timm(name: str, first_norm: str | None = None, pixels: tuple[Channels, Channels] = (HALF, HALF)) -> VisionFamily:
    return VisionFamily(
        name,
        "patch_embed.proj",
        "pos_embed",
        ("cls_token", "dist_token", "reg_token"),
        "blocks.{}.",
        _TIMM,
        norm="norm",
        first_norm=first_norm,
        positioned=None,
        scales=_GAMMA,
        optional=("dist_token", "reg_token", "ls1.gamma", "ls2.gamma", "patch_embed.proj.bias"),
        unread=("head.", "head_dist.", "mask_token"),
        classifier=("head.",),
        antialias=True,
        mean=pixels[0],
        std=pixels[1],
    )


VISION: dict[str, VisionFamily] = {
    row.name: row
    for row in (
        VisionFamily("vit", _PATCHES, _POSITION, (_CLASS,), "encoder.layer.{}.", _BERT, mean=HALF, std=HALF),
        # transformers' own default is HALF; the published networks were trained with these
        VisionFamily(
            "deit",
            _PATCHES,
            _POSITION,
            (_CLASS, _DISTILLED),
            "encoder.layer.{}.",
            _BERT,
            positioned=2,
            unread=_HEADS,
            classifier=("cls_classifier.", "classifier."),
        ),
        VisionFamily("dinov2", _PATCHES, _POSITION, (_CLASS,), "encoder.layer.{}.", _DINO, scales=_LAMBDA),
        VisionFamily(
            "dinov2_with_registers",
            _PATCHES,
            _POSITION,
            (_CLASS, _REGISTERS),
            "encoder.layer.{}.",
            _DINO,
            scales=_LAMBDA,
            antialias=True,
        ),
        _clip("clip"),
        _clip("clip_vision_model"),
        _timm("timm"),
        _timm("timm_clip", "norm_pre", CLIP),
    )
}
