"""Convolutional networks from timm's folders: EfficientNet-Lite, MobileNetV2 and V3, and the ResNets that are torchvision's, too.

Widths, depths, kernels and groups are those of the weights, the size of pictures and their normalization are config.json's; a family adds strides and activations. Those called "tf_" were trained in
TensorFlow: they pad as it does, and their batch norms have its epsilon.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor

from sartor.errors import SourceError
from sartor.model.cnn_families import Parts, built, resnet
from sartor.model.graph import INPUT, Draft, Graph, normalization

HARMLESS = {"num_classes", "drop_rate", "drop_path_rate"}  # of what timm may be told beside the name
STRIDES = (1, 2, 2, 2, 1, 2, 1)  # of the first blocks of the stages
# of MobileNetV3's, and how many of its first stages have ReLU
V3 = {"large": ((1, 2, 2, 2, 1, 2), 3), "small": ((2, 2, 2, 1, 2), 2)}


def _block(p: Parts, x: str, name: str, stride: int, act: str) -> str:
    """Widening, depthwise convolution, squeeze and excite, narrowing: those that there are; what was read is added where the size is the same."""
    wide = p.has(f"{name}.conv_pwl")  # else nothing is widened first
    y = p.conv(x, f"{name}.conv_pw", f"{name}.bn1", act=act) if wide else x
    y = p.conv(y, f"{name}.conv_dw", f"{name}.bn{2 if wide else 1}", stride, act)
    if p.has(f"{name}.se.conv_reduce"):
        gate = p.conv(p.draft.add("global_average_pool", y), f"{name}.se.conv_reduce", act="relu")
        y = p.draft.add("mul", y, p.conv(gate, f"{name}.se.conv_expand", act="gate"), name=f"{name}.se.mul")
    y = p.conv(y, f"{name}.conv_{'pwl' if wide else 'pw'}", f"{name}.bn{3 if wide else 2}")
    return p.added(x, y) if p.draft.shape[x] == p.draft.shape[y] else y


def _stages(p: Parts, x: str, strides: Sequence[int], acts: Sequence[str]) -> str:
    for stage, (stride, act) in enumerate(zip(strides, acts, strict=True)):
        for n in p.numbers(f"blocks.{stage}"):
            x = _block(p, x, f"blocks.{stage}.{n}", stride if n == 0 else 1, act)
    return x


def _mobilenet_v2(p: Parts) -> str:
    x = _stages(p, p.conv(INPUT, "conv_stem", "bn1", 2, "relu6"), STRIDES, ("relu6",) * len(STRIDES))
    return p.linear(p.pooled(p.conv(x, "conv_head", "bn2", act="relu6")), "classifier")


def _mobilenet_v3(size: str, p: Parts) -> str:
    strides, relus = V3[size]
    acts = ["relu" if n < relus else "swish" for n in range(len(strides))]
    x = _stages(p, p.conv(INPUT, "conv_stem", "bn1", 2, "swish"), strides, acts)
    last = f"blocks.{len(strides)}.0"
    x = p.draft.add("global_average_pool", p.conv(x, f"{last}.conv", f"{last}.bn1", act="swish"))
    return p.linear(p.draft.add("flatten", p.conv(x, "conv_head", act="swish")), "classifier")


# what timm calls them -> how they are put together; other variants differ in ways that names and shapes do not tell
FAMILIES: dict[str, Callable[[Parts], str]] = {
    r"(tf_)?efficientnet_lite[0-4]": _mobilenet_v2,  # of the same parts
    r"mobilenetv2_(035|050|075|100|140|110d|120d)": _mobilenet_v2,
    r"(tf_)?mobilenetv3_large_(075|100)": partial(_mobilenet_v3, "large"),
    r"(tf_)?mobilenetv3_small_(050|075|100)": partial(_mobilenet_v3, "small"),
    r"(tv_)?resnet(18|34|50|101|152)|(tv_)?resnext50_32x4d|resnext101_32x8d|wide_resnet(50|101)_2": resnet,
}


def builder_of(name: str) -> Callable[[Parts], str] | None:
    """How the network that timm calls so is put together; None where Sartor does not know."""
    return next((build for pattern, build in FAMILIES.items() if re.fullmatch(pattern, name)), None)


def from_timm(weights: Mapping[str, Tensor], config: Mapping[str, Any]) -> Graph:
    """The network of a timm state dict and config.json.

    Raises:
        SourceError: config.json does not say what is needed, or the weights do not fit together.
    """
    name, told, args = str(config["architecture"]), config["pretrained_cfg"], config.get("model_args") or {}
    build, odd = builder_of(name), sorted(set(args) - HARMLESS)
    odd += ["global_pool"] * (config.get("global_pool", "avg") != "avg")
    if odd or build is None:
        raise SourceError(
            f"timm's '{name}'{f' with {odd[0]}' if odd else ''} is not a plain one, which Sartor reads: give it as an ONNX file"
        )
    try:
        (_, size, wide), *pixels = ([float(x) for x in told[k]] for k in ("input_size", "mean", "std"))
        fits = size == wide >= 1 and all(len(x) == 3 and all(map(math.isfinite, x)) for x in pixels)
        if not fits or min(pixels[1]) <= 0:
            raise ValueError
    except (LookupError, TypeError, ValueError) as error:
        raise SourceError(
            "config.json does not say the size of its pictures, which are square, and the mean and deviation of their pixels: fetch the model again"
        ) from error
    tensorflow = name.startswith("tf_")
    draft = Draft(int(size), *normalization(*map(tuple, pixels)))  # type: ignore[arg-type]
    return built(weights, build, Parts({}, draft, 1e-3 if tensorflow else 1e-5, tensorflow))
