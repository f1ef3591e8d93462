"""Laws of the report on pictures, and of which patches decided."""

from __future__ import annotations

import copy
import re
from html.parser import HTMLParser
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch

from sartor.errors import InputError
from sartor.model.network import layers_of, shrink_attention_
from sartor.model.vision import VisionConfig
from sartor.report.overlay import inferno, overlay
from sartor.report.pictures import inspection, page, table, warnings
from sartor.stages.attribute import _watched, patches_that_decided
from sartor.stages.head import choose_head, with_head

from .test_pictures import network

CONFIG = VisionConfig("dinov2", 64, 4, 256, layers=4, size=32, patch=8, prefix=2)
PART = {"attention": [0.02, 0.01, 0.03], "mlp": [0.4, 0.3, 0.5]}
LAYER = {
    "groups": 6,
    "groups_kept": 5,
    "channels": 1536,
    "channels_kept": 512,
    "user": PART,
    "generic": {"attention": [0.05, 0.04, 0.06], "mlp": [0.1, 0.05, 0.2]},
    "verdict": {"attention": "undecided", "mlp": "personalized"},
}
REPORT: dict[str, Any] = {
    "kind": "pictures",
    "runtime": "ONNX Runtime",
    "bytes": {
        "artifact": 11_000_000,
        "original_fp16": 44_000_000,
        "budget": 11_050_000,
        "dense_fp32": 88_400_000,
        "dense_int8": 22_900_000,
    },
    "user": {
        "metric": "accuracy",
        "dense": 0.902,
        "artifact": 0.911,
        "dense_ci95": [0.87, 0.93],
        "ci95": [0.88, 0.94],
        "change": 0.009,
        "change_ci95": [-0.012, 0.031],
        "pictures": 240,
        "nats": 0.31,
        "dense_nats": 0.34,
        "agreement": 0.942,
        "by_class": [
            {"pictures": 3, "right": 3, "ci95": [0.4385, 1.0], "dense_right": 2},
            {"pictures": 237, "right": 216, "ci95": [0.87, 0.94], "dense_right": 214},
        ],
    },
    "generic": {"metric": "feature agreement", "artifact": 0.871, "ci95": [0.86, 0.88], "pictures": 400},
    "speed": {
        "seconds": 0.0061,
        "low": 0.006,
        "high": 0.0064,
        "dense_seconds": 0.0214,
        "dense_int8_seconds": 0.0118,
        "dense_read_seconds": 0.0197,
        "threads": 2,
    },
    "peak_rss_bytes": 90_000_000,
    "dense_peak_rss_bytes": 190_000_000,
    "parity": {"cosine": 0.9987, "same_answers": 1.0, "pictures": 48},
    "data": {
        "pictures": {"train": 780, "validation": 180, "test": 240},
        "classes": 12,
        "labelled": True,
        "mirrored": False,
        "dropped": {"truncated or damaged": 3, "exact <duplicates>": 11},
    },
    "head": {"depth": 11, "of": 12, "nats": 0.412},
    "layers": [LAYER] * 10 + [LAYER | {"groups_kept": 0, "channels_kept": 0}],
    "controls": [
        {
            "name": "same bytes, generic calibration & no adaptation",
            "bytes": 11_000_000,
            "accuracy": 0.84,
            "ci95": [0.8, 0.88],
            "change": 0.071,
            "change_ci95": [0.04, 0.1],
            "seconds": 61.0,
            "note": "",
        },
        {
            "name": "the original at 8 bits",
            "bytes": None,
            "accuracy": None,
            "ci95": None,
            "change": None,
            "change_ci95": None,
            "seconds": None,
            "note": "not measured: add --controls full",
        },
    ],
    "adaptation": {"curve": [[0.0, 0.4], [30.0, 0.33], [60.0, 0.31]], "pictures": 900, "pictures_per_s": 15.0},
    "recovery": {"curve": [[0.0, 0.8], [60.0, 0.36]], "pictures": 900, "pictures_per_s": 15.0},
    "pruning": {
        "channels": 9_000,
        "groups": 20,
        "validation_whole": {"accuracy": 0.92, "nats": 0.3},
        "validation_cut": {"accuracy": 0.5, "nats": 1.4},
        "validation_fitted": {"accuracy": 0.85, "nats": 0.5},
    },
    "probing": {
        "masks": 24,
        "r2": 0.8,
        "spearman": 0.9,
        "factor": 1.3,
        "user_pictures": 300,
        "generic_pictures": 300,
        "known": 0.85,
    },
    "plan": {"price": 1e-9, "predicted_damage": 0.2, "method": "sartor"},
    "seconds": {"open": 4.0, "plan": 40.0, "adapt": 60.0, "recover": 60.0, "controls": 100.0},
    "effort": "quick",
    "seed": 0,
    "model": {"spec": "pypi:some-vit==1.0", "sha256": "0" * 64},
    "notes": ["17 photos of the smallest class are few"],
    "parameters": {"before": 22_000_000, "after": 9_500_000},
    "versions": {"sartor": "0.1.0", "onnxruntime": "1.32.0"},
    "job_peak_rss_bytes": 1_500_000_000,
    "peak_rss_bytes_by_stage": {"probe": 900_000_000},
}


