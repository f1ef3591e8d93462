"""The whole job on pico models: budgets, parity in llama.cpp, round trips, resume, privacy, the command line."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import sartor
from sartor import api, cli, storage
from sartor.cli import main
from sartor.errors import BudgetError, InputError, SartorError
from sartor.export import gguf_file, llamacpp, text_jobs
from sartor.model import network as net
from sartor.model.precision import running
from sartor.numerics.grids import GRIDS
from sartor.pipeline import kept_back
from sartor.stages import likelihood
from sartor.stages.distil import DistilConfig, anchor, distil_
from sartor.stages.masters import Latents, put_
from sartor.stages.measure import token_nats
from sartor.stages.tokens import cut_windows, encode_windows, training_rows
from tests.conftest import make_efforts_tiny, make_model, on_grid, texts


def write(path: Path, model: Any, tokenizer: Any, latents: Latents) -> int:
    names = {n: g.name for n, g in latents.grids.items()}
    size = gguf_file.write(path, model, tokenizer, latents.masters, latents.scales, names, "pico")
    a = net.anatomy(model)
    assert size == gguf_file.file_bytes(
        gguf_file.header_bytes(model.config, a, tokenizer, "pico"), a, model.config, names
    )
    return size


@pytest.mark.parametrize("grid", [None, *GRIDS])
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_llama_cpp_computes_what_pytorch_computes(
    family: str, grid: str | None, tokenizer: Any, tmp_path: Path
) -> None:
    model = make_model(len(tokenizer), family, tied=family != "mistral")
    windows = encode_windows(cut_windows(texts("cook", 2, 1)), tokenizer)
    latents = on_grid(model, grid)
    assert bool(latents.grids) == (grid is not None)
    write(tmp_path / "m.gguf", model, tokenizer, latents)
    put_(model, latents)
    parity = llamacpp.parity(token_nats(model, windows), llamacpp.nats(tmp_path / "m.gguf", windows))
    assert parity.mean_absolute < (0.002 if grid is None else 0.05)


def test_unequal_layers_and_missing_attention_run_in_llama_cpp(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    net.shrink_attention_(model, 0, [1])
    net.shrink_attention_(model, 1, [])
    net.shrink_mlp_(model, 2, torch.arange(96))
    windows = encode_windows(cut_windows(texts("cook", 2, 1)), tokenizer)
    write(tmp_path / "m.gguf", model, tokenizer, on_grid(model, None))
    parity = llamacpp.parity(token_nats(model, windows), llamacpp.nats(tmp_path / "m.gguf", windows))
    assert parity.mean_absolute < 0.002


def test_llama_cpp_tokenizes_as_we_do(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    write(tmp_path / "m.gguf", model, tokenizer, on_grid(model, None))
    samples = [*texts("cook", 2, 1), "Ünïcode ☃ and 123 numbers\n\n  spaces"]
    theirs = llamacpp.run_job(tmp_path / "m.gguf", "tokenize", texts=samples)["ids"]
    assert theirs == [tokenizer(t, add_special_tokens=False)["input_ids"] for t in samples]


@pytest.fixture(scope="module")
def fitted(place: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One finished job, shared by the tests that only look at it."""
    with pytest.MonkeyPatch.context() as patch:
        make_efforts_tiny(patch)
        root = tmp_path_factory.mktemp("out")
        patch.setenv("SARTOR_CACHE", str(root / "cache"))
        out = root / "fitted"
        sartor.compress(str(place["model"]), place["user"], "24%", out, generic=place["generic"])
    return out


def test_the_file_keeps_the_budget_and_the_report_tells_its_bytes(fitted: Path) -> None:
    r = json.loads((fitted / "report.json").read_text())
    size = (fitted / "model.gguf").stat().st_size
    assert r["parity"]["same_tokens"] == 1
    assert size == r["bytes"]["artifact"] <= r["bytes"]["budget"]
    assert size > 0.9 * r["bytes"]["budget"]
    assert {
        "model",
        "runtime",
        "bytes",
        "parameters",
        "user",
        "generic",
        "speed",
        "peak_rss_bytes",
        "seconds",
        "controls",
        "data",
        "seed",
        "versions",
    } <= set(r)
    assert r["parameters"]["after"] < r["parameters"]["before"]
    assert r["user"]["ci95"][0] < r["user"]["artifact"] < r["user"]["ci95"][1]
    assert [c["name"] for c in r["controls"]][:2] == [
        "same bytes, generic calibration, before recovery",
        "same bytes, personal calibration, before recovery",
    ]


