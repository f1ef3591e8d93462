"""Models larger than the memory: what goes through the disk is what goes through memory."""

from __future__ import annotations

import errno
import json
import mmap
import os
from collections import namedtuple
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from sartor import api, job, paging
from sartor.effort import UNTRAINED
from sartor.errors import InputError, OutputError, SourceError
from sartor.job import Job, pages_for
from sartor.memory import lies_in_memory
from sartor.model.network import clone, load_dense, sharing
from sartor.model.precision import running
from sartor.numerics import gptq, grids
from sartor.numerics.four import NAMED
from sartor.numerics.grids import GRIDS, encode, search_scales, snap
from sartor.pipeline import apply_plan, make_plan
from sartor.sources import Source, resolve
from sartor.stages.distil import DistilConfig, anchor, distil_
from sartor.stages.likelihood import hidden_of, loss_of
from sartor.stages.masters import Adam, Mean, free, gradients_, put_, update_
from sartor.stages.sensitivity import feel
from sartor.stages.tokens import cut_windows, encode_windows, training_rows
from sartor.tensors import Entry, metadata_of, read_tensors, sizes_in, write_tensors
from tests.conftest import texts


@pytest.fixture
def all_in_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pico tensors are files too, wherever this machine has its temporary folders."""
    monkeypatch.setattr(paging, "LEAST", 1)
    monkeypatch.setattr(job, "lies_in_memory", lambda folder: False)


def resident() -> int:
    """Bytes of this process that are in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def agree(inside: dict[str, torch.Tensor], through: dict[str, torch.Tensor], rtol: float, atol: float) -> None:
    assert inside.keys() == through.keys()
    for name, w in inside.items():
        assert torch.allclose(w, through[name], rtol=rtol, atol=atol), name


def test_what_is_let_go_comes_back_as_it_was_written(tmp_path: Path) -> None:
    with paging.paging(tmp_path):
        t = paging.zeros((1 << 24,))
        assert float(t.sum()) == 0
        t.copy_(torch.arange(1 << 24))
        full = resident()
        paging.let_go(t)
        assert full - resident() > 0.9 * t.nbytes
        assert torch.equal(t, torch.arange(1 << 24).float())
        assert list(tmp_path.iterdir()) == [], "a file has a name"


