"""Language models as ExecuTorch programs: what the files hold, and what the runtime makes of them. Without ExecuTorch what it is given is tested all the same."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import sartor
from sartor import text_exports
from sartor.cli import main
from sartor.errors import MissingExtra, SartorError, SourceError
from sartor.export import decoder, executorch_text, lowering, text_runtimes
from sartor.model.families import FAMILIES
from tests.conftest import make_model, on_grid, texts
from tests.test_onnx_text import TOKENS, make_artifact, network

EXACT = 2e-5  # of logits that vary by a half, where nothing but the order of sums differs
ROUNDING = 0.15  # where what a matrix reads is rounded to 8 bits
MARK = "anna-marker"


def need() -> None:
    if lowering.missing(executorch_text.NEEDS):
        pytest.skip(f"ExecuTorch is an optional extra and not installed: {executorch_text.INSTALL}")


def some_ids(n: int = TOKENS) -> torch.Tensor:
    return torch.randint(0, 300, (1, n), generator=torch.Generator().manual_seed(2))


def module(model: Any, latents: Any, context: int = 48) -> decoder.Decoder:
    return decoder.Decoder(model, latents, context).eval().requires_grad_(False)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_module_says_what_pytorch_says_all_at_once_and_token_by_token(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, latents = network(300, family, "IQ4_NL")
    ids, runs = some_ids(), module(model, latents)
    wanted = executorch_text.dequantized(model)(input_ids=ids).logits[0]
    assert (runs(ids, torch.tensor([0]))[0] - wanted).abs().max() < ROUNDING
    monkeypatch.setattr(decoder, "read_in_eight", lambda x: x)
    assert (runs(ids, torch.tensor([0]))[0] - wanted).abs().max() < EXACT
    one_by_one = [runs(ids[:, n : n + 1], torch.tensor([n]))[0] for n in range(TOKENS)]
    assert (torch.cat(one_by_one) - wanted).abs().max() < EXACT
    assert (runs(ids[:, 9:], torch.tensor([9]))[0] - wanted[9:]).abs().max() < EXACT


def test_one_large_number_of_a_token_does_not_take_the_others_steps() -> None:
    x = torch.randn(1, 3, 512, generator=torch.Generator().manual_seed(1))
    x[0, 1, 7] = 500.0
    rows = decoder.read_in_eight(decoder.Spread(512)(x))
    others = torch.arange(512) != 7
    one_row = (decoder.read_in_eight(x) - x)[0, 1, others].abs().mean()
    assert (rows.sum(0) - x[0])[1, others].abs().mean() < one_row / 4


def test_what_the_module_cannot_compute_is_refused() -> None:
    model = make_model(300)
    model.config.rope_parameters = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 2.0}
    with pytest.raises(SourceError, match="yarn"):
        module(model, on_grid(model, "Q4_0"))
    model.config.hidden_act = "gelu"
    with pytest.raises(SourceError, match="gelu"):
        module(model, on_grid(model, "Q4_0"))


@pytest.mark.parametrize("family", ["mistral", "qwen2", "qwen3"])
def test_a_lowered_file_says_what_its_module_says(family: str, tokenizer: Any, tmp_path: Path) -> None:
    need()
    model, latents = network(300, family, "IQ4_NL")
    file = executorch_text.write(tmp_path, model, tokenizer, latents, context=160)
    ids = some_ids(150)  # in two calls
    text_runtimes.run_job("executorch", file, "logits", 1, windows=[ids[0].tolist()], out=str(tmp_path / "x.npz"))
    found = torch.from_numpy(np.load(tmp_path / "x.npz")["arr_0"])
    wanted = module(model, latents, 160)(ids, torch.tensor([0]))[0]
    assert (found - wanted).abs().max() < ROUNDING
    assert (found - wanted).abs().mean() < ROUNDING / 50  # a number between two steps may go either way
    with pytest.raises(SartorError, match="161 tokens are more than the 160 .* give a shorter text"):
        text_runtimes.run_job("executorch", file, "score", 1, windows=[[1] * 161])


@dataclass(frozen=True)
class Exported:
    """An artifact, the folder with its file for ExecuTorch, and what was measured."""

    artifact: Path
    folder: Path
    rows: list[dict[str, Any]]


@pytest.fixture(scope="module")
def exported(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    need()
    root = tmp_path_factory.mktemp("executorch") / MARK
    (root / "texts").mkdir(parents=True)
    for n, text in enumerate(texts("cook", 80, 4)):
        (root / "texts" / f"{n}.txt").write_text(text)
    artifact = make_artifact(tokenizer, root / "fitted")
    with pytest.MonkeyPatch.context() as patch:
        for name, few in {"TURNS": 1, "GENERATE": 4, "PROMPT": 16, "TEST_BYTES": 4000}.items():
            patch.setattr(text_exports, name, few)
        patch.setattr(text_runtimes, "cores", lambda: 1)
        rows = text_exports.measure_text_exports(artifact, ["executorch"], root / "texts", root / "phone")
    return Exported(artifact, root / "phone", rows)


def test_a_file_stands_in_the_table_beside_llama_cpp(exported: Exported) -> None:
    assert [r["runtime"] for r in exported.rows] == ["llama.cpp", "ExecuTorch"]
    theirs, ours = exported.rows
    assert abs(ours["bits_per_byte"] - theirs["bits_per_byte"]) < 0.01 * theirs["bits_per_byte"]
    assert ours["mean"] < 0.05
    assert ours["generate_tokens_per_s"] > 0
    assert "its memory is with torch" in text_exports.table(exported.rows)


def test_a_folder_holds_all_that_a_runner_needs_and_names_no_folder(exported: Exported) -> None:
    assert {f.name for f in exported.folder.iterdir()} >= {"model.pte", "tokenizer.json", "executorch.json"}
    told = json.loads((exported.folder / "executorch.json").read_text())
    assert told["vocab_size"] == sartor.load(exported.artifact)[0].config.vocab_size
    assert (told["context_length"], told["eos_token_ids"]) == (1024, [0])
    for file in exported.folder.iterdir():
        assert MARK.encode() not in file.read_bytes()
        assert b"site-packages" not in file.read_bytes()


def test_a_file_writes_what_pytorch_writes(exported: Exported, capsys: pytest.CaptureFixture[str]) -> None:
    model, tokenizer, _ = sartor.load(exported.artifact)
    prompt = "butter \u00e4 and\tsalt"
    asked = {"prompt": prompt, "tokens": 20, "temperature": 5.0, "top_p": 1.0, "seed": 1}
    said: dict[str, Any] = text_runtimes.run_job("executorch", exported.folder / "model.pte", "generate", 1, **asked)  # type: ignore[arg-type]
    first = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    assert said["ids"][: len(first)] == first
    assert said["text"] == tokenizer.decode(said["ids"][len(first) :])
    assert main(["run", str(exported.folder), "butter", "--tokens", "3", "--temperature", "0"]) == 0
    first = tokenizer("butter", add_special_tokens=False)["input_ids"]
    likeliest = int(model(input_ids=torch.tensor([first])).logits[0, -1].argmax())
    assert capsys.readouterr().out.startswith("butter" + tokenizer.decode([likeliest]))


def test_without_executorch_the_others_are_written_and_its_pip_command_is_said(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    find = lowering.importlib.util.find_spec
    monkeypatch.setattr(lowering.importlib.util, "find_spec", lambda n: None if n == "executorch" else find(n))
    for name, few in {"TURNS": 1, "GENERATE": 2, "PROMPT": 8, "TEST_BYTES": 4000}.items():
        monkeypatch.setattr(text_exports, name, few)
    artifact = make_artifact(tokenizer, tmp_path / "fitted")
    (tmp_path / "texts").mkdir()
    for n, text in enumerate(texts("cook", 80, 4)):
        (tmp_path / "texts" / f"{n}.txt").write_text(text)
    asked = ["export", str(artifact), "--data", str(tmp_path / "texts"), "--out", str(tmp_path / "all")]
    assert main(asked) == 0
    said = capsys.readouterr()
    assert "ONNX Runtime" in said.out
    assert "ExecuTorch" not in said.out
    kept = json.loads((tmp_path / "all" / "exports.json").read_text())
    assert kept["rows"][-1]["runtime"] == "ONNX Runtime"
    assert "Tokens a second" in (tmp_path / "all" / "exports.html").read_text()
    assert "pip install executorch==" in said.err
    with pytest.raises(MissingExtra, match="ExecuTorch is not installed: pip install executorch=="):
        sartor.export(artifact, "executorch", tmp_path / "phone")
    assert not (tmp_path / "phone").exists()
