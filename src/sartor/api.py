"""The whole job: sources, data, decision, action, export, measurement, report."""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from sartor import evaluate, picture_storage, storage
from sartor.clock import versions
from sartor.controls import control_arms
from sartor.data.generic import generic_corpus
from sartor.data.readers import read_folder
from sartor.data.split import Corpus, split
from sartor.effort import TRAININGS, USUAL_SIZE, effort_of, stage_seconds
from sartor.errors import InputError, OutputError
from sartor.export.worker import peak_memory
from sartor.files import write_whole
from sartor.job import Job, Prepared, pages_for
from sartor.memory import cores, free_at_once, hand_back
from sartor.model.kinds import kind_of
from sartor.model.network import anatomy, layers_of
from sartor.model.precision import computing, running
from sartor.numerics.metrics import Score
from sartor.paging import as_usual_, paging
from sartor.picture_api import compress_pictures, evaluate_pictures_again, is_picture_artifact
from sartor.picture_exports import export_pictures
from sartor.picture_probe import probe_pictures
from sartor.pictures import Fitted
from sartor.pipeline import Compressed, apply_plan, make_plan
from sartor.plan import Budget, Plan
from sartor.probing import Recall, Tell, explain, sense, worth_of
from sartor.progress import Progress
from sartor.report.html import page
from sartor.report.layers import layer_rows
from sartor.sources import Source, cache_dir, fetched, resolve
from sartor.stages import whose
from sartor.stages.distil import Trained
from sartor.stages.probe import order_units
from sartor.stages.tokens import encode_windows, training_rows
from sartor.tensors import sizes_in
from sartor.text_exports import ARTIFACT, export_text, write_gguf


def compress(
    model: str,
    data: str | Path,
    budget: str | Budget,
    out: str | Path | None = None,
    effort: str = "standard",
    to: str | None = None,
    generic: str | Path | None = None,
    controls: str = "fast",
    seed: int = 0,
    resume: bool = False,
    tell: Tell = lambda stage, share, note: None,
    method: str = "sartor",
    steps: int = 1,
    labels: str | Path | None = None,
    faster: float | None = None,
    keep_general: float = 0.0,
    memory: str | None = None,
) -> Compressed | Fitted:
    """Fit a model to one user's data and a budget.

    Args:
        model: folder, .gguf file, pypi:NAME==VERSION or hub id. data: file or folder of the user's documents, or folder of photos.
        budget: "25%", "67MB" or a Budget. out: where to write artifact and report; None keeps the result in memory.
        effort: quick, standard or thorough. controls: none, fast (without recovery) or full (with it).
        resume: go on with an interrupted job in `out`. tell: called with (stage, share done, note).
        method: how cuts are chosen; sartor, or paper: the two-rate rule of arXiv:2408.08684 in our reading, as a baseline. steps: that a transformer's cuts are made in, each healed and measured.
        labels: a CSV of photos and their classes, where these do not lie in one folder a class. faster: for pictures, than the original in fp32, at least so many times.
        keep_general: for language models, share of everyone's text in all that shapes the model, 0 to 0.9.
        memory: for language models, that the job may take ("4GB"; None: most of what is free): larger models go through the disk, layer by layer.
        to: gguf for language models, onnx for those that see; None: what goes with the model.
    Raises:
        InputError, BudgetError, OutputError, MissingExtra, ParityError: each with the way out.
    """
    size, effort = (budget, effort) if isinstance(budget, str) else (budget.text(), budget.effort)
    job = Job(
        model,
        str(data),
        size,
        to,
        effort,
        str(generic) if generic else None,
        controls,
        seed=seed,
        method=method,
        steps=steps,
        labels=str(labels) if labels else None,
        faster=faster,
        keep_general=keep_general,
        memory=memory,
    )
    job.check()
    torch.set_num_threads(cores())
    shown, (tell, peaks) = tell, _watching(tell)
    with storage.claimed(Path(out) if out is not None else None, resume) as folder:
        source = resolve(job.model)
        kind = kind_of(source.folder)
        job.check_kind(kind)
        _expect(shown, job, kind, source)
        return (compress_pictures if kind == "pictures" else _compress_texts)(job, source, folder, tell, peaks)


