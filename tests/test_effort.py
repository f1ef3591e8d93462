"""Effort levels on machines of every pace."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

import pytest
import torch

from sartor.effort import EFFORTS, PICTURE_EFFORTS, at_pace
from sartor.model import precision


@pytest.mark.parametrize("levels", [EFFORTS, PICTURE_EFFORTS])
@pytest.mark.parametrize("name", EFFORTS)
def test_a_slow_machine_looks_at_less_and_trains_and_is_measured_as_long(levels: Any, name: str) -> None:
    """No count grows or falls under the quick level's; seconds and held-out text stay, and the rate at which whole weights learn."""
    usual, slow, quick = levels[name], at_pace(levels, name, 0.25), levels["quick"]
    assert at_pace(levels, name, 1.0) == usual
    counts = {k for k, v in asdict(usual).items() if isinstance(v, int)}
    fewer = {k for k in counts if getattr(slow, k) < getattr(usual, k)}
    assert all(
        getattr(slow, k) == max(getattr(usual, k) // 4, min(getattr(quick, k), getattr(usual, k))) for k in fewer
    )
    assert all(getattr(slow, k) == getattr(usual, k) for k in counts - fewer)
    assert bool(fewer) == (name != "quick")
    assert "test_bytes" not in fewer
    trainings = [slow.training, usual.training] if levels is EFFORTS else [slow, usual]
    assert trainings[0].adapt == trainings[1].adapt
    slower, usual_rate = trainings[0].recover, trainings[1].recover.rate
    assert slower.rate == pytest.approx(usual_rate * (0.25 if levels is EFFORTS else 1.0))
    assert replace(slower, rate=usual_rate) == trainings[1].recover


def test_half_the_pace_lies_between() -> None:
    """Rows at half the pace are more than at a quarter, fewer than at the usual one; so are lessons."""
    thorough = [at_pace(EFFORTS, "thorough", pace) for pace in (0.25, 0.5, 1.0)]
    assert [e.felt_rows for e in thorough] == [128, 256, 512]
    assert [e.training.lessons for e in thorough] == [256, 512, 1024]


@pytest.mark.parametrize(
    ("operations", "pace"), [(20e9, 0.25), (148e9, 0.25), (240e9, 0.5), (500e9, 1.0), (9000e9, 1.0)]
)
def test_pace_is_told_by_the_faster_numbers(operations: float, pace: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """A product is timed in what networks run in here; steps are coarse, so that two jobs agree."""
    product = 2 * precision.TOKENS * precision.INPUTS * precision.OUTPUTS
    slower = {torch.float32: 1.0, torch.bfloat16: 9.0}
    monkeypatch.setattr(precision, "_seconds", lambda dtype: product / operations * slower[dtype])
    for found in (precision.running_dtype, precision.pace):
        found.cache_clear()
    try:
        assert precision.pace() == pace
        assert precision.computing() == {"arithmetic": "fp32", "pace": f"{pace:g}"}
    finally:
        for found in (precision.running_dtype, precision.pace):
            found.cache_clear()
