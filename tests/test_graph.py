"""Convolutional networks as data: what goes together, what a cut does, and what an ONNX file says of them."""

from __future__ import annotations

import random
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from sartor.errors import InputError, SourceError
from sartor.export import onnxrt
from sartor.export.graph_file import write
from sartor.model.cnn_families import from_torchvision
from sartor.model.graph import INPUT, MEAN, STD, Draft, Graph, macs, normalization
from sartor.model.graph_branches import branches
from sartor.model.graph_channels import at_size, channel_groups, ended, ends_of, masked, shrink, with_head
from sartor.model.graph_onnx import read_graph

SIZE, CLASSES = 24, 5


class Maker:
    """A random network, part by part; every bias is felt."""

    def __init__(self, seed: int) -> None:
        self.g = torch.Generator().manual_seed(seed)
        self.draft = Draft(SIZE, *normalization())

    def conv(self, x: str, out: int, kernel: int = 1, stride: int = 1, groups: int = 1) -> str:
        inside = self.draft.shape[x][0] // groups
        weight = torch.randn(out, inside, kernel, kernel, generator=self.g) * (2 / (inside * kernel**2)) ** 0.5
        sizes: Any = {"stride": (stride, stride), "padding": (kernel // 2, kernel // 2), "groups": groups}
        return self.draft.conv(x, weight, torch.randn(out, generator=self.g), **sizes)

    def act(self, x: str, op: str = "relu") -> str:
        return self.draft.add(op, x, **({"low": 0.0, "high": 6.0} if op == "clip" else {}))

    def depthwise(self, x: str, times: int = 1, stride: int = 1) -> str:
        channels = self.draft.shape[x][0]
        return self.conv(x, times * channels, 3, stride, channels)

    def gate(self, x: str) -> str:
        """Squeeze and excite."""
        squeezed = self.act(self.conv(self.draft.add("global_average_pool", x), 4))
        wide = self.conv(squeezed, self.draft.shape[x][0])
        return self.draft.add("mul", x, self.draft.add("hard_sigmoid", wide, scale=1 / 6, shift=0.5))

    def linear(self, x: str, out: int) -> str:
        inside = self.draft.shape[x][0]
        weight = torch.randn(out, inside, generator=self.g) * inside**-0.5
        return self.draft.linear(x, weight, torch.randn(out, generator=self.g))

    def done(self, x: str, pooled: bool = True) -> Graph:
        x = self.draft.add("global_average_pool", x) if pooled else x
        return self.draft.graph(self.linear(self.draft.add("flatten", x), CLASSES))


def plain(m: Maker) -> Graph:
    x = m.act(m.conv(INPUT, 8, 3, 2))
    sizes: Any = {"kernel": (3, 3), "stride": (2, 2), "dilation": (1, 1), "ceil": True, "padding": (1, 1)}
    x = m.act(m.conv(m.draft.add("max_pool", x, **sizes), 12, 3), "hard_swish")
    x = m.draft.add("flatten", x)  # a channel is 49 numbers of it
    return m.draft.graph(m.linear(m.act(m.linear(x, 10)), CLASSES))


def residual(m: Maker) -> Graph:
    x = m.act(m.conv(INPUT, 8, 3, 2))
    for out, stride in ((8, 1), (12, 2)):
        y = m.conv(m.act(m.conv(x, 6, 3, stride)), out, 3)
        x = m.act(m.draft.add("add", m.conv(x, out, 1, stride) if stride > 1 else x, y))
    return m.done(x)


def inverted(m: Maker) -> Graph:
    x = m.act(m.conv(INPUT, 8, 3, 2), "clip")
    for out, stride in ((8, 1), (10, 2), (10, 1)):
        y = m.gate(m.act(m.depthwise(m.act(m.conv(x, 16), "clip"), 1, stride), "clip"))
        y = m.conv(y, out)
        x = m.draft.add("add", x, y) if m.draft.shape[x] == m.draft.shape[y] else y
    x = m.act(m.depthwise(x, times=2))
    return m.done(m.draft.add("mul", x, m.act(x, "sigmoid")))


def fire(m: Maker) -> Graph:
    x = m.act(m.conv(INPUT, 8, 3, 2))
    for _ in range(2):
        squeezed = m.act(m.conv(x, 5))
        x = m.draft.add("concat", m.act(m.conv(squeezed, 6)), m.act(m.conv(squeezed, 7, 3)))
    x = m.draft.add("add", x, m.conv(x, 13, 3))  # the concatenation meets other channels
    return m.done(m.act(x), pooled=False)


def grouped(m: Maker) -> Graph:
    x = m.act(m.conv(INPUT, 12, 3, 2))
    y = m.act(m.conv(m.act(m.conv(x, 16)), 24, 3, 1, groups=4))
    x = m.draft.add("add", x, m.conv(y, 12))
    both = m.draft.add("concat", x, m.conv(x, 12))
    x = m.conv(both, 12, 3, 1, groups=6)  # groups that lie in one of the two, or in the other
    x = m.draft.add("mul", x, m.act(m.conv(x, 1), "sigmoid"))  # one gate for all channels
    sizes: Any = {"kernel": (2, 2), "stride": (2, 2), "padding": (0, 0), "ceil": False, "count_padding": True}
    return m.done(m.draft.add("average_pool", m.draft.add("pad", x, pads=(0, 1, 1, 0), value=0.5), **sizes))


KINDS: list[Callable[[Maker], Graph]] = [plain, residual, inverted, fire, grouped]


def pictures(n: int = 2, size: int = SIZE) -> Tensor:
    return torch.randint(0, 256, (n, 3, size, size), generator=torch.Generator().manual_seed(7), dtype=torch.uint8)


def some(graph: Graph, seed: int) -> dict[str, Tensor]:
    """Some units of most groups, in no order."""
    draw, keep = random.Random(seed), {}
    for group in channel_groups(graph):
        if group.units > 1 and draw.random() < 0.8:
            kept = set(draw.sample(range(group.units), draw.randint(1, group.units - 1)))
            keep[group.name] = torch.tensor([u in kept for u in range(group.units)])
    return keep


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(4))
def test_a_shrunk_network_says_what_the_masked_one_says(kind: Callable[[Maker], Graph], seed: int) -> None:
    graph = kind(Maker(seed))
    keep, x = some(graph, seed), pictures()
    dense = graph(x)
    with masked(graph, keep):
        logits, features = graph(x), graph.features(x)
    small = shrink(graph, keep)
    close(small(x), logits)
    assert (logits - dense).abs().max() > 1e-2  # the cut is felt
    assert torch.equal(graph(x), dense)
    # the same features in the same order, without those that are gone
    stays = torch.ones(graph.layers[graph.nodes[-1].name].in_features, dtype=torch.bool)
    for group in (g for g in channel_groups(graph) if g.name in keep):
        part = group.columns.get(graph.nodes[-1].name)
        if part is not None:
            stays[part.at] = keep[group.name][part.unit]
    close(small.features(x), features[:, stays])
    assert not features[:, ~stays].any()
    again = some(small, seed + 1)  # and so on
    with masked(small, again):
        logits = small(x)
    close(shrink(small, again)(x), logits)


@pytest.mark.parametrize("kind", KINDS)
def test_every_unit_is_in_one_group_and_the_ends_are_in_none(kind: Callable[[Maker], Graph]) -> None:
    graph = kind(Maker(0))
    groups = channel_groups(graph)
    assert len({g.name for g in groups}) == len(groups)
    rows: dict[str, list[int]] = {}
    for group in groups:
        for name, part in group.rows.items():
            rows.setdefault(name, []).extend(part.at.tolist())
            assert sorted(set(part.unit.tolist())) == list(range(group.units))
    assert all(len(set(at)) == len(at) for at in rows.values())
    assert graph.nodes[-1].name not in rows
    assert graph.nodes[0].name not in {n for g in groups for n in g.columns}


def test_groups_are_those_that_a_person_would_draw() -> None:
    m = Maker(0)
    first = m.act(m.conv(INPUT, 8, 3))
    wide = m.gate(m.depthwise(m.conv(first, 16)))
    graph = m.done(m.draft.add("concat", m.draft.add("add", first, m.conv(wide, 8)), m.conv(wide, 6)))
    found = {(tuple(g.rows), tuple(g.columns), g.units) for g in channel_groups(graph)}
    conv = [n.name for n in graph.nodes if n.op == "conv"]
    head = graph.nodes[-1].name
    assert found == {
        ((conv[0], conv[5]), (conv[1], head), 8),  # the stream
        ((conv[1], conv[2], conv[4]), (conv[3], conv[5], conv[6]), 16),  # the wide part, with its gate
        ((conv[3],), (conv[4],), 4),  # the squeezed part
        ((conv[6],), (head,), 6),
    }


def blocks(m: Maker) -> Graph:
    """Two residual blocks of three layers that keep their size behind one that does not, and one that reads what lies before the block it is in."""
    x = m.act(m.conv(INPUT, 8, 3, 2))
    x = m.draft.add("add", m.conv(x, 12, 1, 2), m.conv(m.act(m.conv(x, 6, 3, 2)), 12, 3))
    for _ in range(2):
        x = m.draft.add("add", x, m.conv(m.act(m.depthwise(m.act(m.conv(x, 16)))), 12))
    y = m.act(m.conv(x, 10))
    return m.done(m.draft.add("add", x, m.conv(m.draft.add("add", y, m.conv(x, 10)), 12)))


def test_residual_blocks_are_those_that_a_person_would_draw() -> None:
    graph = blocks(Maker(0))
    adds = [n for n in graph.nodes if n.op == "add"]
    found = branches(graph)
    assert [b.add for b in found] == [adds[1].name, adds[2].name, adds[4].name]
    assert [(b.skip, b.last) for b in found] == [a.inputs for a in (adds[1], adds[2], adds[4])]
    assert [len(b.inside) for b in found] == [5, 5, 5]
    groups = channel_groups(graph)
    ends = ends_of(graph, groups)
    assert {name: b.add for name, b in ends.items()} == {
        next(g.name for g in groups if {*g.rows, *g.columns} <= b.inside): b.add for b in found
    }
    assert not ends_of(fire(Maker(0)), channel_groups(fire(Maker(0))))
    assert not ends_of(plain(Maker(0)), channel_groups(plain(Maker(0))))


@pytest.mark.parametrize("which", [[0], [1], [0, 1], [2], [0, 1, 2]])
@pytest.mark.parametrize("kind", [blocks, inverted])
def test_a_residual_block_with_nothing_left_to_read_is_gone(kind: Callable[[Maker], Graph], which: list[int]) -> None:
    graph, x = kind(Maker(1)), pictures()
    ends = list(ends_of(graph, channel_groups(graph)).items())
    gone = dict(ends[n % len(ends)] for n in which)
    units = {g.name: g.units for g in channel_groups(graph)}
    keep = some(graph, 1) | {name: torch.zeros(units[name], dtype=torch.bool) for name in gone}
    small = shrink(graph, keep)
    with masked(graph, keep):
        close(small(x), graph(x))
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in graph.modules())
    left = {n.name for n in small.nodes}
    assert not left & set().union(*({b.add, *b.inside} for b in gone.values()))
    assert set(small.layers) <= left
    assert len(left) == len(graph.nodes) - len(set().union(*({b.add, *b.inside} for b in gone.values())))


