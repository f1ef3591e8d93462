"""Checkpoints of vision transformers, read into the one network of `vision.py`.

A checkpoint is a folder of config.json and safetensors as transformers or timm write them. `families.VISION` says which name means what; this file folds what differs:

    fused q, k, v -> three; layer scales -> o_proj, down_proj; missing q, k, v biases -> zeros
    patches' bias + position table, resized -> position; prefix tokens + their positions -> prefix

Sizes are the tensors' own, and config.json has to agree. Heads are left alone. One departure: CLIP norms its class token alone behind the layers, here all tokens are.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from sartor.errors import SourceError
from sartor.model.families import QKV, VISION, VisionFamily
from sartor.model.network import BLOCK
from sartor.model.stored import names_in, read_json, stored
from sartor.model.vision import Vision, VisionConfig

SIDE = 224  # pixels that a picture gets unless the user says otherwise: what most of these networks were trained with
NORMS = ("input_layernorm", "post_attention_layernorm")
# transformers' names of activations -> ours
SPELLINGS = {
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "quick_gelu": "quick_gelu",
    "relu": "relu",
}
# timm's architectures that are nothing but a plain transformer; the others differ in ways that their files do not tell
PLAIN = re.compile(
    r"(vit|deit|deit3)_(tiny|small|medium|base|large|huge)(_distilled)?_patch\d+(_reg\d+)?(_dinov2)?(_clip(?:_quickgelu)?)?(_\d+)?"
)
HARMLESS = {
    *("img_size", "patch_size", "embed_dim", "depth", "num_heads", "mlp_ratio", "qkv_bias", "num_classes"),
    *("init_values", "reg_tokens", "no_embed_class", "dynamic_img_size", "global_pool", "drop_rate", "drop_path_rate"),
}


@dataclass(frozen=True)
class Said:
    """What config.json says and the tensors do not, and what both have to agree about (None: it does not say).

    size: pixels of a side of the pictures that the position table is for. prefix: tokens in front of the patches.
    """

    row: VisionFamily
    heads: int
    activation: str
    eps: float
    qkv_bias: bool = True
    width: int | None = None
    layers: int | None = None
    size: int | None = None
    prefix: int | None = None


def load_vision(folder: Path, size: int | None = None) -> Vision:
    """The network of a checkpoint, in fp32, for looking at and cutting: eval, without gradients and without a head.

    Args:
        size: a side of the pictures in pixels, a multiple of the patch's; None: SIDE rounded down to one, or the checkpoint's own if that is smaller.

    Raises:
        SourceError: no such checkpoint, a network that is not a plain transformer, or tensors that are missing, unknown or misshapen.
    """
    raw = read_json(folder / "config.json")
    said = _timm(raw) if is_timm(raw) else _transformers(folder, raw)
    mean, std = _pixels(folder, raw, said.row)
    left = _split(_tensors(folder, said.row))
    patches = _take(left, said.row.patches + ".weight", None, 3, None, None)
    width, patch = patches.shape[0], patches.shape[2]
    layers = _layers(left, said, width)
    prefix, position = _tokens(left, said, width, patch, size)
    state = {"model.patches.weight": patches, "model.prefix": prefix, "model.position": position, **layers}
    for ours, theirs in (("norm", said.row.norm), ("first_norm", said.row.first_norm)):
        if theirs:
            state |= {f"model.{ours}.{k}": _take(left, f"{theirs}.{k}", width) for k in ("weight", "bias")}
    if left:
        raise SourceError(
            f"the checkpoint has {len(left)} tensors that a plain vision transformer has not ('{min(left)}'): Sartor reads {', '.join(VISION)}"
        )
    config = VisionConfig(
        family=said.row.name,
        hidden_size=width,
        num_attention_heads=said.heads,
        intermediate_size=len(layers["model.layers.0.mlp.up_proj.bias"]),
        layers=len({n.split(".")[2] for n in layers}),
        size=math.isqrt(len(position)) * patch,
        patch=patch,
        prefix=len(prefix),
        activation=said.activation,
        eps=said.eps,
        first_norm=said.row.first_norm is not None,
        mean=mean,
        std=std,
    )
    _agree(said, config)
    if config.intermediate_size % BLOCK:
        raise SourceError(f"the MLPs have {config.intermediate_size} channels: Sartor needs a multiple of {BLOCK}")
    return _filled(config, state)


def _filled(config: VisionConfig, state: dict[str, Tensor]) -> Vision:
    with torch.random.fork_rng(devices=[]):  # the first weights of a module are drawn; nobody shall notice
        model = Vision(config)
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise SourceError(
            f"the checkpoint's tensors do not fit together ({str(error).splitlines()[-1].strip()[:160]}): fetch it again"
        ) from error
    return model.eval().requires_grad_(False)


def is_timm(raw: dict[str, Any]) -> bool:
    return "architecture" in raw and "pretrained_cfg" in raw


def _timm(raw: dict[str, Any]) -> Said:
    name, args = str(raw["architecture"]), raw.get("model_args") or {}
    plain = PLAIN.fullmatch(name)
    odd = sorted(set(args) - HARMLESS)
    if not plain or odd:
        raise SourceError(
            f"timm's '{name}' {f'with {odd[0]} ' if odd else ''}is not a plain vision transformer: Sartor reads timm's ViT, DeiT, DINOv2 (not giant) and CLIP's towers, EfficientNet-Lite, MobileNetV2 and V3, and plain ResNets"
        )
    # heads are 64 wide in all of them but the huge ones
    heads = {"tiny": 3, "small": 6, "medium": 8, "base": 12, "large": 16, "huge": 16}[plain[2]]
    clip = plain[6] or ""  # its towers have a norm in front of the layers, too
    row, eps = (VISION["timm_clip"], 1e-5) if clip else (VISION["timm"], 1e-6)
    activation = "quick_gelu" if "quickgelu" in clip else "gelu"
    return Said(row, int(args.get("num_heads", heads)), activation, eps, bool(args.get("qkv_bias", True)))


def _transformers(folder: Path, raw: dict[str, Any]) -> Said:
    from transformers import AutoConfig

    kind = raw.get("model_type")
    if kind not in VISION:
        known = ", ".join(name for name in VISION if not name.startswith("timm"))
        raise SourceError(f"the model is of type '{kind}': Sartor knows the vision transformers {known}")
    try:
        config: Any = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:
        raise SourceError(
            f"transformers cannot read config.json ({type(error).__name__}): fetch the model again"
        ) from error
    config = getattr(config, "vision_config", config)
    if getattr(config, "use_swiglu_ffn", False):
        raise SourceError(
            f"this {kind} has gated MLPs (SwiGLU), as the giant one: Sartor cuts plain ones, give the small, base or large network"
        )
    if config.hidden_act not in SPELLINGS:
        raise SourceError(f"the model's activation is '{config.hidden_act}': Sartor knows {', '.join(SPELLINGS)}")
    row = VISION[kind]
    return Said(
        row,
        config.num_attention_heads,
        SPELLINGS[config.hidden_act],
        config.layer_norm_eps,
        getattr(config, "qkv_bias", True),
        config.hidden_size,
        config.num_hidden_layers,
        _side(config.image_size) // _side(config.patch_size) * _side(config.patch_size),
        len(row.prefix) - 1 + getattr(config, "num_register_tokens", 1),
    )


def _side(size: Any) -> int:
    sides = {size} if isinstance(size, int) else set(size)
    if len(sides) != 1 or min(sides) < 1:
        raise SourceError(f"the model's pictures or patches are {size} pixels: Sartor needs square ones")
    return int(sides.pop())


def _agree(said: Said, made: VisionConfig) -> None:
    """config.json against the tensors."""
    for what, want, got in (
        ("width", said.width, made.hidden_size),
        ("layers", said.layers, made.layers),
        ("prefix tokens", said.prefix, made.prefix),
    ):
        if want is not None and want != got:
            raise SourceError(f"config.json says {what} {want}, the tensors say {got}: fetch the model again")
    if said.heads < 1 or made.hidden_size % said.heads:
        raise SourceError(f"{said.heads} heads do not divide a width of {made.hidden_size}: fetch the model again")


def _pixels(folder: Path, raw: dict[str, Any], row: VisionFamily) -> tuple[Any, Any]:
    """Mean and deviation that the checkpoint's pixels, between 0 and 1, are normalized with."""
    read = {"mean": row.mean, "std": row.std} | {
        k: v for k, v in (raw.get("pretrained_cfg") or {}).items() if k in ("mean", "std")
    }
    mean, std, factor = read["mean"], read["std"], 1 / 255
    for name in ("preprocessor_config.json", "processor_config.json"):
        if (folder / name).is_file():
            found = read_json(folder / name)
            found = found.get("image_processor", found)
            plain = found.get("do_normalize", True)
            mean = found.get("image_mean", mean) if plain else (0.0, 0.0, 0.0)
            std = found.get("image_std", std) if plain else (1.0, 1.0, 1.0)
            factor = found.get("rescale_factor", factor) if found.get("do_rescale", True) else 1.0
            break
    try:
        mean, std = (tuple(float(x) / (255 * factor) for x in v) for v in (mean, std))
    except (TypeError, ValueError, ZeroDivisionError):
        mean, std = (), ()
    if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
        raise SourceError("the mean and deviation of the pixels are not three numbers each: fetch the model again")
    return mean, std


