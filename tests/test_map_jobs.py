"""The whole job on photos with a convolutional network: a pico one as an ONNX file and as torchvision's weights, ONNX Runtime, the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import sartor
from sartor.cli import main
from sartor.export import graph_file, onnxrt
from sartor.model.graph import INPUT, Draft, Graph, macs, normalization
from sartor.picture_api import ARTIFACT
from sartor.picture_view import sides_of

from .test_graph import Maker
from .test_picture_jobs import NAMES, assert_no_name_leaves, fitted_by_command, put_photos, put_tiny, report
from .test_pictures import drawn

SIDE = 32


def network(side: int = SIDE) -> Graph:
    m = Maker(0)
    m.draft = Draft(side, *normalization())
    x = m.act(m.conv(INPUT, 16, 3, 2), "clip")
    for out, stride in ((16, 1), (32, 2), (32, 1), (32, 1)):
        y = m.conv(m.act(m.depthwise(m.act(m.conv(x, 96), "clip"), 1, stride), "clip"), out)
        x = m.draft.add("add", x, y) if m.draft.shape[x] == m.draft.shape[y] else y
    return m.done(m.act(m.conv(x, 64), "clip"))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model file, a user's photos by class, the same without classes, and generic pictures."""
    root = tmp_path_factory.mktemp("maps")
    found = {"model": root / "net.onnx"} | {name: root / name for name in ("photos", "loose", "generic")}
    graph_file.write(found["model"], network())
    put_photos(found)
    return found


@pytest.fixture(autouse=True)
def _tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    put_tiny(monkeypatch)


