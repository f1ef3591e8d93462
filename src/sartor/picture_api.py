"""The whole job on pictures: decision, action, export to ONNX, measurement in ONNX Runtime, report."""

from __future__ import annotations

import json
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from sartor import picture_storage, storage
from sartor.data.photos import open_photo
from sartor.errors import BudgetError, InputError, OutputError
from sartor.export import onnx_text, runtimes, seen
from sartor.export.worker import peak_memory
from sartor.files import write_whole
from sartor.job import Job
from sartor.map_view import THREADS
from sartor.model.graph import Graph
from sartor.model.network import anatomy
from sartor.picture_evaluate import Originals, measure_pictures, picture_controls
from sartor.picture_job import PreparedPictures, refuse_other_photos
from sartor.picture_view import View, view_again, view_of
from sartor.pictures import Fitted, fit_pictures, plan_pictures
from sartor.plan import Plan
from sartor.probing import Tell
from sartor.report.layers import layer_rows, map_rows
from sartor.report.pictures import page
from sartor.sources import Source, fetched, resolve
from sartor.stages.attribute import patches_that_decided

ARTIFACT = "model.onnx"


def compress_pictures(job: Job, source: Source, folder: Path | None, tell: Tell, memory: dict[str, int]) -> Fitted:
    """Fit a network that sees to one user's photos and a budget; `api.compress` for a model that sees.

    Args:
        folder: where artifact and report are written; None keeps the result in memory. memory: the job's peaks by stage, as they come.
    Raises:
        InputError, BudgetError, OutputError, MissingExtra, ParityError: each with the way out.
    """
    started = time.monotonic()
    p = PreparedPictures(job, source, tell)
    point = None
    if folder:
        point = storage.Checkpoint(folder, asdict(job) | {"pictures": p.fingerprint()})
        p.notes += storage.told_of(point)
    seconds = {"open": time.monotonic() - started}
    view = _view(p, job, point, seconds, tell)
    plan = storage.planned(point, seconds, lambda: _decide(p, view, job, tell))
    kept, settled = (point.of, point.save_plan) if point else (None, lambda plan: None)
    made = fit_pictures(view.dense, plan, view.pictures, view.costs, job.effort, None, tell, kept, settled, job.steps)
    seconds |= made.seconds
    if folder:
        _finish(p, view, job, made, folder, seconds, memory, tell)
        if point:
            point.clear()
    return made


def _view(
    p: PreparedPictures, job: Job, point: storage.Checkpoint | None, seconds: dict[str, float], tell: Tell
) -> View:
    """What the network will look at: as it was decided, in a resumed job."""
    started = time.monotonic()
    file = point.folder / "view.json" if point else None
    if file and file.exists():
        return view_again(p, job, json.loads(file.read_text()))
    try:
        view = view_of(p, job, tell)
    except BudgetError:
        if point:
            point.clear()
        raise
    if file:
        write_whole(file, json.dumps(view.decided()))
    seconds["view"] = time.monotonic() - started
    return view


def _decide(p: PreparedPictures, view: View, job: Job, tell: Tell) -> Plan:
    found = view.dense, view.pictures, view.costs, p.source.sha256, job.effort, job.seed, tell, view.felt
    plan = plan_pictures(*found)
    return replace(plan, predicted_damage=plan.predicted_damage + view.narrow)


def _finish(
    p: PreparedPictures,
    view: View,
    job: Job,
    made: Fitted,
    folder: Path,
    seconds: dict[str, float],
    memory: dict[str, int],
    tell: Tell,
) -> None:
    """Write the artifact, measure it in its runtime against the original and the controls, and write the report."""
    started = time.monotonic()
    tell("export", 0.0, "ONNX")
    artifact = folder / ARTIFACT
    weights = seen.fitted_weights(made.model)
    seen.write(artifact, made.model, weights)
    held = seen.dequantized(made.model, weights)
    picture_storage.save(held, made.plan, p.album.classes if p.labelled else (), p.source.provenance(), folder)
    if (size := artifact.stat().st_size) > p.budget_bytes:
        raise OutputError(f"the file has {size} bytes, more than the budget of {p.budget_bytes}: please report this")
    seconds["export"] = time.monotonic() - started
    with tempfile.TemporaryDirectory() as tmp:
        originals = Originals.written(p, Path(tmp))
        report = measure_pictures(p, view.side, originals, artifact, held, tell)
        seconds["measure"] = time.monotonic() - started - seconds["export"]
        report["data"]["mirrored"] = made.mirror
        report["head"] |= {
            "sides": view.sides,
            "keys": view.keys,
            "key_dim": view.key_dim,
            "nats": view.head.nats,
            "own": view.head.own,
        }
        report["speed"]["asked"] = job.faster
        report["weights"] = weights
        report |= _told(p, job, made, memory)
        _write(report, seconds, folder)
        if job.controls != "none":
            started = time.monotonic()
            report["controls"] = picture_controls(p, view, job, made, originals, artifact, tell)
            seconds["controls"] = time.monotonic() - started
            _write(report, seconds, folder)


