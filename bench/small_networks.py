"""Networks of every family of convolutions, narrower than their namesakes and with weights at random: for what is measured of formats, not of words."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

CLASSES = 10
# outputs, kernel, stride, times wider inside, blocks; as in MobileNetV2 and EfficientNet-Lite0, half as wide
V2 = (
    (8, 3, 1, 1, 1),
    (12, 3, 2, 6, 2),
    (16, 3, 2, 6, 3),
    (32, 3, 2, 6, 4),
    (48, 3, 1, 6, 3),
    (80, 3, 2, 6, 3),
    (160, 3, 1, 6, 1),
)
LITE = ((8, 3, 1, 1, 1), (12, 3, 2, 6, 2), (20, 5, 2, 6, 2), (40, 3, 2, 6, 3), (56, 5, 1, 6, 3), (96, 5, 2, 6, 4), (160, 3, 1, 6, 1))  # fmt: skip
# kernel, width inside, outputs, squeeze and excite; as in MobileNetV3-Small
V3 = (
    (3, 16, 16, True), (3, 72, 24, False), (3, 88, 24, False), (5, 96, 40, True), (5, 240, 40, True), (5, 240, 40, True),
    (5, 120, 48, True), (5, 144, 48, True), (5, 288, 96, True), (5, 576, 96, True), (5, 576, 96, True),
)  # fmt: skip


class Weights(dict[str, Tensor]):
    """Weights in the making."""

    def __init__(self) -> None:
        self.draw = torch.Generator().manual_seed(0)

    def conv(self, name: str, out: int, inside: int, kernel: int = 1, bias: bool = False) -> None:
        self[f"{name}.weight"] = (
            torch.randn(out, inside, kernel, kernel, generator=self.draw) * (2 / (inside * kernel**2)) ** 0.5
        )
        if bias:
            self[f"{name}.bias"] = 0.1 * torch.randn(out, generator=self.draw)

    def norm(self, name: str, width: int) -> None:
        for end, start in (("weight", 1.0), ("bias", 0.0), ("running_mean", 0.0), ("running_var", 1.0)):
            spread = 0.1 * torch.randn(width, generator=self.draw)
            self[f"{name}.{end}"] = start + (spread.abs() if end == "running_var" else spread)

    def both(self, conv: str, norm: str, out: int, inside: int, kernel: int = 1) -> None:
        self.conv(conv, out, inside, kernel)
        self.norm(norm, out)

    def linear(self, name: str, out: int, inside: int) -> None:
        self[f"{name}.weight"] = torch.randn(out, inside, generator=self.draw) / inside**0.5
        self[f"{name}.bias"] = 0.1 * torch.randn(out, generator=self.draw)


def mobilenet_v2() -> Weights:
    w = Weights()
    w.both("features.0.0", "features.0.1", 16, 3, 3)
    width, n = 16, 0
    for out, kernel, _, times, blocks in V2:
        for _ in range(blocks):
            n, wide = n + 1, width * times
            at = f"features.{n}.conv"
            if times > 1:
                w.both(f"{at}.0.0", f"{at}.0.1", wide, width)
            k = int(times > 1)
            w.both(f"{at}.{k}.0", f"{at}.{k}.1", wide, 1, kernel)
            w.both(f"{at}.{k + 1}", f"{at}.{k + 2}", out, wide)
            width = out
    w.both("features.18.0", "features.18.1", 640, width)
    w.linear("classifier.1", CLASSES, 640)
    return w


def mobilenet_v3() -> Weights:
    w = Weights()
    w.both("features.0.0", "features.0.1", 16, 3, 3)
    width = 16
    for n, (kernel, wide, out, squeezed) in enumerate(V3, 1):
        at, k = f"features.{n}.block", int(wide != width)
        if wide != width:
            w.both(f"{at}.0.0", f"{at}.0.1", wide, width)
        w.both(f"{at}.{k}.0", f"{at}.{k}.1", wide, 1, kernel)
        if squeezed:
            k += 1
            w.conv(f"{at}.{k}.fc1", max(8, wide // 4), wide, bias=True)
            w.conv(f"{at}.{k}.fc2", wide, max(8, wide // 4), bias=True)
        w.both(f"{at}.{k + 1}.0", f"{at}.{k + 1}.1", out, wide)
        width = out
    w.both("features.12.0", "features.12.1", 576, width)
    w.linear("classifier.0", 512, 576)
    w.linear("classifier.3", CLASSES, 512)
    return w


def resnet() -> Weights:
    w = Weights()
    w.both("conv1", "bn1", 32, 3, 7)
    width = 32
    for stage, out in enumerate((32, 64, 128, 256), 1):
        for n in range(2):
            at, inside = f"layer{stage}.{n}", width if n == 0 else out
            w.both(f"{at}.conv1", f"{at}.bn1", out, inside, 3)
            w.both(f"{at}.conv2", f"{at}.bn2", out, out, 3)
            if inside != out:
                w.both(f"{at}.downsample.0", f"{at}.downsample.1", out, inside)
        width = out
    w.linear("fc", CLASSES, width)
    return w


def squeezenet() -> Weights:
    """SqueezeNet 1.1, as wide as it is."""
    w, width = Weights(), 64
    w.conv("features.0", width, 3, 3, bias=True)
    fires = (
        (3, 16, 64),
        (4, 16, 64),
        (6, 32, 128),
        (7, 32, 128),
        (9, 48, 192),
        (10, 48, 192),
        (11, 64, 256),
        (12, 64, 256),
    )
    for n, squeezed, out in fires:
        w.conv(f"features.{n}.squeeze", squeezed, width, bias=True)
        w.conv(f"features.{n}.expand1x1", out, squeezed, bias=True)
        w.conv(f"features.{n}.expand3x3", out, squeezed, 3, bias=True)
        width = 2 * out
    w.conv("classifier.1", CLASSES, width, bias=True)
    return w


def efficientnet_lite() -> Weights:
    w = Weights()
    w.both("conv_stem", "bn1", 16, 3, 3)
    width = 16
    for stage, (out, kernel, _, times, blocks) in enumerate(LITE):
        for n in range(blocks):
            at, wide = f"blocks.{stage}.{n}", width * times
            parts = [("conv_dw", wide, 1, kernel), ("conv_pwl" if times > 1 else "conv_pw", out, wide, 1)]
            for k, part in enumerate([("conv_pw", wide, width, 1), *parts] if times > 1 else parts, 1):
                w.both(f"{at}.{part[0]}", f"{at}.bn{k}", *part[1:])
            width = out
    w.both("conv_head", "bn2", 640, width)
    w.linear("classifier", CLASSES, 640)
    return w


FAMILIES: dict[str, Callable[[], Weights]] = {
    f.__name__: f for f in (mobilenet_v2, mobilenet_v3, resnet, squeezenet, efficientnet_lite)
}


def make_convolutions(folder: Path, family: str) -> Path:
    """torchvision's weights in a file, or timm's folder."""
    weights = {name: t.contiguous() for name, t in FAMILIES[family]().items()}
    if family != efficientnet_lite.__name__:
        save_file(weights, folder / f"{family}.safetensors")
        return folder / f"{family}.safetensors"
    told = {"mean": [0.5] * 3, "std": [0.5] * 3, "input_size": [3, 224, 224]}
    (folder / "config.json").write_text(json.dumps({"architecture": "efficientnet_lite0", "pretrained_cfg": told}))
    save_file(weights, folder / "model.safetensors")
    return folder