@pytest.fixture(scope="module")
def fitted(place: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One job through the command line, with all controls."""
    return fitted_by_command(place, tmp_path_factory.mktemp("job") / "seen", "--size", "45%")


def test_the_file_keeps_its_budget_and_says_what_pytorch_says(fitted: Path) -> None:
    r = report(fitted)
    assert (fitted / ARTIFACT).stat().st_size == r["bytes"]["artifact"] <= r["bytes"]["budget"]
    assert r["parity"]["cosine"] > 0.98
    model, classes, plan = sartor.load(fitted)
    assert isinstance(model, Graph)
    assert model.rounding is not None
    assert sum(macs(model).values()) < sum(macs(network()).values())
    pixels = drawn(8, 30)[0]
    said = onnxrt.outputs(fitted / ARTIFACT, pixels.numpy())
    with torch.no_grad():
        assert torch.cosine_similarity(model.features(pixels), torch.tensor(said["features"])).min() > 0.98
    assert classes == sorted(NAMES)
    assert len(plan.layers) == len(r["layers"])


def test_the_report_tells_channels_and_what_a_user_would_pick_instead(
    fitted: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    r = report(fitted)
    assert (
        sum(x["channels"] - x["channels_kept"] for x in r["layers"]) == r["pruning"]["channels"] > 0
    )  # the file is smaller than what eight bits alone make
    assert len(r["controls"]) == 5
    assert all(c["accuracy"] is not None for c in r["controls"])
    page = (fitted / "report.html").read_text()
    assert page.count("<svg") >= 3
    assert "heads" not in page
    assert main(["inspect", str(fitted)]) == 0
    said = capsys.readouterr().out
    assert "channels" in said
    assert "heads" not in said


def test_no_name_of_class_or_file_leaves_but_in_classes_json(fitted: Path) -> None:
    assert_no_name_leaves(fitted)


def test_photos_are_named_measured_again_and_exported(
    fitted: Path, place: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photo = next((place["photos"] / NAMES[0]).iterdir())
    assert main(["run", str(fitted), str(photo), "--why", str(tmp_path / "why.png")]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 3
    ask = ["eval", str(fitted), "--data", str(place["photos"]), "--generic", str(place["generic"]), "--json"]
    assert main([*ask, "--model", str(place["model"])]) == 0
    again = json.loads(capsys.readouterr().out)
    assert again["user"]["artifact"] == report(fitted)["user"]["artifact"]
    assert main(["export", str(fitted), "--to", "onnx", "--out", str(tmp_path / "same")]) == 0
    assert (tmp_path / "same" / "model.onnx").read_bytes() == (fitted / ARTIFACT).read_bytes()
    for folder in (fitted, tmp_path / "same"):
        assert main(["run", str(folder), str(photo), "--why", str(tmp_path / f"{folder.name}.png")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:3] == lines[3:]
    told = json.loads((tmp_path / "same" / "preprocessor_config.json").read_text())
    assert told["crop_size"] == {"height": SIDE, "width": SIDE}
    pixels, model = torch.full((3, 1, 1), 200.0), sartor.load(fitted)[0]
    mean, std = (torch.tensor(told[k])[:, None, None] for k in ("image_mean", "image_std"))
    scale, shift = model.scale, model.shift  # what the file does in front of everything
    assert torch.allclose((pixels * told["rescale_factor"] - mean) / std, pixels * scale + shift, rtol=1e-3)
    assert main(["export", str(fitted), "--to", "onnx-int4", "--out", str(tmp_path / "no")]) == 2
    assert "take one of onnx-fp32" in capsys.readouterr().err
    both = ["export", str(fitted), "--data", str(place["photos"]), "--to", "onnx-fp32", "onnx-int8"]
    assert main([*both, "--out", str(tmp_path / "both")]) == 0
    assert capsys.readouterr().out.count("ONNX Runtime") == 2


def test_photos_without_labels_keep_their_features(place: dict[str, Path], tmp_path: Path) -> None:
    ask = ["compress", str(place["model"]), "--data", str(place["loose"]), "--size", "50%", "--controls", "none"]
    assert main([*ask, "--out", str(tmp_path / "out")]) == 0
    assert report(tmp_path / "out")["user"]["metric"] == "feature agreement"


def test_smaller_pictures_are_tried_where_time_is_asked_for(
    place: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    graph_file.write(tmp_path / "large.onnx", network(96))
    assert sides_of(network(96)) == [96, 64]
    assert sides_of(network(SIDE)) == [SIDE]
    out, photos, generic = tmp_path / "out", str(place["photos"]), str(place["generic"])
    ask = ["compress", str(tmp_path / "large.onnx"), "--data", photos, "--generic", generic, "--size", "60%"]
    assert main([*ask, "--faster", "2", "--controls", "none", "--out", str(out)]) == 0
    r = report(out)
    assert sorted(map(int, r["head"]["sides"])) == [64, 96]
    assert r["head"]["side"] == sartor.load(out)[0].size
    assert min(r["head"]["sides"].items(), key=lambda x: sum(x[1]))[0] == str(r["head"]["side"])
    assert r["speed"]["dense_seconds"] / r["speed"]["seconds"] > 1
    capsys.readouterr()
    assert main(["eval", str(out), "--data", photos, "--model", str(tmp_path / "large.onnx"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["user"]["artifact"] == r["user"]["artifact"]
    assert main(["inspect", str(out)]) == 0
    photo = next((place["photos"] / NAMES[0]).iterdir())
    assert main(["run", str(out), str(photo), "--why", str(tmp_path / "why.png")]) == 0


def test_an_interrupted_job_goes_on_to_the_same_cuts(place: dict[str, Path], tmp_path: Path) -> None:
    ask = ["compress", str(place["model"]), "--data", str(place["photos"]), "--size", "45%", "--controls", "none"]
    out = tmp_path / "out"

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        put_tiny(patch)
        patch.setattr("sartor.picture_api.measure_pictures", stop)
        with pytest.raises(KeyboardInterrupt):
            sartor.compress(str(place["model"]), place["photos"], "45%", out, controls="none")
    plan = json.loads((out / "plan.json").read_text())
    assert main([*ask, "--out", str(out), "--resume"]) == 0
    again = json.loads((out / "plan.json").read_text())
    assert [x["channels"] for x in again["layers"]] == [x["channels"] for x in plan["layers"]]


def test_cuts_in_steps_are_refused(place: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ask = ["compress", str(place["model"]), "--data", str(place["photos"]), "--size", "45%", "--steps", "2"]
    assert main([*ask, "--out", str(tmp_path / "o")]) == 2
    assert "--steps is for transformers" in capsys.readouterr().err
    assert not (tmp_path / "o").exists()


def test_bytes_that_cannot_be_reached_are_refused(
    place: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ask = ["compress", str(place["model"]), "--data", str(place["photos"]), "--size", "5%"]
    assert main([*ask, "--out", str(tmp_path / "out")]) == 2
    assert "smallest model" in capsys.readouterr().err
