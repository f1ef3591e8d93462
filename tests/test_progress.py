"""The line on stderr and the time that it foretells."""

from __future__ import annotations

import pytest

from sartor.effort import TRAININGS, stage_seconds
from sartor.progress import Progress


class Watch:
    """A clock that a test turns."""

    time = 0.0

    def __call__(self) -> float:
        return self.time


def test_time_left_follows_the_work_seen_and_trainings_take_what_they_were_given(
    capsys: pytest.CaptureFixture[str],
) -> None:
    watch = Watch()
    progress = Progress({"probe": 30.0, "adapt": 50.0, "fit": 20.0, "recover": 50.0, "measure": 10.0}, TRAININGS, watch)
    progress("probe", 0.0, "")
    assert progress.left(0.0) == 160
    watch.time = 120.0  # four times as slow
    progress("adapt", 0.0, "the first step")
    assert progress.left(0.0) == 100 + 4 * 30
    assert "adapt      35%  about 4 min left   the first step" in capsys.readouterr().err
    watch.time = 150.0  # half of 60 seconds: recovery has the other 40
    assert progress.left(0.5) == 30 + 40 + 4 * 30
    watch.time = 180.0
    progress("fit", 0.0, "")
    watch.time = 280.0
    assert progress.left(0.5) == pytest.approx(100 + 40 + 10 * (220 / 40))
    watch.time = 380.0
    progress("measure", 0.0, "")  # nothing had to recover
    assert progress.left(0.5) == 0
    watch.time = 400.0
    assert progress.left(0.5) == 20
    assert progress.left(1.0) == 0


def test_what_nobody_foretold_is_shown_without_a_time(capsys: pytest.CaptureFixture[str]) -> None:
    watch = Watch()
    progress = Progress(now=watch)
    watch.time = 60.0
    progress("measure", 0.5, "the artifact")
    assert capsys.readouterr().err.split() == ["measure", "the", "artifact"]


@pytest.mark.parametrize("kind", ["texts", "pictures"])
@pytest.mark.parametrize("effort", ["quick", "standard", "thorough"])
def test_every_level_foretells_all_stages(kind: str, effort: str) -> None:
    found = stage_seconds(kind, effort, controls=True)
    assert min(found.values()) > 0
    assert list(found)[-1] == "controls"
    assert "controls" not in stage_seconds(kind, effort, controls=False)
    assert list(found).index("adapt") < list(found).index("fit") < list(found).index("recover")
