"""Control arms: what the same effort gives without the user's data, and what a user would pick instead."""

from __future__ import annotations

import gc
import time
from typing import Any

import torch

from sartor import evaluate
from sartor.job import Job, Prepared
from sartor.model.network import clone, load_dense
from sartor.pipeline import EFFORTS, Tell, Texts, apply_plan, make_plan
from sartor.stages.calibrate import second_moments
from sartor.stages.distil import DistilConfig
from sartor.stages.tokens import sample, training_rows


def control_arms(p: Prepared, job: Job, seconds: dict[str, float], tell: Tell) -> list[dict[str, Any]]:
    """The same bytes with generic calibration, and llama.cpp's own quantizer with the user's importance matrix."""
    started = time.monotonic()
    windows = evaluate.held_out(p.user.test, p.generic.test, EFFORTS[job.effort].test_bytes)
    rows = generic_arm(p, job, windows, tell) if job.controls == "full" or job.effort != "quick" else [_quick_note()]
    dense, tokenizer = load_dense(p.source.folder)
    f16 = evaluate.dense_reference(p.source).f16
    half = clone(dense, torch.bfloat16)
    del dense
    rows += evaluate.quantizer_controls(
        f16,
        second_moments(half, sample(training_rows(p.texts.train, tokenizer), 32, job.seed)),
        windows,
        tokenizer,
        tell,
    )
    seconds["controls"] = time.monotonic() - started
    return rows


def _quick_note() -> dict[str, Any]:
    return {
        "name": "same bytes, generic calibration",
        "bytes": None,
        "user": None,
        "generic": None,
        "note": "not measured: add --controls full, or --effort standard",
    }


def generic_arm(p: Prepared, job: Job, windows: evaluate.HeldOut, tell: Tell) -> list[dict[str, Any]]:
    """Plan, cut, quantize (and, with controls=full, train) as for the user, but on generic text in the user's place.

    Without training the personal arm is made again without training too, so that like is compared with like.
    """
    public = Texts(
        p.generic.probe,
        p.generic_rest,
        p.generic.validation,
        p.generic.probe,
        p.generic_train,
    )
    full = job.controls == "full"
    arms = [("same bytes, generic calibration" + ("" if full else ", before recovery"), public)] + (
        [] if full else [("same bytes, personal calibration, before recovery", p.texts)]
    )
    rows = []
    for name, texts in arms:
        p.model, tokenizer = load_dense(p.source.folder)
        plan = make_plan(
            p.model,
            tokenizer,
            texts,
            p.budget_bytes,
            p.bytes_of,
            p.source.sha256,
            "quick",
            job.rho,
            job.seed,
            tell=_inside(tell, 0.0, 0.3, name),
        )
        config = EFFORTS[job.effort].training if full else DistilConfig(seconds=0.0)
        made = apply_plan(
            p.release,
            tokenizer,
            plan,
            texts,
            job.effort if full else "quick",
            config,
            _inside(tell, 0.3, 0.5, name),
        )
        user, generic = evaluate.torch_scores(made.model, windows, made.tokenizer)
        rows.append(
            {
                "name": name,
                "bytes": plan.predicted_bytes,
                "user": user,
                "generic": generic,
                "note": "measured in PyTorch",
            }
        )
        del made
        gc.collect()
    return rows


def _inside(tell: Tell, start: float, width: float, name: str) -> Tell:
    """Progress of another pipeline as part of the controls' own."""
    return lambda stage, share, note: tell("controls", start + width * share, f"{name}: {note}")
