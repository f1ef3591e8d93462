"""Runtimes of phones: what their files say beside PyTorch, each reopened in its own runtime. A runtime that is not installed is skipped, with the pip command as the reason."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sartor.errors import InputError, MissingExtra, SartorError
from sartor.export import coreml, lowering, runtimes
from sartor.model.network import shrink_attention_, shrink_mlp_
from sartor.model.vision import Vision, VisionConfig

PICO = VisionConfig("dinov2", 64, 4, 128, 2, 32, 8, prefix=2, classes=5)
# least cosine of features; random networks of this size lose more to rounding than trained ones
LEAST = {
    "onnx-fp32": 1 - 1e-6,
    "onnx-int8": 0.999,
    "onnx-int4": 0.97,
    "executorch-fp32": 1 - 1e-6,
    "executorch-int8": 0.999,
    "litert-fp32": 1 - 1e-6,
    "litert-int8": 0.999,
    "litert-int4": 0.97,
    "coreml-fp16": 1 - 1e-5,
    "coreml-int8": 0.999,
    "coreml-int4": 0.97,
}
PHONES = ("executorch", "litert", "coreml")
MARK = "anna-marker"  # in the name of the folder that everything is written to


def network(config: VisionConfig = PICO, seed: int = 0) -> Vision:
    """Random weights: a layer with three of four heads and rows that are no multiples of 32, and a layer without attention."""
    torch.manual_seed(seed)
    model = Vision(config).eval().requires_grad_(False)
    for name, p in model.named_parameters():
        p.data = torch.randn_like(p) * (p[0].numel() ** -0.5 if name.endswith("weight") and p.ndim > 1 else 0.3)
        p.data += 1.0 * (name.endswith("norm.weight"))
    shrink_attention_(model, 0, [0, 2, 3])
    shrink_mlp_(model, 0, torch.arange(92))
    shrink_attention_(model, 1, [])
    return model


def pictures(n: int = 3) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(1).integers(0, 256, (n, 3, 32, 32), dtype=np.uint8))


def names_of(runtime: str) -> list[str]:
    return [name for name in runtimes.ROWS if name.startswith(runtime)]


def need(runtime: str) -> None:
    row = runtimes.ROWS[names_of(runtime)[0]]
    if lowering.missing(row.needs):
        pytest.skip(f"{row.runtime} is an optional extra and not installed: {row.install}")


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, dict[str, dict[str, Any]]]]:
    """runtime -> (folder of its files, what was measured by name); written once."""

    @cache
    def measure(runtime: str) -> tuple[Path, dict[str, dict[str, Any]]]:
        need(runtime)
        folder, names = tmp_path_factory.mktemp("runtimes") / MARK, names_of(runtime)
        return folder, dict(
            zip(names, runtimes.measure_all(network(), folder, pictures(), names, rounds=2), strict=True)
        )

    return measure


@pytest.mark.parametrize("runtime", ["onnx", *PHONES])
def test_every_file_says_in_its_own_runtime_what_pytorch_says(measured: Any, runtime: str) -> None:
    _, found = measured(runtime)
    for name, row in found.items():
        assert row["cosine"] is not None, row["note"]
        assert row["cosine"] > LEAST[name], (name, row["cosine"])
        if row["weights"] in ("fp32", "fp16"):  # rounding may tip what a random network is undecided about
            assert row["same_answers"] == 1.0
        assert row["lowering_seconds"] > 0
        assert (row["seconds"] is None) == (row["peak_rss_bytes"] is None) == (runtime == "coreml")
    assert runtimes.table(list(found.values())).count("\n") == len(found) + 1


@pytest.mark.parametrize("runtime", ["onnx", *PHONES])
def test_fewer_bits_are_fewer_bytes_and_no_file_names_the_folder_it_was_made_in(measured: Any, runtime: str) -> None:
    folder, found = measured(runtime)
    sizes = [row["bytes"] for row in found.values()]  # from most bits to fewest
    assert sizes == sorted(set(sizes), reverse=True)
    assert sorted(f.name for f in folder.iterdir()) == sorted(f"{n}{runtimes.ROWS[n].ending}" for n in found)
    for file in (f for f in folder.rglob("*") if f.is_file()):
        assert MARK.encode() not in file.read_bytes(), file.name
        assert b"site-packages" not in file.read_bytes(), file.name


@pytest.mark.parametrize("runtime", ["litert", "coreml"])
def test_a_network_without_a_head_gives_features_alone(tmp_path: Path, runtime: str) -> None:
    need(runtime)
    model = network(replace(PICO, classes=0, first_norm=True, activation="quick_gelu"))
    shrink_mlp_(model, 0, torch.arange(0))
    name = names_of(runtime)[0]
    file = tmp_path / f"m{runtimes.ROWS[name].ending}"
    assert runtimes.write(name, file, model) > 0
    found = runtimes.ROWS[name].run(file, pictures(2).numpy(), 1, 0)["outputs"]
    assert found.keys() == {"features"}
    cosine = runtimes.alike(found, runtimes.reference(model, pictures(2)))["cosine"]
    assert cosine is not None
    assert cosine > LEAST[name]


def test_a_core_ml_package_holds_the_networks_weights(measured: Any) -> None:
    folder, _ = measured("coreml")
    own = {name: p.numpy() for name, p in network().named_parameters()}
    matrices = {name for name, p in own.items() if p.ndim > 1 and name.endswith("weight")}
    half = 2**-11  # what fp16 rounds off at most; at eight bits the matrix, its scales and their product are fp16
    for weights, step in (("fp16", half), ("int8", 0.5 / 127 + 3 * half)):
        file = folder / f"coreml-{weights}.mlpackage"
        held = coreml.named(runtimes.run_job("coreml", "constants", file)["outputs"], network())
        assert matrices <= held.keys()
        for name, value in held.items():
            off = np.abs(value.reshape(own[name].shape) - own[name])
            assert off.max() <= step * np.abs(own[name]).max(), name


def test_a_runtime_that_fails_says_why_and_names_no_folder(tmp_path: Path) -> None:
    need("litert")
    (tmp_path / MARK).mkdir()
    (tmp_path / MARK / "m.tflite").write_bytes(b"no such file")
    with pytest.raises(SartorError, match="LiteRT failed on m.tflite") as caught:
        runtimes.ROWS["litert-fp32"].run(tmp_path / MARK / "m.tflite", pictures().numpy(), 1, 0)
    assert MARK not in str(caught.value)


def test_lowering_that_takes_too_long_is_ended_and_leaves_nothing(tmp_path: Path) -> None:
    need("executorch")
    with pytest.raises(SartorError, match=r"took more than 0 s"):
        lowering.lower("executorch", {"fp32": tmp_path / "m.pte"}, network(), limit_s=0.1)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", runtimes.ROWS)
def test_an_absent_runtime_names_the_exact_pip_command(monkeypatch: Any, tmp_path: Path, name: str) -> None:
    monkeypatch.setattr(lowering.importlib.util, "find_spec", lambda name: None)
    row = runtimes.ROWS[name]
    assert row.install.startswith("pip install ")
    assert all("==" in package for package in row.install.split()[2:])
    with pytest.raises(MissingExtra) as caught:
        runtimes.write(name, tmp_path / "m", network())
    assert str(caught.value) == f"{row.runtime} is not installed: {row.install}"
    with pytest.raises(MissingExtra, match="pip install"):
        row.run(tmp_path / "m", pictures().numpy(), 1, 0)
    (found,) = runtimes.measure_all(network(), tmp_path, pictures(), [name])
    assert found["note"] == f"not installed: {row.install}"
    assert found["bytes"] is found["cosine"] is found["seconds"] is None
    assert row.install in runtimes.table([found])


def test_a_runtime_that_there_is_not_is_named_with_those_that_there_are(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="'tensorrt'.*litert-int8"):
        runtimes.measure_all(network(), tmp_path, pictures(), ["tensorrt"])
