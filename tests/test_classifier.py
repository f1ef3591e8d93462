"""Heads that pre-trained classifiers came with: which of their rows a user's classes take, and when."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from sartor.cli import main
from sartor.export import graph_file
from sartor.job import Job
from sartor.model import graph_channels
from sartor.model.checkpoints import load_vision
from sartor.model.classifier import Rows, rows_for
from sartor.model.kinds import load_seer
from sartor.picture_job import PreparedPictures
from sartor.sources import resolve
from sartor.stages.head import choose_head, fit_head, read_out, with_head
from sartor.stages.recognition import recognize
from tests.test_graph import CLASSES, Maker, fire, plain, residual
from tests.test_map_jobs import network as maps
from tests.test_picture_jobs import NAMES, fitted_by_command, put_photos, put_tiny, report
from tests.test_pictures import drawn, network
from tests.test_vision_families import SIZES, pictures, rewritten, timm_names

NAMED = ["tench, Tinca tinca", "Border_collie", "crane", "crane", "half-track"]
ASKED = ["border collie", "unheard of", "Tinca tinca", "Crane", "half track"]
ROWS = [1, None, 0, None, 4]


def classifier(kind: str, folder: Path) -> Any:
    """A pico classifier of transformers whose head is felt."""
    import transformers as t

    sizes: dict[str, Any] = SIZES | ({} if kind == "dinov2" else {"intermediate_size": 96})
    config = t.AutoConfig.for_model(kind, **sizes, id2label=dict(enumerate(NAMED)))
    made = t.DeiTForImageClassificationWithTeacher if kind == "deit" else t.AutoModelForImageClassification.from_config
    torch.manual_seed(3)
    model = made(config).eval()
    for name, p in model.named_parameters():
        if "classifier" in name:
            p.data = torch.randn_like(p)
    model.save_pretrained(folder)
    return model


def expect_rows(rows: Rows | None, logits: torch.Tensor, features: torch.Tensor) -> None:
    """That the rows say of features what the whole head said, where they are known, and nothing elsewhere."""
    assert rows is not None
    assert rows.known == 3
    said = features @ rows.weight.T + rows.bias
    for ours, theirs in enumerate(ROWS):
        want = torch.zeros(len(said)) if theirs is None else logits[:, theirs]
        assert torch.allclose(said[:, ours], want, atol=1e-4)


@pytest.mark.parametrize("kind", ["vit", "deit", "dinov2"])
def test_rows_say_what_the_classifier_says_of_their_classes(kind: str, tmp_path: Path) -> None:
    theirs, mine = classifier(kind, tmp_path), load_vision(tmp_path)
    pixels = pictures(mine.size)
    mean, std = (torch.tensor(v)[:, None, None] for v in (mine.config.mean, mine.config.std))
    with torch.no_grad():
        out = theirs((pixels / 255 - mean) / std)
    logits = out.cls_logits if kind == "deit" else out.logits
    rows, note = rows_for(tmp_path, mine, (), ASKED)
    expect_rows(rows, logits, mine.features(pixels))
    assert not note
    assert rows_for(tmp_path, mine, (), ["nobody", "knows"]) == (None, "")


def test_timms_names_are_known_and_a_file_beside_the_model_goes_before(tmp_path: Path) -> None:
    classifier("dinov2", tmp_path)
    whole = load_vision(tmp_path)
    wanted, _ = rows_for(tmp_path, whole, (), ASKED)

    def named_by_timm(found: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return timm_names({n.removeprefix("dinov2.").replace("classifier.", "head."): t for n, t in found.items()})

    rewritten(tmp_path, named_by_timm)
    keys = [f"n{i}" for i in range(len(NAMED))]
    config = {"architecture": "vit_small_patch14_dinov2", "model_args": {"num_heads": 4}, "pretrained_cfg": {}}
    labels = {"label_names": keys, "label_descriptions": dict(zip(keys, NAMED, strict=True))}
    (tmp_path / "config.json").write_text(json.dumps(config | labels))
    rows, _ = rows_for(tmp_path, load_vision(tmp_path), (), ASKED)
    assert wanted is not None
    assert rows is not None
    assert torch.equal(rows.weight, wanted.weight)
    by_key, _ = rows_for(tmp_path, whole, (), ["n1", "n4"])
    assert by_key is not None
    assert by_key.known == 2
    (tmp_path / "labels.txt").write_text("\n".join("abcde"))
    by_file, _ = rows_for(tmp_path, whole, resolve(str(tmp_path)).classes, ["c", "n1"])
    assert by_file is not None
    assert by_file.known == 1
    by_config, note = rows_for(tmp_path, whole, ["one", "too", "few"], ["n1", "n4"])
    assert by_config is not None
    assert by_config.known == 2
    assert "labels.txt names 3 classes" in note


def test_a_convolutional_networks_rows_are_named_by_a_file_beside_it(tmp_path: Path) -> None:
    graph_file.write(tmp_path / "net.onnx", residual(Maker(0)))
    assert resolve(str(tmp_path / "net.onnx")).classes == ()
    (tmp_path / "labels.txt").write_text("\n".join(NAMED) + "\n")
    source = resolve(str(tmp_path / "net.onnx"))
    assert list(source.classes) == NAMED
    whole, pixels = load_seer(source.folder), torch.randint(0, 256, (3, 3, 24, 24), dtype=torch.uint8)
    rows, note = rows_for(source.folder, whole, source.classes, ASKED)
    expect_rows(rows, whole(pixels), whole.features(pixels))
    assert not note
    rows, note = rows_for(source.folder, whole, source.classes[1:], ASKED)
    assert rows is None
    assert f"labels.txt names 4 classes and the model's own head has {CLASSES} rows" in note
    for other in (plain, fire):  # a layer stands in front of the head; the head reads every place of the map
        rows, note = rows_for(source.folder, other(Maker(0)), NAMED, ASKED)
        assert rows is None
        assert "no head of its own reads" in note
    rows, note = rows_for(source.folder, whole, NAMED, ["not", "there"])
    assert rows is None
    assert "none of your classes" in note
    decomposed = rows_for(source.folder, whole, ["K\u00e4se", *NAMED[1:]], ["Ka\u0308se"])[0]  # as macOS spells folders
    assert decomposed is not None
    (tmp_path / "labels.txt").write_text("\n".join(NAMED) + "\n\n", encoding="utf-8-sig")
    assert list(resolve(str(tmp_path / "net.onnx")).classes) == NAMED


def test_rows_that_know_the_classes_beat_few_pictures_and_others_are_left_alone() -> None:
    model, many, few, new = network(), drawn(400, 31), drawn(15, 32), drawn(150, 33)
    features = read_out(model, many[0], 4)[-1]
    own = Rows(*fit_head(features, many[1], 3, 0.03), 3)
    alone, helped = choose_head(model, *few, 3), choose_head(model, *few, 3, own=own)
    assert (alone.own, helped.own, helped.depth) == (0, 3, 4)
    assert helped.nats < alone.nats
    better, plain_one = (recognize(with_head(model, head), *new) for head in (helped, alone))
    assert better.accuracy > plain_one.accuracy
    assert better.nats.mean() < plain_one.nats.mean()
    torch.manual_seed(0)
    wrong = Rows(own.weight[[1, 2, 0]] * 3, own.bias[[1, 2, 0]], 3)
    assert choose_head(model, *few, 3, own=wrong).own == 0


def test_a_strong_pull_leaves_rows_as_they_are() -> None:
    model, few = network(), drawn(30, 34)
    features = read_out(model, few[0], 4)[-1]
    own = Rows(torch.randn(3, features.shape[1], generator=torch.Generator().manual_seed(0)), torch.zeros(3), 3)
    weight, _ = fit_head(features, few[1], 3, 1e6, own)
    assert torch.allclose(weight, own.weight, atol=1e-3)
    assert not torch.allclose(fit_head(features, few[1], 3, 0.03, own)[0], own.weight, atol=1e-2)


def test_a_job_takes_rows_of_its_users_classes(tmp_path: Path) -> None:
    """From the folders' names to the head, its report and the note of a file that does not fit."""
    place = {name: tmp_path / name for name in ("photos", "loose", "generic")}
    put_photos(place)
    graph_file.write(tmp_path / "net.onnx", residual(Maker(0)))
    (tmp_path / "labels.txt").write_text("\n".join([*NAMES, "other", "another"]))
    ask = Job(str(tmp_path / "net.onnx"), str(place["photos"]), "60%", generic=str(place["generic"]))
    p = PreparedPictures(ask, resolve(ask.model), lambda *_: None)
    assert p.own is not None
    assert p.own.known == 3
    assert p.own.weight.shape == (3, 12)
    assert not p.notes
    (tmp_path / "labels.txt").write_text("\n".join(NAMES))
    p = PreparedPictures(ask, resolve(ask.model), lambda *_: None)
    assert p.own is None
    assert "is not used" in p.notes[0]