def _expect(shown: Tell, job: Job, kind: str, source: Source) -> None:
    """How long it will take, as far as anybody can say before it begins."""
    if isinstance(shown, Progress):
        many = sum(sizes_in(source.folder)) if kind == "texts" else USUAL_SIZE
        shown.expect(stage_seconds(kind, job.effort, job.controls != "none", many), TRAININGS)


def _compress_texts(job: Job, source: Source, folder: Path | None, tell: Tell, memory: dict[str, int]) -> Compressed:
    pages, room, note = pages_for(source, folder, job.memory)
    if pages:
        free_at_once()
    with paging(pages, room):
        made = _made(job, source, folder, tell, memory, note)
    as_usual_(layers_of(made.model))
    return made


def _made(job: Job, source: Source, folder: Path | None, tell: Tell, memory: dict[str, int], note: str) -> Compressed:
    started = time.monotonic()
    if note:
        tell("open", 0.0, note)
    asked = {k: v for k, v in asdict(job).items() if k != "memory"}  # it may be resumed with less of it
    prepared = Prepared(job, tell, source)
    point = storage.Checkpoint(folder, asked | {"texts": prepared.fingerprint()}) if folder else None
    prepared.notes = [*storage.told_of(point), note]
    if folder:  # written now, while the original is in memory and little else is
        evaluate.dense_reference(prepared.source, (prepared.model, prepared.tokenizer))
    seconds = {"open": time.monotonic() - started}
    plan = storage.planned(point, seconds, lambda: _decide(prepared, job, tell))
    made = _apply(prepared, job, plan, point, seconds, tell)
    if folder:
        finish(prepared, job, made, folder, seconds, memory, tell)
        if point:
            point.clear()
    return made


def _watching(tell: Tell) -> tuple[Tell, dict[str, int]]:
    """Progress that also notes the job's peak memory up to each stage, and starts each with what the last one left free."""
    peaks: dict[str, int] = {}

    def told(stage: str, share: float, note: str) -> None:
        if stage not in peaks:
            hand_back()
        peaks[stage] = peak_memory()
        tell(stage, share, note)

    return told, peaks


def _decide(p: Prepared, job: Job, tell: Tell) -> Plan:
    return make_plan(
        p.model, p.tokenizer, p.texts, p.budget_bytes, p.bytes_of, p.source.sha256, job.effort, job.rho, job.seed, tell,
        _memory(p), job.method,
    )  # fmt: skip


def _memory(p: Prepared) -> Recall:
    """What was measured of this model before: the next budget, and the next user's generic text, need it not again."""
    return storage.remembered(cache_dir() / "probes", p.source.sha256)


def probe(
    model: str,
    data: str | Path,
    generic: str | Path | None = None,
    effort: str = "standard",
    seed: int = 0,
    tell: Tell = lambda stage, share, note: None,
    labels: str | Path | None = None,
) -> dict[str, Any]:
    """What one user's texts or photos need of a model, and what generic ones need, part by part.

    Raises:
        InputError, SourceError: each with the way out.
    """
    public, named = (str(x) if x else None for x in (generic, labels))
    job = Job(model, str(data), "50%", effort=effort, generic=public, seed=seed, labels=named)
    job.check()
    torch.set_num_threads(cores())
    source = resolve(model)
    job.check_kind(kind := kind_of(source.folder))
    if kind == "pictures":
        return probe_pictures(job, source, tell)
    pages, room, _ = pages_for(source, None, None)
    with paging(pages, room):
        p = Prepared(job, tell, source)
        dense = running(p.release())
        user, general, halves = sense(dense, p.tokenizer, p.texts, effort, seed, tell, _memory(p), alone=True)
        worth = worth_of(dense, p.tokenizer, p.texts, order_units(user), effort, seed, tell, _memory(p))
        without = explain(dense, p.tokenizer, p.texts, effort, seed, tell, _memory(p))
    return {
        "kind": "texts",
        "model": p.source.provenance(),
        "effort": effort,
        "seed": seed,
        **whose.told(user, general, halves, worth, without),
    }