def test_as_much_stays_in_memory_as_there_is_room_for(tmp_path: Path) -> None:
    size = 1 << 24
    with paging.paging(tmp_path, 5 * size):
        before = resident()
        made = [paging.zeros((size // 4,)).fill_(n) for n in range(10)]
        for _ in range(3):
            for t in paging.each(made):
                t.add_(1)
        assert 0.8 * 5 * size < resident() - before < 1.2 * 6 * size
        assert [float(t.mean()) for t in made] == [n + 3 for n in range(10)]
        del made[:5]  # what is gone makes room, and nobody else's memory is handed back in its place
        others = [torch.full((size // 4,), 7.0) for _ in range(10)]
        for t in paging.each(made * 5):
            t.add_(1)
        assert all((t == 7).all() for t in others)


def test_what_is_in_memory_is_never_let_go(tmp_path: Path) -> None:
    t = torch.frombuffer(mmap.mmap(-1, 1 << 22), dtype=torch.float32)  # whole pages, that would be lost
    t.copy_(torch.arange(1 << 20))
    with paging.paging(tmp_path):
        paging.let_go(t, t[5:])
        assert torch.equal(t, torch.arange(1 << 20).float())
        assert paging.kept(torch.ones(3)).untyped_storage().filename is None, "small ones stay in memory"
        assert paging.kept(t).untyped_storage().filename is not None
    assert paging.kept(t) is t


def test_without_paging_everything_is_in_memory(model: Any) -> None:
    assert not paging.on()
    assert all(p.untyped_storage().filename is None for p in clone(model).parameters())


def test_a_network_that_shares_weights_can_lose_them_alone(model: Any) -> None:
    other = sharing(model)
    assert all(a is not b and a.data_ptr() == b.data_ptr() for a, b in zip(model.parameters(), other.parameters(), strict=True))  # fmt: skip
    other.model.layers[0].mlp.up_proj.weight.data = torch.zeros(256, 64)
    assert model.model.layers[0].mlp.up_proj.weight.any()
    assert other.lm_head.weight is other.model.embed_tokens.weight


@pytest.mark.usefixtures("all_in_files")
def test_gradients_through_the_disk_are_those_in_memory(place: dict[str, Path], tokenizer: Any, tmp_path: Path) -> None:
    rows = training_rows(texts("cook", 4, 1), tokenizer, 64)[:3]

    def gradients(model: Any) -> dict[str, torch.Tensor]:
        named = dict(model.requires_grad_(True).named_parameters())
        gradients_(named)
        for part in rows.split(2):  # two passes: the second adds
            loss_of(model, hidden_of(model, part), part).backward()
        return {n: p.grad for n, p in named.items()}

    inside = gradients(load_dense(place["model"])[0])
    with paging.paging(tmp_path):
        through = gradients(load_dense(place["model"])[0])
        assert all(g.untyped_storage().filename for g in through.values())
    agree(inside, through, 1e-5, 1e-8)


@pytest.mark.usefixtures("all_in_files")
def test_steps_of_training_through_the_disk_are_those_in_memory(
    place: dict[str, Path], tokenizer: Any, tmp_path: Path
) -> None:
    rows = training_rows(texts("cook", 8, 1), tokenizer, 64)

    def stepped() -> dict[str, torch.Tensor]:
        small = load_dense(place["model"])[0]
        student, latents = running(small), free(small)
        named = dict(student.requires_grad_(True).named_parameters())
        optimizers = {n: Adam(latents.masters[n], 1e-3) for n in named}
        gradients_(named)
        mean = Mean(latents)
        for n in range(3):
            part = rows[2 * n : 2 * n + 2]
            loss_of(student, hidden_of(student, part), part).backward()
            update_(named, optimizers, 1e-3)
            put_(student, latents)
            mean.add_(latents)
        return {n: m.clone() for n, m in mean.latents.masters.items()}

    inside = stepped()
    with paging.paging(tmp_path):
        through = stepped()
    start = dict(load_dense(place["model"])[0].named_parameters())
    assert not any(torch.equal(w, start[name]) for name, w in inside.items())
    agree(inside, through, 1e-3, 2e-5)


@pytest.mark.usefixtures("all_in_files")
def test_what_a_network_feels_through_the_disk_is_what_it_feels_in_memory(
    place: dict[str, Path], tokenizer: Any, tmp_path: Path
) -> None:
    rows = training_rows(texts("cook", 8, 1), tokenizer, 64)[:6]
    inside = feel(running(load_dense(place["model"])[0]), rows)
    with paging.paging(tmp_path):
        through = feel(running(load_dense(place["model"])[0]), rows)
    for site, sketch in inside.sketch.items():
        assert sketch.abs().sum() > 0
        assert torch.allclose(sketch, through.sketch[site], rtol=1e-4, atol=1e-7)
        assert torch.allclose(inside.alone[site], through.alone[site], rtol=1e-4)


@pytest.mark.usefixtures("all_in_files", "tiny")
def test_a_plan_and_what_it_makes_are_the_same_through_the_disk(place: dict[str, Path], tmp_path: Path) -> None:
    def made() -> tuple[str, dict[str, torch.Tensor]]:
        prepared = job.Prepared(Job(str(place["model"]), str(place["user"]), "30%", generic=str(place["generic"])), lambda *_: None)  # fmt: skip
        p, t = prepared, prepared.texts
        plan = make_plan(p.model, p.tokenizer, t, p.budget_bytes, p.bytes_of, p.source.sha256, "quick")
        done = apply_plan(p.release, p.tokenizer, plan, t, "quick", UNTRAINED)
        return plan.to_json(), {n: done.latents.value(n).clone() for n in done.latents.masters}

    plan, weights = made()
    with paging.paging(tmp_path):
        other, through = made()
    assert json.loads(plan) == json.loads(other)
    agree(weights, through, 1e-4, 1e-6)


@pytest.mark.usefixtures("all_in_files")
def test_training_through_the_disk_learns_and_leaves_no_gradient(
    place: dict[str, Path], tokenizer: Any, tmp_path: Path
) -> None:
    own = training_rows(texts("cook", 20, 3), tokenizer, 64)
    windows = encode_windows(cut_windows(texts("cook", 6, 9)), tokenizer)
    with paging.paging(tmp_path):
        small = load_dense(place["model"])[0]
        student = running(small)
        latents = free(small)
        config = DistilConfig(6.0, 3e-3, checks=2)
        course = distil_(student, latents, own, anchor(student, own[:4]), windows, config)
        assert min(b for _, b in course.curve[1:]) < course.curve[0][1]
        assert all(p.grad is None for p in student.parameters())


@pytest.mark.usefixtures("all_in_files", "tiny")
def test_a_job_larger_than_the_memory_goes_through_the_disk(place: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "fitted"
    done = api.compress(str(place["model"]), place["user"], "30%", out, "quick", generic=place["generic"], controls="none", memory="1MB")  # fmt: skip
    report = json.loads((out / "report.json").read_text())
    assert any("through the disk" in note for note in report["notes"])
    assert report["parity"]["mean_absolute"] < 0.05
    assert not [f for f in out.iterdir() if f.name.startswith(".")]
    made = done.model
    ids = torch.tensor([done.tokenizer("butter and").input_ids])
    cached = made.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0)
    assert torch.equal(cached, made.generate(ids, max_new_tokens=8, do_sample=False, use_cache=False, pad_token_id=0))


def source_of(place: dict[str, Path]) -> Source:
    return resolve(str(place["model"]))


@pytest.mark.usefixtures("all_in_files")
def test_a_job_is_made_in_memory_where_there_is_room(place: dict[str, Path], tmp_path: Path) -> None:
    assert pages_for(source_of(place), tmp_path, "8GB") == (None, 0, "")
    folder, room, note = pages_for(source_of(place), tmp_path, "800MB")
    assert (folder, room) == (tmp_path, 0)
    assert "0.8 GB may be used" in note


@pytest.mark.usefixtures("all_in_files")
def test_no_room_on_the_disk_is_said_before_any_work(
    place: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(job.shutil, "disk_usage", lambda folder: usage(1, 1, 0))
    with pytest.raises(OutputError, match="larger disk"):
        pages_for(source_of(place), tmp_path, "800MB")


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="needs a place in memory")
def test_a_folder_in_memory_is_no_way_out(place: dict[str, Path], tmp_path: Path) -> None:
    assert lies_in_memory(Path("/dev/shm"))
    with pytest.raises(OutputError, match="on a disk"):
        pages_for(source_of(place), Path("/dev/shm"), "800MB")


@pytest.mark.parametrize("memory", ["4", "40%", "much", "0GB"])
def test_memory_is_a_size(memory: str) -> None:
    with pytest.raises(InputError):
        Job("m", "d", "25%", memory=memory).check()


def test_memory_is_for_language_models() -> None:
    with pytest.raises(InputError, match="--memory"):
        Job("m", "d", "25%", memory="4GB").check_kind("pictures")


def test_missing_weights_are_refused_on_disk_too(place: dict[str, Path], tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in place["model"].iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    weights = load_file(broken / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, broken / "model.safetensors", {"format": "pt"})
    with paging.paging(tmp_path), pytest.raises(SourceError, match=r"layers\.1\.mlp\.up_proj"):
        load_dense(broken)


def test_weights_quantized_by_a_method_of_their_own_are_refused_on_disk(place: dict[str, Path], tmp_path: Path) -> None:
    for file in place["model"].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "fp8"}}))
    with paging.paging(tmp_path), pytest.raises(SourceError, match="method of their own"):
        load_dense(tmp_path)


def test_a_full_disk_is_said_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with paging.paging(tmp_path), pytest.raises(OutputError, match="full"):
        paging.zeros((1 << 20,))


@pytest.mark.parametrize("grid", ["IQ4_NL", "Q8_0", "Q3_K", "INT4"])
def test_a_matrix_in_parts_is_rounded_as_the_whole(grid: str, monkeypatch: pytest.MonkeyPatch) -> None:
    g, w, c = NAMED[grid], torch.randn(40, 512), torch.rand(512)
    scales = search_scales(w, c, g)
    packed = encode(w, scales, g) if grid in GRIDS else None
    snapped, swept = snap(w, scales, g), gptq.gptq(w, torch.diag(c), g)
    monkeypatch.setattr(grids, "AT_ONCE", 512 * 7)
    monkeypatch.setattr(gptq, "ROWS", 9)
    assert torch.equal(search_scales(w, c, g), scales)
    assert torch.equal(snap(w, scales, g), snapped)
    assert torch.equal(gptq.gptq(w, torch.diag(c), g).latent, swept.latent)
    if packed is not None:
        assert (encode(w, scales, g) == packed).all()


def test_weights_that_are_there_twice_count_once(tmp_path: Path) -> None:
    for name in ("a-1", "a-2", "consolidated"):
        save_file({f"{name}.w": torch.zeros(10)}, tmp_path / f"{name}.safetensors")
    assert sum(sizes_in(tmp_path)) == 30
    index = {"weight_map": {"x": "a-1.safetensors", "y": "a-2.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert sum(sizes_in(tmp_path)) == 20
    save_file({"w": torch.zeros(7)}, tmp_path / "model.safetensors")
    assert sum(sizes_in(tmp_path)) == 7


def test_tensors_written_one_at_a_time_are_a_safetensors_file(tmp_path: Path) -> None:
    wanted = {
        "b": torch.randn(3, 5),
        "a": torch.randint(0, 255, (7,), dtype=torch.uint8),
        "c": torch.randn(4, 2).half(),
        "d": torch.randn(2, 2).bfloat16(),
        "empty": torch.zeros(0, 3),
    }
    write_tensors(tmp_path / "t.safetensors", {n: Entry.of(t) for n, t in wanted.items()}, {"seconds": "1.5"})
    theirs, ours = load_file(tmp_path / "t.safetensors"), dict(read_tensors(tmp_path / "t.safetensors"))
    assert theirs.keys() == ours.keys() == wanted.keys()
    for name, t in wanted.items():
        assert torch.equal(theirs[name], t)
        assert torch.equal(ours[name], t)
    assert metadata_of(tmp_path / "t.safetensors") == {"seconds": "1.5"}
    assert sum(sizes_in(tmp_path)) == sum(t.numel() for t in wanted.values())


def test_a_tensor_that_is_not_what_was_said_of_it_is_not_written(tmp_path: Path) -> None:
    entry = replace(Entry.of(torch.ones(3)), make=lambda: torch.ones(4))
    with pytest.raises(ValueError, match="not what was said"):
        write_tensors(tmp_path / "t.safetensors", {"x": entry}, {})
