"""Convolutional networks from torchvision's weights: what their names and shapes do not say is told here (timm's: `timm_families.py`).

Widths, depths, kernels and groups are those of the weights; a family adds strides, activations and the order of parts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from sartor.errors import SourceError
from sartor.model.graph import INPUT, Draft, Graph, normalization

SIZE = 224  # pixels of a side that they were trained on
ACTIVATIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "relu": ("relu", {}),
    "relu6": ("clip", {"low": 0.0, "high": 6.0}),
    "swish": ("hard_swish", {}),
    "gate": ("hard_sigmoid", {"scale": 1 / 6, "shift": 0.5}),
}
STRIDES_V2 = (1, 2, 1, 2, 1, 1, 2, 1, 1, 1, 1, 1, 1, 2, 1, 1, 1)
# (strides of the blocks, how many of the first have ReLU), by how many blocks there are
V3 = {15: ((1, 2, 1, 2, 1, 1, 2, 1, 1, 1, 1, 1, 2, 1, 1), 6), 11: ((2, 2, 1, 2, 1, 1, 1, 1, 2, 1, 1), 3)}


class _Noted(dict[str, Tensor]):
    """Weights by name, and which of them were read."""

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        super().__init__(weights)
        self.read: set[str] = set()

    def __getitem__(self, name: str) -> Tensor:
        self.read.add(name)
        return super().__getitem__(name)


@dataclass(frozen=True)
class Parts:
    """Weights by name, and the draft that they go into. same: windows are padded as TensorFlow does it, an odd number at the end."""

    weights: Mapping[str, Tensor]
    draft: Draft
    eps: float = 1e-5
    same: bool = False

    def has(self, name: str) -> bool:
        return f"{name}.weight" in self.weights

    def numbers(self, prefix: str) -> list[int]:
        """n of all names `prefix`.n."""
        at = prefix.count(".") + 1
        return sorted({int(n.split(".")[at]) for n in self.weights if n.startswith(f"{prefix}.")})

    def act(self, x: str, kind: str) -> str:
        op, attributes = ACTIVATIONS[kind]
        return self.draft.add(op, x, name=f"{x}_{kind}", **attributes)

    def linear(self, x: str, name: str) -> str:
        weight, bias = (self.weights[f"{name}.{end}"].float() for end in ("weight", "bias"))
        return self.draft.linear(x, weight, bias, name)

    def pooled(self, x: str) -> str:
        return self.draft.add("flatten", self.draft.add("global_average_pool", x))

    def added(self, x: str, y: str) -> str:
        return self.draft.add("add", x, y, name=f"{y}_add")

    def pool(self, x: str, ceil: bool, padding: int) -> str:
        sizes: dict[str, Any] = {"kernel": (3, 3), "stride": (2, 2), "padding": (padding, padding), "dilation": (1, 1)}
        return self.draft.add("max_pool", x, **sizes, ceil=ceil)

    def conv(
        self, x: str, name: str, norm: str = "", stride: int = 1, act: str = "", padding: int | None = None
    ) -> str:
        """A convolution that keeps the size but for its stride, the batch norm `norm` and an activation, where they are named."""
        weight = self.weights[f"{name}.weight"]
        kernel, strides = list(weight.shape[2:]), (stride, stride)
        sizes: dict[str, Any] = {"stride": strides, "padding": [k // 2 if padding is None else padding for k in kernel]}
        if self.same:
            pads = self.draft.same(x, kernel, strides, (1, 1), upper=True)
            x, sizes["padding"] = self.draft.padded(x, pads, kernel, 0.0)
        sizes["groups"] = self.draft.shape[x][0] // weight.shape[1]
        bias = self.weights[f"{name}.bias"].float() if f"{name}.bias" in self.weights else None
        x = self.draft.conv(x, weight.float(), bias, name, **sizes)
        if norm:
            gamma, beta, mean, variance = (
                self.weights[f"{norm}.{end}"].double() for end in ("weight", "bias", "running_mean", "running_var")
            )
            scale = (gamma / (variance + self.eps).sqrt())[:, None, None]
            self.draft.affine(x, scale, beta[:, None, None] - mean[:, None, None] * scale)
        return self.act(x, act) if act else x


def _inverted(p: Parts, x: str, name: str, stride: int, act: str) -> str:
    """Widening, depthwise convolution, squeeze and excite, narrowing: those that there are. A residual block where it keeps the size."""
    start, parts = x, [f"{name}.{n}" for n in p.numbers(name)]
    # a part is a convolution and its norm, squeeze and excite, or the one or the other by itself
    parts = [part for part in parts if not p.has(part) or p.weights[f"{part}.weight"].ndim == 4]
    for part in parts:
        if p.has(f"{part}.fc1"):
            gate = p.conv(p.draft.add("global_average_pool", x), f"{part}.fc1", act="relu")
            x = p.draft.add("mul", x, p.conv(gate, f"{part}.fc2", act="gate"), name=f"{part}.mul")
            continue
        if p.has(part):
            conv, norm = part, f"{name}.{int(part.split('.')[-1]) + 1}"
        else:
            conv, norm = f"{part}.0", f"{part}.1"
        own = stride if p.weights[f"{conv}.weight"].shape[1] == 1 else 1
        x = p.conv(x, conv, norm, own, act if part != parts[-1] else "")
    return p.added(start, x) if p.draft.shape[start] == p.draft.shape[x] else x


def _mobilenet_v2(p: Parts) -> str:
    x = p.conv(INPUT, "features.0.0", "features.0.1", 2, "relu6")
    for n, stride in enumerate(STRIDES_V2, 1):
        x = _inverted(p, x, f"features.{n}.conv", stride, "relu6")
    last = f"features.{len(STRIDES_V2) + 1}"
    return p.linear(p.pooled(p.conv(x, f"{last}.0", f"{last}.1", act="relu6")), "classifier.1")


def _mobilenet_v3(p: Parts) -> str:
    last = p.numbers("features")[-1]
    strides, relus = V3[last - 1]
    x = p.conv(INPUT, "features.0.0", "features.0.1", 2, "swish")
    for n, stride in enumerate(strides):
        x = _inverted(p, x, f"features.{n + 1}.block", stride, "relu" if n < relus else "swish")
    x = p.pooled(p.conv(x, f"features.{last}.0", f"features.{last}.1", act="swish"))
    return p.linear(p.act(p.linear(x, "classifier.0"), "swish"), "classifier.3")


def resnet(p: Parts) -> str:
    if (kernel := tuple(p.weights["conv1.weight"].shape[2:])) != (7, 7):
        raise ValueError(f"a ResNet whose first convolution is {kernel}, not (7, 7) as torchvision's")
    x = p.pool(p.conv(INPUT, "conv1", "bn1", 2, "relu"), False, 1)
    for stage in range(1, 5):
        for n in p.numbers(f"layer{stage}"):
            name, stride = f"layer{stage}.{n}", 2 if stage > 1 and n == 0 else 1
            parts = [k for k in (1, 2, 3) if p.has(f"{name}.conv{k}")]
            y = x
            for k in parts:  # the first convolution of 3 x 3 strides
                own, act = (stride if k == len(parts) - 1 else 1), ("relu" if k < len(parts) else "")
                y = p.conv(y, f"{name}.conv{k}", f"{name}.bn{k}", own, act)
            short = f"{name}.downsample"
            x = p.conv(x, f"{short}.0", f"{short}.1", stride) if p.has(f"{short}.0") else x
            x = p.act(p.added(x, y), "relu")
    return p.linear(p.pooled(x), "fc")


def _squeezenet(p: Parts) -> str:
    x, parts = p.conv(INPUT, "features.0", stride=2, act="relu", padding=0), p.numbers("features")
    for n in range(2, parts[-1] + 1):
        if n not in parts:  # a number without weights is a pooling
            x = p.pool(x, True, 0)
            continue
        squeezed = p.conv(x, f"features.{n}.squeeze", act="relu")
        sides = [p.conv(squeezed, f"features.{n}.expand{k}x{k}", act="relu") for k in (1, 3)]
        x = p.draft.add("concat", *sides, name=f"features.{n}.concat")
    return p.pooled(p.conv(x, "classifier.1", act="relu"))


# (a name that only this family has, how it is put together, epsilon of its batch norms)
FAMILIES: dict[str, tuple[str, Callable[[Parts], str], float]] = {
    "mobilenet_v2": ("features.1.conv.0.0.weight", _mobilenet_v2, 1e-5),
    "mobilenet_v3": ("features.1.block.0.0.weight", _mobilenet_v3, 1e-3),
    "resnet": ("layer1.0.conv1.weight", resnet, 1e-5),
    "squeezenet": ("features.3.squeeze.weight", _squeezenet, 1e-5),
}


def from_torchvision(weights: Mapping[str, Tensor], size: int = SIZE) -> Graph:
    """The network of a torchvision state dict, MobileNetV2 or V3, a ResNet or SqueezeNet, for pictures of `size` pixels a side.

    Raises:
        SourceError: it is of none of these families, or its weights do not fit together.
    """
    rows = [row for row in FAMILIES.values() if row[0] in weights]
    if len(rows) != 1:
        raise SourceError(
            f"these {len(weights)} weights are of no family that Sartor knows: give torchvision's {', '.join(FAMILIES)}, an ONNX file, or the folder of a transformers model"
        )
    _, build, eps = rows[0]
    return built(weights, build, Parts({}, Draft(size, *normalization()), eps))


def built(weights: Mapping[str, Tensor], build: Callable[[Parts], str], parts: Parts) -> Graph:
    """The network that a family makes of all of these weights.

    Raises:
        SourceError: they do not fit together.
    """
    noted = _Noted(weights)
    try:
        end = build(replace(parts, weights=noted))
        if left := sorted(n for n in weights if n not in noted.read and not n.endswith("num_batches_tracked")):
            raise ValueError(f"{len(left)} of them belong to nothing, as {left[0]}")
        return parts.draft.graph(end)
    except (LookupError, ValueError, RuntimeError) as error:
        why = str(error.args[0] if error.args else type(error).__name__).splitlines()[0][:100]
        raise SourceError(
            f"these weights do not fit together ({why}): give torchvision's or timm's own, or an ONNX file"
        ) from error