def test_a_whole_job_begins_with_rows_that_know_its_classes_and_is_measured_again_with_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    put_tiny(monkeypatch)
    place = {name: tmp_path / name for name in ("photos", "loose", "generic")}
    put_photos(place)
    pixels, labels = drawn(900, 41)
    body = graph_channels.ended(maps())
    knows = graph_channels.with_head(body, *fit_head(body(pixels), labels, 3, 0.03))
    place["model"] = tmp_path / "net.onnx"
    graph_file.write(place["model"], knows)
    (tmp_path / "labels.txt").write_text("\n".join(NAMES))
    fitted = fitted_by_command(place, tmp_path / "out", "--size", "45%", "--controls", "none")
    told = report(fitted)
    assert told["head"]["own"] == 3
    assert "3 of its classes the model's own head knows by name" in (fitted / "report.html").read_text()
    capsys.readouterr()
    again = ["eval", str(fitted), "--data", str(place["photos"]), "--generic", str(place["generic"]), "--json"]
    assert main([*again, "--model", str(place["model"])]) == 0
    assert json.loads(capsys.readouterr().out)["user"]["dense"] == told["user"]["dense"]
    (tmp_path / "labels.txt").unlink()
    assert main([*again, "--model", str(place["model"])]) == 2
    assert "knew 3 of your classes by name, now it knows 0" in capsys.readouterr().err
    (tmp_path / "labels.txt").write_text("one\ntwo")
    fitted = fitted_by_command(place, tmp_path / "other", "--size", "45%", "--controls", "none")
    assert any("labels.txt names 2 classes" in note for note in report(fitted)["notes"])
    assert report(fitted)["head"]["own"] == 0
