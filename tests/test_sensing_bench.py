"""The scripts that ask how units are best sensed: what they draw and recover, and what their tables say."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import additivity
import ground_truth
import numpy as np
import premise
import pytest
import second_user
import sensing
import steps
import torch
from scipy.stats import spearmanr

from sartor.model.network import BLOCK, anatomy, clone, linear, load_dense, query_rows
from sartor.numerics.grids import GRIDS, search_scales, snap
from sartor.stages.bits import BASE
from sartor.stages.likelihood import kl_of, nats_of, top_of
from sartor.stages.probe import Effects, Units, effects_of, order_units
from sartor.stages.sensitivity import feel
from sartor.stages.tokens import sample, training_rows
from tests.conftest import texts

PLANTED = 12
Array = np.ndarray


def units_of(layers: int, groups: int, blocks: int) -> Units:
    rows = [(n, kind, i) for n in range(layers) for kind, many in ((0, groups), (1, blocks)) for i in range(many)]
    layer, kind, index = np.array(rows).T
    return Units({}, layer, kind, index, np.ones(len(rows)))


UNITS = units_of(6, 4, 36)
D = len(UNITS.layer)


def drawn(design: str, m: int, units: Units = UNITS) -> Array:
    return sensing.DESIGNS[design](units, m, np.random.default_rng(0))


def planted() -> Array:
    """Effects of which most are nothing."""
    rng, x = np.random.default_rng(1), np.zeros(D)
    x[rng.permutation(D)[:PLANTED]] = rng.uniform(1, 3, PLANTED)
    return x


def asked(
    script: Any, patch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], root: dict[str, Path], *more: str
) -> list[str]:
    """What a script prints of the pico model and its user."""
    own = ["--data", str(root["user"]), "--generic", str(root["generic"])]
    patch.setattr("sys.argv", [script.__name__, str(root["model"]), *own, *more])
    script.main()
    return capsys.readouterr().out.splitlines()


def refused(script: Any, patch: pytest.MonkeyPatch, *more: str) -> str:
    """The one line that a script ends with."""
    patch.setattr("sys.argv", [script.__name__, *more])
    with pytest.raises(SystemExit) as ended:
        script.main()
    return str(ended.value.code)


@pytest.fixture(scope="module")
def wide(place: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The pico model with more text."""
    root = tmp_path_factory.mktemp("wide")
    for name, topic, seed in (("user", "cook", 5), ("generic", "sail", 6)):
        (root / name).mkdir()
        for i, text in enumerate(texts(topic, 500, seed)):
            (root / name / f"{i}.txt").write_text(text)
    return {"model": place["model"], "user": root / "user", "generic": root / "generic"}


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows are drawn as the scripts draw them, but six at most."""
    for script in (ground_truth, sensing, steps):
        monkeypatch.setattr(script, "sample", lambda rows, n, seed: sample(rows, min(n, 6), seed))


# what is drawn


@pytest.mark.parametrize("design", sensing.DESIGNS)
@pytest.mark.parametrize("units", [UNITS, units_of(3, 2, 4)], ids=["many units", "few units"])
def test_fewer_masks_are_the_first_of_more(design: str, units: Units) -> None:
    many = drawn(design, 71, units)
    assert many.shape == (71, len(units.layer))
    assert set(np.unique(many)) == {0.0, 1.0}
    assert all(np.array_equal(drawn(design, m, units), many[:m]) for m in (1, 8, 70))


def test_a_partition_takes_every_unit_once_and_few_of_a_layer_together() -> None:
    probes = round(1 / sensing.SHARE)
    for masks in drawn("partition", 3 * probes).reshape(3, probes, D):
        assert (masks.sum(0) == 1).all()
        for n in range(6):
            assert masks[:, (UNITS.layer == n) & (UNITS.kind == 0)].sum(1).max() == 1
            assert masks[:, (UNITS.layer == n) & (UNITS.kind == 1)].sum(1).max() == -(-36 // probes)


def test_antithetic_masks_are_halves_of_one_pool() -> None:
    one, other = drawn("antithetic", 41)[:40].reshape(-1, 2, D).swapaxes(0, 1)
    size = round(sensing.SHARE * D)
    assert (one.sum(1) == size).all()
    assert (other.sum(1) == size).all()
    assert not (one * other).any()
    assert drawn("antithetic", 41)[40].sum() == size


@pytest.mark.parametrize("units", [UNITS, units_of(30, 10, 100), units_of(3, 2, 4)], ids=lambda u: len(u.layer))
def test_hadamard_masks_are_balanced_and_every_two_groups_meet_as_often(units: Units) -> None:
    d = len(units.layer)
    order = min(64, 1 << (d.bit_length() - 1))
    width = max(1, round(2 * sensing.SHARE * d / order))
    for masks in drawn("Hadamard", 2 * (order - 1), units).reshape(2, order - 1, d):
        assert (masks.sum(1) == width * order / 2).all()
        met = masks.T @ masks
        off = np.flatnonzero(np.diag(met))
        assert (np.diag(met)[off] == order / 2).all()
        assert order * width - width <= len(off) <= order * width  # one group is on in all of them
        assert set(np.unique(met[off][:, off])) == {order / 4, order / 2}


def test_bernoulli_masks_take_their_share() -> None:
    masks = drawn("Bernoulli", 400)
    assert abs(masks.mean() - sensing.SHARE) < 4 * (sensing.SHARE / masks.size) ** 0.5


def test_masks_of_segments_take_every_unit_once_and_touch_few_layers() -> None:
    masks = drawn("segments", 200)
    per = next(m for m in range(1, 200) if (masks[:m].sum(0) == 1).all())
    assert (masks[per : 2 * per].sum(0) == 1).all()
    layers = [set(UNITS.layer[mask > 0]) for mask in masks]
    assert all(len(x) == 1 for x in layers)  # of six layers a segment has one
    assert {n for x in layers for n in x} == set(range(6))
    assert masks.sum(1).max() <= 2 * round(sensing.SHARE * D)


# what is recovered


@pytest.mark.filterwarnings("ignore:Orthogonal matching", "ignore:An input array is constant")
@pytest.mark.parametrize("design", sensing.DESIGNS)
@pytest.mark.parametrize("solver", sensing.SOLVERS)
def test_every_solver_finds_planted_effects_among_the_units_that_were_off(design: str, solver: str) -> None:
    masks, x = drawn(design, D // 2), planted()
    seen = masks.any(0)
    found = sensing.SOLVERS[solver](masks, masks @ x, np.full(D, x.mean()))
    there = np.count_nonzero(x[seen])
    assert ground_truth.found_share(found[seen], x[seen], there / seen.sum()) >= 0.5
    assert spearmanr(found[seen], x[seen]).statistic > 3 / seen.sum() ** 0.5


@pytest.mark.parametrize("jointly_sparse", [False, True])
def test_vectors_find_planted_effects(jointly_sparse: bool) -> None:
    masks, x = drawn("partition", D // 2), planted()
    vectors = np.random.default_rng(2).normal(size=(D, 64)) * np.sqrt(x)[:, None]
    found = sensing.from_vectors(masks, masks @ vectors, jointly_sparse)
    assert set(np.argsort(-found)[:PLANTED]) == set(np.flatnonzero(x))


def test_masks_leave_a_true_prior_as_it_is_and_correct_a_wrong_one() -> None:
    masks, rng = drawn("partition", D // 2), np.random.default_rng(3)
    x = rng.lognormal(size=D)
    solve = sensing.SOLVERS[sensing.TO_PRIOR]
    assert np.allclose(solve(masks, masks @ x, x), x)
    wrong = x * rng.lognormal(sigma=0.5, size=D)
    found = solve(masks, masks @ x, wrong)
    assert np.square(found - x).sum() < np.square(wrong - x).sum()


def test_a_prior_that_knows_only_an_order_is_put_into_the_unit_of_what_was_measured() -> None:
    masks, x = drawn("partition", D // 2), np.random.default_rng(3).lognormal(size=D)
    assert np.allclose(sensing.priced(1000 * x, masks, masks @ x), x)
    assert (sensing.priced(x, masks, -masks @ x) > 0).all()


@pytest.mark.filterwarnings("ignore:Orthogonal matching", "ignore:An input array is constant")
def test_what_foretells_held_out_masks_is_chosen_and_told_how_sure_it_is() -> None:
    masks, x, rng = drawn("partition", D), planted(), np.random.default_rng(4)
    got = {"removed": masks, "kl": masks @ x, "loss": masks @ x, "hidden": masks @ x}
    got["vector"] = masks @ rng.normal(size=(D, 48))
    priors = {"the truth": x, "noise": rng.lognormal(size=D)}
    found = {name: (scores, note) for name, scores, note in sensing.recoveries(got, D, priors)}
    scores, note = found["KL, what foretells held-out masks best"]
    assert ground_truth.found_share(scores, x, PLANTED / D) == 1
    chosen, sure = note.split("; ")
    assert np.array_equal(found["KL, " + chosen][0], scores)
    assert chosen != "ridge to noise"
    mean, low, high = map(float, re.findall(r"[\d.]+", sure))
    assert 0.5 < low <= mean <= high <= 1


@pytest.mark.filterwarnings("ignore:Orthogonal matching", "ignore:An input array is constant")
@pytest.mark.parametrize("masks", [np.zeros((12, D)), np.ones((12, D)), np.tile(drawn("partition", 1), (12, 1))])
def test_masks_that_are_all_alike_say_nothing(masks: Array) -> None:
    prior = np.random.default_rng(0).lognormal(size=D)
    for name, solve in sensing.SOLVERS.items():
        found = solve(masks, masks @ prior, prior)
        if name == sensing.TO_PRIOR:
            assert np.array_equal(found, prior)
        elif name == "non-negative":  # reads levels, not differences
            assert len(np.unique(found.round(9))) <= 2
        else:
            assert not found.any()
    for sparse in (False, True):
        assert not sensing.from_vectors(masks, masks @ np.ones((D, 64)), sparse).any()


def test_the_highest_are_found_by_themselves() -> None:
    x = np.random.default_rng(0).permutation(40.0 + np.arange(40))
    assert ground_truth.found_share(x, x) == 1
    assert ground_truth.found_share(-x, x) == 0
    assert ground_truth.found_share(x[:3], x[:3]) == 1


# what is measured


def test_leaving_out_is_what_a_network_without_those_weights_says(
    place: dict[str, Path], tiny: None, few: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    p, _ = ground_truth.opened(str(place["model"]), str(place["user"]), str(place["generic"]))
    model = clone(p.model, torch.float32)
    units, rows, a = ground_truth.generic_units(p, model, 32), ground_truth.probing_rows(p, False, 2), anatomy(model)
    found = ground_truth.leave_one_out(model, p.source.sha256, units, rows, "truth")
    kl = found["kl"].mean(1)
    assert kl.shape == (3 * (2 + 8),)
    groups, blocks = np.flatnonzero(units.kind == 0), np.flatnonzero(units.kind == 1)
    for u in (groups[kl[groups].argmax()], groups[0], blocks[kl[blocks].argmax()], blocks[5]):
        n, i = int(units.layer[u]), int(units.index[u])
        without = clone(model)
        if units.kind[u]:
            linear(without, n, "mlp.down_proj").weight.data[:, units.order[n][32 * i : 32 * (i + 1)]] = 0
        else:
            linear(without, n, "self_attn.o_proj").weight.data[:, query_rows([i], a)[0]] = 0
        for r, row in enumerate(rows.split(1)):
            assert found["kl"][u, r] == pytest.approx(kl_of(without, row, top_of(model, row)), rel=1e-2, abs=2e-6)
            rise = (nats_of(without, row) - nats_of(model, row)).mean()
            assert found["loss"][u, r] == pytest.approx(float(rise), rel=1e-2, abs=2e-6)
    assert kl.max() > 1e-3
    monkeypatch.setattr(ground_truth, "Tail", lambda *_: pytest.fail("it was known"))
    again = ground_truth.leave_one_out(model, p.source.sha256, units, rows, "truth")
    assert all(np.array_equal(again[k], v) for k, v in found.items())


def test_units_of_generic_text_are_left_out_for_it_and_for_the_user(
    place: dict[str, Path], tiny: None, few: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    first = asked(ground_truth, monkeypatch, capsys, place, "--rows", "2", "--block", "32")
    assert [line.split()[:3] for line in first] == [["generic", "30", "units,"], ["user", "30", "units,"]]
    assert asked(ground_truth, monkeypatch, capsys, place, "--rows", "2", "--block", "32") == first
    folders = ["--data", str(place["user"]), "--generic", str(place["generic"])]
    assert "must divide the 256" in refused(ground_truth, monkeypatch, str(place["model"]), *folders, "--block", "48")


def test_the_table_of_sensing_has_every_way_and_screening_all_units_is_the_truth(
    place: dict[str, Path], tiny: None, few: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = asked(sensing, monkeypatch, capsys, place, "--rows", "1", "--block", "32", "--spent", "2", "1")
    for design in sensing.DESIGNS:
        for m in ("d/2 = 15", "d/1 = 30"):
            assert sum(f"  {m}: {design}, " in line for line in lines) == len(sensing.SOLVERS) + 3 + 5
    speeds = {
        line.split(":")[0].strip(): float(line.split(", ")[1].split()[0]) for line in lines if " a second" in line
    }
    assert set(sensing.DESIGNS) < set(speeds)
    assert min(speeds.values()) > 0
    (exact,) = (line for line in lines if "d/1 = 30: screened" in line)
    assert re.search(r" 1\.00  cheapest  1\.00  rank  1\.00 ", exact)


def test_masks_are_measured_once_and_tell_what_each_unit_alone_costs(
    place: dict[str, Path], tiny: None, few: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    p, model = ground_truth.opened(str(place["model"]), str(place["user"]), str(place["generic"]))
    units, rows = ground_truth.generic_units(p, model, 64), ground_truth.probing_rows(p, False, 1)
    exact = ground_truth.leave_one_out(model, p.source.sha256, units, rows, "truth")
    monkeypatch.setitem(sensing.DESIGNS, "each alone", lambda units, m, rng: np.eye(m))
    got = sensing.readings(model, p.source.sha256, units, rows, "each alone", len(units.layer))
    for kind in ("kl", "loss", "hidden"):
        assert np.allclose(got[kind], exact[kind].mean(1))
    assert np.allclose(got["vector"], exact["vector"])
    monkeypatch.setattr(sensing, "Tail", lambda *_: pytest.fail("it was known"))
    again = sensing.readings(model, p.source.sha256, units, rows, "each alone", len(units.layer))
    assert all(np.array_equal(again[k], v) for k, v in got.items())


def test_sensing_says_how_many_masks_it_needs(
    place: dict[str, Path], tiny: None, few: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask = [str(place["model"]), "--data", str(place["user"]), "--generic", str(place["generic"])]
    said = refused(sensing, monkeypatch, *ask, "--block", "64", "--spent", "8")
    assert said == "d/8 of 18 units are 2 masks: 10 are needed, so take a smaller --block or --spent"


# what single effects foretell


def test_plans_take_their_shares_and_chosen_ones_the_cheapest() -> None:
    effects = np.random.default_rng(0).lognormal(size=200)
    random, chosen = additivity.plans(effects, np.random.default_rng(1))
    wanted = np.round(additivity.SHARES * 200)
    assert np.array_equal(random.sum(1), np.tile(wanted, 3))
    assert np.array_equal(chosen.sum(1), wanted)
    assert all(effects[row == 1].max() < effects[row == 0].min() for row in chosen)


def test_what_is_foretold_but_for_a_factor_is_foretold() -> None:
    y = np.random.default_rng(0).lognormal(size=40)
    assert additivity.r2(3 * y, y) == pytest.approx((1, 1))
    assert max(additivity.r2(y[::-1], y)) < 0.5


def test_a_group_alone_and_its_sketch_foretell_the_same(place: dict[str, Path], tiny: None) -> None:
    model, tokenizer = load_dense(place["model"])[:2]
    felt, a = feel(model, training_rows(texts("cook", 10, 3), tokenizer)), anatomy(model)
    units = order_units(effects_of(a, felt))
    v = additivity.sketches(units, felt, a.queries_per_group * a.head_dim)
    groups = units.kind == 0
    assert groups.sum() == 6
    assert np.allclose(np.square(v).sum(0)[groups], units.effects[groups], rtol=1e-4)


def test_effects_foretell_the_order_of_chosen_plans(
    place: dict[str, Path], tiny: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = asked(additivity, monkeypatch, capsys, place, "--rows", "16")
    assert "30 units" in lines[0]
    assert not any("nan" in line for line in lines)
    (told,) = (line for line in lines if line.startswith("chosen  plans, sum"))
    assert float(told.split("rank ")[1].split()[0]) > 0.8


# whose units are


def test_importance_of_one_text_is_alike_up_to_its_ceiling_and_of_unlike_texts_is_not() -> None:
    rng = np.random.default_rng(0)
    base, other = (rng.lognormal(size=200) for _ in range(2))
    rows = lambda x: x * rng.chisquare(1, (64, len(x)))  # noqa: E731
    between, interval, ceiling = premise.beside(rows(base), rows(base), rng)
    assert between[0] == pytest.approx(ceiling[0], rel=0.05)
    assert interval[0, 0] < between[0] < interval[1, 0]
    unlike, _, high = premise.beside(rows(base), rows(other), rng)
    assert abs(unlike[0]) < 0.2 < 0.7 < high[0]


def test_a_matrix_that_is_on_the_grid_cannot_be_rounded(place: dict[str, Path], tiny: None) -> None:
    model, tokenizer = load_dense(place["model"])[:2]
    w, grid = linear(model, 1, "mlp.up_proj").weight, GRIDS[BASE]
    w.data = snap(w.data, search_scales(w.data, None, grid), grid)
    felt = np.square(premise.of_matrices(model, training_rows(texts("cook", 10, 3), tokenizer))).mean(0)
    assert felt.argmin() == 7 + 5
    assert felt.min() < 1e-6 * np.median(felt)


def test_the_premise_is_told_at_every_grain_and_the_same_again(
    wide: dict[str, Path], tiny: None, few: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ask = ["--rows", "16", "--exact-rows", "4"]
    monkeypatch.setattr(premise, "DRAWS", 20)
    first = asked(premise, monkeypatch, capsys, wide, *ask)
    assert [line.rsplit(": ", 1)[0] for line in first[::2]] == [
        f"{grain} ({many})" for grain, many in zip(premise.GRAINS, (6, 6, 12, 21), strict=True)
    ]
    for line in first[1::2]:
        between, low, high, ceiling, *_ = (float(x) for x in re.findall(r"-?\d\.\d\d", line))
        assert -1 <= low <= between <= high <= 1
        assert between <= ceiling + 0.2
    for name in ("feel", "of_matrices", "left_out"):
        monkeypatch.setattr(premise, name, lambda *_: pytest.fail("it was known"))
    assert asked(premise, monkeypatch, capsys, wide, *ask) == first


def test_the_premise_needs_rows_to_halve(place: dict[str, Path], tiny: None, monkeypatch: pytest.MonkeyPatch) -> None:
    ask = [str(place["model"]), "--data", str(place["user"]), "--generic", str(place["generic"])]
    assert re.fullmatch(r"generic has \d+ rows of 256 tokens: 66 are needed, .*", refused(premise, monkeypatch, *ask))
    assert refused(premise, monkeypatch, *ask, "--exact-rows", "1") == "2"


# the next user of a model


def test_a_soft_threshold_believes_halves_that_agree() -> None:
    rng = np.random.default_rng(0)
    own, generic = (
        Effects({0: torch.tensor(rng.lognormal(size=8))}, {0: torch.tensor(rng.lognormal(size=2))}, {}, 0)
        for _ in range(2)
    )
    assert torch.allclose(second_user.flat(second_user.soft((own, own), generic)), second_user.flat(own))


def test_the_second_user_is_told_for_every_number_of_rows_and_the_same_again(
    wide: dict[str, Path], tiny: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(second_user, "ROWS", (4, 16))
    ask = ["--profile", "16", "--reference", "32"]
    first = asked(second_user, monkeypatch, capsys, wide, *ask)
    ranks = {line[2:46].strip(): float(line.split("rank ")[1].split()[0]) for line in first if " rank " in line}
    assert len(ranks) == 2 + 4 * 2
    assert ranks["32 other rows of the user"] == 1
    for n in (4, 16):
        assert ranks["generic profile, 16 rows"] < ranks[f"{n} rows, recovered beside the profile"]
    monkeypatch.setattr(second_user, "without_repair", lambda *_: pytest.fail("it was known"))
    assert asked(second_user, monkeypatch, capsys, wide, *ask) == first


def test_the_second_user_needs_other_rows(place: dict[str, Path], tiny: None, monkeypatch: pytest.MonkeyPatch) -> None:
    ask = [str(place["model"]), "--data", str(place["user"]), "--generic", str(place["generic"])]
    said = refused(second_user, monkeypatch, *ask, "--profile", "16")
    assert re.fullmatch(r"user has \d+ rows of 256 tokens: 96 are needed, .*", said)


# one cut or many


def test_cuts_in_steps_end_with_as_many_weights_as_one_cut(
    place: dict[str, Path], tiny: None, few: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(steps, "TEST_BYTES", 4096)
    dense, *arms = asked(steps, monkeypatch, capsys, place, "--removed", "0.3", "--steps", "2")
    assert "dense" in dense
    assert [line[:30].strip() for line in arms] == ["one shot", "2 steps of equal allowance", "2 steps of equal size"]
    gone = {int(re.search(r"([\d,]+) weights gone", line)[1].replace(",", "")) for line in arms}  # type: ignore[index]
    model = load_dense(place["model"])[0]
    whole, block = steps.weights_of(model), anatomy(model).unit_parameters()[0]
    assert len(gone) == 1
    assert abs(gone.pop() - 0.3 * whole) <= block
    assert block == BLOCK * 3 * 64
