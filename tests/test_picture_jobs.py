"""The whole job on photos: a pico DINOv2, drawn photos, ONNX Runtime, the command line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import sartor
from sartor import effort, picture_exports, picture_storage, picture_view
from sartor.cli import main
from sartor.data.photos import open_photo
from sartor.export import onnxrt
from sartor.job import Job
from sartor.model.network import BLOCK, anatomy
from sartor.model.precision import running
from sartor.picture_api import ARTIFACT
from sartor.picture_job import PreparedPictures
from sartor.pictures import felt_pictures, needed
from sartor.sources import resolve
from sartor.stages.allot import allot, left
from sartor.stages.tune import TuneConfig

from .test_pictures import drawn

TINY = effort.PictureEffort(32, 0.9, 6, 16, 24, TuneConfig(1.0, 1e-3, checks=2), TuneConfig(1.0, 1e-3, checks=2))
NAMES = ("secret-standing", "secret-lying", "secret-square")


def put_tiny(patch: pytest.MonkeyPatch) -> None:
    for name in effort.PICTURE_EFFORTS:
        patch.setitem(effort.PICTURE_EFFORTS, name, TINY)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of a pico model, a user's photos by class, the same without classes, and generic pictures."""
    root = tmp_path_factory.mktemp("seen")
    found = {name: root / name for name in ("model", "photos", "loose", "generic")}
    put_model(found["model"])
    put_photos(found)
    return found


def put_model(folder: Path) -> None:
    """A pico DINOv2."""
    from transformers import Dinov2Config, Dinov2Model

    torch.manual_seed(0)
    config = Dinov2Config(
        hidden_size=64, num_hidden_layers=4, num_attention_heads=4, image_size=32, patch_size=8, layerscale_value=1.0
    )
    Dinov2Model(config).save_pretrained(folder)


def put_photos(place: dict[str, Path]) -> None:
    """A user's photos by class, the same without classes, and generic pictures."""
    pixels, labels = drawn(180, 21)
    for i, (picture, label) in enumerate(zip(pixels, labels, strict=True)):
        for folder in (place["photos"] / NAMES[label], place["loose"]):
            keep(picture, folder / f"secret-{i}.png")
    for i, picture in enumerate(drawn(60, 22)[0]):
        keep(picture, place["generic"] / f"g{i}.png")


def keep(picture: torch.Tensor, file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.ascontiguousarray(picture.permute(1, 2, 0).numpy())).save(file)


@pytest.fixture(autouse=True)
def _tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    put_tiny(monkeypatch)


