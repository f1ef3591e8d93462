"""torchvision's convolutional networks, put together again from their weights: beside the same networks written out here as torchvision writes them (names, order, arithmetic)."""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from onnx.helper import make_node
from safetensors.torch import save_file
from torch import Tensor, nn

from sartor.errors import InputError, SourceError
from sartor.model.classifier import names_in, rows_for
from sartor.model.cnn_families import SIZE, from_torchvision
from sartor.model.kinds import kind_of, load_seer
from sartor.model.timm_families import from_timm
from sartor.sources import resolve

from .test_graph import CLASSES, close, lively, mobilenet_v2, normalized, onnx_file, pictures


class Basic(nn.Module):
    """Two convolutions of 3 x 3, and a way past them."""

    def __init__(self, inside: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inside, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out)
        self.conv2, self.bn2 = nn.Conv2d(out, out, 3, 1, 1, bias=False), nn.BatchNorm2d(out)
        past = nn.Sequential(nn.Conv2d(inside, out, 1, stride, bias=False), nn.BatchNorm2d(out))
        self.downsample = past if stride > 1 or inside != out else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        return torch.relu(y + (x if self.downsample is None else self.downsample(x)))


class Bottleneck(nn.Module):
    """A grouped convolution of 3 x 3 between two of 1 x 1."""

    def __init__(self, inside: int, out: int, stride: int) -> None:
        super().__init__()
        wide = out // 2
        self.conv1, self.bn1 = nn.Conv2d(inside, wide, 1, bias=False), nn.BatchNorm2d(wide)
        self.conv2, self.bn2 = nn.Conv2d(wide, wide, 3, stride, 1, groups=2, bias=False), nn.BatchNorm2d(wide)
        self.conv3, self.bn3 = nn.Conv2d(wide, out, 1, bias=False), nn.BatchNorm2d(out)
        past = nn.Sequential(nn.Conv2d(inside, out, 1, stride, bias=False), nn.BatchNorm2d(out))
        self.downsample = past if stride > 1 or inside != out else None

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x))))))
        return torch.relu(self.bn3(self.conv3(y)) + (x if self.downsample is None else self.downsample(x)))


def resnet(block: Callable[[int, int, int], nn.Module]) -> nn.Module:
    parts: dict[str, nn.Module] = {
        "conv1": nn.Conv2d(3, 8, 7, 2, 3, bias=False),
        "bn1": nn.BatchNorm2d(8),
        "relu": nn.ReLU(),
        "maxpool": nn.MaxPool2d(3, 2, 1),
    }
    width = 8
    for n, out in enumerate((8, 12, 16, 20), 1):
        parts[f"layer{n}"] = nn.Sequential(block(width, out, 1 if n == 1 else 2), block(out, out, 1))
        width = out
    parts |= {"avgpool": nn.AdaptiveAvgPool2d(1), "flat": nn.Flatten(), "fc": nn.Linear(width, CLASSES)}
    return nn.Sequential(OrderedDict(parts))


class Fire(nn.Module):
    def __init__(self, inside: int, squeezed: int, out: int) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(inside, squeezed, 1)
        self.expand1x1, self.expand3x3 = nn.Conv2d(squeezed, out, 1), nn.Conv2d(squeezed, out, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.squeeze(x))
        return torch.cat([torch.relu(self.expand1x1(x)), torch.relu(self.expand3x3(x))], 1)


def squeezenet() -> nn.Module:
    pool = lambda: nn.MaxPool2d(3, 2, ceil_mode=True)  # noqa: E731
    first = [nn.Conv2d(3, 8, 3, 2), nn.ReLU(), pool(), Fire(8, 3, 5), Fire(10, 3, 5), pool()]
    features = nn.Sequential(*first, Fire(10, 4, 6), Fire(12, 4, 6), pool(), Fire(12, 4, 7))
    head = nn.Sequential(nn.Dropout(), nn.Conv2d(14, CLASSES, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1))
    return nn.Sequential(OrderedDict({"features": features, "classifier": head, "flat": nn.Flatten()}))


