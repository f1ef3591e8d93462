"""`bench/map_cuts.py`: every arm on a pico network of convolutions."""

from __future__ import annotations

import dataclasses

import map_cuts
import pytest

from sartor.model.graph import macs
from sartor.model.graph_channels import channel_groups
from sartor.pictures import Pictures

from .test_map_jobs import network
from .test_picture_jobs import put_tiny
from .test_pictures import drawn


@pytest.fixture
def subject(monkeypatch: pytest.MonkeyPatch) -> map_cuts.Subject:
    put_tiny(monkeypatch)
    (train, labels), (held, theirs), (generic, _) = drawn(48, 1), drawn(24, 2), drawn(24, 3)
    return map_cuts.subject(network(), Pictures(train, labels, held, theirs, generic), 0.6, 0)


def test_every_arm_leaves_no_more_multiplications_than_asked_and_the_fit_says_more(subject: map_cuts.Subject) -> None:
    limit = 0.4 * sum(macs(subject.whole).values())
    assert subject.costs.limit == pytest.approx(limit)
    wanted, errors = subject.whole(subject.pictures.validation), {}
    for name, arm in map_cuts.ARMS.items():
        small = map_cuts.cut(subject, arm)
        assert sum(macs(small).values()) <= limit * (1 + 1e-9)
        plain = map_cuts.cut(subject, dataclasses.replace(arm, fitted=False))
        errors[name] = [float((x(subject.pictures.validation) - wanted).square().mean()) for x in (small, plain)]
    assert all(fitted < plain for name, (fitted, plain) in errors.items() if map_cuts.ARMS[name].fitted)


def test_channels_of_no_weight_are_worth_nothing_by_their_magnitude(subject: map_cuts.Subject) -> None:
    group = channel_groups(subject.whole)[1]
    for parts, axis in ((group.rows, 0), (group.columns, 1)):
        for name, part in parts.items():
            weight = subject.whole.layers[name].weight.data.transpose(0, axis)
            weight[part.at[part.unit == 3]] = 0
    worth = map_cuts.magnitude(subject)[1]
    assert worth[3] == 0
    assert (worth > 0).sum() == group.units - 1
