"""ONNX files: what they hold, how large they are, and what ONNX Runtime makes of them."""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from sartor.errors import InputError, MissingExtra, SartorError
from sartor.export import onnxrt
from sartor.export.onnx_file import WEIGHTS, build, dequantized, file_bytes, write
from sartor.model.network import anatomy, linears_of, shrink_attention_, shrink_mlp_
from sartor.model.vision import ACTIVATIONS, Vision, VisionConfig
from sartor.numerics.eight import rounded
from sartor.numerics.four import FOUR, nearest_scales
from sartor.numerics.grids import snap

PICO = VisionConfig("dinov2", 64, 4, 128, 3, 28, 7, prefix=2, classes=5)
# rounding activations to 8 bits turns the features by a tenth of this (1 - cosine), a bias at the wrong channels by ten times as much
TOLERANCE = 1e-3


def network(config: VisionConfig = PICO, unequal: bool = True, seed: int = 0) -> Vision:
    """Random weights; one layer without attention, one without MLP, the rest of unequal sizes."""
    torch.manual_seed(seed)
    model = Vision(config).eval().requires_grad_(False)
    for name, p in model.named_parameters():
        p.data = torch.randn_like(p) * (p[0].numel() ** -0.5 if name.endswith("weight") and p.ndim > 1 else 0.3)
        p.data += 1.0 * (name.endswith("norm.weight"))
    if unequal:
        shrink_attention_(model, 0, [0, 2, 3])
        shrink_attention_(model, 1, [])
        shrink_mlp_(model, 0, torch.arange(96))
        shrink_mlp_(model, 2, torch.arange(0))
    return model


def pictures(n: int, size: int = PICO.size) -> np.ndarray:
    return np.random.default_rng(1).integers(0, 256, (n, 3, size, size), dtype=np.uint8)


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(((a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)).min())


def torch_outputs(model: Vision, pixels: np.ndarray) -> dict[str, np.ndarray]:
    features = model.features(torch.from_numpy(pixels))
    return {"features": features.numpy()} | ({} if model.head is None else {"logits": model.head(features).numpy()})


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_an_fp32_file_says_what_pytorch_says(tmp_path: Path, activation: str) -> None:
    model = network(replace(PICO, activation=activation, first_norm=activation == "quick_gelu"))
    write(tmp_path / "m.onnx", model, "fp32")
    found, wanted = onnxrt.outputs(tmp_path / "m.onnx", pictures(3)), torch_outputs(model, pictures(3))
    assert found.keys() == wanted.keys()
    assert all(np.abs(found[k] - wanted[k]).max() < 1e-4 for k in found)


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_a_rounded_file_says_what_its_dequantized_network_says(tmp_path: Path, weights: str) -> None:
    model = network()
    write(tmp_path / "m.onnx", model, weights)
    found = onnxrt.outputs(tmp_path / "m.onnx", pictures(3))
    held = torch_outputs(dequantized(model, weights), pictures(3))
    assert 1 - cosine(found["features"], held["features"]) < TOLERANCE
    assert np.abs(found["logits"] - held["logits"]).max() < 0.05 * np.abs(held["logits"]).max()
    # the weights' own rounding is no part of this: what is left is the activations'
    whole = 1 - cosine(held["features"], torch_outputs(model, pictures(3))["features"])
    assert whole < {"int8": TOLERANCE, "int4": 0.1}[weights]


def on_four_bits(model: Vision) -> Vision:
    """Its matrices with other scales than the file would find by itself."""
    for n, name, module in linears_of(model):
        if module.in_features % 32 == 0:
            scales = nearest_scales(1.3 * module.weight)
            module.weight.data = snap(module.weight.data, scales, FOUR)
            model.block_scales[f"model.layers.{n}.{name}.weight"] = scales
    return model


def test_a_network_on_four_bits_is_in_its_file_as_it_is(tmp_path: Path) -> None:
    model = on_four_bits(network(replace(PICO, num_attention_heads=2), False))
    held = dequantized(model, "int4")
    for (_, _, ours), (_, _, theirs) in zip(linears_of(model), linears_of(held), strict=True):
        assert torch.equal(ours.weight, theirs.weight)
    assert held.block_scales.keys() == model.block_scales.keys()
    write(tmp_path / "four.onnx", model, "int4")
    write(tmp_path / "eight.onnx", held, "int8")
    four, eight = (onnxrt.outputs(tmp_path / f"{n}.onnx", pictures(3))["features"] for n in ("four", "eight"))
    assert 1 - cosine(four, torch_outputs(held, pictures(3))["features"]) < TOLERANCE
    assert 1 - cosine(four, eight) < TOLERANCE


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize(
    ("config", "unequal"),
    [
        (PICO, True),
        (PICO, False),
        (replace(PICO, classes=0, prefix=0, first_norm=True), True),
        (replace(PICO, hidden_size=96, num_attention_heads=3, classes=200, size=126, layers=12), False),
        (replace(PICO, activation="quick_gelu", patch=14, prefix=5, intermediate_size=672), True),
    ],
)
def test_the_size_is_known_before_the_file_is_written(
    tmp_path: Path, config: VisionConfig, unequal: bool, weights: str
) -> None:
    model = network(config, unequal)
    write(tmp_path / "m.onnx", model, weights)
    assert (tmp_path / "m.onnx").stat().st_size == file_bytes(config, anatomy(model), weights)
    assert list(tmp_path.iterdir()) == [tmp_path / "m.onnx"]