def test_adaptation_helps_the_user_on_validation_and_recovery_does_not_hurt(fitted: Path) -> None:
    r = json.loads((fitted / "report.json").read_text())
    adapted, recovered = ([b for _, b in r[k]["curve"]] for k in ("adaptation", "recovery"))
    assert min(adapted) < adapted[0]
    assert min(recovered) <= recovered[0] < adapted[0]


def test_recovery_on_the_grid_goes_back_to_what_the_teacher_says(place: dict[str, Path]) -> None:
    teacher, tokenizer = net.load_dense(place["model"])
    own = training_rows(texts("cook", 60, 5), tokenizer)
    said = anchor(teacher, own)
    reference = likelihood.top_of(teacher, own)
    distance = lambda: likelihood.kl_of(student, own, reference)  # noqa: E731
    student, latents = running(teacher), on_grid(teacher, "IQ4_NL")
    torch.manual_seed(0)
    for w in latents.masters.values():
        w.add_(0.3 * w.std() * torch.randn_like(w) if w.ndim > 1 else 0.0)
    put_(student, latents)
    before = distance()
    validation = encode_windows(cut_windows(texts("cook", 10, 78)), tokenizer)
    distil_(student, latents, None, said, validation, DistilConfig(3.0, 1e-3, checks=1))
    assert distance() < before / 2


def test_what_is_saved_comes_back_and_exports_to_the_same_bytes(fitted: Path, tmp_path: Path) -> None:
    model, tokenizer, plan = sartor.load(fitted)
    windows = encode_windows(cut_windows(texts("cook", 3, 77)), tokenizer)
    assert (
        llamacpp.parity(token_nats(model, windows), llamacpp.nats(fitted / "model.gguf", windows)).mean_absolute < 0.05
    )
    again = sartor.export(fitted, "gguf", tmp_path / "again")
    assert again.read_bytes() == (fitted / "model.gguf").read_bytes()
    assert sartor.Plan.from_json(plan.to_json()) == plan


def test_no_name_or_text_of_the_user_leaves(fitted: Path, place: dict[str, Path]) -> None:
    line = (place["user"] / "secret-name-0.txt").read_text()[:60].encode()
    for file in fitted.rglob("*"):
        if file.is_file():
            raw = file.read_bytes()
            for marker in (b"secret-name", line, str(place["user"]).encode()):
                assert marker not in raw, file.name


def test_the_report_is_one_page_without_network(fitted: Path) -> None:
    page = (fitted / "report.html").read_text()
    assert page.count("<svg") >= 4
    assert "src=" not in page
    assert "href=" not in page
    assert "http" not in page.replace("http://www.w3.org/2000/svg", "")
    assert "<script" not in page