def _apply(
    p: Prepared, job: Job, plan: Plan, point: storage.Checkpoint | None, seconds: dict[str, float], tell: Tell
) -> Compressed:
    """Act on the plan, from the last checkpoint where there is one."""
    kept, settled = (point.of, point.save_plan) if point else (None, lambda plan: None)
    made = apply_plan(p.release, p.tokenizer, plan, p.texts, job.effort, None, tell, kept, settled, job.steps)
    seconds |= made.seconds
    return made


def finish(
    p: Prepared, job: Job, made: Compressed, folder: Path, seconds: dict[str, float], memory: dict[str, int], tell: Tell
) -> dict[str, Any]:
    """Write the artifact, measure it in its runtime against the original and the controls, and write the report."""
    started = time.monotonic()
    tell("export", 0.0, "GGUF")
    artifact = write_gguf(folder, made.model, made.tokenizer, made.latents)
    storage.save(made.model, made.tokenizer, made.latents, made.plan, p.source.provenance(), folder)
    shape, kinds, grids = anatomy(made.model), evaluate.layer_bytes(made.model, made.plan.grids), made.plan.grids
    seconds["export"] = time.monotonic() - started
    report, fitted = measure(evaluate.dense_reference(p.source), p.user, p.generic, folder, job.effort, tell)
    report["bytes"] |= {"original_fp16": p.original_fp16, "budget": p.budget_bytes, "by_kind": kinds}
    if artifact.stat().st_size > p.budget_bytes:
        raise OutputError(
            f"the file has {artifact.stat().st_size} bytes, more than the budget of {p.budget_bytes}: please report this"
        )
    seconds["measure"] = time.monotonic() - started - seconds["export"]
    report |= {
        "controls": [],
        "model": p.source.provenance(),
        "notes": [n for n in (p.source.note, *p.user.warnings, *p.notes, _on_tokens(report)) if n],
        "parameters": {"before": p.parameters, "after": shape.parameters()},
        "layers": layer_rows(made.plan, shape),
        "probing": made.plan.probing,
        "plan": {
            "method": made.plan.method,
            "price": made.plan.price,
            "predicted_damage": made.plan.predicted_damage,
            "vocabulary": shape.vocab,
            "grids": sorted(set(grids.values())),
        },
        "adaptation": _course(made.adapted),
        "recovery": _course(made.trained),
        "pruning": made.pruning,
        "seconds": {k: round(v, 1) for k, v in seconds.items()},
        "seed": job.seed,
        "effort": job.effort,
        "keep_general": job.keep_general,
        "job_peak_rss_bytes": peak_memory(),
        "peak_rss_bytes_by_stage": memory,
    }
    write_report(report, folder)
    if job.controls != "none":
        report["controls"] = control_arms(p, job, fitted, seconds, tell)
        report["seconds"] = {k: round(v, 1) for k, v in seconds.items()}
        write_report(report, folder)
    return report


def measure(
    dense: evaluate.Dense, user: Corpus, generic: Corpus, folder: Path, effort: str, tell: Tell
) -> tuple[dict[str, Any], Score]:
    """Everything that is measured on the artifact itself and on the original, in llama.cpp, in one run.

    Returns:
        (part of the report, the artifact's coding length of the user's test text).
    """
    artifact = folder / ARTIFACT
    small, tokenizer, _ = storage.load(folder)
    windows = evaluate.held_out(user.test, generic.test, effort_of(effort).test_bytes)
    tell("measure", 0.05, "parity with PyTorch")
    parity = evaluate.check_parity(artifact, small, encode_windows(windows.user, tokenizer))
    parity["same_tokens"] = evaluate.same_tokens(artifact, windows, tokenizer)
    del small
    tell("measure", 0.3, "the artifact on held-out text")
    ours = evaluate.in_runtime(artifact, windows, tokenizer)
    tell("measure", 0.5, "the original on held-out text")
    theirs = evaluate.in_runtime(dense.f16, windows, dense.tokenizer)
    tell("measure", 0.85, "speed and memory")
    speed = evaluate.speeds(artifact, dense.q8_0, evaluate.prompt_ids(windows, tokenizer))
    found = {
        "runtime": "llama.cpp",
        "bytes": {"artifact": artifact.stat().st_size, "dense_q8_0": dense.q8_0.stat().st_size},
        "user": evaluate.figures("user", ours[0], theirs[0]),
        "generic": evaluate.figures("generic", ours[1], theirs[1]),
        "speed": {k: v for k, v in speed.items() if k != "peak_rss_bytes"},
        "peak_rss_bytes": speed["peak_rss_bytes"],
        "parity": parity,
        "data": {
            "documents": user.counts(),
            "tokens": int(training_rows(user.train, tokenizer).numel()),
            "dropped": user.dropped,
            "ordered_by_time": user.ordered_by_time,
            "sha256": user.fingerprint(),
        },
        "versions": versions("sartor", "torch", "transformers", "gguf", "xllamacpp") | computing(),
    }
    return found, ours[0]


