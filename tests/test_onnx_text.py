"""Language models as ONNX: what the files hold, and what ONNX Runtime makes of them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch

import sartor
from sartor import storage, text_exports
from sartor.cli import main
from sartor.errors import InputError, MissingExtra, SartorError, SourceError
from sartor.export import lowering, onnx_parts, onnx_text, text_runtimes
from sartor.export.onnx_grids import HELD, product, rows_of
from sartor.model import network as net
from sartor.model.families import FAMILIES
from sartor.model.vocabulary import closed_order, trim_tokenizer
from sartor.numerics.grids import GRIDS, indices, search_scales, snap, tensor_bytes
from sartor.plan import LayerPlan, Plan, to_mask
from sartor.stages.masters import Latents, put_
from sartor.stages.tokens import cut_windows, encode_windows
from sartor.text_exports import measure_text_exports, write_gguf
from tests.conftest import make_model, on_grid, texts

TOLERANCE = 1e-5  # of logits that vary by a half, where nothing but the order of sums differs
ROUNDING = 0.15  # where ONNX Runtime rounds what a matrix reads to 8 bits; a wrong layout moves them by more than one
TOKENS = 24
WINDOW = 7  # of mistral's attention: most of the tokens do not see the first ones


def network(vocab: int, family: str, grid: str | None) -> tuple[Any, Latents]:
    """A model with unequal layers, one without attention and one without MLP, and weights that say something; with the weights that a file holds."""
    model = make_model(vocab, family, tied=family != "mistral")
    torch.manual_seed(1)
    for p in model.parameters():
        p.data = p.data + 0.3 * torch.randn_like(p) if p.ndim == 1 else 3 * p.data
    if family == "mistral":
        model.config.sliding_window = WINDOW
    net.shrink_attention_(model, 0, [1])
    net.shrink_attention_(model, 1, [])
    net.shrink_mlp_(model, 1, torch.arange(96))
    net.shrink_mlp_(model, 2, torch.arange(0))
    latents = on_grid(model, grid)
    for name, w in latents.masters.items():
        if w.ndim == 2 and name not in latents.grids:
            latents.masters[name] = w.half().float()  # as the file holds what is on no grid
    put_(model, latents)
    return model, latents


def session(file: Any) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    return onnxruntime.InferenceSession(file.SerializeToString(), options)


def decode(run: Any, ids: Sequence[int], past: dict[str, np.ndarray], before: int) -> tuple[np.ndarray, Any]:
    """(logits of the ids, the cache behind them), `before` tokens being in the cache `past` (none: empty)."""
    given = {i.name: i.shape for i in run.get_inputs()}
    empty = {n: np.zeros((1, s[1], 0, s[3]), np.float32) for n, s in given.items() if n.startswith("past")}
    feed = {"input_ids": np.array([ids]), "attention_mask": np.ones((1, before + len(ids)), np.int64)}
    names = [o.name for o in run.get_outputs()]
    found = dict(zip(names, run.run(names, (feed | empty | past)), strict=True))
    return found.pop("logits")[0], {n.replace("present", "past_key_values"): x for n, x in found.items()}


@pytest.mark.parametrize("grid", [None, *GRIDS])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_file_says_what_pytorch_says_all_at_once_and_token_by_token(family: str, grid: str | None) -> None:
    model, latents = network(300, family, grid)
    ids = torch.randint(0, 300, (TOKENS,), generator=torch.Generator().manual_seed(2)).tolist()
    wanted = model(input_ids=torch.tensor([ids])).logits[0].numpy()
    exact = session(onnx_text.build(model, latents, onnx_text.FULL))
    assert np.abs(decode(exact, ids, {}, 0)[0] - wanted).max() < TOLERANCE
    past: dict[str, np.ndarray] = {}
    for n, token in enumerate(ids):
        logits, past = decode(exact, [token], past, n)
        assert np.abs(logits[0] - wanted[n]).max() < TOLERANCE
    _, first = decode(exact, ids[:9], {}, 0)
    assert np.abs(decode(exact, ids[9:], first, 9)[0] - wanted[9:]).max() < TOLERANCE
    rounded = decode(session(onnx_text.build(model, latents)), ids, {}, 0)[0]
    assert np.abs(rounded - wanted).max() < ROUNDING


def test_the_cache_counts_the_layers_that_have_attention_left_each_with_its_heads() -> None:
    model, latents = network(300, "llama", "IQ4_NL")
    net.shrink_attention_(model, 0, [])
    latents = on_grid(model, "IQ4_NL")
    file = onnx_text.build(model, latents).graph
    assert [i.name for i in file.input] == [
        "input_ids",
        "attention_mask",
        "past_key_values.0.key",
        "past_key_values.0.value",
    ]
    assert [o.name for o in file.output] == ["logits", "present.0.key", "present.0.value"]
    assert file.input[2].type.tensor_type.shape.dim[1].dim_value == 2


def test_a_network_without_any_attention_runs() -> None:
    model = make_model(300, "llama", layers=2)
    for n in range(2):
        net.shrink_attention_(model, n, [])
    ids = torch.arange(5)[None]
    run = session(onnx_text.build(model, on_grid(model, "Q8_0"), onnx_text.FULL))
    put_(model, on_grid(model, "Q8_0"))
    found = run.run(["logits"], {"input_ids": ids.numpy()})[0]
    assert np.abs(found - model(input_ids=ids).logits.numpy()).max() < TOLERANCE


def stored(grid: str) -> tuple[torch.Tensor, dict[str, np.ndarray]]:
    """(the weights of a matrix on this grid, what a file stores of it)."""
    w = torch.randn(24, 512, generator=torch.Generator().manual_seed(3))
    w[0, :32], w[1, :256] = 0, 0  # blocks without weights
    scales = search_scales(w, None, GRIDS[grid])
    codes = indices(w, scales, GRIDS[grid]).numpy().reshape(24, -1, 32)
    return snap(w, scales, GRIDS[grid]), HELD[grid].pack(codes, scales.numpy())


def run_nodes(nodes: list[Any], arrays: dict[str, np.ndarray], x: np.ndarray, kind: int) -> np.ndarray:
    file = onnx_parts.framed(
        {"x": (kind, list(x.shape))}, {"y": (onnx_parts.FLOAT, ["a", "b", "c"][: 3 - (x.ndim - 1)])}
    )
    file.graph.node.extend(nodes)
    for name, array in arrays.items():
        onnx_parts.store(file, name, array, (onnx_text.STORED[str(array.dtype)], array.shape))
    found: np.ndarray = session(file).run(["y"], {"x": x})[0]
    return found


@pytest.mark.parametrize("grid", GRIDS)
def test_every_weight_of_every_grid_is_held_exactly_in_both_uses(grid: str) -> None:
    w, arrays = stored(grid)
    named = {f"w.{end}": a for end, a in arrays.items()}
    nodes, tables = rows_of(grid, "w", list(arrays), "x", "y")
    rows = run_nodes(nodes, named | tables, np.array([5, 0, 1, 23]), onnx_parts.INT64)
    assert np.array_equal(rows.reshape(4, 512), w[[5, 0, 1, 23]].numpy())
    nodes, tables = product(grid, "w", "x", "y", (24, 512), "", onnx_text.FULL)
    found = run_nodes(nodes, named | tables, np.eye(512, dtype=np.float32), onnx_parts.FLOAT)
    assert np.array_equal(found.T, w.numpy())


@pytest.mark.parametrize("grid", GRIDS)
def test_a_matrix_takes_as_many_bytes_as_in_the_gguf_file(grid: str) -> None:
    _, arrays = stored(grid)
    ours, theirs = sum(a.nbytes for a in arrays.values()), tensor_bytes(grid, (24, 512))
    if GRIDS[grid].scales == 1:
        assert ours == theirs
    else:  # multiples of scales take eight bits, not six
        assert theirs < ours < 1.05 * theirs


def test_a_tied_embedding_is_stored_once_and_all_constants_are_known_before_the_first_token(tmp_path: Path) -> None:
    model, latents = network(300, "llama", "IQ4_NL")
    file = onnx_text.build(model, latents)
    held = [t.name for t in file.graph.initializer]
    assert len(held) == len(set(held))
    assert [n for n in held if "lm_head" in n] == []
    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.optimized_model_filepath = 3, str(tmp_path / "seen.onnx")
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    onnxruntime.InferenceSession(file.SerializeToString(), options)
    seen = onnx_parts.onnx_package().load(str(tmp_path / "seen.onnx")).graph
    constant = {t.name for t in seen.initializer}
    for n in seen.node:
        assert not set(n.input) <= constant, n.name  # what has only constant inputs was computed
        if n.op_type == "MatMulNBits":
            assert set(n.input[1:3]) <= constant


def make_artifact(tokenizer: Any, folder: Path) -> Path:
    """A saved artifact with a trimmed vocabulary, unequal layers and one without attention; llama.cpp cannot run one without MLP."""
    order, base = closed_order(tokenizer, {})
    small, ids = trim_tokenizer(tokenizer, order[: base + 100])
    model = make_model(len(tokenizer))
    net.shrink_attention_(model, 0, [1])
    net.shrink_attention_(model, 1, [])
    net.shrink_mlp_(model, 1, torch.arange(96))
    net.shrink_vocabulary_(model, ids, {"bos_token_id": 0, "eos_token_id": 0})
    latents, a = on_grid(model, "IQ4_NL"), net.anatomy(model)
    layers = [LayerPlan(to_mask(range(g), g), to_mask(range(f), f)) for g, f in zip(a.groups, a.ffn, strict=True)]
    grids = {n: g.name for n, g in latents.grids.items()}
    plan = Plan("0", "llama", 0, 0, None, None, tuple(layers), grids, 0.0, 0.0, {}, {}, {}, 0.3, 0)
    folder.mkdir()
    storage.save(model, small, latents, plan, {}, folder)
    write_gguf(folder, model, small, latents)
    return folder


@pytest.fixture
def artifact(tokenizer: Any, tmp_path: Path) -> Path:
    return make_artifact(tokenizer, tmp_path / "fitted")


def test_an_export_is_the_same_bytes_again_and_names_no_folder(artifact: Path, tmp_path: Path) -> None:
    one, two = sartor.export(artifact, "onnx", tmp_path / "anna"), sartor.export(artifact, "onnx", tmp_path / "two")
    assert one.read_bytes() == two.read_bytes()
    assert b"anna" not in one.read_bytes()
    assert {f.name for f in one.parent.iterdir()} >= {"model.onnx", "tokenizer.json", "genai_config.json"}
    told = json.loads((one.parent / "genai_config.json").read_text())["model"]
    assert told["vocab_size"] == sartor.load(artifact)[0].config.vocab_size
    assert told["decoder"]["num_hidden_layers"] == 2


def test_in_its_own_process_a_file_scores_and_writes_as_pytorch_does(artifact: Path, tmp_path: Path) -> None:
    file = sartor.export(artifact, "onnx", tmp_path / "phone")
    model, tokenizer, plan = sartor.load(artifact)
    onnx_parts.save(file, onnx_text.build(model, storage.latents_of(artifact, plan), onnx_text.FULL))
    window = encode_windows(cut_windows(texts("cook", 1, 9)), tokenizer)[0]
    ids = list(window.ids)
    wanted = -torch.log_softmax(model(input_ids=torch.tensor([ids])).logits[0].double(), -1)
    nats = text_runtimes.run_job("onnx", file, "score", windows=[ids, ids[:5]])["nats"]
    assert np.abs(np.array(nats[0]) - wanted[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0].numpy()).max() < 1e-4
    assert np.abs(np.array(nats[1]) - nats[0][:4]).max() < 1e-4  # the first window left nothing behind
    asked = {"prompt": "butter and salt", "tokens": 12, "temperature": 0.0, "top_p": 1.0, "seed": 0}
    said: dict[str, Any] = text_runtimes.run_job("onnx", file, "generate", **asked)  # type: ignore[arg-type]
    so_far = tokenizer("butter and salt", add_special_tokens=False)["input_ids"]
    first = len(so_far)
    while len(so_far) < first + 12 and (token := int(model(input_ids=torch.tensor([so_far])).logits[0, -1].argmax())):
        so_far.append(token)
    assert said["ids"] == so_far
    assert said["text"] == tokenizer.decode(so_far[first:])


@pytest.mark.parametrize("runtime", ["gguf", "onnx"])
def test_what_a_runtime_writes_is_spelled_as_the_tokenizer_spells_it(
    runtime: str, artifact: Path, tmp_path: Path
) -> None:
    file = {"gguf": artifact / "model.gguf", "onnx": sartor.export(artifact, "onnx", tmp_path / "phone")}[runtime]
    tokenizer = sartor.load(artifact)[1]
    prompt = "butter \u00e4 and\tsalt"
    asked = {"prompt": prompt, "tokens": 20, "temperature": 5.0, "top_p": 1.0, "seed": 1}
    said: dict[str, Any] = text_runtimes.run_job(runtime, file, "generate", 1, **asked)  # type: ignore[arg-type]
    first = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    assert said["ids"][: len(first)] == first
    assert len(said["ids"]) > len(first)
    assert said["text"] == tokenizer.decode(said["ids"][len(first) :])


def test_both_runtimes_say_what_pytorch_says_and_stand_in_one_table(
    artifact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, few in {"TURNS": 1, "GENERATE": 4, "PROMPT": 16, "SEEDS": range(1), "TEST_BYTES": 4000}.items():
        monkeypatch.setattr(text_exports, name, few)
    monkeypatch.setattr(text_runtimes, "cores", lambda: 1)
    data = tmp_path / "texts"
    data.mkdir()
    for n, text in enumerate(texts("cook", 80, 4)):
        (data / f"{n}.txt").write_text(text)
    rows = measure_text_exports(artifact, ["onnx"], data, tmp_path / "phone")
    assert [r["runtime"] for r in rows] == ["llama.cpp", "ONNX Runtime"]
    assert abs(rows[0]["bits_per_byte"] - rows[1]["bits_per_byte"]) < 0.01 * rows[0]["bits_per_byte"]
    for row in rows:
        assert row["largest"] < 0.3
        assert row["mean"] < 0.05
        assert row["generate_tokens_per_s"] > 0
    assert main(["export", str(artifact), "--to", "onnx", "--out", str(tmp_path / "again")]) == 0
    said = capsys.readouterr().out
    assert "ONNX Runtime" in said
    assert "llama.cpp" in said
    assert main(["run", str(tmp_path / "again"), "butter", "--tokens", "3"]) == 0
    assert capsys.readouterr().out.startswith("butter")


def test_a_layer_with_attention_and_no_mlp_is_not_given_to_llama_cpp_which_would_leave_out_both(
    model: Any, tokenizer: Any, tmp_path: Path
) -> None:
    net.shrink_mlp_(model, 0, torch.arange(0))
    with pytest.raises(SourceError, match="layer 0 .* without FFN"):
        write_gguf(tmp_path, model, tokenizer, on_grid(model, None))
    net.shrink_attention_(model, 0, [])
    write_gguf(tmp_path, model, tokenizer, on_grid(model, None))


def test_what_cannot_be_written_is_named_with_what_can(artifact: Path, tmp_path: Path, monkeypatch: Any) -> None:
    with pytest.raises(InputError, match="gguf, onnx or executorch, not as litert-int8"):
        sartor.export(artifact, "litert-int8", tmp_path / "x")
    assert not (tmp_path / "x").exists()
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "model.onnx").write_bytes(b"no such file")
    with pytest.raises(SartorError, match="ONNX Runtime failed on model.onnx: it cannot be loaded") as caught:
        text_runtimes.run_job("onnx", tmp_path / "bad" / "model.onnx", "score", windows=[[1, 2]])
    assert "bad" not in str(caught.value)
    monkeypatch.setattr(lowering.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match="pip install onnxruntime=="):
        text_runtimes.run_job("onnx", tmp_path / "model.onnx", "score", windows=[])