def test_the_commands_speak_json_and_text(
    fitted: Path,
    place: dict[str, Path],
    capsys: pytest.CaptureFixture[str],
    tiny: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SARTOR_CACHE", str(fitted.parent / "cache"))
    assert main(["inspect", str(fitted)]) == 0
    assert "vocabulary" in capsys.readouterr().out
    assert main(["run", str(fitted), "butter and", "--tokens", "8", "--temperature", "0"]) == 0
    assert capsys.readouterr().out.startswith("butter and")
    assert main(["eval", str(fitted), "--data", str(place["user"]), "--generic", str(place["generic"]), "--json"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert again["user"]["artifact"] == pytest.approx(
        json.loads((fitted / "report.json").read_text())["user"]["artifact"], rel=1e-3
    )
    other = fitted.parent / "changed"
    shutil.copytree(place["user"], other)
    next(f for f in sorted(other.rglob("*")) if f.is_file()).write_text("a longer note of another day\n" * 200)
    for command, more in (("eval", []), ("export", ["--to", "onnx", "--out", str(fitted.parent / "no")])):
        assert main([command, str(fitted), "--data", str(other), *more]) == 2
        assert "not those this artifact was fitted to" in capsys.readouterr().err
    assert main(["doctor"]) == 0
    assert "xllamacpp" in capsys.readouterr().out


def test_what_is_said_ends_where_the_context_is_full(
    fitted: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["run", str(fitted), ""]) == 2
    assert "the prompt is empty" in capsys.readouterr().err
    asked = {"prompt": "butter and salt " * 200, "tokens": 4, "temperature": 0.0, "top_p": 1.0, "seed": 0}
    said = llamacpp.run_job(fitted / "model.gguf", "generate", **asked)  # over 2048 bytes: there is room for it all
    assert len(said["ids"]) > 512
    asked = {**asked, "prompt": "butter and salt " * 3000}
    with pytest.raises(SartorError, match=r"tokens and at most 8191 fit: give a shorter one"):
        llamacpp.run_job(fitted / "model.gguf", "generate", **asked)


def test_a_generation_stops_at_the_last_place() -> None:
    class Echo:
        room = 8

        def decode(self, ids: list[int], start: int, every: bool) -> np.ndarray:
            assert start + len(ids) <= self.room
            return np.eye(5, dtype=np.float32)[[(ids[-1] + 1) % 5]]

        def tokenize(self, text: str) -> list[int]:
            return list(range(len(text)))

        prompted = tokenize

        def text(self, ids: list[int]) -> str:
            return "".join(map(str, ids))

        def ends(self, token: int) -> bool:
            return False

        def clear(self) -> None: ...

    job = {"prompt": "abcde", "tokens": 9, "temperature": 0.0, "top_p": 1.0, "seed": 0}
    assert text_jobs.job_generate(Echo(), job)["text"] == "012"
    assert text_jobs.job_generate(Echo(), job | {"tokens": 2})["text"] == "01"
    with pytest.raises(SystemExit, match="8 tokens and at most 7 fit"):
        text_jobs.job_generate(Echo(), job | {"prompt": "abcdefgh"})


def test_probing_tells_draws_and_is_remembered(
    place: dict[str, Path], tiny: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ask = ["probe", str(place["model"]), "--data", str(place["user"]), "--generic", str(place["generic"])]
    assert main([*ask, "--out", str(tmp_path / "probed")]) == 0
    told, progress = capsys.readouterr()
    assert "gradients on" in progress
    assert all(f"{n} {part}" in told for n in range(3) for part in ("attention", "MLP"))
    assert "Without the" in told
    assert re.search(r"need most: .* \([+-]\d+%\): by so much a byte of them costs more without it", told)
    assert "with this much text" in told
    assert "random cuts on other text of yours" in told
    assert "photo" not in told
    page = (tmp_path / "probed" / "probe.html").read_text()
    assert page.count("<circle") == 12
    assert page.count("<rect") == 3 * 2
    assert "groups of heads" in told
    r = json.loads((tmp_path / "probed" / "probe.json").read_text())
    assert {v for part in r["verdicts"].values() for v in part} <= {"personalized", "generic", "undecided"}
    assert "personalized" in r["verdicts"]["mlp"]  # a cook's texts and a sailor's
    assert main([*ask, "--json"]) == 0
    again, progress = capsys.readouterr()
    assert json.loads(again)["without"] == r["without"]
    assert "gradients" not in progress
    for file in (tmp_path / "cache" / "probes").iterdir():
        assert "secret-name" not in file.read_text()
    assert main([*ask, "--out", str(tmp_path / "probed")]) == 2
    assert main([*ask, "--labels", "some.csv"]) == 2
    assert "--labels and --faster are for models that see" in capsys.readouterr().err


@pytest.mark.parametrize("stage", ["adapt", "fit", "recover"])
def test_an_interrupted_job_resumes(stage: str, place: dict[str, Path], tmp_path: Path, tiny: None) -> None:
    def stop(now: str, share: float, note: str) -> None:
        if now == stage and share > 0.3:
            raise KeyboardInterrupt

    ask = (str(place["model"]), place["user"], "24%", tmp_path / "out")
    with pytest.raises(KeyboardInterrupt):
        sartor.compress(*ask, generic=place["generic"], controls="none", tell=stop)
    assert (tmp_path / "out" / "checkpoint" / "plan.json").exists()
    plan = (tmp_path / "out" / "checkpoint" / "plan.json").read_text()
    seen: list[str] = []
    sartor.compress(*ask, generic=place["generic"], controls="none", resume=True, tell=lambda s, f, n: seen.append(s))
    assert "probe" not in seen
    assert "recover" in seen
    assert ("fit" in seen) == (stage != "recover")
    before, after = sartor.Plan.from_json(plan), sartor.Plan.from_json((tmp_path / "out" / "plan.json").read_text())
    assert before.vocabulary == after.vocabulary
    assert (before == after) == (stage != "adapt")  # once it has adapted, the network settles what goes
    assert not (tmp_path / "out" / "checkpoint").exists()
    assert (tmp_path / "out" / "model.gguf").stat().st_size <= json.loads(plan)["budget_bytes"]


def test_a_job_that_is_killed_says_how_to_go_on(place: dict[str, Path], tmp_path: Path) -> None:
    ask = [sys.executable, "-m", "sartor.cli", "compress", str(place["model"]), "--data", str(place["user"])]
    ask += ["--generic", str(place["generic"]), "--size", "24%", "--out", str(tmp_path / "out")]
    env = os.environ | {"SARTOR_CACHE": str(tmp_path / "cache")}
    with subprocess.Popen(ask, stderr=subprocess.PIPE, text=True, env=env) as job:
        assert job.stderr
        assert any(line.startswith("probe") for line in job.stderr)
        job.terminate()
        told = job.stderr.read()
    assert job.returncode == 130
    assert "--resume" in told
    assert "Traceback" not in told


def test_equal_seeds_give_equal_plans_and_more_room_less_damage(place: dict[str, Path], tiny: None) -> None:
    def plan(size: str) -> sartor.Plan:
        job = api.Job(str(place["model"]), str(place["user"]), size, generic=str(place["generic"]))
        p = api.Prepared(job, lambda *a: None)
        return sartor.make_plan(p.model, p.tokenizer, p.texts, p.budget_bytes, p.bytes_of, p.source.sha256)

    a, b, roomy, rich = plan("24%"), plan("24%"), plan("27%"), plan("45%")
    assert a.to_json() == b.to_json()
    assert a.predicted_bytes <= a.budget_bytes
    assert a.predicted_damage >= roomy.predicted_damage >= rich.predicted_damage
    assert {"Q5_0", "Q8_0"} & set(rich.grids.values())


def test_rows_are_kept_back_from_whoever_has_enough() -> None:
    rows = torch.arange(40)[:, None].expand(40, 8)
    learned, unseen = kept_back(rows, 10, 0)
    assert len(unseen) == 10
    assert sorted(torch.cat([learned, unseen])[:, 0].tolist()) == list(range(40))
    learned, unseen = kept_back(rows, 11, 0)
    assert torch.equal(learned, rows)
    assert torch.equal(unseen, rows)


def test_a_network_that_lost_an_attention_still_learns(place: dict[str, Path], tokenizer: Any) -> None:
    model, _ = net.load_dense(place["model"])
    rows = training_rows(texts("cook", 20, 3), tokenizer, 64)[:16]
    said = anchor(model, rows)
    net.shrink_attention_(model, 1, [])
    latents = Latents({n: p.detach().clone() for n, p in model.named_parameters()})
    windows = encode_windows(cut_windows(texts("cook", 4, 50)), tokenizer)
    before = latents.masters["model.layers.2.mlp.up_proj.weight"].clone()
    lost = latents.masters["model.layers.1.input_layernorm.weight"].clone()
    distil_(model, latents, None, said, windows, DistilConfig(2.0, 3e-4, checks=4))
    assert not torch.equal(latents.masters["model.layers.2.mlp.up_proj.weight"], before)
    assert torch.allclose(latents.masters["model.layers.1.input_layernorm.weight"], lost)


def test_a_settled_plan_is_replayed_as_it_stands(place: dict[str, Path], tiny: None) -> None:
    p = api.Prepared(
        api.Job(str(place["model"]), str(place["user"]), "24%", generic=str(place["generic"])), lambda *a: None
    )
    plan = sartor.make_plan(p.model, p.tokenizer, p.texts, p.budget_bytes, p.bytes_of, p.source.sha256)
    assert not plan.settled
    mine = replace(plan, layers=plan.layers[::-1], settled=True)
    made = sartor.apply_plan(p.model, p.tokenizer, mine, p.texts)
    assert made.plan == replace(mine, gone=made.plan.gone)
    assert net.anatomy(made.model).ffn == tuple(len(x.kept_channels()) for x in mine.layers)
    assert sartor.apply_plan(p.model, p.tokenizer, plan, p.texts).plan.settled


def test_a_share_of_everyones_text_draws_what_is_needed_towards_it(place: dict[str, Path], tiny: None) -> None:
    job = api.Job(str(place["model"]), str(place["user"]), "24%", generic=str(place["generic"]))
    apart = []
    for share in (0.0, 0.6):
        p = api.Prepared(replace(job, keep_general=share), lambda *a: None)
        own = sum(map(len, p.user.train))
        assert sum(map(len, p.texts.train)) == pytest.approx(own / (1 - share), rel=1e-3)
        assert list(p.texts.train[: len(p.user.train)]) == list(p.user.train)
        assert set(p.texts.train[len(p.user.train) : -1]) <= set(p.generic_train)
        plan = sartor.make_plan(p.model, p.tokenizer, p.texts, p.budget_bytes, p.bytes_of, p.source.sha256)
        apart.append(sum(abs(x.user[part][0] - x.generic[part][0]) for x in plan.layers for part in x.user))
    assert apart[1] < apart[0]


def test_a_share_that_is_none_is_refused(place: dict[str, Path]) -> None:
    for share in (-0.1, 0.95, float("nan")):
        with pytest.raises(InputError, match="keep-general"):
            sartor.compress(str(place["model"]), place["user"], "25%", keep_general=share)


def test_what_cannot_be_reached_names_the_nearest(place: dict[str, Path], tiny: None, tmp_path: Path) -> None:
    with pytest.raises(BudgetError) as e:
        sartor.compress(str(place["model"]), place["user"], "6%", tmp_path / "o", generic=place["generic"])
    assert not (tmp_path / "o").exists()
    assert e.value.nearest
    assert f"{e.value.nearest:,}" in str(e.value)
    with pytest.raises(InputError, match="gguf"):
        sartor.compress(str(place["model"]), place["user"], "25%", to="floppy", generic=place["generic"])


@pytest.mark.parametrize(
    "more", [[], ["--to", "gguf", "--generic", "g", "--steps", "3", "--keep-general", "0.25", "--method", "paper"]]
)
def test_the_command_that_goes_on_is_read_as_the_same_job(more: list[str]) -> None:
    read = cli.parser(cli.COMMANDS).parse_args
    asked = read(["compress", "a model", "--data", "my texts", "--size", "25%", "--out", "o", "--seed", "4", *more])
    again = read(cli._resuming(asked)[1:])
    assert vars(again) == vars(asked) | {"resume": True}


def test_mistakes_at_the_command_line_are_one_line(tmp_path: Path, place: dict[str, Path]) -> None:
    command = [
        sys.executable,
        "-m",
        "sartor.cli",
        "compress",
        str(place["model"]),
        "--data",
        str(place["user"]),
        "--size",
        "64",
        "--out",
        str(tmp_path / "o"),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert (
        done.stderr.strip() == "sartor: the size '64' has no unit (did you mean 64MB or 64%?): write 25%, 67MB or 64MiB"
    )
    assert done.stdout == ""
    assert not (tmp_path / "o").exists()


def test_a_damaged_artifact_is_refused(fitted: Path, tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text((fitted / "plan.json").read_text())
    with pytest.raises(sartor.api.InputError, match=r"model\.safetensors"):  # type: ignore[attr-defined]
        storage.load(tmp_path)
