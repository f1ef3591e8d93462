"""The scripts that compare ways to cut, and what lets them run on a GPU."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import at_bytes
import cuts
import on_gpu
import pytest
import torch

from sartor.model.network import clone, load_dense
from sartor.stages import masters
from sartor.stages.bits import all_on_base
from sartor.stages.distil import DistilConfig, anchor, distil_
from sartor.stages.masters import Adam, free
from sartor.stages.tokens import cut_windows, encode_windows, training_rows
from tests.conftest import texts


def trained(model: Any, tokenizer: Any, config: DistilConfig) -> tuple[Any, int]:
    """A copy, and the tokens that it saw; what the model itself says is learnt, from slightly moved weights."""
    rows = training_rows(texts("cook", 10, 3), tokenizer, 64)
    validation = encode_windows(cut_windows(texts("cook", 6, 8)), tokenizer)
    student, g = clone(model), torch.Generator().manual_seed(0)
    for p in student.parameters():
        p.data += 0.02 * torch.randn(p.shape, generator=g)
    done = distil_(student, free(student), None, anchor(model, rows), validation, config)
    return student, done.tokens


def test_a_training_of_so_many_rows_is_the_same_again(place: dict[str, Path], tokenizer: Any) -> None:
    model = load_dense(place["model"])[0]
    config = DistilConfig(math.inf, 1e-3, checks=2, rows=24)
    (one, tokens), (other, _) = (trained(model, tokenizer, config) for _ in range(2))
    assert tokens == 24 * 64
    assert all(torch.equal(p, q) for p, q in zip(one.parameters(), other.parameters(), strict=True))
    assert trained(model, tokenizer, config.part(0.5))[1] == 12 * 64


@pytest.mark.parametrize("relative", [False, True])
def test_all_tensors_at_once_take_the_step_that_each_alone_takes(relative: bool) -> None:
    g = torch.Generator().manual_seed(0)
    shapes = {"matrix": (30, 20), "bias": (7,), "unused": (3,)}
    ours, theirs = ({n: torch.nn.Parameter(torch.ones(s)) for n, s in shapes.items()} for _ in range(2))
    mine, plain = ({n: Adam(p.data, 1e-3, relative) for n, p in of.items()} for of in (ours, theirs))
    for step in range(4):
        for n in ("matrix", "bias"):
            gradient = (step - 1.5) * torch.randn(shapes[n], generator=g)
            ours[n].grad, theirs[n].grad = gradient.clone(), gradient.clone()
        on_gpu.update_(ours, mine, 1e-2)
        masters.update_(theirs, plain, 1e-2)
    assert all(torch.allclose(ours[n], theirs[n], atol=1e-6) for n in shapes)
    assert not torch.equal(ours["matrix"], torch.ones(30, 20))


def test_draws_are_those_of_the_processor() -> None:
    draw = on_gpu.drawn_on_cpu(torch.randperm, "cpu")
    plain = torch.randperm(50, generator=torch.Generator().manual_seed(3))
    assert torch.equal(draw(50, generator=torch.Generator().manual_seed(3)), plain)
    with torch.device("meta"):  # as on a device that a processor's generator cannot draw for
        assert torch.equal(draw(50, generator=torch.Generator().manual_seed(3)), plain)


def test_cuts_are_measured_as_they_are_and_after_recovery(
    place: dict[str, Path], tiny: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arms = ["Sartor", "Wanda-sp", "random"]
    ask = ["cuts", str(place["model"]), "--data", str(place["user"]), "--generic", str(place["generic"])]
    monkeypatch.setattr("sys.argv", [*ask, "--removed", "0.4", "--rows", "16", "--train", "32", "--only", *arms])
    cuts.main()
    first = capsys.readouterr().out.splitlines()
    found = {
        (arm, how): line
        for line in first[1:]
        for arm in arms
        for how in (" cut ", "trained on 32")
        if f": {arm} " in line and how in line
    }
    assert len(found) == len(first) - 1 == 6
    bits = {key: float(line.split("user ")[1].split()[0]) for key, line in found.items()}
    assert bits["Sartor", " cut "] <= bits["random", " cut "]
    assert bits["random", "trained on 32"] <= bits["random", " cut "]
    monkeypatch.setattr(cuts, "cell", lambda *_: pytest.fail("it was known"))
    cuts.main()
    assert capsys.readouterr().out.splitlines() == first


def test_at_equal_bytes_every_arm_fits_and_only_its_cuts_and_repair_differ(
    place: dict[str, Path], tiny: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arms = ["Sartor", "FLAP", "random"]
    ask = ["at_bytes", str(place["model"]), "--data", str(place["user"]), "--generic", str(place["generic"])]
    monkeypatch.setattr("sys.argv", [*ask, "--sizes", "25%", "--rows", "16", "--train", "32", "--only", *arms])
    at_bytes.main()
    first = capsys.readouterr().out.splitlines()
    limit = int(0.25 * 2 * sum(p.numel() for p in load_dense(place["model"])[0].parameters()))
    sizes = {
        arm: int(line.split(" gone, ")[1].split()[0].replace(",", ""))
        for line in first
        for arm in arms
        if f": {arm} " in line
    }
    assert set(sizes) == set(arms)
    assert all(0.9 * limit < size <= limit for size in sizes.values())
    monkeypatch.setattr(at_bytes, "cell", lambda *_: pytest.fail("it was known"))
    at_bytes.main()
    assert capsys.readouterr().out.splitlines() == first


def test_weights_on_their_nearest_levels_are_nearly_what_they_were(place: dict[str, Path]) -> None:
    model = load_dense(place["model"])[0]
    latents = at_bytes.to_nearest(free(model), all_on_base(model))
    assert set(latents.scales) == set(all_on_base(model))
    for name in latents.scales:
        w = latents.masters[name]
        assert float((latents.value(name) - w).square().mean()) < 0.02 * float(w.square().mean())
