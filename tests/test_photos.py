"""From picture files to splits: every kind of file, every layout of folders, and nothing that crosses a split."""

from __future__ import annotations

import io
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sartor.data import photos
from sartor.data.album import PARTS, Album, _few_shot, near_duplicates, split
from sartor.data.photos import Gallery, open_photo, read_photos
from sartor.errors import DataError

SIZE = 32


def scene(seed: int, side: int = 48) -> Image.Image:
    """A smooth random picture: unlike any other seed's, like itself after recompression."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 255, (6, 6, 3), dtype=np.uint8))
    return coarse.resize((side, side), Image.Resampling.BICUBIC)


def put(file: Path, image: Image.Image, **options: object) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    image.save(file, **options)  # type: ignore[arg-type]
    return file


def folder(root: Path, sizes: dict[str, int], first: int = 0) -> Path:
    seed = first
    for name, n in sizes.items():
        for i in range(n):
            put(root / name / f"{i:03d}.png", scene(seed))
            seed += 1
    return root


def test_a_photo_is_turned_upright_by_its_exif(tmp_path: Path) -> None:
    image = Image.new("RGB", (40, 40), "white")
    image.paste("red", (0, 0, 20, 40))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be seen upright it is turned clockwise: left becomes top
    file = put(tmp_path / "a.jpg", image, exif=exif, quality=95)
    picture = open_photo(file, SIZE).int()
    assert picture[:, 4, 4].tolist()[1] < 40
    assert picture[:, 4, 28].tolist()[1] < 40
    assert picture[1, 28].min() > 215


@pytest.mark.parametrize("kind", ["CMYK", "L", "1", "P", "16-bit", "16-bit tiff", "32-bit", "float", "LA"])
def test_whatever_the_mode_the_brightness_stays(tmp_path: Path, kind: str) -> None:
    ramp = np.tile(np.repeat([0, 255], 20), (40, 1)).astype(np.uint8)
    grey = Image.fromarray(ramp)
    made = {
        "16-bit": (Image.fromarray(ramp.astype(np.uint16) * 257), "png"),
        "16-bit tiff": (Image.fromarray((ramp.astype(np.uint16) * 257).astype(">u2")), "tif"),
        "32-bit": (Image.fromarray(ramp.astype(np.int32) * 257), "tif"),
        "float": (Image.fromarray(ramp.astype(np.float32) / 255), "tif"),
    }
    image, suffix = made.get(kind) or (
        grey.convert("RGB").convert(kind) if kind != "LA" else grey.convert("LA"),
        "jpg" if kind == "CMYK" else "png",
    )
    picture = open_photo(put(tmp_path / f"a.{suffix}", image), SIZE)
    assert picture.dtype == torch.uint8
    assert picture.shape == (3, SIZE, SIZE)
    assert picture[:, :, :12].float().mean() < 12
    assert picture[:, :, -12:].float().mean() > 243


def test_middle_grey_of_sixteen_bits_is_middle_grey(tmp_path: Path) -> None:
    file = put(tmp_path / "a.png", Image.fromarray(np.full((20, 20), 32768, np.uint16)))
    assert set(open_photo(file, SIZE).unique().tolist()) <= {127, 128}


def test_what_shows_through_is_white(tmp_path: Path) -> None:
    palette = Image.new("P", (20, 20), 0)
    palette.putpalette([0, 0, 0, 255, 0, 0])
    file = put(tmp_path / "p.png", palette, transparency=0)
    clear = put(tmp_path / "c.png", Image.new("RGBA", (20, 20), (0, 0, 0, 0)))
    assert open_photo(file, SIZE).min() == 255
    assert open_photo(clear, SIZE).min() == 255


def test_of_an_animation_the_first_frame_is_taken(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (20, 20), c) for c in ("red", "blue")]
    for name in ("a.gif", "a.webp"):
        file = tmp_path / name
        frames[0].save(file, save_all=True, append_images=frames[1:])
        red, _, blue = open_photo(file, SIZE).float().mean((1, 2)).tolist()
        assert red > 200 > 50 > blue
    put(tmp_path / "b.gif", frames[0])
    assert read_photos(tmp_path, SIZE).dropped == {photos.SEVERAL: 2}


def test_a_damaged_second_frame_does_not_cost_the_first(tmp_path: Path) -> None:
    frames = [scene(i, 20) for i in range(2)]
    file, raw = tmp_path / "a.gif", io.BytesIO()
    frames[0].save(raw, "GIF")
    first = raw.getvalue()
    frames[0].save(file, save_all=True, append_images=frames[1:])
    file.write_bytes(file.read_bytes()[: len(first) + 40])
    assert open_photo(file, SIZE).shape == (3, SIZE, SIZE)


def test_what_a_photo_loses_is_noticed_and_the_photo_kept(tmp_path: Path) -> None:
    deep = [Image.fromarray(np.full((20, 20), n * 9_000, np.uint16)) for n in (1, 2)]
    put(tmp_path / "a.png", deep[0])
    put(tmp_path / "a.tif", deep[1])
    put(tmp_path / "a.jpg", scene(0).convert("CMYK"))
    put(tmp_path / "plain.jpg", scene(1))
    gallery = read_photos(tmp_path, SIZE)
    assert len(gallery.pixels) == 4
    assert gallery.dropped == {photos.DEEP: 2, photos.INKS: 1}


def test_the_middle_square_is_taken_and_a_drafted_jpeg_looks_the_same(tmp_path: Path) -> None:
    wide = Image.new("RGB", (2400, 800), "blue")
    wide.paste(scene(1, 800), (800, 0))
    jpeg, png = put(tmp_path / "a.jpg", wide, quality=95), put(tmp_path / "a.png", wide)
    a, b = open_photo(jpeg, SIZE).float(), open_photo(png, SIZE).float()
    assert (a - b).abs().mean() < 3
    alone = open_photo(put(tmp_path / "b.png", scene(1, 800)), SIZE).float()
    assert (b - alone).abs()[:, :, 2:-2].max() <= 2


def bad_files(root: Path) -> dict[str, str]:
    """File names and why each cannot be used."""
    root.mkdir(parents=True, exist_ok=True)
    whole = io.BytesIO()
    scene(0, 200).save(whole, "JPEG")
    (root / "cut.jpg").write_bytes(whole.getvalue()[: len(whole.getvalue()) // 2])
    (root / "text.jpg").write_text("no picture at all")
    (root / "empty.jpg").write_bytes(b"")
    (root / "phone.heic").write_bytes(b"\0\0\0\x18ftypheic" + b"\0" * 40)
    (root / "renamed.jpg").write_bytes(b"\0\0\0\x18ftypheic" + b"\0" * 40)
    (root / "program.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 99 99\n")
    Image.new("1", (10_000, 10_000)).save(root / "bomb.png")
    Image.new("RGB", (7, 50)).save(root / "tiny.png")
    return {
        "cut.jpg": photos.DAMAGED,
        "text.jpg": photos.NO_PICTURE,
        "empty.jpg": photos.NO_PICTURE,
        "phone.heic": photos.HEIC,
        "renamed.jpg": photos.HEIC,
        "program.png": photos.NO_PICTURE,
        "bomb.png": photos.BOMB,
        "tiny.png": photos.TINY,
    }


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_bad_file_is_refused_in_one_line_and_counted_in_a_folder(tmp_path: Path) -> None:
    why = bad_files(tmp_path / "all")
    for name, reason in why.items():
        with pytest.raises(DataError, match=reason) as caught:
            open_photo(tmp_path / "all" / name, SIZE)
        assert "\n" not in str(caught.value)
        assert str(tmp_path) not in str(caught.value)
    folder(tmp_path, {"all": 3})
    (tmp_path / "all" / "notes.txt").write_text("hello")
    (tmp_path / "all" / ".hidden.png").write_text("hello")
    gallery = read_photos(tmp_path / "all", SIZE)
    expected = Counter(why.values()) + Counter({"files of other kinds than pictures": 1})
    assert gallery.dropped == expected
    assert len(gallery.pixels) == len(gallery.exact) == 3
    assert gallery.labels is None
    assert gallery.classes == ()


def test_damaged_bytes_anywhere_never_raise_anything_but_a_data_error(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for kind in ("JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP"):
        raw = io.BytesIO()
        scene(0, 24).save(raw, kind)
        for _ in range(25):
            damaged = np.frombuffer(raw.getvalue(), np.uint8).copy()
            damaged[rng.integers(0, len(damaged), 6)] = rng.integers(0, 255, 6)
            (tmp_path / "a").write_bytes(damaged.tobytes())
            try:
                assert open_photo(tmp_path / "a", SIZE).shape == (3, SIZE, SIZE)
            except DataError:
                continue


def test_folders_are_classes_and_loose_photos_are_counted(tmp_path: Path) -> None:
    folder(tmp_path, {"b": 5, "a/2021": 2, "a/2022": 2})
    put(tmp_path / "loose.png", scene(99))
    gallery = read_photos(tmp_path, SIZE)
    assert gallery.classes == ("a", "b")
    assert gallery.labels is not None
    assert gallery.labels.tolist() == [0] * 4 + [1] * 5
    assert gallery.dropped == {"photos outside the class folders": 1}
    assert gallery.part == [None] * 9


def test_folders_of_dates_are_no_classes(tmp_path: Path) -> None:
    gallery = read_photos(folder(tmp_path, {"2021-05": 4, "2022": 4, "100APPLE": 4}), SIZE)
    assert gallery.labels is None
    assert gallery.dropped["folders that are dates and were taken for no classes"] == 3


def test_the_owners_split_is_kept_and_nothing_near_a_test_photo_is_trained_on(tmp_path: Path) -> None:
    folder(tmp_path / "train", {"a": 12, "b": 12})
    folder(tmp_path / "Val", {"a": 4, "b": 4}, first=100)
    folder(tmp_path / "test", {"a": 6, "b": 6}, first=200)
    put(tmp_path / "train/a/copy.jpg", scene(200), quality=80)
    put(tmp_path / "train/b/same.png", scene(207))
    gallery = read_photos(tmp_path, SIZE)
    assert Counter(gallery.part) == {"train": 26, "validation": 8, "test": 12}
    album = split(gallery)
    assert album.counts() == {"train": 24, "validation": 8, "test": 12}
    assert album.dropped == {"near duplicates of test photos outside test": 1, "exact duplicates": 1}


def test_a_missing_validation_is_taken_from_train_and_a_missing_test_is_the_validation(tmp_path: Path) -> None:
    folder(tmp_path / "x/train", {"a": 20, "b": 20})
    folder(tmp_path / "x/test", {"a": 6, "b": 6}, first=200)
    album = split(read_photos(tmp_path / "x", SIZE))
    assert album.counts() == {"train": 32, "validation": 8, "test": 12}
    (tmp_path / "x/test").rename(tmp_path / "x/val")
    other = split(read_photos(tmp_path / "x", SIZE))
    assert other.counts() == album.counts()
    assert any("no test folder" in w for w in other.warnings)


def test_a_table_of_labels_is_matched_exactly_first_and_ambiguity_is_refused(tmp_path: Path) -> None:
    folder(tmp_path / "data", {"": 10})
    put(tmp_path / "data/Sub/One.png", scene(50))
    put(tmp_path / "data/Sub/one.png", scene(51))
    put(tmp_path / "data/unnamed.png", scene(52))
    rows = [f"{i:03d}.png;{'cat' if i < 5 else 'dog, big'}" for i in range(10)]
    rows += [".\\Sub\\one.png;cat", "SUB/ONE.png;cat", "gone.png;cat", "odd row", "000.PNG;cat"]
    for header in ("", "Photo;Label\n"):
        table = tmp_path / "data/labels.csv"
        table.write_text(header + "\n".join(rows))
        gallery = read_photos(tmp_path / "data", SIZE, table)
        assert gallery.classes == ("cat", "dog, big")
        assert gallery.labels is not None
        assert np.bincount(gallery.labels).tolist() == [6, 5]
        assert gallery.dropped == {
            "rows whose file name fits several files": 1,
            "rows whose file is missing": 1,
            "rows that are not 'file,label'": 1,
            "photos that the table of labels does not name": 2,
        }


@pytest.mark.parametrize("between", [",", ";", "\t"])
def test_a_table_finds_its_columns_by_their_headers(tmp_path: Path, between: str) -> None:
    folder(tmp_path / "data", {"": 8})
    rows = [["id", "label", "file"], *([str(i), "ab"[i % 2], f"{i:03d}.png"] for i in range(8))]
    (tmp_path / "t.csv").write_text("\n".join(between.join(r) for r in rows))
    gallery = read_photos(tmp_path / "data", SIZE, tmp_path / "t.csv")
    assert gallery.labels is not None
    assert gallery.labels.tolist() == [0, 1] * 4
    assert not gallery.dropped


def test_a_table_that_names_no_file_is_refused(tmp_path: Path) -> None:
    folder(tmp_path / "data", {"": 8})
    (tmp_path / "t.csv").write_text("elsewhere/1.png,a\nelsewhere/2.png,b\n")
    with pytest.raises(DataError, match="none of the 2 files named in 't.csv'"):
        read_photos(tmp_path / "data", SIZE, tmp_path / "t.csv")
    (tmp_path / "t.csv").write_bytes(b"\0\1\2")
    for name in ("t.csv", "absent.csv"):
        with pytest.raises(DataError, match="no table of labels"):
            read_photos(tmp_path / "data", SIZE, tmp_path / name)


def test_names_that_differ_only_in_case_are_both_kept_and_counted(tmp_path: Path) -> None:
    folder(tmp_path, {"a": 4, "b": 4})
    put(tmp_path / "a/X.png", scene(50))
    put(tmp_path / "a/x.png", scene(51))
    gallery = read_photos(tmp_path, SIZE)
    assert len(gallery.pixels) == 10
    assert gallery.dropped == {"file names that differ only in case (kept)": 2}


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({}, "folder is empty"),
        ({"a": 1}, "one photo"),
        ({"a": 9}, "one class"),
        ({"a": 3, "b": 3}, "the largest has 3"),
    ],
)
def test_a_folder_that_nothing_can_be_learnt_from_is_refused_in_one_line(
    tmp_path: Path, sizes: dict[str, int], message: str
) -> None:
    with pytest.raises(DataError, match=message) as caught:
        read_photos(folder(tmp_path, sizes), SIZE)
    assert "\n" not in str(caught.value)


def test_texts_and_files_are_no_folder_of_photos(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("hello")
    with pytest.raises(DataError, match="1 files of other kinds than pictures"):
        read_photos(tmp_path, SIZE)
    with pytest.raises(DataError, match="one file at 'a.txt'"):
        read_photos(tmp_path / "a.txt", SIZE)
    with pytest.raises(DataError, match="nothing at 'b'"):
        read_photos(tmp_path / "b", SIZE)


def test_a_large_folder_is_sampled_by_class_and_the_same_way_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(photos, "MOST", 40)
    root = folder(tmp_path, {"a": 60, "b": 30, "c": 5})
    first, again = read_photos(root, SIZE), read_photos(root, SIZE)
    assert first.labels is not None
    assert first.exact == again.exact
    assert first.dropped == {"photos left out of a sample of 40": 55}
    counts = np.bincount(first.labels)
    assert counts.sum() == 40
    assert counts[2] >= 4
    assert 1.6 < counts[0] / counts[1] < 2.4


def gallery_of(images: list[Image.Image], labels: list[int] | None, part: list[str | None] | None = None) -> Gallery:
    pixels = torch.stack([torch.from_numpy(np.array(i.convert("RGB"))).permute(2, 0, 1).contiguous() for i in images])
    return Gallery(
        pixels,
        None if labels is None else torch.tensor(labels),
        () if labels is None else tuple("abcdefgh"[: max(labels) + 1]),
        part or [None] * len(images),
        tuple(str(hash(p.numpy().tobytes())) for p in pixels),
        Counter(),
    )


def recompressed(image: Image.Image) -> Image.Image:
    raw = io.BytesIO()
    image.save(raw, "JPEG", quality=70)
    return Image.open(raw).convert("RGB")


def where(album: Album, images: list[Image.Image]) -> list[str | None]:
    """The part that each image is in."""
    found = {p.numpy().tobytes(): name for name in PARTS for p in getattr(album, name).pixels}
    return [found.get(np.array(i).transpose(2, 0, 1).tobytes()) for i in images]


def test_near_duplicates_never_cross_a_split() -> None:
    images = [scene(i) for i in range(60)]
    copies = [recompressed(i) for i in images]
    gallery = gallery_of(images + copies, [i % 3 for i in range(60)] * 2)
    for seed in range(5):
        album = split(gallery, seed)
        lost = album.dropped["test photos nearly the same as another"]
        assert sum(album.counts().values()) == 120 - lost
        assert album.counts()["test"] == lost > 0  # each had one copy
        parts = list(zip(where(album, images), where(album, copies), strict=True))
        assert all(a == b or {a, b} == {"test", None} for a, b in parts)
        assert set(where(album, images)) == set(PARTS)


@pytest.mark.parametrize("share", [0.01, 0.02, 0.035])
def test_copies_with_their_edges_cut_off_are_near(share: float) -> None:
    images = [scene(i, 224) for i in range(20)]
    off = share * 224
    copies = [i.resize((224, 224), Image.Resampling.BICUBIC, (off, off, 224 - off, 224 - off)) for i in images]
    clusters = near_duplicates(gallery_of(images + [recompressed(i) for i in copies], None).pixels)
    assert np.array_equal(clusters[:20], clusters[20:])
    assert len(set(clusters.tolist())) == 20


def test_pictures_of_one_outline_are_not_taken_for_near_duplicates() -> None:
    """All that is on white has the same flat border; what is inside counts."""
    images = []
    for i in range(8):
        image = Image.new("RGB", (48, 48), "white")
        image.paste(scene(i, 24), (12, 12))
        images.append(image)
    gallery = gallery_of(images, None)
    assert len(set(near_duplicates(gallery.pixels).tolist())) == 8
    twins = gallery_of([*images, recompressed(images[3])], None)
    clusters = near_duplicates(twins.pixels)
    assert clusters[3] == clusters[8]
    assert len(set(clusters.tolist())) == 8


@pytest.mark.parametrize("outline", [False, True])
def test_one_colour_or_one_outline_makes_no_two_pictures_alike(outline: bool) -> None:
    """As under water, or seen through a round opening: what all have in common says nothing."""
    images = []
    for i in range(24):
        rng = np.random.default_rng(i)
        texture = rng.normal(0, 8, (12, 12, 3)) + ((230, 130, 60) if outline else (20, 110, 170))
        picture = Image.fromarray(np.clip(texture, 0, 255).astype(np.uint8)).resize(
            (224, 224), Image.Resampling.BICUBIC
        )
        if outline:
            y, x = np.mgrid[:224, :224] - 112
            inside = Image.fromarray(((x**2 + y**2 < 100**2) * 255).astype(np.uint8))
            picture = Image.composite(picture, Image.new("RGB", (224, 224)), inside)
        images.append(picture)
    clusters = near_duplicates(gallery_of([*images, recompressed(images[3])], None).pixels)
    assert clusters[3] == clusters[24]
    assert len(set(clusters.tolist())) == 24


def test_flat_pictures_are_like_nothing() -> None:
    flat = [Image.new("RGB", (64, 64), (v, v, v)) for v in (0, 7, 90, 200, 255)]
    assert len(set(near_duplicates(gallery_of(flat, None).pixels).tolist())) == 5


def test_a_split_is_stratified_and_the_same_for_the_same_seed() -> None:
    sizes = [40, 20, 10, 6, 5, 4]
    labels = [k for k, n in enumerate(sizes) for _ in range(n)]
    gallery = gallery_of([scene(i) for i in range(len(labels))], labels)
    album, again, other = split(gallery, 3), split(gallery, 3), split(gallery, 4)
    assert torch.equal(album.test.pixels, again.test.pixels)
    assert not torch.equal(album.test.pixels, other.test.pixels)
    table = {name: np.bincount(getattr(album, name).labels, minlength=6) for name in PARTS}
    assert sum(table.values()).tolist() == sizes  # type: ignore[union-attr]
    for name, share in (("train", 0.65), ("validation", 0.15), ("test", 0.20)):
        assert np.abs(table[name] - share * np.array(sizes)).max() <= 1
    assert table["train"].min() >= 1
    assert table["test"].min() >= 1
    assert any(
        "6 of 6 classes have fewer than 10 test photos" in w and "may still mean 72%" in w for w in album.warnings
    )
    assert any("test photos: intervals are wide" in w for w in album.warnings)


def test_classes_with_enough_test_photos_are_not_called_uncertain() -> None:
    assert _few_shot(np.array([10, 40])) == []
    (told,) = _few_shot(np.array([9, 10, 40]))
    assert told.startswith("1 of 3 classes")


def test_a_class_that_clusters_tie_to_others_still_reaches_train_and_test() -> None:
    images = [scene(i) for i in range(30)] + [recompressed(scene(i)) for i in range(8)]
    labels = [0] * 30 + [1] * 8  # every photo of class 1 is a near duplicate of one of class 0
    for seed in range(5):
        album = split(gallery_of(images, labels), seed)
        for name in ("train", "test"):
            assert set(getattr(album, name).labels.tolist()) == {0, 1}


def test_duplicates_and_small_classes_are_dropped_and_counted() -> None:
    images = [scene(i) for i in range(40)]
    labels = [0] * 20 + [1] * 17 + [2] * 3
    images += [images[0], images[1], images[21]]
    labels += [0, 1, 1]  # a copy, a contradiction, a copy
    album = split(gallery_of(images, labels))
    assert album.dropped == {
        "exact duplicates": 2,
        "equal photos in several classes": 2,
        "photos of classes with fewer than 4 photos": 3,
    }
    assert album.classes == ("a", "b")
    assert sum(album.counts().values()) == 36


def test_photos_without_labels_are_split_too() -> None:
    album = split(gallery_of([scene(i) for i in range(100)], None))
    assert album.counts() == {"train": 65, "validation": 15, "test": 20}
    assert album.train.labels is None
    assert album.classes == ()


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        ([scene(i) for i in range(23)], None, "23 of 23 photos"),
        ([scene(0)] * 40, None, "1 of 40 photos"),
        ([scene(i) for i in range(27)], [0] * 24 + [1] * 3, "one class of 2 remains"),
        ([scene(0, 48 + i).resize((48, 48)) for i in range(30)], None, "too few distinct ones"),
    ],
)
def test_too_few_photos_are_refused_in_one_line(
    images: list[Image.Image], labels: list[int] | None, message: str
) -> None:
    with pytest.raises(DataError, match=message) as caught:
        split(gallery_of(images, labels))
    assert "\n" not in str(caught.value)