def part(inside: int, out: int, kernel: int, stride: int, act: nn.Module | None, groups: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(inside, out, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(out, eps=1e-3), *([] if act is None else [act]))


class Squeezed(nn.Module):
    """Squeeze and excite."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Conv2d(width, 4, 1), nn.Conv2d(4, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * nn.functional.hardsigmoid(self.fc2(torch.relu(self.fc1(x.mean((2, 3), keepdim=True)))))


class InvertedV3(nn.Module):
    def __init__(self, inside: int, wide: int, out: int, kernel: int, squeezed: bool, act: str, stride: int) -> None:
        super().__init__()
        made = nn.Hardswish if act == "HS" else nn.ReLU
        parts = [part(inside, wide, 1, 1, made())] if wide != inside else []
        parts.append(part(wide, wide, kernel, stride, made(), wide))
        last = [Squeezed(wide)] if squeezed else []
        self.block = nn.Sequential(*parts, *last, part(wide, out, 1, 1, None))
        self.same = stride == 1 and inside == out

    def forward(self, x: Tensor) -> Tensor:
        return x + self.block(x) if self.same else self.block(x)


def mobilenet_v3() -> nn.Module:
    """The small one, thin: kernel, width, outputs, squeeze and excite, activation, stride."""
    rows = (
        (3, 8, 8, True, "RE", 2), (3, 16, 10, False, "RE", 2), (3, 16, 10, False, "RE", 1), (5, 16, 12, True, "HS", 2),
        (5, 20, 12, True, "HS", 1), (5, 20, 12, True, "HS", 1), (5, 16, 14, True, "HS", 1), (5, 18, 14, True, "HS", 1),
        (5, 24, 16, True, "HS", 2), (5, 24, 16, True, "HS", 1), (5, 24, 16, True, "HS", 1),
    )  # fmt: skip
    blocks: list[nn.Module] = [part(3, 8, 3, 2, nn.Hardswish())]
    width = 8
    for kernel, wide, out, squeezed, act, stride in rows:
        blocks.append(InvertedV3(width, wide, out, kernel, squeezed, act, stride))
        width = out
    features = nn.Sequential(*blocks, part(width, 24, 1, 1, nn.Hardswish()))
    head = nn.Sequential(nn.Linear(24, 20), nn.Hardswish(), nn.Dropout(), nn.Linear(20, CLASSES))
    parts = {"features": features, "pool": nn.AdaptiveAvgPool2d(1), "flat": nn.Flatten(), "classifier": head}
    return nn.Sequential(OrderedDict(parts))


class Same(nn.Conv2d):
    """Padded as TensorFlow does it."""

    def forward(self, x: Tensor) -> Tensor:
        sides = [
            max(0, (-(-n // s) - 1) * s + k - n)
            for n, s, k in zip(x.shape[2:], self.stride, self.kernel_size, strict=True)
        ]
        x = nn.functional.pad(x, [p for t in reversed(sides) for p in (t // 2, t - t // 2)])
        return nn.functional.conv2d(x, self.weight, None, self.stride, groups=self.groups)


class LiteBlock(nn.Module):
    """An inverted residual as timm names it; without widening, a separable convolution."""

    def __init__(self, inside: int, out: int, kernel: int, stride: int, times: int, tensorflow: bool) -> None:
        super().__init__()
        wide, self.relu, self.alike = inside * times, nn.ReLU6(), stride == 1 and inside == out
        self.order = ["conv_pw", "bn1", "relu", "conv_dw", "bn2", "relu", "conv_pwl", "bn3"]
        if times == 1:
            self.order = ["conv_dw", "bn1", "relu", "conv_pw", "bn2"]
        shapes = {
            "conv_pw": (inside, wide, 1, 1, 1),
            "conv_dw": (wide, wide, kernel, stride, wide),
            "conv_pwl": (wide, out, 1, 1, 1),
        }
        if times == 1:
            shapes |= {"conv_pw": (inside, out, 1, 1, 1)}
        width = inside
        for name in self.order:
            if name.startswith("conv"):
                _, width, k, s, groups = shapes[name]
                setattr(self, name, lite_conv(*shapes[name], tensorflow))
            elif name.startswith("bn"):
                setattr(self, name, nn.BatchNorm2d(width, eps=1e-3 if tensorflow else 1e-5))

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for name in self.order:
            y = getattr(self, name)(y)
        return x + y if self.alike else y


def lite_conv(inside: int, out: int, kernel: int, stride: int, groups: int, tensorflow: bool) -> nn.Conv2d:
    if tensorflow:
        return Same(inside, out, kernel, stride, groups=groups, bias=False)
    return nn.Conv2d(inside, out, kernel, stride, kernel // 2, groups=groups, bias=False)


def efficientnet_lite(tensorflow: bool) -> nn.Module:
    """A thin one: outputs, kernel, stride, times, blocks of each stage."""
    rows = (
        (4, 3, 1, 1, 1),
        (6, 3, 2, 6, 2),
        (8, 5, 2, 6, 2),
        (10, 3, 2, 6, 2),
        (12, 5, 1, 6, 2),
        (14, 5, 2, 6, 2),
        (16, 3, 1, 6, 1),
    )
    norm, width, stages = {"eps": 1e-3 if tensorflow else 1e-5}, 8, []
    for out, kernel, stride, times, blocks in rows:
        stages.append(
            nn.Sequential(
                *(
                    LiteBlock(width if n == 0 else out, out, kernel, stride if n == 0 else 1, times, tensorflow)
                    for n in range(blocks)
                )
            )
        )
        width = out
    parts: dict[str, nn.Module] = {
        "conv_stem": lite_conv(3, 8, 3, 2, 1, tensorflow),
        "bn1": nn.BatchNorm2d(8, **norm),
        "act": nn.ReLU6(),
    }
    parts |= {
        "blocks": nn.Sequential(*stages),
        "conv_head": lite_conv(width, 20, 1, 1, 1, tensorflow),
        "bn2": nn.BatchNorm2d(20, **norm),
    }
    parts |= {
        "act2": nn.ReLU6(),
        "pool": nn.AdaptiveAvgPool2d(1),
        "flat": nn.Flatten(),
        "classifier": nn.Linear(20, CLASSES),
    }
    return nn.Sequential(OrderedDict(parts))


@pytest.mark.parametrize(("architecture", "size"), [("efficientnet_lite0", 96), ("tf_efficientnet_lite1", 90)])
def test_timms_efficientnet_lite_is_a_source_with_the_names_of_its_classes(
    architecture: str, size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SARTOR_CACHE", str(tmp_path / "cache"))
    torch.manual_seed(0)
    model = lively(efficientnet_lite(architecture.startswith("tf_")).eval())
    folder = tmp_path / "lite"
    folder.mkdir()
    save_file({n: v.contiguous() for n, v in model.state_dict().items()}, folder / "model.safetensors")
    told = {"mean": [0.5, 0.4, 0.3], "std": [0.5, 0.6, 0.7], "input_size": [3, size, size]}
    config = {"architecture": architecture, "pretrained_cfg": told, "label_names": list("abcde")}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "other.safetensors").write_bytes(b"beside it")
    source, x = resolve(str(folder)), pictures(2, size)
    graph = load_seer(source.folder)
    assert (graph.size, source.classes, names_in(source.folder)) == (size, (), list("abcde"))
    rows, note = rows_for(source.folder, graph, source.classes, ["C", "x"])
    assert rows is not None
    assert (rows.known, note) == (1, "")
    mean, std = (torch.tensor(told[k])[:, None, None] for k in ("mean", "std"))
    wanted = model((x / 255 - mean) / std)
    assert (wanted[0] - wanted[1]).abs().max() > 1e-3
    close(graph(x), wanted)
    (folder / "config.json").write_text(json.dumps(config | {"pretrained_cfg": {"mean": [0.5]}}))
    with pytest.raises(SourceError, match="size of its pictures"):
        resolve(str(folder))
    (folder / "config.json").write_text(json.dumps(config | {"model_args": {"output_stride": 16}}))
    with pytest.raises(SourceError, match="output_stride"):
        resolve(str(folder))
    (folder / "config.json").write_text(json.dumps(config | {"architecture": "efficientnet_b0"}))
    with pytest.raises(SourceError, match="plain vision transformer"):
        load_seer(resolve(str(folder)).folder)


STAGES = (1, 2, 3, 2, 3)  # blocks of the small MobileNetV3


def timms_mobilenet_v3(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """torchvision's weights by timm's names; its batch norms have another epsilon, which the variances make good."""
    parts: dict[str, tuple[str, str]] = {
        "features.0": ("conv_stem", "bn1"),
        "features.12": ("blocks.5.0.conv", "blocks.5.0.bn1"),
    }
    squeezed, block = dict[str, str](), 1
    for stage, count in enumerate(STAGES):
        for n in range(count):
            theirs, ours = f"features.{block}.block", f"blocks.{stage}.{n}"
            numbers = sorted({int(name.split(".")[3]) for name in state if name.startswith(f"{theirs}.")})
            plain = [k for k in numbers if f"{theirs}.{k}.fc1.weight" not in state]
            convs = ["conv_pw", "conv_dw", "conv_pwl"] if len(plain) == 3 else ["conv_dw", "conv_pw"]
            for at, (k, conv) in enumerate(zip(plain, convs, strict=True), 1):
                parts[f"{theirs}.{k}"] = f"{ours}.{conv}", f"{ours}.bn{at}"
            squeezed |= {f"{theirs}.{k}": f"{ours}.se" for k in set(numbers) - set(plain)}
            block += 1
    found = {}
    for name, t in state.items():
        start, _, end = name.rpartition(".")
        at, _, which = start.rpartition(".")
        if at in parts:
            found[f"{parts[at][int(which)]}.{end}"] = t + 1e-3 - 1e-5 if end == "running_var" else t
        elif at in squeezed:
            found[f"{squeezed[at]}.{'conv_reduce' if which == 'fc1' else 'conv_expand'}.{end}"] = t
        else:
            new = {"classifier.0": "conv_head", "classifier.3": "classifier"}[start]
            found[f"{new}.{end}"] = t[..., None, None] if new == "conv_head" and end == "weight" else t
    return found


@pytest.mark.parametrize(
    ("architecture", "made", "named"),
    [
        ("mobilenetv3_small_100", mobilenet_v3, timms_mobilenet_v3),
        ("resnet18", lambda: resnet(Basic), dict),
        ("mobilenetv2_100", lambda: efficientnet_lite(False), dict),  # of the same parts
    ],
)
def test_timms_other_networks_are_read_by_their_names(
    architecture: str, made: Callable[[], nn.Module], named: Callable[[Any], dict[str, Tensor]]
) -> None:
    torch.manual_seed(0)
    model = lively(made().eval())
    told = {"mean": [0.5, 0.4, 0.3], "std": [0.5, 0.6, 0.7], "input_size": [3, 96, 96]}
    config = {"architecture": architecture, "pretrained_cfg": told}
    graph, x = from_timm(named(model.state_dict()), config), pictures(2, 96)
    mean, std = (torch.tensor(told[k])[:, None, None] for k in ("mean", "std"))
    wanted = model((x / 255 - mean) / std)
    assert (wanted[0] - wanted[1]).abs().max() > 1e-3
    close(graph(x), wanted)
    for odd in ({"architecture": "mobilenetv3_rw"}, {"model_args": {"output_stride": 16}}, {"global_pool": "max"}):
        with pytest.raises(SourceError, match="is not a plain one"):
            from_timm(named(model.state_dict()), config | odd)


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "mobilenet_v2": mobilenet_v2,
    "mobilenet_v3": mobilenet_v3,
    "resnet": lambda: resnet(Basic),
    "resnext": lambda: resnet(Bottleneck),
    "squeezenet": squeezenet,
}


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_is_put_together_from_its_names(name: str) -> None:
    torch.manual_seed(0)
    model = lively(NETWORKS[name]().eval())
    graph, x = from_torchvision(model.state_dict(), 96), pictures(2, 96)
    wanted = model(normalized(x))
    assert (wanted[0] - wanted[1]).abs().max() > 1e-3
    close(graph(x), wanted)


def test_torchvisions_weights_are_a_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SARTOR_CACHE", str(tmp_path / "cache"))
    torch.manual_seed(0)
    state = lively(resnet(Basic).eval()).state_dict()
    save_file({n: v.contiguous() for n, v in state.items()}, tmp_path / "resnet.safetensors")
    source = resolve(str(tmp_path / "resnet.safetensors"))
    assert kind_of(source.folder) == "pictures"
    again = load_seer(source.folder)
    assert again.size == SIZE
    assert torch.equal(again(pictures(1, SIZE)), from_torchvision(state)(pictures(1, SIZE)))
    with pytest.raises(InputError, match=f"{SIZE} were needed"):
        load_seer(source.folder, 96)
    save_file({"layer.weight": torch.ones(2)}, tmp_path / "other.safetensors")
    (tmp_path / "broken.safetensors").write_bytes(b"not weights")
    stem = {"conv1.weight": state["conv1.weight"][..., 2:5, 2:5].clone()}
    for name, more in (("gated", {"layer1.0.se.conv.weight": torch.ones(2)}), ("small", stem)):
        save_file({n: v.contiguous() for n, v in (state | more).items()}, tmp_path / f"{name}.safetensors")
    halves = {n: v.half() if v.is_floating_point() else v for n, v in state.items()}
    assert from_torchvision(halves)(pictures(1, SIZE)).shape == (1, CLASSES)
    wrong = (
        ("other", "no family"),
        ("broken", "not a safetensors"),
        ("gated", "se.conv.weight"),
        ("small", "first conv"),
    )
    for name, why in wrong:
        with pytest.raises(SourceError, match=why):
            resolve(str(tmp_path / f"{name}.safetensors"))


def test_a_graph_with_attention_is_not_taken_for_convolutions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SARTOR_CACHE", str(tmp_path / "cache"))
    ones = {"w": np.ones((4, 3, 3, 3), np.float32), "g": np.ones(4, np.float32)}
    nodes = [make_node("Conv", ["x", "w"], ["a"]), make_node("LayerNormalization", ["a", "g"], ["y"])]
    with pytest.raises(SourceError, match="vision transformer"):
        resolve(str(onnx_file(tmp_path / "m.onnx", nodes, ones)))
    plain = onnx_file(tmp_path / "p.onnx", [make_node("Conv", ["x", "w"], ["y"])], ones)
    assert kind_of(resolve(str(plain)).folder) == "pictures"
