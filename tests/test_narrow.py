"""Laws of heads whose queries and keys have fewer dimensions than their values."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from sartor import picture_storage
from sartor.export import onnx_file, onnxrt
from sartor.model.network import anatomy, clone, masked, shrink_attention_
from sartor.plan import LayerPlan, Plan, to_mask
from sartor.stages.head import choose_head, with_head
from sartor.stages.narrow import moments_of_heads, narrowed, widths
from sartor.stages.recognition import kl_of, said_of
from tests.test_pictures import drawn, network


@pytest.fixture(scope="module")
def seen() -> torch.Tensor:
    return drawn(48, 1)[0]


@pytest.fixture(scope="module")
def whole() -> Any:
    model = network()
    model = with_head(model, choose_head(model, *drawn(60, 1), 3))
    for layer in model.model.layers:  # random queries and keys compare nothing: logits of a trained network are larger
        layer.self_attn.q_proj.weight.data *= 6
        layer.self_attn.k_proj.weight.data *= 6
    return model


def test_all_dimensions_say_what_the_network_says(whole: Any, seen: torch.Tensor) -> None:
    same = narrowed(whole, moments_of_heads(whole, seen), anatomy(whole).head_dim)
    assert torch.allclose(same(seen), whole(seen), atol=1e-4)


def test_the_more_dimensions_the_less_it_costs_and_less_than_taking_some(whole: Any, seen: torch.Tensor) -> None:
    fresh = drawn(32, 2)[0]
    said = said_of(whole, fresh)
    costs = [kl_of(narrowed(whole, moments_of_heads(whole, seen), keys), fresh, said) for keys in (4, 8, 12, 16)]
    assert costs == sorted(costs, reverse=True)
    assert costs[0] > 1e-4
    plain = clone(whole)
    for layer in plain.model.layers:
        layer.self_attn.q_proj.weight.data.unflatten(0, (-1, 16))[:, 8:] = 0
        layer.self_attn.q_proj.bias.data.unflatten(0, (-1, 16))[:, 8:] = 0
    assert costs[1] < 0.5 * kl_of(plain, fresh, said)


def test_heads_leave_a_narrowed_network_as_they_leave_a_whole_one(whole: Any, seen: torch.Tensor) -> None:
    small = narrowed(whole, moments_of_heads(whole, seen), 8)
    a = anatomy(small)
    assert a.key_dim == 8
    assert a.groups == anatomy(whole).groups
    assert a.linear_shapes(0)["self_attn.q_proj"] == tuple(small.model.layers[0].self_attn.q_proj.weight.shape)
    keep = torch.tensor([True, False, *[True] * (a.groups[0] - 2)])
    with masked(small, {0: keep}, {}):
        asked = small(seen)
    shrink_attention_(small, 0, keep.nonzero().flatten().tolist())
    assert torch.allclose(small(seen), asked, atol=1e-5)


@pytest.mark.parametrize("weights", ["fp32", "int8", "int4"])
def test_the_file_of_a_narrowed_network_says_what_it_says_and_has_the_bytes_foretold(
    weights: str, seen: torch.Tensor, tmp_path: Path
) -> None:
    pytest.importorskip("onnxruntime")
    model = network()
    model = with_head(model, choose_head(model, *drawn(60, 1), 3))
    small = narrowed(model, moments_of_heads(model, seen), 8)
    shrink_attention_(small, 1, [0])
    onnx_file.write(tmp_path / "m.onnx", small, weights)
    assert (tmp_path / "m.onnx").stat().st_size == onnx_file.file_bytes(small.config, anatomy(small), weights)
    said = onnxrt.outputs(tmp_path / "m.onnx", seen[:8].numpy())
    held = onnx_file.dequantized(small, weights)
    assert torch.nn.functional.cosine_similarity(torch.tensor(said["features"]), held.features(seen[:8])).min() > 0.999
    if weights == "fp32":
        assert torch.allclose(torch.tensor(said["logits"]), held(seen[:8]), atol=1e-4)


def test_a_narrowed_network_is_the_same_after_a_round_trip(whole: Any, seen: torch.Tensor, tmp_path: Path) -> None:
    small = narrowed(whole, moments_of_heads(whole, seen), 8)
    shrink_attention_(small, 0, [0])
    a = anatomy(small)
    layers = tuple(LayerPlan(to_mask(range(g), g), to_mask(range(f), f)) for g, f in zip(a.groups, a.ffn, strict=True))
    plan = Plan("", "vit", 0, 0, None, None, layers, {}, 0.0, 0.0, {}, {}, {}, 0.3, 0)
    picture_storage.save(small, plan, ["a"] * small.config.classes, {}, tmp_path)
    again, _, _ = picture_storage.load(tmp_path)
    assert again.config == replace(whole.config, keys=8)
    assert torch.equal(again(seen[:4]), small(seen[:4]))


def test_what_all_keys_of_a_picture_share_costs_no_dimension(seen: torch.Tensor) -> None:
    model = network()
    moved = clone(model)
    for n, layer in enumerate(moved.model.layers):
        layer.self_attn.k_proj.bias.data += 50 * torch.randn(64, generator=torch.Generator().manual_seed(n))
    one, other = (narrowed(m, moments_of_heads(m, seen), 8) for m in (model, moved))
    assert torch.allclose(one.features(seen[:8]), other.features(seen[:8]), atol=1e-3)


def test_a_head_that_compares_nothing_still_compares_nothing(whole: Any, seen: torch.Tensor) -> None:
    still = clone(whole)
    for name in ("q_proj", "k_proj"):
        getattr(still.model.layers[0].self_attn, name).weight.data[:16] = 0
        getattr(still.model.layers[0].self_attn, name).bias.data[:16] = 0
    small = narrowed(still, moments_of_heads(still, seen), 16)
    assert torch.allclose(small(seen[:8]), still(seen[:8]), atol=1e-4)


def test_widths_are_steps_below_the_heads_own(whole: Any) -> None:
    dims = anatomy(whole).head_dim
    assert all(keys < dims and keys % 8 == 0 for keys in widths(whole))
    assert widths(whole) == sorted(widths(whole), reverse=True)