def unlabelled() -> dict[str, Any]:
    """Clusters in the classes' place, and neither generic pictures nor trainings."""
    r = copy.deepcopy(REPORT)
    r["user"] |= {"metric": "feature agreement", "dense": 1.0, "artifact": 0.95, "dense_ci95": [1.0, 1.0]}
    r["user"] |= {"ci95": [0.94, 0.96], "change": -0.05, "change_ci95": [-0.06, -0.04]}
    del r["user"]["nats"], r["user"]["dense_nats"], r["data"]["mirrored"]
    r["data"] |= {"labelled": False, "dropped": {}}
    return r | {"generic": None, "adaptation": {}, "recovery": {}, "pruning": {}}


def alone() -> dict[str, Any]:
    return REPORT | {"controls": [], "layers": [LAYER] * 24}


@pytest.mark.parametrize("r", [REPORT, unlabelled(), alone()], ids=["labelled", "unlabelled", "alone"])
def test_the_page_stands_alone_and_every_drawing_stays_inside_its_box(r: dict[str, Any]) -> None:
    text = page(r)
    assert not re.search(r"src=|href=|<script|http(?!://www.w3.org/2000/svg)|None|nan", text)
    assert "<duplicates>" not in text
    assert unclosed(text) == []
    drawings = re.findall(r"<svg.*?</svg>", text)
    assert len(drawings) >= 4
    for drawing in drawings:
        svg = ElementTree.fromstring(drawing)
        _, _, width, height = map(float, svg.attrib["viewBox"].split())
        for x, y in corners(svg):
            assert 0 <= x <= width, drawing
            assert 0 <= y <= height, drawing


