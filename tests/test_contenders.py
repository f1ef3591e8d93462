"""Laws of the benchmark's contenders: equal bytes, equal time, and what every ablation leaves out."""

from __future__ import annotations

import ctypes
import importlib.util
import itertools
import sys
import types
from dataclasses import replace
from pathlib import Path
from typing import Any

import ablations
import llamacpp_rivals
import onnxruntime_rival
import pruned_rivals
import pytest
import torch
import torch_worker
import torchao_rival
from cuts import REPAIR
from plain_tuning import tuned_
from rivals import RIVALS
from subject import SEED, Subject

from sartor import evaluate
from sartor.effort import EFFORTS
from sartor.errors import BudgetError, SartorError
from sartor.export import llama_quantizer
from sartor.model.network import BLOCK, anatomy, clone
from sartor.numerics.grids import GRIDS, snap
from sartor.pipeline import apply_plan, measure
from sartor.stages.bits import BASE
from sartor.stages.decide import Measured, decide
from sartor.stages.measure import score, score_of
from sartor.stages.tokens import encode_windows


@pytest.mark.parametrize("name", pruned_rivals.NAMES)
def test_cuts_at_equal_bytes_never_exceed_them(name: str, subject: Subject, tmp_path: Path) -> None:
    network, seen = subject.network(), pruned_rivals.seen_of(subject)[0]
    ranking = RIVALS[pruned_rivals.NAMES[name]](seen)
    biased = name in pruned_rivals.BIASED

    def size(a: Any, grid: str) -> int:
        return pruned_rivals._file_bytes(subject, biased, a, grid)

    whole = size(anatomy(network), "Q4_0")
    shares = []
    for limit in (2 * whole, int(0.9 * whole), int(0.7 * whole)):
        grid, plan, share = pruned_rivals.cut_to(anatomy(network), ranking, limit, size)
        cut = REPAIR[pruned_rivals.NAMES[name]](network, plan, seen)
        evaluate.write_plain(tmp_path / "x.gguf", cut, subject.tokenizer, grid)
        assert 0.8 * limit < (tmp_path / "x.gguf").stat().st_size <= limit or limit > whole
        shares.append((grid, share))
    assert shares[0] == ("Q8_0", 0.0)
    assert 0 < shares[1][1] < shares[2][1]
    with pytest.raises(BudgetError, match="cannot be reached"):
        pruned_rivals.cut_to(anatomy(network), ranking, whole // 10, size)


def test_a_repair_by_biases_arrives_in_llama_cpp(subject: Subject, tmp_path: Path) -> None:
    network, seen = subject.network(), pruned_rivals.seen_of(subject)[0]
    _, plan, _ = pruned_rivals.cut_to(
        anatomy(network), RIVALS["FLAP"](seen), 1, lambda a, grid: 2 - (sum(a.ffn) + BLOCK * sum(a.groups) <= 600)
    )
    cut = REPAIR["FLAP"](network, plan, seen)
    evaluate.write_plain(tmp_path / "x.gguf", cut, subject.tokenizer, "F16")
    windows = encode_windows(subject.windows.user, subject.tokenizer)[:4]
    evaluate.check_parity(tmp_path / "x.gguf", cut, windows)
    for module in cut.modules():
        if isinstance(module, torch.nn.Linear) and module.bias is not None:
            module.bias.data += 1.0  # what the file does not hold
    with pytest.raises(SartorError):
        evaluate.check_parity(tmp_path / "x.gguf", cut, windows)


def test_plain_tuning_lowers_what_the_user_text_costs_and_changes_a_copy_only(subject: Subject) -> None:
    network = subject.network()
    before = score(network, subject.validation()).bits_per_byte
    course = tuned_(network, subject)
    assert course.tokens > 0
    assert score(network, subject.validation()).bits_per_byte < before
    seconds = EFFORTS["quick"].training.adapt.seconds + EFFORTS["quick"].training.recover.seconds
    assert seconds <= course.seconds < seconds + 5


def test_a_pruned_rival_is_cut_trained_and_written_within_the_bytes(subject: Subject, tmp_path: Path) -> None:
    made = pruned_rivals.pruned("wanda-sp", subject, "20%", tmp_path)
    assert made.bytes <= subject.budget("20%")
    assert made.seconds >= 2
    assert "Q4_0" in made.note


def test_what_is_tuned_is_tuned_once_for_all_types(
    subject: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = llamacpp_rivals.original(subject, "F16", tmp_path).bytes
    one = llamacpp_rivals.tuned(subject, "F16", tmp_path)
    monkeypatch.setattr(llamacpp_rivals, "tuned_", lambda *_: pytest.fail("trained again"))
    again = llamacpp_rivals.tuned(subject, "F16", tmp_path)
    assert one.seconds == again.seconds >= 2
    assert abs(one.bytes - before) < 64
    _, matrix, _ = llamacpp_rivals.tuned_files(subject)
    assert matrix["blk.2.ffn_down.weight"].shape == (256,)
    assert (matrix["blk.0.attn_q.weight"] > 0).all()


def test_the_layer_that_does_nothing_goes_first(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    idle = subject.network()
    for writer in (idle.model.layers[1].self_attn.o_proj, idle.model.layers[1].mlp.down_proj):
        writer.weight.data.zero_()
    monkeypatch.setattr(subject, "half", lambda: clone(idle))
    assert llamacpp_rivals.layer_order(subject)[0] == 1
    assert len(idle.model.layers) == 3


class Parameters(ctypes.Structure):
    """What the quantizer is asked of llama_model_quantize_params."""

    _fields_ = (
        ("nthread", ctypes.c_int32),
        ("ftype", ctypes.c_int),
        ("imatrix", ctypes.c_void_p),
        ("prune_layers", ctypes.POINTER(ctypes.c_int32)),
    )


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """Layers that a stand-in for llama-cpp-python was asked to leave out, call by call; its files have 100 bytes and 20 more a layer that stays of three."""
    told: list[list[int]] = []

    def quantize(source: bytes, target: bytes, params: Parameters) -> int:
        gone = list(itertools.takewhile(lambda n: n >= 0, params.prune_layers)) if params.prune_layers else []
        told.append(gone)
        Path(target.decode()).write_bytes(bytes(100 + 20 * (3 - len(gone))))
        return 0

    stand_in = types.SimpleNamespace(
        llama_log_callback=lambda f: f,
        llama_log_set=lambda *_: None,
        llama_model_quantize_default_params=Parameters,
        llama_model_quantize=quantize,
    )
    monkeypatch.setitem(sys.modules, "llama_cpp", stand_in)
    monkeypatch.setattr(llama_quantizer, "available", lambda: True)
    return told


def test_as_few_layers_as_the_size_asks_for_are_left_out(
    subject: Subject, asked: list[list[int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(llamacpp_rivals, "gguf_artifact", lambda file, *_: file.stat().st_size)
    monkeypatch.setattr(llamacpp_rivals, "_matrix", lambda *_: {})
    monkeypatch.setattr(llamacpp_rivals, "layer_order", lambda _: [2, 0, 1])
    monkeypatch.setattr(subject, "_shared", {})
    sizes = {
        limit: llamacpp_rivals.without_layers(subject, f"{limit}B", tmp_path) for limit in (161, 160, 159, 135, 120)
    }
    assert sizes == {161: 160, 160: 160, 159: 140, 135: 120, 120: 120}
    assert asked[-1] == [0, 2]
    with pytest.raises(SartorError, match="119 bytes"):
        llamacpp_rivals.without_layers(subject, "119B", tmp_path)


@pytest.fixture(scope="module")
def measured(subject: Subject) -> Measured:
    p = subject.p
    return measure(subject.half(), p.tokenizer, subject.texts, subject.budget("20%"), p.bytes_of, "quick")


def decided(subject: Subject, measured: Measured, size: str) -> Any:
    p = subject.p
    return decide(subject.half(), p.tokenizer, measured, subject.budget(size), p.bytes_of, "", 0.3, SEED)


def test_without_probing_every_layer_loses_the_same(subject: Subject, measured: Measured) -> None:
    plan = decided(subject, ablations.uniform(measured, subject), "18%")
    channels = [len(layer.kept_channels()) for layer in plan.layers]
    assert max(channels) - min(channels) <= BLOCK
    assert max(channels) < 256
    assert plan.predicted_bytes <= plan.budget_bytes
    assert float(measured.user.channel[0].sum()) != pytest.approx(float(measured.user.channel[1].sum()), rel=1e-3)


def test_without_trimming_all_words_stay_and_without_mixing_there_is_one_grid(
    subject: Subject, measured: Measured
) -> None:
    whole = ablations.all_words(measured, subject)
    assert min(measured.words.sizes) < len(subject.tokenizer) == min(whole.words.sizes)
    assert decided(subject, whole, "20%").vocabulary is None
    assert set(decided(subject, measured, "40%").grids.values()) != {BASE}
    assert set(decided(subject, ablations.one_grid(measured, subject), "40%").grids.values()) == {BASE}


def test_without_fit_every_weight_is_on_the_nearest_level(subject: Subject, measured: Measured) -> None:
    plan = replace(decided(subject, measured, "20%"), settled=True)
    network = subject.network()
    latents = ablations.rounded(None, network, replace(plan, grids={"model.embed_tokens.weight": BASE}), 0, None)  # type: ignore[arg-type]
    w = network.model.embed_tokens.weight.data
    assert torch.equal(latents.masters["model.embed_tokens.weight"], w)
    assert torch.equal(
        latents.value("model.embed_tokens.weight"), snap(w, latents.scales["model.embed_tokens.weight"], GRIDS[BASE])
    )
    assert set(latents.grids) == {"model.embed_tokens.weight"}


def test_without_recovery_it_adapts_and_without_teacher_it_still_learns(subject: Subject, measured: Measured) -> None:
    plan, training = decided(subject, measured, "20%"), EFFORTS["quick"].training
    ask = (subject.network, subject.tokenizer, plan, subject.texts, "quick")
    still = apply_plan(*ask, ablations.without_recovery(training))
    assert still.adapted is not None
    assert still.trained is None
    assert still.plan.settled
    alone = apply_plan(*ask, ablations.without_teacher(training))
    assert alone.trained is not None
    assert alone.trained.tokens > 0


@pytest.mark.parametrize("name", ["sartor", "sartor, generic text"])
def test_sartors_cell_keeps_its_budget(name: str, subject: Subject, tmp_path: Path) -> None:
    made = ablations.fitted(name, subject, "20%", tmp_path)
    assert made.bytes <= subject.budget("20%")
    assert made.seconds >= 2


@pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason=torchao_rival.PIP)
@pytest.mark.parametrize("kind", torchao_rival.TYPES)
def test_torchaos_files_are_smaller_than_bf16_and_say_nearly_the_same(
    kind: str, subject: Subject, tmp_path: Path
) -> None:
    half, file = subject.half(), tmp_path / "x.safetensors"
    windows = encode_windows(subject.windows.user, subject.tokenizer)[:4]
    with torch.inference_mode():
        network = torch_worker.load(str(subject.source.folder), kind)
        read = torch_worker.job_write(network, {"file": str(file)})["read"]
        nats = torch_worker.job_score(network, {"windows": [w.ids for w in windows]})["nats"]
        speed = torch_worker.job_speed(network, {"ids": range(20), "generate": 2, "repeats": 1})
    assert 0.2 * file.stat().st_size < read < file.stat().st_size < 0.8 * 2 * anatomy(half).parameters() + 10_000
    said = score_of(windows, [torch.tensor(n) for n in nats]).bits_per_byte
    assert said == pytest.approx(score(half, windows).bits_per_byte, rel=0.05)
    assert set(speed) == {"prompt_tokens_per_s", "generate_tokens_per_s"}


@pytest.mark.skipif(not onnxruntime_rival.available(), reason=onnxruntime_rival.PIP)
@pytest.mark.parametrize("kind", ["int4 k_quant", "int8"])
def test_onnx_runtimes_own_files_are_smaller_than_fp16_and_say_nearly_the_same(
    kind: str, subject: Subject, tmp_path: Path
) -> None:
    made = onnxruntime_rival.built(subject, kind, tmp_path)
    whole = anatomy(subject.network()).parameters() * 4
    assert 0.5 * made.bytes < made.read < made.bytes < 0.6 * whole
    assert made.scores(subject.windows)[0].bits_per_byte == pytest.approx(
        subject.reference()[0].bits_per_byte, rel=0.05 if kind == "int4 k_quant" else 0.01
    )
    assert min(made.speed(range(20)).values()) > 0


@pytest.mark.skipif(onnxruntime_rival.available(), reason="onnxruntime-genai is installed")
def test_without_the_builder_its_cells_name_the_way_out(subject: Subject, tmp_path: Path) -> None:
    with pytest.raises(SartorError, match="pip install onnxruntime-genai"):
        onnxruntime_rival.built(subject, "int4", tmp_path)


@pytest.mark.skipif(llama_quantizer.available(), reason="llama-cpp-python is installed")
def test_without_llama_cpps_quantizer_its_cells_name_the_way_out_before_any_training(
    subject: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(llamacpp_rivals, "tuned_", lambda *_: pytest.fail("trained for nothing"))
    for make in (llamacpp_rivals.quantized, llamacpp_rivals.with_matrix, llamacpp_rivals.tuned):
        with pytest.raises(SartorError, match="pip install"):
            make(subject, "Q4_0", tmp_path)
    with pytest.raises(SartorError, match="pip install"):
        llamacpp_rivals.without_layers(subject, "20%", tmp_path)


@pytest.mark.skipif(not llama_quantizer.available(), reason=llama_quantizer.PIP)
def test_llama_cpp_leaves_layers_out_and_quantizes_what_was_tuned(subject: Subject, tmp_path: Path) -> None:
    whole = llamacpp_rivals.quantized(subject, "IQ4_NL", tmp_path)
    share = f"{int(0.95 * whole.bytes)}B"
    assert llamacpp_rivals.without_layers(subject, share, tmp_path).bytes <= 0.95 * whole.bytes
    tuned = llamacpp_rivals.tuned(subject, "Q4_0", tmp_path)
    assert tuned.scores(subject.windows)[0].bits_per_byte < 1.02 * subject.reference()[0].bits_per_byte