@pytest.fixture(scope="module")
def fitted(place: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One job through the command line, with all controls."""
    return fitted_by_command(place, tmp_path_factory.mktemp("job") / "seen", "--size", "35%", "--to", "onnx")


def fitted_by_command(place: dict[str, Path], out: Path, *more: str) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        put_tiny(patch)
        ask = ["compress", str(place["model"]), "--data", str(place["photos"]), "--generic", str(place["generic"])]
        assert main([*ask, *more, "--out", str(out)]) == 0
    return out


def report(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "report.json").read_text())
    return found


def test_the_file_keeps_its_budget_and_agrees_with_pytorch(fitted: Path) -> None:
    r = report(fitted)
    assert r["weights"] == "int4"  # eight bits would take cuts
    assert (fitted / ARTIFACT).stat().st_size == r["bytes"]["artifact"] <= r["bytes"]["budget"]
    assert r["parity"]["cosine"] > 0.98
    model, classes, plan = sartor.load(fitted)
    pixels = drawn(8, 30)[0]
    said = onnxrt.outputs(fitted / ARTIFACT, pixels.numpy())
    with torch.no_grad():
        assert torch.cosine_similarity(model.features(pixels), torch.tensor(said["features"])).min() > 0.98
    assert classes == sorted(NAMES)
    assert len(plan.layers) == r["head"]["depth"]


def test_heads_compare_by_as_many_dimensions_as_damage_least_with_what_else_must_go(fitted: Path) -> None:
    head = report(fitted)["head"]
    tried = {int(k): sum(damages) for k, damages in head["keys"].items()}
    assert set(tried) == {8, 16}
    assert head["key_dim"] == min(tried, key=lambda k: tried[k])
    model = picture_storage.load(fitted)[0]
    assert model.config.key_dim == head["key_dim"]
    assert all(
        p.shape[0] % head["key_dim"] == 0
        for n, p in model.named_parameters()
        if n.endswith(("q_proj.weight", "k_proj.weight"))
    )
    said = ("of 16 dimensions" in (fitted / "report.html").read_text()) == (head["key_dim"] == 8)
    assert said


def test_photos_are_named_with_what_decided_drawn(
    fitted: Path, place: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photo, why = next((place["photos"] / NAMES[0]).iterdir()), tmp_path / "why.png"
    before = fitted.stat().st_mtime_ns
    assert main(["run", str(fitted), str(photo), "--why", str(why)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert all(any(name in line for name in NAMES) for line in lines)
    assert Image.open(why).size[1] >= 448
    assert fitted.stat().st_mtime_ns == before
    capsys.readouterr()
    assert main(["run", str(fitted), str(tmp_path / "missing.jpg")]) == 2
    assert "no file 'missing.jpg'" in capsys.readouterr().err
    assert main(["run", str(fitted), str(photo), "--why", str(tmp_path / "no" / "why.png")]) == 2


def test_the_report_compares_with_what_a_user_would_pick_instead(fitted: Path) -> None:
    r = report(fitted)
    assert {"user", "generic", "speed", "parity", "head", "layers", "controls", "data", "versions"} <= set(r)
    assert r["controls"][1]["name"].startswith("ONNX Runtime's own 8 bits of the original's first")
    left = "nothing" if r["head"]["key_dim"] == 16 else "nothing else than to 8 dimensions to compare patches by"
    assert [c["name"] for c in r["controls"]][2:] == [
        f"the original adapted to your photos, 8 bits, {left} cut",
        "same bytes, personal calibration",
        "same bytes, generic calibration",
    ]
    assert r["user"]["ci95"][0] <= r["user"]["artifact"] <= r["user"]["ci95"][1]
    assert sum(r["data"]["pictures"].values()) <= 180
    page = (fitted / "report.html").read_text()
    assert page.count("<svg") >= 3
    assert "<script" not in page


def test_no_name_of_class_or_file_leaves_but_in_classes_json(fitted: Path) -> None:
    assert_no_name_leaves(fitted)


def assert_no_name_leaves(fitted: Path) -> None:
    for file in fitted.rglob("*"):
        if file.is_file() and file.name != "classes.json":
            assert b"secret" not in file.read_bytes(), file.name


def test_the_same_commands_inspect_measure_and_export(
    fitted: Path, place: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", str(fitted)]) == 0
    assert "heads" in capsys.readouterr().out
    ask = ["eval", str(fitted), "--data", str(place["photos"]), "--generic", str(place["generic"]), "--json"]
    assert main(ask) == 2  # the original was a folder: which one, only the user knows
    capsys.readouterr()
    assert main([*ask, "--model", str(place["model"])]) == 0
    changed = tmp_path / "changed"
    shutil.copytree(place["photos"], changed)
    (changed / NAMES[0]).rename(changed / "secret-other")
    other = [str(changed) if a == str(place["photos"]) else a for a in ask]
    again, r = json.loads(capsys.readouterr().out), report(fitted)
    assert again["user"]["artifact"] == r["user"]["artifact"]
    assert again["user"]["dense"] == pytest.approx(r["user"]["dense"], abs=0.05)
    assert main([*other, "--model", str(place["model"])]) == 2
    told = capsys.readouterr().err
    assert "classes" in told
    assert "secret" not in told
    shutil.rmtree(changed)
    shutil.copytree(place["photos"], changed)
    Image.new("RGB", (40, 40), "red").save(next((changed / NAMES[0]).iterdir()))  # as many photos, one of them another
    assert main([*[str(changed) if a == str(place["photos"]) else a for a in ask], "--model", str(place["model"])]) == 2
    assert "not those this artifact was fitted to" in capsys.readouterr().err
    assert sartor.export(fitted, "onnx", tmp_path / "copy").read_bytes() == (fitted / ARTIFACT).read_bytes()


def test_exports_are_compared_in_one_table(
    fitted: Path, place: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ask = ["export", str(fitted), "--data", str(place["photos"]), "--to", "onnx-fp32", "onnx-int8", "onnx-int4"]
    assert main([*ask, "--out", str(tmp_path / "all")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len([line for line in lines if line.startswith("ONNX Runtime")]) == 3
    assert (tmp_path / "all" / "onnx-int4.onnx").read_bytes() == (fitted / ARTIFACT).read_bytes()
    kept = json.loads((tmp_path / "all" / "exports.json").read_text())
    own, told = kept["rows"][2], report(fitted)
    assert own["pictures"] == told["user"]["pictures"] <= picture_exports.HELD_OUT
    assert own["accuracy"] == told["user"]["artifact"]  # the same file on the same held-out photos
    page = (tmp_path / "all" / "exports.html").read_text()
    assert page.count("<svg") == 2
    assert "secret" not in page + json.dumps(kept)
    fewer = tmp_path / "fewer"
    shutil.copytree(place["photos"], fewer)
    next((fewer / NAMES[0]).iterdir()).unlink()
    assert main([*ask[:2], "--data", str(fewer), *ask[4:], "--out", str(tmp_path / "no")]) == 2
    assert "not those this artifact was fitted to" in capsys.readouterr().err
    assert not (tmp_path / "no").exists()
    assert main(["export", str(fitted), "--to", "toaster", "--out", str(tmp_path / "x")]) == 2
    assert "executorch-int8" in capsys.readouterr().err


def test_an_export_says_what_goes_in_and_what_comes_out_and_runs(
    fitted: Path, place: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoImageProcessor

    photo, out = next((place["photos"] / NAMES[0]).iterdir()), tmp_path / "phone"
    assert main(["export", str(fitted), "--to", "onnx", "--out", str(out)]) == 0
    assert {f.name for f in out.iterdir()} == {ARTIFACT, "classes.json", "preprocessor_config.json"}
    for name in ("classes.json", "preprocessor_config.json"):
        assert (out / name).read_bytes() == (fitted / name).read_bytes()
    wide = Image.open(photo).resize((90, 60))
    wide.save(tmp_path / "wide.png")
    theirs = AutoImageProcessor.from_pretrained(out)(wide, return_tensors="np")["pixel_values"][0]
    ours = open_photo(tmp_path / "wide.png", sartor.load(fitted)[0].size).numpy()
    assert theirs.dtype == np.uint8
    assert np.abs(theirs.astype(int) - ours).mean() < 2  # they round between resizing and cutting out
    told = json.loads((out / "preprocessor_config.json").read_text())
    assert told["image_mean"] == [0.485, 0.456, 0.406]
    assert told["image_std"] == [0.229, 0.224, 0.225]
    capsys.readouterr()
    assert main(["run", str(fitted), str(photo), "--why", str(tmp_path / "why.png")]) == 0
    first = capsys.readouterr().out
    for named in (out, out / ARTIFACT):
        assert main(["run", str(named), str(photo), "--why", str(tmp_path / "no.png")]) == 0
        said = capsys.readouterr()
        assert said.out == first
        assert said.err.count("\n") == 1
        assert "sartor compress wrote" in said.err
    assert not (tmp_path / "no.png").exists()


def test_of_several_exports_one_is_named_and_a_bare_file_is_refused(
    fitted: Path, place: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photo, out = str(next((place["photos"] / NAMES[0]).iterdir())), tmp_path / "all"
    assert main(["export", str(fitted), "--to", "onnx-fp32", "--out", str(out)]) == 0
    (out / ARTIFACT).rename(out / "onnx-fp32.onnx")
    assert main(["run", str(out), photo]) == 0  # the only one
    shutil.copy(out / "onnx-fp32.onnx", out / "other.onnx")
    capsys.readouterr()
    for wrong, way_out in (
        (out, "holds 2 models (onnx-fp32.onnx, other.onnx), one is run: name it, as all/onnx-fp32.onnx"),
        (out / "none.onnx", "there is no 'none.onnx'"),
    ):
        assert main(["run", str(wrong), photo]) == 2
        assert way_out in capsys.readouterr().err
    assert main(["run", str(out / "other.onnx"), photo]) == 0
    (out / "preprocessor_config.json").unlink()
    (out / "other.onnx").rename(out / ARTIFACT)
    capsys.readouterr()
    assert main(["run", str(out), photo]) == 2
    assert "copy all files that sartor export wrote" in capsys.readouterr().err


def test_photos_without_labels_are_fitted_to_how_alike_they_are(place: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    sartor.compress(str(place["model"]), place["loose"], "35%", out, controls="none", faster=1.05)
    r = report(out)
    assert r["user"]["metric"] == "feature agreement"
    assert 0.5 < r["user"]["artifact"] <= 1
    assert r["generic"] is None
    assert all(layer["verdict"] == {} for layer in r["layers"])  # with nobody to compare with, nothing is said
    assert r["adaptation"] == {}
    assert r["head"]["side"] in {int(side) for side in r["head"]["sides"]}
    assert r["head"]["keys"] == {}  # nobody says what the network adapts to, which would heal it
    assert (r["speed"]["dense_seconds"] / r["speed"]["seconds"] < 1.05) == (
        "1.05 times as fast was asked for" in (out / "report.html").read_text()
    )
    assert main(["inspect", str(out)]) == 0
    assert not r["data"]["labelled"]
    assert (
        main(["export", str(out), "--data", str(place["loose"]), "--to", "onnx", "--out", str(tmp_path / "all")]) == 0
    )
    (row,) = json.loads((tmp_path / "all" / "exports.json").read_text())["rows"]
    assert (row["pictures"], row["accuracy"]) == (r["user"]["pictures"], None)
    assert row["cosine"] > 0.98
    assert "held out" in (tmp_path / "all" / "exports.html").read_text()
    assert json.loads((out / "classes.json").read_text()) == []
    assert main(["run", str(out), str(next(place["loose"].iterdir()))]) == 2


def test_where_everything_fits_nothing_is_cut_and_all_time_is_adaptation(
    place: dict[str, Path], tmp_path: Path
) -> None:
    sartor.compress(str(place["model"]), place["photos"], "70%", tmp_path / "out", controls="none")
    r = report(tmp_path / "out")
    assert r["weights"] == "int8"
    assert r["pruning"] == r["recovery"] == {}
    assert r["adaptation"]["curve"][-1][0] > TINY.adapt.seconds
    assert r["bytes"]["artifact"] <= r["bytes"]["budget"]


@pytest.mark.parametrize("stage", ["adapt", "recover"])
def test_an_interrupted_job_on_photos_resumes(stage: str, place: dict[str, Path], tmp_path: Path) -> None:
    told: list[str] = []

    def stop(now: str, share: float, note: str) -> None:
        told.append(now)
        if told.count(stage) == 2:  # behind the first step
            raise KeyboardInterrupt

    ask = (str(place["model"]), place["photos"], "35%", tmp_path / "out")
    with pytest.raises(KeyboardInterrupt):
        sartor.compress(*ask, controls="none", tell=stop)
    seen: list[str] = []
    sartor.compress(*ask, controls="none", resume=True, tell=lambda s, f, n: seen.append(s))
    assert "probe" not in seen
    assert ("fit" in seen) == (stage == "adapt")
    assert not (tmp_path / "out" / "checkpoint").exists()


def test_a_job_whose_heads_are_narrowed_resumes_runs_and_is_exported(
    place: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(picture_view, "kl_of", lambda *_: 0.0)  # then fewer dimensions are always better
    ask = (str(place["model"]), place["photos"], "18%", tmp_path / "out")
    more = {"generic": place["generic"], "controls": "none"}

    def stop(now: str, share: float, note: str) -> None:
        if now == "adapt":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sartor.compress(*ask, **more, tell=stop)
    saved = json.loads((tmp_path / "out" / "checkpoint" / "view.json").read_text())
    assert saved["keys"] == 8
    job = Job(str(place["model"]), str(place["photos"]), "18%", generic=str(place["generic"]))
    p = PreparedPictures(job, resolve(job.model), lambda *_: None)
    view = picture_view.view_of(p, job, lambda *_: None)
    again = picture_view.view_again(p, job, json.loads(json.dumps(view.decided())))
    assert all(torch.equal(x, y) for x, y in zip(view.dense.parameters(), again.dense.parameters(), strict=True))
    assert again.decided() == view.decided()
    sartor.compress(*ask, **more, resume=True)
    assert picture_storage.load(tmp_path / "out")[0].config.keys == 8
    assert report(tmp_path / "out")["head"]["key_dim"] == 8
    photo = str(next((place["photos"] / NAMES[0]).iterdir()))
    assert main(["run", str(tmp_path / "out"), photo, "--why", str(tmp_path / "why.png")]) == 0
    assert main(["export", str(tmp_path / "out"), "--to", "onnx-int4", "--out", str(tmp_path / "four")]) == 0
    assert main(["run", str(tmp_path / "four"), photo]) == 0
    capsys.readouterr()
    assert main(["inspect", str(tmp_path / "out")]) == 0
    assert "8 of 16 dimensions" in capsys.readouterr().out


def test_probing_photos_tells_and_draws(
    place: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ask = ["probe", str(place["model"]), "--data", str(place["photos"])]
    out = tmp_path / "probed"
    assert main([*ask, "--generic", str(place["generic"]), "--out", str(out)]) == 0
    told, progress = capsys.readouterr()
    assert "gradients on your pictures" in progress
    r = json.loads((out / "probe.json").read_text())
    layers = len(r["verdicts"]["mlp"])  # up to where the head reads
    assert all(f"{n} {part}" in told for n in range(layers) for part in ("attention", "MLP"))
    assert "of your photos are named otherwise" in told or " parts 0 matter to your photos otherwise" in told
    assert f"of {4 * layers} heads" in told
    assert "your text" not in told
    assert "generic pictures that nothing was fitted to" in told
    page = (out / "probe.html").read_text()
    assert page.count("<circle") == 4 * layers  # two parts a layer, for the user's and for generic pictures
    assert "What your photos need of this model" in page
    assert all(0 <= x[0] <= 1 for side in r["without"].values() for k in ("attention", "mlp") for x in side[k])
    assert max(x[0] for k in ("attention", "mlp") for x in r["without"]["user"][k]) > 0
    assert "secret" not in told + progress + page + (out / "probe.json").read_text()
    assert main(ask) == 2
    assert "name a folder of public pictures with --generic" in capsys.readouterr().err


@pytest.mark.parametrize("slower", [0.004, -0.004])
def test_time_is_set_right_by_what_the_cut_network_really_takes(
    slower: float, place: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a clock on which networks of half the size are slower, or faster, than the sum of their parts."""

    def seconds(network: Any, weights: str) -> float:
        a = anatomy(network)
        heads, blocks = sum(a.groups), sum(a.ffn) / BLOCK
        share = (heads + blocks) / (16 + 32)
        slow = slower * max(0.0, 1 - 4 * abs(share - 0.6))
        return (0.06 if weights == "fp32" else 0.002 + 0.0005 * heads + 0.00025 * blocks) + slow

    monkeypatch.setattr(picture_view, "seconds_of", lambda networks, _: {k: seconds(*n) for k, n in networks.items()})
    monkeypatch.setattr(picture_view, "SHARES", (1.0,))
    job = Job(str(place["model"]), str(place["loose"]), "90%", faster=4.0)
    p = PreparedPictures(job, resolve(job.model), lambda *_: None)
    found, sizes = {}, {}
    for corrected in (0, 3):
        monkeypatch.setattr(picture_view, "CORRECTED", corrected)
        view = picture_view.view_of(p, job, lambda *_: None)
        effects = needed(felt_pictures(running(view.dense), view.pictures, TINY, 0))
        small = left(anatomy(view.dense), allot(anatomy(view.dense), effects, view.costs).steps)
        found[corrected] = 0.06 / seconds(picture_view.resized(view.dense, small), "int8")
        sizes[corrected] = sum(small.groups) + sum(small.ffn) / BLOCK
    assert found[3] >= 4.0
    assert (found[0] < 4.0) == (slower > 0)
    assert (sizes[3] > sizes[0]) == (slower < 0)  # time that is left is used


def test_four_bits_are_asked_where_bytes_decide_and_not_where_time_does(
    place: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def seconds(network: Any, weights: str) -> float:
        a = anatomy(network)
        return 0.06 if weights == "fp32" else 0.002 + 0.0005 * sum(a.groups) + 0.00025 * sum(a.ffn) / BLOCK

    asked: list[float] = []
    monkeypatch.setattr(picture_view, "seconds_of", lambda networks, _: {k: seconds(*n) for k, n in networks.items()})
    monkeypatch.setattr(picture_view, "SHARES", (1.0,))
    monkeypatch.setattr(picture_view, "four_damage", lambda *_: asked.append(0.0) or 1e-3)
    for faster in (8.0, 3.3):
        job = Job(str(place["model"]), str(place["loose"]), "40%", faster=faster)
        p = PreparedPictures(job, resolve(job.model), lambda *_: None)
        view = picture_view.view_of(p, job, lambda *_: None)
        assert (view.costs.four is None) == (faster == 8.0) == (not asked)


def test_a_job_in_steps_resumes_and_its_controls_are_alike(place: dict[str, Path], tmp_path: Path) -> None:
    def stop(now: str, share: float, note: str) -> None:
        if now == "prune" and "step 2" in note:
            raise KeyboardInterrupt

    ask = (str(place["model"]), place["photos"], "18%", tmp_path / "out")
    more = {"generic": place["generic"], "steps": 2, "controls": "full"}
    with pytest.raises(KeyboardInterrupt):
        sartor.compress(*ask, **more, tell=stop)
    assert not sartor.Plan.from_json((tmp_path / "out" / "checkpoint" / "plan.json").read_text()).settled
    seen: list[str] = []
    sartor.compress(*ask, **more, resume=True, tell=lambda stage, share, note: seen.append(note))
    assert not any(note.startswith("step 1:") for note in seen)
    assert any(note.startswith("step 2:") for note in seen)
    told = report(tmp_path / "out")
    assert any(s["kept"] for s in told["pruning"]["steps"])
    page = (tmp_path / "out" / "report.html").read_text()
    assert "made in steps" in page
    assert "share, 95% interval" in page
    by_class = told["user"]["by_class"]
    assert len(by_class) == 3
    assert sum(c["pictures"] for c in by_class) == told["user"]["pictures"]
    assert sum(c["right"] for c in by_class) == round(told["user"]["artifact"] * told["user"]["pictures"])
    assert all(c["ci95"][0] - 1e-9 <= c["right"] / c["pictures"] <= c["ci95"][1] + 1e-9 for c in by_class)
    assert told["plan"]["predicted_damage"] > 0
    assert told["bytes"]["artifact"] <= told["bytes"]["budget"]
    arms = [c for c in told["controls"] if "calibration" in c["name"]]
    assert len(arms) == 2
    assert ["adapted to your photos, fp32" in c["name"] for c in told["controls"]] == [
        False,
        False,
        False,
        True,
        False,
        False,
    ]
    assert all(c["bytes"] <= told["bytes"]["budget"] for c in arms)


def test_the_table_of_all_exports_has_a_row_for_each_and_a_family_is_measured_once(
    place: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import exports

    monkeypatch.setattr(exports, "put_least_effort", lambda: None)  # tiny already
    ask = ["--texts", str(tmp_path), "--photos", str(place["photos"]), "--out", str(tmp_path / "o")]
    monkeypatch.setattr("sys.argv", ["exports.py", *ask, "--families", "vit"])
    exports.main()
    rows = json.loads((tmp_path / "o" / "exports.json").read_text())
    assert [(r["family"], r["runtime"]) for r in rows[:3]] == [("vit", "ONNX Runtime")] * 3
    assert all(r["cosine"] > 0.9 for r in rows[:3])
    assert all(r["cosine"] is not None or "pip install" in r["note"] for r in rows)
    first = capsys.readouterr().out
    assert first.count("\n") == len(rows) + 2
    monkeypatch.setattr(exports, "exported", None)  # would be asked for a family that is not there yet
    exports.main()
    assert capsys.readouterr().out == first


def test_what_cannot_be_asked_is_refused_in_one_line(
    place: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ask = ["compress", str(place["model"]), "--data", str(place["photos"])]
    for i, (wrong, way_out) in enumerate(
        (
            (["--size", "35%", "--to", "gguf"], "--to onnx"),
            (["--size", "1%"], "ask for"),
            (["--size", "35%", "--faster", "1000"], "times as fast, with pictures of"),
            (["--size", "35%", "--faster", "0.5"], "above 1"),
            (["--size", "35%", "--method", "paper"], "leave them out"),
        )
    ):
        assert main([*ask, *wrong, "--out", str(tmp_path / str(i))]) == 2
        told = capsys.readouterr().err.strip().splitlines()[-1]
        assert way_out in told
        assert "secret" not in told
        assert not (tmp_path / str(i)).exists()
    assert main(["probe", str(place["model"]), "--data", str(place["photos"])]) == 2
    assert "with --generic" in capsys.readouterr().err
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("words")
    ask[3] = str(tmp_path / "texts")
    assert main([*ask, "--size", "35%", "--out", str(tmp_path / "o")]) == 2