class Tags(HTMLParser):
    """Those that are open, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def unclosed(text: str) -> list[str]:
    """Tags left open at the end, but for html itself."""
    tags = Tags()
    tags.feed(text)
    return [t for t in tags.open if t != "html"]


def corners(svg: ElementTree.Element) -> list[tuple[float, float]]:
    """Of all boxes, lines of text (6 units a letter of size 12) and paths."""
    found = []
    for e in svg:
        tag, get = e.tag.split("}")[1], lambda k, e=e: float(e.attrib[k])
        if tag == "rect":
            found += [(get("x"), get("y")), (get("x") + get("width"), get("y") + get("height"))]
        elif tag == "text":
            long = get("font-size") / 2 * len(e.text or "")
            start = get("x") - {"start": 0, "middle": long / 2, "end": long}[e.attrib["text-anchor"]]
            found += [(start, get("y")), (start + long, get("y"))]
        else:
            assert "-" not in (d := e.attrib["d"])
            found += [(float(x), float(y)) for x, y in re.findall(r"[ML]([\d.]+) ([\d.]+)", d)]
            found += [(float(x), 0.0) for x in re.findall(r"H([\d.]+)", d)]
    return found


def test_the_headline_claims_no_more_than_the_interval_does() -> None:
    for change, ci95, words in (
        (0.009, [-0.012, 0.031], "about as many as the original"),
        (0.031, [0.01, 0.05], "3.1 points more</b> than the original"),
        (-0.031, [-0.05, -0.01], "3.1 points fewer</b> than the original"),
    ):
        told = page(REPORT | {"user": REPORT["user"] | {"change": change, "change_ci95": ci95}})
        assert words in told.split("</p>")[0]
    assert "3.5 times as fast" in page(REPORT).split("</p>")[0]
    assert "as you do" not in page(unlabelled()).split("</p>")[0]


def test_what_was_not_measured_is_said() -> None:
    lines = table(REPORT).splitlines()
    assert any(re.search(r"original at 8 bits +not measured +add --controls full", line) for line in lines)
    assert not any("generic pictures" in w for w in warnings(REPORT))
    assert any("generic pictures" in w for w in warnings(unlabelled()))
    assert re.search(r"generic pictures +not measured", table(unlabelled()))
    assert "not measured: no generic pictures" in page(unlabelled()).split("</p>")[0]
    weak = REPORT | {"probing": REPORT["probing"] | {"spearman": 0.2}}
    assert len(warnings(weak)) == len(warnings(REPORT)) + 1


def test_the_table_has_one_column_of_changes_and_the_inspection_a_line_a_layer() -> None:
    told = table(REPORT)
    at = told.splitlines()[0].index("change")
    assert all(line[at - 2 : at] == "  " for line in told.splitlines()[2:] if "ours" in line or "times" in line)
    assert "+0.9 points [-1.2, +3.1]" in told
    lines = inspection(REPORT).splitlines()
    assert sum(bool(re.match(r" +\d+ +\d+/6 +\d+/1536 ", line)) for line in lines) == len(REPORT["layers"])
    assert "behind layer 11 of 12" in inspection(REPORT)
    assert inspection(unlabelled())


def test_without_labels_clusters_are_never_taken_for_likeness() -> None:
    assert re.search(r"calibration.* 84.0% \(clusters\) +ours \+7.1 points", table(unlabelled()))
    quality, controls = (page(unlabelled()).split(f"<h2>{h}")[1].split("<h2>")[0] for h in ("Quality", "What else"))
    assert "84.0%" not in quality
    assert "put into their cluster" in controls
    assert page(REPORT).split("<h2>Quality")[1].split("<h2>")[0].count("84.0%") == 1


def squares(n: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, Any]:
    """(noise with one square that is red or blue, which of the two, row and column of the square's patch)."""
    rng = np.random.default_rng(seed)
    pixels, labels, at = rng.integers(0, 256, (n, 3, 32, 32)), rng.integers(0, 2, n), rng.integers(0, 4, (n, 2))
    for picture, label, (y, x) in zip(pixels, labels, at, strict=True):
        colour = np.array([255, 30, 30] if label else [30, 30, 255])
        picture[:, 8 * y : 8 * y + 8, 8 * x : 8 * x + 8] = colour[:, None, None]
    return torch.tensor(pixels, dtype=torch.uint8), torch.tensor(labels), at


@pytest.fixture(scope="module")
def headed() -> Any:
    return fitted(network(config=CONFIG))


def fitted(model: Any) -> Any:
    pixels, labels, _ = squares(160, 1)
    return with_head(model, choose_head(model, pixels, labels, 2))


def inside_and_outside(model: Any) -> tuple[float, float]:
    """Mean relevance of the square's patch, and of all others, over 20 pictures."""
    inside, outside = [], []
    for picture, label, (y, x) in zip(*squares(20, 7), strict=True):
        relevance = patches_that_decided(model, picture[None], int(label))
        assert relevance.shape == (4, 4)
        assert 0 <= float(relevance.min()) <= float(relevance.max()) <= 1
        inside.append(float(relevance[y, x]))
        outside.append(float(relevance.sum() - relevance[y, x]) / 15)
    return float(np.mean(inside)), float(np.mean(outside))


def test_the_square_that_decides_is_found_for_its_answer_and_not_for_the_other(headed: Any) -> None:
    inside, outside = inside_and_outside(headed)
    assert inside > 0.8
    assert inside > 2 * outside
    pixels, labels, at = squares(20, 7)
    other = [
        float(patches_that_decided(headed, p[None], 1 - int(c))[tuple(a)])
        for p, c, a in zip(pixels, labels, at, strict=True)
    ]
    assert np.mean(other) < 0.2


@pytest.mark.parametrize("gone", [[1], [0, 1, 2, 3]])
def test_patches_decide_where_a_layer_or_all_have_no_attention(gone: list[int]) -> None:
    model = network(config=CONFIG)
    shrink_attention_(model, 2, [0, 3])  # layers may differ in heads, too
    for n in gone:
        shrink_attention_(model, n, [])
    inside, outside = inside_and_outside(fitted(model))
    assert inside > 2 * outside


def test_the_model_is_left_as_it_was_also_when_the_answer_does_not_exist(headed: Any) -> None:
    pixels = squares(3, 5)[0]
    before = headed(pixels)
    with torch.no_grad():
        patches_that_decided(headed, pixels[:1], 0)
    with pytest.raises(IndexError):
        patches_that_decided(headed, pixels[:1], 7)
    assert torch.equal(headed(pixels), before)
    assert not any(layer.self_attn._forward_hooks for layer in layers_of(headed))
    assert not any(p.requires_grad or p.grad is not None for p in headed.parameters())


def test_attention_spelt_out_is_the_attention(headed: Any) -> None:
    pixels = squares(2, 5)[0]
    with _watched(headed) as maps:
        spelt = headed(pixels)
    assert torch.allclose(spelt, headed(pixels), atol=1e-5)
    assert len(maps) == headed.config.layers
    assert all(torch.allclose(m.sum(-1), torch.ones(()), atol=1e-5) for m in maps)


def test_a_network_without_a_head_has_no_answer_to_explain() -> None:
    with pytest.raises(InputError, match="no head"):
        patches_that_decided(network(config=CONFIG), squares(1, 5)[0], 0)


def test_the_overlay_shows_the_picture_and_is_brightest_where_it_mattered() -> None:
    pixels = torch.full((3, 32, 32), 128, dtype=torch.uint8)
    relevance = torch.zeros(4, 4)
    relevance[1, 2] = 1.0
    image = overlay(pixels, relevance)
    assert image.height >= 448
    found = np.asarray(image).astype(int)
    side = image.height
    assert (found[:, :side] == 128).all()
    bright = found[:, -side:].sum(-1)
    y, x = np.unravel_index(bright.argmax(), bright.shape)
    assert (y * 4 // side, x * 4 // side) == (1, 2)


def test_colours_grow_lighter_with_relevance() -> None:
    x = torch.linspace(0, 1, 101)[None]
    light = (inferno(x) * torch.tensor([0.2126, 0.7152, 0.0722])[:, None, None]).sum(0)[0]
    assert (light.diff() > 0).all()
    assert float(light[0]) < 2
    assert float(light[-1]) > 240