def _tensors(folder: Path, row: VisionFamily) -> dict[str, Float[Tensor, ...]]:
    """What the files hold of the network, in fp32, without what all names begin with."""
    names = names_in(folder)
    end = row.patches + ".weight"
    start = [n.removesuffix(end) for n in names if n == end or n.endswith("." + end)]
    if len(start) != 1:
        raise SourceError(f"the checkpoint has {len(start)} tensors '{end}', one was needed: give one {row.name}")
    found = stored(folder, lambda name: not name.removeprefix(start[0]).startswith(row.unread))
    return {name.removeprefix(start[0]): t for name, t in found.items()}


def _split(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Fused queries, keys and values apart."""
    out: dict[str, Tensor] = {}
    for name, t in tensors.items():
        parts = t.chunk(3) if ".attn.qkv." in name else ()
        out |= {name.replace(".qkv.", f".{k}."): p for k, p in zip("qkv", parts, strict=False)} or {name: t}
    return out


def _take(left: dict[str, Tensor], name: str, *shape: int | None) -> Tensor:
    """The tensor of that name out of what is left, checked; None is any size."""
    if name not in left:
        raise SourceError(
            f"the checkpoint has no tensor '{name}': give the whole network as transformers or timm save it"
        )
    t = left.pop(name)
    if t.dim() != len(shape) or any(s not in (None, n) for s, n in zip(shape, t.shape, strict=True)):
        raise SourceError(
            f"the tensor '{name}' is {tuple(t.shape)}, {shape} was needed (None: any): fetch the model again"
        )
    return t


def _lacks(left: dict[str, Tensor], row: VisionFamily, name: str) -> bool:
    """Whether the whole checkpoint has nothing of an optional name."""
    return name in row.optional and not any(n.endswith(name) for n in left)


def _layers(left: dict[str, Tensor], said: Said, width: int) -> dict[str, Tensor]:
    row = said.row
    inner = left.get(row.layer.format(0) + row.inside["mlp.up_proj"] + ".bias")
    ffn = 0 if inner is None else len(inner)
    at = re.compile(re.escape(row.layer).replace(r"\{\}", r"(\d+)"))
    count = len({m[1] for m in map(at.match, left) if m})
    scales = {ours: s for ours, s in row.scales.items() if not _lacks(left, row, s)}
    out: dict[str, Tensor] = {}
    for n in range(max(count, 1)):
        out |= {f"model.layers.{n}.{k}": t for k, t in _layer(left, said, n, width, ffn, scales).items()}
    return out


def _layer(
    left: dict[str, Tensor], said: Said, n: int, width: int, ffn: int, scales: dict[str, str]
) -> dict[str, Tensor]:
    """One layer under our names, its scales folded."""
    out: dict[str, Tensor] = {}
    at = said.row.layer.format(n)
    for ours, theirs in said.row.inside.items():
        rows = ffn if ours == "mlp.up_proj" else width
        columns = () if ours in NORMS else (ffn if ours == "mlp.down_proj" else width,)
        weight = _take(left, f"{at}{theirs}.weight", rows, *columns)
        without = ours in QKV and not said.qkv_bias
        bias = torch.zeros(rows) if without else _take(left, f"{at}{theirs}.bias", rows)
        if ours in scales:
            scale = _take(left, at + scales[ours], width)
            weight, bias = weight * scale[:, None], bias * scale
        out |= {f"{ours}.weight": weight, f"{ours}.bias": bias}
    return out


def _tokens(
    left: dict[str, Tensor], said: Said, width: int, patch: int, size: int | None
) -> tuple[Float[Tensor, "p w"], Float[Tensor, "t w"]]:
    """(prefix, position of the patches), with positions and the patches' bias folded."""
    row = said.row
    tokens = [_rows(left, name, width) for name in row.prefix if not _lacks(left, row, name)]
    prefix = torch.cat(tokens)
    table = _rows(left, row.position, width)
    grid = math.isqrt(len(table))
    placed = len(table) - grid**2  # rows of prefix tokens
    allowed = (0, len(prefix)) if row.positioned is None else (row.positioned,)
    own = said.size or grid * patch
    if placed not in allowed or placed > len(prefix) or own != grid * patch:
        raise SourceError(
            f"the position table has {len(table)} rows, which are no {own // patch} x {own // patch} patches behind {allowed[-1]} tokens: fetch the model again"
        )
    prefix[:placed] += table[:placed]
    position = resized(table[placed:], _wanted(size, own, patch) // patch, row.antialias)
    if not _lacks(left, row, row.patches + ".bias"):
        position = position + _take(left, row.patches + ".bias", width)
    return prefix, position


def _rows(left: dict[str, Tensor], name: str, width: int) -> Float[Tensor, "n w"]:
    """Tokens, whether the checkpoint keeps them as (w,), (n, w) or (1, n, w)."""
    shape = (None,) * (left[name].dim() - 1) if name in left else ()
    return _take(left, name, *shape, width).reshape(-1, width).clone()


def _wanted(size: int | None, own: int, patch: int) -> int:
    if size is None:
        return min(own, max(SIDE // patch, 1) * patch)
    if size < patch or size % patch:
        near = max(round(size / patch), 1) * patch
        raise SourceError(f"pictures of {size} pixels are not made of patches of {patch}: {near} would be")
    return size


def resized(table: Float[Tensor, "s w"], grid: int, antialias: bool) -> Float[Tensor, "t w"]:
    """A square position table for `grid` patches a side, bicubic as transformers and timm do it."""
    own = math.isqrt(len(table))
    if own == grid:
        return table
    picture = table.T.reshape(1, -1, own, own)
    out = torch.nn.functional.interpolate(
        picture, (grid, grid), mode="bicubic", align_corners=False, antialias=antialias
    )
    return out.flatten(2)[0].T.contiguous()
