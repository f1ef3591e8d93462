"""What one user's photos need of a vision transformer, and what generic pictures need, part by part."""

from __future__ import annotations

from functools import partial
from typing import Any

from sartor.effort import picture_effort_of
from sartor.errors import InputError
from sartor.job import Job
from sartor.model.graph_saved import is_graph
from sartor.model.precision import running
from sartor.picture_job import PreparedPictures
from sartor.pictures import felt_pictures, needed
from sartor.probing import Tell
from sartor.sources import Source
from sartor.stages import whose
from sartor.stages.probe import check, order_units, without_parts
from sartor.stages.recognition import BATCH
from sartor.stages.tokens import sample


def probe_pictures(job: Job, source: Source, tell: Tell) -> dict[str, Any]:
    """As `api.probe`: every part is left out on pictures that neither the head nor anything else was fitted to.

    Raises:
        InputError: a convolutional network, or no generic pictures to compare with.
    """
    if not job.generic:
        raise InputError(
            "sartor probe says what your photos need beside what everyone's need: name a folder of public pictures with --generic"
        )
    if is_graph(source.folder):
        raise InputError(
            "sartor probe is for models that read texts and for vision transformers, and this is a convolutional network: sartor compress tells of its channels"
        )
    p = PreparedPictures(job, source, tell)
    e, dense = picture_effort_of(job.effort), running(p.dense)
    felt = felt_pictures(dense, p.pictures, e, job.seed, partial(tell, "probe"))
    user, halves, general = needed(felt), felt[1], felt[2]
    assert general is not None  # there are generic pictures
    judged = sample(p.pictures.validation, e.checked, job.seed)
    told = lambda share, note: tell("probe", 0.8 + 0.2 * share, note)  # noqa: E731
    worth = check(dense, order_units(user), judged, e.checks, job.seed, told)
    without = {
        name: without_parts(dense, sample(pixels, 2 * e.checked, job.seed), partial(_half, tell, start), BATCH)
        for name, pixels, start in (("user", p.album.test.pixels, 0.0), ("generic", p.generic.test, 0.5))
    }
    return {
        "kind": "pictures",
        "model": p.source.provenance(),
        "effort": job.effort,
        "seed": job.seed,
        **whose.told(user, general, halves, worth, without),
        "notes": [*p.notes, *p.album.warnings, *_what_names_are(p), _how_many(without)],
    }


def _what_names_are(p: PreparedPictures) -> list[str]:
    if p.labelled:
        return []
    return [
        f"Nobody named your photos: a name is the one of {p.classes} groups of like pictures that a photo falls into."
    ]


def _how_many(without: dict[str, Any]) -> str:
    mine, theirs = (without[k]["rows"] for k in ("user", "generic"))
    return (
        f"Every part was left out for {mine} photos of yours and {theirs} generic pictures that nothing was fitted to."
    )


def _half(tell: Tell, start: float, share: float, note: str) -> None:
    tell("explain", start + share / 2, note)
