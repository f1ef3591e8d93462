"""Control arms: what the same effort gives without the user's data, and what a user would pick instead."""

from __future__ import annotations

import gc
import tempfile
import time
from pathlib import Path
from typing import Any

from sartor import evaluate
from sartor.effort import UNTRAINED, Training, effort_of
from sartor.evaluate import HeldOut
from sartor.export import gguf_file
from sartor.job import Job, Prepared
from sartor.model.network import load_dense
from sartor.model.precision import running
from sartor.numerics.metrics import Score
from sartor.pipeline import Compressed, apply_plan, make_plan
from sartor.probing import Tell, Texts
from sartor.stages.calibrate import second_moments
from sartor.stages.tokens import sample, training_rows

GENERIC = "same bytes, generic calibration"
PERSONAL = "same bytes, personal calibration"


def control_arms(p: Prepared, job: Job, fitted: Score, seconds: dict[str, float], tell: Tell) -> list[dict[str, Any]]:
    """The same bytes with generic calibration, and llama.cpp's own quantizer with the user's importance matrix.

    Args:
        fitted: coding length of the user's test text under the artifact, in its runtime.
    """
    started = time.monotonic()
    windows = evaluate.held_out(p.user.test, p.generic.test, effort_of(job.effort).test_bytes)
    if job.controls == "full":
        rows = trained_arm(p, job, fitted, windows, tell)
    elif job.effort == "quick":
        rows = [evaluate.not_measured(GENERIC, "add --controls full, or --effort standard")]
    else:
        rows = untrained_arms(p, job, windows, tell)
    dense, tokenizer = load_dense(p.source.folder)
    half = running(dense)
    del dense
    rows += evaluate.quantizer_controls(
        evaluate.dense_reference(p.source).f16,
        second_moments(half, sample(training_rows(p.texts.train, tokenizer), 32, job.seed)),
        windows,
        tokenizer,
        fitted,
        tell,
    )
    seconds["controls"] = time.monotonic() - started
    return rows


def trained_arm(p: Prepared, job: Job, fitted: Score, windows: HeldOut, tell: Tell) -> list[dict[str, Any]]:
    """The whole job with generic text in the user's place, measured in the runtime."""
    made = _made(p, job, public_texts(p), job.effort, effort_of(job.effort).training, _inside(tell, 0.0, 0.8, GENERIC))
    with tempfile.TemporaryDirectory() as tmp:
        file = Path(tmp) / "control.gguf"
        gguf_file.write_latents(file, made.model, made.tokenizer, made.latents, "control")
        size, scores = file.stat().st_size, evaluate.in_runtime(file, windows, made.tokenizer)
    return [evaluate.control(GENERIC, size, *scores, fitted)]


def untrained_arms(p: Prepared, job: Job, windows: HeldOut, tell: Tell) -> list[dict[str, Any]]:
    """Both kinds of calibration without recovery, planned with less effort, in PyTorch: like compared with like."""
    scores: dict[str, tuple[int, Score, Score]] = {}
    for n, (name, texts) in enumerate(((PERSONAL, p.texts), (GENERIC, public_texts(p)))):
        made = _made(p, job, texts, "quick", UNTRAINED, _inside(tell, 0.4 * n, 0.4, name))
        scores[name] = made.plan.predicted_bytes, *evaluate.torch_scores(made.model, windows, made.tokenizer)
        del made
        gc.collect()
    note = "before recovery, in PyTorch"
    return [
        evaluate.control(f"{GENERIC}, before recovery", *scores[GENERIC], scores[PERSONAL][1], note),
        evaluate.control(f"{PERSONAL}, before recovery", *scores[PERSONAL], None, note),
    ]


def public_texts(p: Prepared) -> Texts:
    """Generic text in the user's place."""
    return Texts(p.generic.probe, p.generic_rest, p.generic.validation, p.generic.probe, p.generic_train)


def _made(p: Prepared, job: Job, texts: Texts, effort: str, training: Training, tell: Tell) -> Compressed:
    """The pipeline once more, for the same bytes, on other texts."""
    p.model, tokenizer = load_dense(p.source.folder)
    plan = make_plan(
        p.model, tokenizer, texts, p.budget_bytes, p.bytes_of, p.source.sha256, effort, job.rho, job.seed,
        _inside(tell, 0.0, 0.4, ""), method=job.method,
    )  # fmt: skip
    return apply_plan(p.release, tokenizer, plan, texts, effort, training, _inside(tell, 0.4, 0.6, ""), steps=job.steps)


def _inside(tell: Tell, start: float, width: float, name: str) -> Tell:
    """Progress of another pipeline as part of the controls' own."""
    return lambda stage, share, note: tell("controls", start + width * share, f"{name}: {note}" if name else note)