@pytest.mark.parametrize("weights", WEIGHTS)
def test_more_heads_channels_or_classes_never_take_fewer_bytes(weights: str) -> None:
    a = anatomy(network())
    sizes = [file_bytes(PICO, replace(a, groups=(g, 0, 4)), weights) for g in range(5)]
    assert sizes == sorted(set(sizes))
    sizes = [file_bytes(PICO, replace(a, ffn=(f, 32, 0)), weights) for f in range(0, 1024, 32)]
    assert sizes == sorted(set(sizes))
    sizes = [file_bytes(PICO, replace(a, vocab=v), weights) for v in range(300)]
    assert sizes == sorted(set(sizes))


def test_a_known_size_is_asked_in_less_than_two_milliseconds() -> None:
    config = replace(PICO, layers=12, hidden_size=384, num_attention_heads=6, intermediate_size=1536)
    a = replace(anatomy(network()), groups=(6,) * 12, ffn=(1536,) * 12, width=384, head_dim=64)
    file_bytes(config, a, "int8")
    started = time.process_time()
    for _ in range(50):
        file_bytes(config, a, "int8")
    assert time.process_time() - started < 50 * 0.002


def test_the_same_network_makes_the_same_bytes() -> None:
    first, second = (build(network(), "int8") for _ in range(2))
    assert first.SerializeToString() == second.SerializeToString()


def test_a_file_says_nothing_of_where_it_was_made() -> None:
    file = build(network(), "int8")
    assert {f.name for f, _ in file.ListFields()} == {"ir_version", "producer_name", "graph", "opset_import"}
    assert {f.name for f, _ in file.graph.ListFields()} == {"name", "node", "initializer", "input", "output"}
    assert not any(n.doc_string or n.name for n in file.graph.node)


@pytest.mark.parametrize("weights", WEIGHTS)
def test_a_picture_means_the_same_alone_and_among_others(tmp_path: Path, weights: str) -> None:
    write(tmp_path / "m.onnx", network(), weights)
    alone = onnxrt.outputs(tmp_path / "m.onnx", pictures(3)[:1])["features"]
    among = onnxrt.outputs(tmp_path / "m.onnx", pictures(3))["features"][:1]
    assert 1 - cosine(alone, among) < (1e-6 if weights == "fp32" else TOLERANCE)


def test_what_is_rounded_stays_when_rounded_again() -> None:
    weight = torch.randn(8, 40)
    weight[3] = 0
    numbers, scale = rounded(weight)
    held = numbers * scale[:, None]
    assert (held - weight).abs().max() <= scale.max() / 2 * 1.001
    assert torch.equal(rounded(held)[0], numbers)
    torch.testing.assert_close(rounded(held)[1], scale)


@pytest.mark.parametrize("weights", WEIGHTS)
def test_a_dequantized_network_makes_the_same_numbers(weights: str) -> None:
    model = network()
    first, second = build(model, weights), build(dequantized(model, weights), weights)
    for a, b in zip(first.graph.initializer, second.graph.initializer, strict=True):
        if a.data_type in (2, 3):
            assert a.raw_data == b.raw_data, a.name


def test_speed_and_memory_are_measured_in_the_runtime(tmp_path: Path) -> None:
    files = {w: tmp_path / f"{w}.onnx" for w in ("fp32", "int8")}
    for weights, file in files.items():
        write(file, network(), weights)
    found = onnxrt.speeds(files, pictures(2), threads=1, rounds=5)
    assert list(found) == ["fp32", "int8"]
    assert found["fp32"]["speedup"] == 1
    assert all(0 < f["low"] <= f["seconds"] <= f["high"] for f in found.values())
    job = onnxrt.run_job("memory", {"file": files["int8"]}, pictures(2), threads=1)
    assert 0 < job["before_bytes"] < job["peak_rss_bytes"] < 300e6  # torch is not in it


def test_a_broken_file_is_refused_without_its_folder(tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_bytes(b"nothing")
    with pytest.raises(SartorError, match="m.onnx") as error:
        onnxrt.outputs(tmp_path / "m.onnx", pictures(1))
    assert str(tmp_path) not in str(error.value)


def test_what_is_missing_is_named_with_its_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnxrt, "available", lambda: False)
    with pytest.raises(MissingExtra, match="pip install onnxruntime=="):
        onnxrt.outputs(tmp_path / "m.onnx", pictures(1))
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(MissingExtra, match="pip install onnx=="):
        build(network(), "fp32")
    with pytest.raises(InputError, match="int8"):
        file_bytes(PICO, anatomy(network()), "int3")