def _told(p: PreparedPictures, job: Job, made: Fitted, memory: dict[str, int]) -> dict[str, Any]:
    """The part of the report that says what was done."""
    plan = made.plan
    return {
        "controls": [],
        "model": p.source.provenance(),
        "notes": [n for n in (p.source.note, *p.album.warnings, *p.notes) if n],
        "parameters": {"before": p.parameters, "after": sum(x.numel() for x in made.model.parameters())},
        "layers": map_rows(plan, made.teacher)
        if isinstance(made.model, Graph)
        else layer_rows(plan, anatomy(made.model)),
        "probing": plan.probing,
        "plan": {"method": plan.method, "price": plan.price, "predicted_damage": plan.predicted_damage},
        "adaptation": _course(made.adapted),
        "recovery": _course(made.trained),
        "pruning": made.pruning,
        "seed": job.seed,
        "effort": job.effort,
        "job_peak_rss_bytes": peak_memory(),
        "peak_rss_bytes_by_stage": memory,
    }


def _course(c: Any) -> dict[str, Any]:
    if c is None:
        return {}
    return {"curve": [list(x) for x in c.curve], "pictures": c.pictures, "pictures_per_s": c.pictures / c.seconds}


def _write(report: dict[str, Any], seconds: dict[str, float], folder: Path) -> None:
    report["seconds"] = {k: round(v, 1) for k, v in seconds.items()}
    write_whole(folder / "report.json", json.dumps(report, indent=1))
    write_whole(folder / "report.html", page(report))


def evaluate_pictures_again(
    folder: Path, data: Path, generic: Path | None, tell: Tell, model: str | None, labels: Path | None
) -> dict[str, Any]:
    """Measure an artifact again, on its own, against its original with a head fitted anew; photos are split as they were when it was made (same seed).

    Raises:
        InputError: the original cannot be found again, or is another one.
    """
    old = storage.report_of(folder)
    spec = model or old["model"]["spec"]
    if model is None and not fetched(spec):
        raise InputError("the original was a local folder or file, whose place is not kept: name it with --model")
    source = resolve(spec)
    if source.sha256 != old["model"]["sha256"]:
        raise InputError("--model is not the original this artifact was made from: its sha256 differs")
    told = str(generic) if generic else None
    job = Job(spec, str(data), f"{old['bytes']['budget']}B", effort=old["effort"], generic=told, seed=old["seed"])
    job, began = replace(job, labels=str(labels) if labels else None), old["head"].get("own_whole", 0)
    p = PreparedPictures(job, source, tell, known=began > 0, depth=old["head"]["depth"])
    held, _, classes = picture_storage.load(folder)
    refuse_other_photos(old, p.album, p.photos_sha256(), classes, p.labelled)
    if p.head.own != began:
        raise InputError(
            f"the original's head knew {began} of your classes by name, now it knows {p.head.own}: put its config.json and labels.txt back as they were"
        )
    with tempfile.TemporaryDirectory() as tmp:
        fresh = measure_pictures(p, held.size, Originals.written(p, Path(tmp)), folder / ARTIFACT, held, tell)
    fresh["data"]["mirrored"] = old["data"]["mirrored"]
    fresh["head"], fresh["speed"]["asked"] = old["head"], old["speed"]["asked"]
    return old | fresh | {"controls": [], "seconds": {}}


def is_picture_artifact(folder: Path) -> bool:
    """Whether `folder` holds what this module wrote; a language model's ONNX file has a configuration beside it."""
    return (folder / ARTIFACT).exists() and not (folder / onnx_text.CONFIG).exists()


def sees(place: Path) -> bool:
    """Whether this is an artifact or an export of a network that sees, or a file of one: the names of its classes lie there."""
    return is_picture_artifact(place) or (_folder_of(place) / picture_storage.CLASSES).exists()


def _folder_of(place: Path) -> Path:
    return place.parent if place.suffix in runtimes.READS else place


def _file_of(place: Path) -> Path:
    """The file to run: the artifact, the one that was exported, or the one that is named.

    Raises:
        InputError: there is none, or several.
    """
    if place.suffix in runtimes.READS:
        if not place.exists():
            raise InputError(f"there is no '{place.name}': name a folder or file that sartor export wrote")
        return place
    if (place / ARTIFACT).exists():
        return place / ARTIFACT
    found = sorted(f.name for f in place.iterdir() if f.suffix in runtimes.READS)
    if len(found) != 1:
        held = f"holds {len(found)} models ({', '.join(found)})" if found else "holds no model"
        raise InputError(
            f"'{place.name}' {held}, one is run: name it, as {place.name}/{found[0] if found else ARTIFACT}"
        )
    return place / found[0]


def classify(place: Path, photo: Path) -> tuple[list[tuple[str, float]], torch.Tensor, torch.Tensor | None]:
    """([(class, probability), ...] the likeliest first, by the artifact in its runtime; the picture; the relevance of its patches).

    Args:
        place: an artifact, an export or its file; of an export nobody can say which patches decided (None): that takes the artifact's own weights.
    Raises:
        InputError: neither, made without labels, or a photo that cannot be opened. MissingExtra: the runtime of the file is not installed.
    """
    file = _file_of(place)
    model: Any = None
    if (file.parent / "plan.json").exists():
        model, _, classes = picture_storage.load(file.parent)
        side = model.size
    else:
        classes, side = picture_storage.described(file.parent)
    if not classes:
        raise InputError(f"'{place.name}' was fitted without labels and names no classes: it gives features only")
    pixels = open_photo(photo, side)[None]
    said = runtimes.READS[file.suffix].run(file, pixels.numpy(), THREADS, 0)["outputs"]
    p, order = torch.softmax(torch.tensor(said["logits"][0]).float(), -1).sort(descending=True)
    relevance = None if model is None else patches_that_decided(model, pixels, int(order[0]))
    return [(classes[int(c)], float(x)) for c, x in zip(order, p, strict=True)], pixels[0], relevance