def _on_tokens(report: dict[str, Any]) -> str:
    """What must be said where the runtime cuts texts otherwise than the model learnt them."""
    other = 1 - report["parity"]["same_tokens"]
    return (
        f"llama.cpp cuts {other:.1%} of the test texts into other tokens than the model learnt: what it is prompted with there, it may read worse"
        if other
        else ""
    )


def _course(t: Trained | None) -> dict[str, Any]:
    """How a training went: validation bits per byte over seconds, tokens, throughput."""
    return {"curve": [list(x) for x in t.curve], "tokens": t.tokens, "tokens_per_s": t.tokens / t.seconds} if t else {}


def write_report(report: dict[str, Any], folder: Path) -> None:
    """report.json and report.html."""
    write_whole(folder / "report.json", json.dumps(report, indent=1))
    write_whole(folder / "report.html", page(report))


def evaluate_again(
    folder: Path, data: Path, generic: Path | None, tell: Tell, model: str | None = None, labels: Path | None = None
) -> dict[str, Any]:
    """Measure an artifact again, on its own; data is split as it was when the model was made (same seed).

    Args:
        model: the original of a network that sees, where it was a folder or file. labels: as for `compress`.

    Raises:
        InputError: not an artifact, other data than it was fitted to, or its original cannot be found again.
    """
    if is_picture_artifact(folder):
        return evaluate_pictures_again(folder, data, generic, tell, model, labels)
    storage.refuse_labels(folder, labels)
    old = storage.report_of(folder)
    if not (folder / ARTIFACT).exists():
        raise InputError(f"'{folder.name}' is not a Sartor artifact: {ARTIFACT} is missing")
    spec = old["model"]["spec"]
    remote = fetched(spec)
    dense = evaluate.cached_dense(old["model"]["sha256"])
    if dense is None and not remote:
        raise InputError(
            f"the original '{spec}' is no longer in Sartor's cache, so there is nothing to compare with: run sartor compress on it once more"
        )
    dense = dense or evaluate.dense_reference(resolve(spec))
    user = split(read_folder(data), old["seed"])
    storage.refuse_other_texts(old, user)
    fresh, _ = measure(dense, user, generic_corpus(generic, may_fetch=remote), folder, old["effort"], tell)
    fresh["bytes"] |= {"original_fp16": old["bytes"]["original_fp16"]}
    return old | fresh | {"controls": [], "seconds": {}}


def load(folder: str | Path) -> tuple[Any, Any, Plan]:
    """(network in fp32, its tokenizer or, of one that sees, the names of its classes, the plan) from a folder that `compress` wrote.

    Raises:
        SourceError: something is missing or does not fit together.
    """
    folder = Path(folder)
    if is_picture_artifact(folder):
        model, plan, classes = picture_storage.load(folder)
        return model, classes, plan
    return storage.load(folder)


def export(folder: str | Path, to: str, out: str | Path) -> Path:
    """Write a saved artifact in a runtime's format: gguf or onnx, with its exact weights, or, of one that sees, for another runtime.

    Args:
        to: gguf (texts), onnx, or, of one that sees, a row of `export.runtimes.ROWS`, as executorch-int8.
    Raises:
        InputError: unknown runtime, or not an artifact. MissingExtra: the runtime's packages are not installed.
    """
    folder, out = Path(folder), Path(out)
    if is_picture_artifact(folder):
        return export_pictures(folder, to, out)
    return export_text(folder, to, out)
