"""How much work a job does: one row an effort level, fitted to the machine's pace."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from math import ceil
from typing import Any, TypeVar

from sartor.model.precision import pace
from sartor.stages.distil import DistilConfig
from sartor.stages.tune import TuneConfig

HEALED = 1.5  # of the time for training, that recovery gets for all that is cut,
LEAST_HEALED, MOST_HEALED = 0.05, 0.6  # none below the one, never more than the other


@dataclass(frozen=True)
class Training:
    """How both trainings go (0 seconds: not at all). The seconds of both are one purse, that `dealt` shares out.

    Attributes:
        adapt: the trimmed network, off the grid. recover: the cut one, on its grids; the longer, the smaller the peak rate.
        lessons: the user's rows on which the adapted network says what the cut one learns, at most; 0: it learns from what the rows themselves say, as an ablation.
    """

    adapt: DistilConfig
    recover: DistilConfig
    lessons: int

    def dealt(self, gone: float) -> Training:
        """The same seconds, so many of them for recovery as there is to heal.

        What is only rounded or loses words is nearly whole after the fit, and every second of adaptation teaches it more (docs/log.md).

        Args:
            gone: share of the layers' weights that will be cut.
        """
        if not self.adapt.seconds or not self.recover.seconds:
            return self
        share, seconds = min(MOST_HEALED, HEALED * gone), self.adapt.seconds + self.recover.seconds
        share = share if share >= LEAST_HEALED else 0.0
        adapt, recover = (replace(c, seconds=seconds * s) for c, s in ((self.adapt, 1 - share), (self.recover, share)))
        return Training(adapt, recover, ceil(self.lessons * share / MOST_HEALED))


UNTRAINED = Training(DistilConfig(0.0), DistilConfig(0.0), 0)


@dataclass(frozen=True)
class Effort:
    """How much work each stage does; one row an effort level.

    Attributes:
        rows: rows of 256 tokens for second moments, and generic ones in training. felt_rows: for backward probes on either text, at most; known: reliability of the units' order that is enough
        (`probing.sounded`). probe_rows: on which damage is measured. checks: random masks. expected_rows: rows on which the model says what words it expects.
        layers_at_once: whose three-bit damage is measured together. curve_rows: on which it is measured what cuts of a part cost once the rest is fitted; 0: it is taken as the sum of effects. fit_rows: the user's rows that the cut network is fitted and rounded on.
        validation_bytes, test_bytes: text measured on.
    """

    rows: int
    felt_rows: int
    known: float
    probe_rows: int
    checks: int
    expected_rows: int
    layers_at_once: int
    curve_rows: int
    fit_rows: int
    training: Training
    validation_bytes: int
    test_bytes: int


EFFORTS: dict[str, Effort] = {
    "quick": Effort(
        rows=32,
        felt_rows=32,
        known=0.9,
        probe_rows=4,
        checks=8,
        expected_rows=64,
        layers_at_once=5,
        curve_rows=0,
        fit_rows=64,
        training=Training(DistilConfig(75.0, 2e-4, checks=1), DistilConfig(75.0, 4e-4, checks=1), lessons=160),
        validation_bytes=12_288,
        test_bytes=32_768,
    ),
    "standard": Effort(
        rows=64,
        felt_rows=128,
        known=0.92,
        probe_rows=8,
        checks=16,
        expected_rows=96,
        layers_at_once=3,
        curve_rows=0,
        fit_rows=192,
        training=Training(DistilConfig(350.0, 2e-4, checks=3), DistilConfig(350.0, 3e-4, checks=3), lessons=768),
        validation_bytes=24_576,
        test_bytes=98_304,
    ),
    "thorough": Effort(
        rows=192,
        felt_rows=512,
        known=0.97,
        probe_rows=16,
        checks=48,
        expected_rows=512,
        layers_at_once=1,
        curve_rows=8,
        fit_rows=768,
        training=Training(DistilConfig(1200.0, 1e-4), DistilConfig(2800.0, 1.5e-4), lessons=1024),
        validation_bytes=32_768,
        test_bytes=196_608,
    ),
}


@dataclass(frozen=True)
class PictureEffort:
    """The same for pictures.

    Attributes:
        felt: pictures for backward probes on either kind, at most; known: reliability of the units' order that is enough. checks: random masks, on `checked` pictures.
        fitted: the user's pictures that the cut network is fitted on. adapt, recover: trainings of the whole and of the cut network.
    """

    felt: int
    known: float
    checks: int
    checked: int
    fitted: int
    adapt: TuneConfig
    recover: TuneConfig


PICTURE_EFFORTS: dict[str, PictureEffort] = {
    "quick": PictureEffort(48, 0.9, 8, 32, 48, TuneConfig(60.0, 1e-3, checks=2), TuneConfig(60.0, 2e-3, checks=2)),
    "standard": PictureEffort(192, 0.92, 16, 64, 192, TuneConfig(240.0, 1e-3), TuneConfig(360.0, 2e-3)),
    "thorough": PictureEffort(512, 0.97, 48, 128, 512, TuneConfig(900.0, 7e-4), TuneConfig(2400.0, 1.5e-3)),
}

Level = TypeVar("Level", bound=Any)
# of a level: on what figures are measured, and how finely, are no matter of time
KEPT = ("test_bytes", "layers_at_once")


# seconds at standard effort, on two cores with bf16, a model of 135 M parameters or a small vision transformer: to begin with, since a job tells its own pace
STAGES = {
    "texts": {"open": 10, "probe": 110, "decide": 95, "adapt": 0, "prune": 55, "fit": 190, "recover": 0, "export": 5, "measure": 150, "controls": 300},
    "pictures": {"open": 20, "view": 20, "probe": 10, "adapt": 0, "prune": 10, "fit": 20, "recover": 0, "export": 5, "measure": 30, "controls": 40},
}  # fmt: skip
TRAININGS = ("adapt", "recover")
USUAL_SIZE = 135_000_000  # parameters of that model
WORK = {"quick": 0.45, "standard": 1.0, "thorough": 3.0}


def stage_seconds(kind: str, effort: str, controls: bool, parameters: int = USUAL_SIZE) -> dict[str, float]:
    """{stage: seconds that it takes, about} of a whole job, for whoever waits (`progress.Progress`).

    Args:
        kind: texts, or pictures. controls: whether there are any. parameters: of the model; all but training takes as long as there are many.
    """
    times = WORK[effort] * parameters / USUAL_SIZE
    level: Any = EFFORTS[effort].training if kind == "texts" else PICTURE_EFFORTS[effort]
    found = {stage: times * seconds for stage, seconds in STAGES[kind].items() if controls or stage != "controls"}
    return found | {stage: getattr(level, stage).seconds for stage in TRAININGS}


def effort_of(name: str) -> Effort:
    """The level, as it fits this machine."""
    return at_pace(EFFORTS, name, pace())


def picture_effort_of(name: str) -> PictureEffort:
    """The same for pictures."""
    return at_pace(PICTURE_EFFORTS, name, pace())


def at_pace(levels: Mapping[str, Level], name: str, pace: float) -> Level:
    """A level for a machine of this pace: it looks at as many rows fewer, down to the quick level's, and trains as long.

    Work of fixed size would take four times as long on a machine without instructions for bf16, and most of it says the same with a quarter of the rows (docs/log.md);
    training has its seconds, which are what makes the difference. The peak rate of recovery goes with the pace: in few steps on the grid a high one loses what error
    feedback had put right, and has no time to find it again.
    """
    level, quick, changed = levels[name], levels["quick"], dict[str, Any]()
    for field in (f.name for f in fields(level) if f.name not in KEPT):
        many, few = getattr(level, field), getattr(quick, field)
        if isinstance(many, Training):
            gentle = replace(many.recover, rate=many.recover.rate * pace)
            lessons = max(min(many.lessons, few.lessons), ceil(many.lessons * pace))
            changed[field] = replace(many, recover=gentle, lessons=lessons)
        elif isinstance(many, int):
            changed[field] = max(min(many, few), ceil(many * pace))
    return replace(level, **changed)
