"""What users really have among their photos, through the command line: each file is refused, left out or taken with a word about it."""

from __future__ import annotations

import io
import json
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sartor.cli import main
from sartor.data import photos

from .test_photos import folder, put, scene
from .test_picture_jobs import NAMES, keep, put_model, put_tiny, report
from .test_pictures import drawn

GIVEN = 90


def png(width: int, height: int, depth: int, rows: bytes) -> bytes:
    """A PNG in colours of these sizes, with so much of its rows as there is."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def put_huge(file: Path) -> None:
    """10,000 pixels a side in 66 bytes: whoever decoded it would call it damaged."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(png(10_000, 10_000, 8, b""))


def put_cut(file: Path) -> None:
    """A JPEG of which half is there."""
    whole = io.BytesIO()
    scene(0, 200).save(whole, "JPEG")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(whole.getvalue()[: len(whole.getvalue()) // 2])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("model")
    put_model(found)
    return found


@pytest.fixture(autouse=True)
def _tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    put_tiny(monkeypatch)


def _huge(root: Path) -> None:
    for n in range(2):
        put_huge(root / f"secret-{n}.png")


def _cut(root: Path) -> None:
    for n in range(2):
        put_cut(root / f"secret-{n}.jpg")


def _texts(root: Path) -> None:
    for n in range(3):
        (root / f"secret-{n}.txt").write_text("words")


def _missing(root: Path) -> None:
    folder(root, {"": 30})
    (root / "labels.csv").write_text("file,label\n" + "".join(f"secret-{n}.png,a\n" for n in range(30)))


REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    "one photo": (
        lambda root: folder(root, {"": 1}),
        "one photo in the folder, at least 24 are needed to fit and to test a model: give a folder of photos",
    ),
    "one class": (
        lambda root: folder(root, {"secret": 30}),
        "all 30 photos are of one class, two or more are needed: add a folder for each other class, or give that folder itself",
    ),
    "too few": (
        lambda root: folder(root, {"secret": 10, "other": 10}),
        "20 of 20 photos remain once duplicates and small classes are dropped, at least 24 are needed",
    ),
    "over 64 megapixels": (
        _huge,
        "no photo that can be read in the folder (2 over 64 megapixels: save a smaller copy), at least 24 are needed",
    ),
    "cut off": (_cut, "(2 truncated or damaged: copy or export it again), at least 24 are needed"),
    "texts": (_texts, "no photo that can be read in the folder (3 files of other kinds than pictures)"),
    "labels of other files": (
        _missing,
        "none of the 30 files named in 'labels.csv' is in the folder: write their names relative to the folder given",
    ),
}


@pytest.mark.parametrize("given", REFUSED)
def test_a_folder_that_cannot_be_fitted_to_is_refused_with_what_was_got_what_is_needed_and_the_way_out(
    given: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make, said = REFUSED[given]
    root = tmp_path / "given"
    root.mkdir()
    make(root)
    labels = [f"--labels={root / 'labels.csv'}"] if (root / "labels.csv").exists() else []
    ask = ["compress", str(model), "--data", str(root), *labels, "--size", "35%", "--out", str(tmp_path / "out")]
    assert main(ask) == 2
    (told,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("sartor: ")]
    assert said in told
    assert "secret" not in told
    assert str(tmp_path) not in told
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", ["eval", "export"])
def test_labels_of_photos_are_refused_where_no_model_sees(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ["--to", "gguf", "--out", str(tmp_path / "out")] if command == "export" else []
    assert main([command, str(tmp_path), "--data", str(tmp_path), "--labels", "labels.csv", *more]) == 2
    assert "--labels is for models that see" in capsys.readouterr().err


def put_odd(root: Path) -> dict[str, str]:
    """Everything else that lies among photos, each with its label."""
    frames = [scene(n) for n in (1, 2)]
    put(root / "secret.gif", frames[0], save_all=True, append_images=frames[1:])
    put(root / "secret.jpg", scene(3).convert("CMYK"))
    grey = np.asarray(scene(4).convert("L")).astype(np.uint16) * 257
    put(root / "secret-grey.png", Image.fromarray(grey))
    rows = np.random.default_rng(5).integers(0, 256, (40, 1 + 6 * 40), dtype=np.uint8)
    rows[:, 0] = 0  # no filter
    (root / "secret-colours.png").write_bytes(png(40, 40, 16, rows.tobytes()))
    put_huge(root / "secret-huge.png")
    put_cut(root / "secret-cut.jpg")
    put(root / "secret-twin.png", scene(6))
    put(root / "secret-TWIN.png", scene(7))
    (root / "secret.txt").write_text("words")
    return {f.name: NAMES[n % 3] for n, f in enumerate(sorted(root.iterdir()))}


NOTICED = {
    photos.SEVERAL: 1,
    photos.INKS: 1,
    photos.DEEP: 2,
    photos.BOMB: 1,
    photos.DAMAGED: 1,
    photos.NO_PICTURE: 1,  # the text, which the table names
    "rows whose file is missing": 2,
    "file names that differ only in case (kept)": 2,
}


def test_labels_and_odd_files_go_through_every_command_and_are_told(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root, table, fitted = tmp_path / "photos", tmp_path / "secret.csv", tmp_path / "fitted"
    root.mkdir()
    named = put_odd(root)
    for n, (picture, label) in enumerate(zip(*drawn(GIVEN, 21), strict=True)):
        keep(picture, root / f"secret-{n}.png")
        named[f"secret-{n}.png"] = NAMES[label]
    named |= {"secret-gone.png": NAMES[0], "secret-lost.png": NAMES[1]}
    table.write_text("file,label\n" + "".join(f"{file},{label}\n" for file, label in named.items()))
    data, labels = ["--data", str(root)], ["--labels", str(table)]
    ask = ["compress", str(model), *data, "--size", "50%", "--effort", "quick", "--controls", "none"]
    assert main([*ask, *labels, "--out", str(fitted)]) == 0
    told = report(fitted)
    assert NOTICED.items() <= told["data"]["dropped"].items()
    assert told["data"]["labelled"]
    assert told["user"]["metric"] == "accuracy"
    assert json.loads((fitted / "classes.json").read_text()) == sorted(NAMES)
    said = capsys.readouterr()
    (line,) = [x for x in said.out.splitlines() if "left out or noticed" in x]
    assert all(f"{n} {why}" in line for why, n in NOTICED.items())
    (line,) = [x for x in said.out.splitlines() if "test photos: what is said of a single one" in x]
    few = sum(c["pictures"] < 10 for c in told["user"]["by_class"])
    assert f"{few} of 3 classes have fewer than 10 test photos" in line
    assert few > 0
    assert "secret" not in said.out + said.err.replace(str(fitted), "")

    again = ["eval", str(fitted), *data, "--model", str(model), "--json"]
    assert main([*again, *labels]) == 0
    assert json.loads(capsys.readouterr().out)["user"]["artifact"] == told["user"]["artifact"]
    assert main(again) == 2
    assert "and the same --labels where a file names them" in capsys.readouterr().err

    export = ["export", str(fitted), "--to", "onnx"]
    assert main([*export, *data, *labels, "--out", str(tmp_path / "all")]) == 0
    (row,) = json.loads((tmp_path / "all" / "exports.json").read_text())["rows"]
    assert row["accuracy"] == told["user"]["artifact"]
    capsys.readouterr()
    assert main([*export, *labels, "--out", str(tmp_path / "no")]) == 2
    err = capsys.readouterr().err
    assert "there is no --data: add it, or leave --labels out" in err
    assert err.count("\n") == 1
    assert not (tmp_path / "no").exists()