def test_bottlenecks_squeezed_blocks_and_what_is_cut_off_twice() -> None:
    m = Maker(0)
    x = m.act(m.conv(INPUT, 8, 3, 2))
    for _ in range(2):  # as in ResNet-50: two groups in a block, and a relu behind the sum
        x = m.act(m.draft.add("add", x, m.conv(m.act(m.conv(m.act(m.conv(x, 6)), 6, 3)), 8)))
    graph, x = m.done(x), pictures()
    groups = channel_groups(graph)
    ends = ends_of(graph, groups)
    assert len(groups) == 5
    assert len(ends) == 2
    keep = {name: torch.zeros(6, dtype=torch.bool) for name in ends}
    small = shrink(graph, keep)
    with masked(graph, keep):
        close(small(x), graph(x))
    assert [n.op for n in small.nodes] == ["conv", "relu", "global_average_pool", "flatten", "linear"]
    broad = Maker(0)
    y = broad.act(broad.conv(INPUT, 6, 3, 2))
    graph = broad.done(
        broad.draft.add("add", broad.conv(y, 1), broad.conv(broad.act(broad.conv(broad.conv(y, 1), 4)), 6))
    )
    assert not branches(graph)  # what would be left is narrower


def test_a_network_reads_pictures_of_another_size_where_its_layers_can() -> None:
    graph = blocks(Maker(0))
    other = at_size(graph, SIZE // 2)
    assert other is not None
    assert other(pictures(2, SIZE // 2)).shape == (2, CLASSES)
    other.layers[graph.nodes[0].name].weight.data.zero_()
    assert graph.layers[graph.nodes[0].name].weight.any()  # it is a copy
    again = at_size(graph, SIZE)
    assert again is not None
    assert torch.equal(again(pictures()), graph(pictures()))
    assert at_size(plain(Maker(0)), 2 * SIZE) is None  # a matrix for so many places


def test_masks_leave_nothing_behind_also_when_the_body_raises() -> None:
    graph = inverted(Maker(0))
    with pytest.raises(ZeroDivisionError), masked(graph, some(graph, 0)):
        raise ZeroDivisionError
    assert not any(m._forward_pre_hooks for m in graph.modules())


def test_a_mask_that_does_not_fit_is_refused() -> None:
    graph = residual(Maker(0))
    name = channel_groups(graph)[0].name
    for keep in ({"nobody": torch.ones(3).bool()}, {name: torch.ones(3).bool()}, {name: torch.zeros(8).bool()}):
        with pytest.raises(InputError, match="channel_groups"):
            shrink(graph, keep)


@pytest.mark.parametrize("kind", KINDS)
def test_every_multiplication_is_counted(kind: Callable[[Maker], Graph]) -> None:
    graph = kind(Maker(0))
    for network in (graph, shrink(graph, some(graph, 0))):
        with FlopCounterMode(display=False) as counter:
            network(pictures(1))
        assert 2 * sum(macs(network).values()) == counter.get_total_flops()


@pytest.mark.parametrize("kind", KINDS)
def test_a_network_is_the_same_in_its_file_in_the_runtime_and_read_again(
    kind: Callable[[Maker], Graph], tmp_path: Path
) -> None:
    graph, file = kind(Maker(0)), tmp_path / "m.onnx"
    write(file, graph)
    again = read_graph(file, (0.1,) * 3, (0.9,) * 3)  # it normalizes pixels itself
    assert [n.name for n in again.nodes] == [n.name for n in graph.nodes]
    assert torch.equal(again(pictures()), graph(pictures()))
    write(tmp_path / "again.onnx", again)
    assert (tmp_path / "again.onnx").read_bytes() == file.read_bytes()
    said = onnxrt.outputs(file, pictures().numpy())
    assert said.keys() == {"logits", "features"}
    close(torch.from_numpy(said["logits"]), graph(pictures()))
    close(torch.from_numpy(said["features"]), graph.features(pictures()))


class Exported(nn.Module):
    """What torch's exporter makes of all this: norms apart, activations spelled out, shapes computed."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.Hardswish())
        self.wide = nn.Sequential(nn.Conv2d(8, 8, 5, 1, 4, 2, groups=8, bias=False), nn.BatchNorm2d(8), nn.ReLU6())
        self.norm, self.drop = nn.BatchNorm2d(16), nn.Dropout()
        self.fc = nn.Sequential(nn.Linear(16, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Linear(12, CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.pad(self.stem(x), (0, 1, 0, 1))
        x = nn.functional.max_pool2d(torch.cat([x, x + self.wide(x)], 1), 3, 2, 1)
        x = self.norm(x) * (nn.functional.relu6(x + 3) / 6) + 0.5
        x = nn.functional.adaptive_avg_pool2d(x, 1) + x.mean((2, 3), keepdim=True)
        return self.fc(self.drop(x.view(x.shape[0], -1)))


def lively(model: nn.Module) -> Any:
    """Norms that do something, and a signal that lasts."""
    for conv in (m for m in model.modules() if isinstance(m, nn.Conv2d)):
        conv.weight.data = torch.randn_like(conv.weight) * (2 / conv.weight[0].numel()) ** 0.5
    for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d | nn.BatchNorm1d)):
        for part, value in (("weight", 1.0), ("bias", 0.0), ("running_mean", 0.0), ("running_var", 1.0)):
            getattr(norm, part).data = value + 0.2 * torch.rand_like(getattr(norm, part))
    return model.requires_grad_(False)


def normalized(pixels: Tensor) -> Tensor:
    return (pixels / 255 - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]


@pytest.mark.parametrize("folded", [True, False])
@pytest.mark.filterwarnings("ignore")
def test_what_torch_exports_is_read_as_it_computes(tmp_path: Path, folded: bool) -> None:
    torch.manual_seed(0)
    model = lively(Exported().eval())
    x = normalized(pictures())
    how: Any = {"dynamic_axes": {"x": {0: "n"}}, "input_names": ["x"], "dynamo": False, "do_constant_folding": folded}
    mode = torch.onnx.TrainingMode.EVAL if folded else torch.onnx.TrainingMode.PRESERVE
    torch.onnx.export(model, (x,), str(tmp_path / "m.onnx"), **how, training=mode, opset_version=17)
    graph = read_graph(tmp_path / "m.onnx")
    close(graph(pictures()), model(x))
    # a norm behind a convolution is in it; one behind anything else, and three constants, are depthwise convolutions
    assert sum(n.op == "conv" for n in graph.nodes) == 2 + 4


def onnx_file(path: Path, nodes: list[Any], arrays: dict[str, Any], sides: tuple[Any, ...] = ("n", 3, 8, 8)) -> Path:
    import onnx

    pixels, y = (onnx.helper.make_tensor_value_info(n, 1, s) for n, s in (("x", sides), ("y", None)))
    tensors = [onnx.numpy_helper.from_array(np.asarray(v), k) for k, v in arrays.items()]
    graph = onnx.helper.make_graph(nodes, "g", [pixels], [y], tensors)
    path.write_bytes(onnx.helper.make_model(graph).SerializeToString())
    return path


def test_an_operator_that_is_not_read_is_named_in_one_line(tmp_path: Path) -> None:
    from onnx import TensorProto
    from onnx.helper import make_node

    weight = {"w": np.ones((4, 3, 3, 3), np.float32)}
    conv = make_node("Conv", ["x", "w"], ["a"])
    cases = {
        "Einsum": ([conv, make_node("Einsum", ["a"], ["y"], equation="abcd->a")], weight),
        "Transpose": ([make_node("Transpose", ["x"], ["y"], perm=[0, 2, 3, 1])], {}),
        "Conv": ([make_node("Conv", ["x", "w"], ["y"], domain="elsewhere")], weight),
        "Reshape": ([make_node("Reshape", ["x", "s"], ["y"])], {"s": np.array([3, -1])}),
        "ReduceMean": ([make_node("ReduceMean", ["x", "s"], ["y"])], {"s": np.array([1])}),
    }
    for op, (nodes, arrays) in cases.items():
        with pytest.raises(SourceError, match=op) as error:
            read_graph(onnx_file(tmp_path / "m.onnx", nodes, arrays))
        assert "\n" not in str(error.value)
        assert str(tmp_path) not in str(error.value)
    bad = {
        "training": ([make_node("BatchNormalization", ["x", *"cccc"], ["y"], training_mode=1)], {"c": np.ones(3)}),
        "whole numbers": ([make_node("Cast", ["x"], ["y"], to=7)], {}),
        "a map of": ([make_node("Conv", ["x", "w"], ["y"])], {"w": np.ones((2**22, 3, 1, 1), np.float32)}),
    }
    for why, (nodes, arrays) in bad.items():
        with pytest.raises(SourceError, match=why):
            read_graph(onnx_file(tmp_path / "m.onnx", nodes, arrays))
    outside = make_node("ConstantOfShape", ["s"], ["k"], value=TensorProto(dims=[1], data_type=1, data_location=1))
    nodes = [outside, make_node("Add", ["x", "k"], ["y"])]
    with pytest.raises(SourceError, match="other files"):
        read_graph(onnx_file(tmp_path / "m.onnx", nodes, {"s": np.array([1])}))
    for sides in (("n", 3, 8, 9), ("n", 1, 8, 8), ("n", 3, 10**6, 10**6)):
        with pytest.raises(SourceError, match="pictures"):
            read_graph(onnx_file(tmp_path / "m.onnx", [make_node("Relu", ["x"], ["y"])], {}, sides))


@pytest.mark.parametrize("auto", ["SAME_UPPER", "SAME_LOWER"])
def test_padding_that_a_file_leaves_open_is_the_runtimes(tmp_path: Path, auto: str) -> None:
    import onnxruntime
    from onnx.helper import make_node

    weight = {"w": np.random.default_rng(0).normal(size=(4, 3, 3, 3)).astype(np.float32)}
    nodes = [
        make_node("Conv", ["x", "w"], ["a"], auto_pad=auto, strides=[2, 2]),
        make_node("MaxPool", ["a"], ["y"], auto_pad=auto, kernel_shape=[2, 2]),
    ]
    file = onnx_file(tmp_path / "m.onnx", nodes, weight)
    graph = read_graph(file)
    x = graph.embed(pictures(2, 8))
    said = onnxruntime.InferenceSession(str(file)).run(None, {"x": x.numpy()})[0]
    close(graph.run(x, 0, len(graph.nodes)), torch.from_numpy(said))


def test_a_factor_behind_an_output_or_another_reader_stays_its_own(tmp_path: Path) -> None:
    import onnxruntime
    from onnx.helper import make_node

    arrays = {"w": np.random.default_rng(0).normal(size=(4, 192)).astype(np.float32), "two": np.array(2, np.float32)}
    nodes = [
        make_node("Flatten", ["x"], ["f"]),
        make_node("Gemm", ["f", "w"], ["g"], transB=1),
        make_node("Flatten", ["g"], ["h"]),
        make_node("Mul", ["h", "two"], ["m"]),
        make_node("Relu", ["g"], ["r"]),
        make_node("Add", ["m", "r"], ["y"]),
    ]
    file = onnx_file(tmp_path / "m.onnx", nodes, arrays)
    graph = read_graph(file)
    x = graph.embed(pictures(2, 8))
    said = onnxruntime.InferenceSession(str(file)).run(None, {"x": x.numpy()})[0]
    close(graph.run(x, 0, len(graph.nodes)), torch.from_numpy(said))


def test_a_head_can_be_put_on_anywhere() -> None:
    graph = inverted(Maker(0))
    for at in (None, graph.nodes[5].name):
        headless = ended(graph, at)
        assert headless.head is None
        features = headless(pictures())
        weight, bias = torch.randn(7, features.shape[1]), torch.randn(7)
        made = with_head(headless, weight, bias)
        close(made(pictures()), features @ weight.T + bias)
        close(made.pool(made.hidden(pictures())), features)
        assert {g.name for g in channel_groups(headless)} < {g.name for g in channel_groups(made)}
    with pytest.raises(InputError, match="features"):
        with_head(graph, torch.randn(7, 3), torch.randn(7))
    with pytest.raises(InputError, match="nobody"):
        ended(graph, "nobody")


class Inverted(nn.Module):
    """As torchvision's: names, order, arithmetic."""

    def __init__(self, inside: int, out: int, times: int, stride: int) -> None:
        super().__init__()
        wide = inside * times
        first = [norms(inside, wide, 1, 1, nn.ReLU6())] if times > 1 else []
        last = [nn.Conv2d(wide, out, 1, bias=False), nn.BatchNorm2d(out)]
        self.conv = nn.Sequential(*first, norms(wide, wide, 3, stride, nn.ReLU6(), wide), *last)
        self.same = stride == 1 and inside == out

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.same else self.conv(x)


def norms(inside: int, out: int, kernel: int, stride: int, act: nn.Module, groups: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(inside, out, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(out), act)


def mobilenet_v2() -> nn.Module:
    stages = ((1, 4, 1, 1), (6, 6, 2, 2), (6, 8, 3, 2), (6, 10, 4, 2), (6, 12, 3, 1), (6, 14, 3, 2), (6, 16, 1, 1))
    blocks, width = [norms(3, 8, 3, 2, nn.ReLU6())], 8
    for times, out, count, stride in stages:
        for n in range(count):
            blocks.append(Inverted(width, out, times, stride if n == 0 else 1))  # type: ignore[arg-type]
            width = out
    features = nn.Sequential(*blocks, norms(width, 20, 1, 1, nn.ReLU6()))
    head = nn.Sequential(nn.Dropout(), nn.Linear(20, CLASSES))
    parts = {"features": features, "pool": nn.AdaptiveAvgPool2d(1), "flat": nn.Flatten(), "classifier": head}
    return nn.Sequential(OrderedDict(parts))


def test_torchvisions_mobilenet_is_put_together_from_its_names() -> None:
    torch.manual_seed(0)
    model = lively(mobilenet_v2().eval())
    graph, x = from_torchvision(model.state_dict(), 64), pictures(2, 64)
    wanted = model(normalized(x))
    assert (wanted[0] - wanted[1]).abs().max() > 1e-3
    close(graph(x), wanted)
    damaged = mobilenet_v2().state_dict()
    damaged["features.5.conv.2.weight"] = torch.ones(9, 9, 1, 1)
    for weights, why in ((damaged, "fit together"), ({"a": torch.ones(1)}, "family")):
        with pytest.raises(SourceError, match=why):
            from_torchvision(weights, 64)
