"""Laws of probing and of the repair after a cut."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from sartor.effort import EFFORTS
from sartor.model import network as net
from sartor.model.tail import Tail
from sartor.numerics.gptq import gptq
from sartor.numerics.grids import GRIDS, snap
from sartor.numerics.metrics import share_interval, student_interval
from sartor.plan import LayerPlan, Plan, to_mask
from sartor.probing import FIRST, Texts, sense, sounded
from sartor.stages import probe
from sartor.stages.calibrate import second_moments
from sartor.stages.decide import settle
from sartor.stages.fit import Evidence, evidence_of, fit
from sartor.stages.likelihood import hidden_of, kl_of, nats_of, top_of
from sartor.stages.masters import put_
from sartor.stages.prune import cut_, gone
from sartor.stages.sensitivity import feel, together
from sartor.stages.tokens import training_rows
from sartor.stages.whose import alike, diagnose, heads_of, verdicts
from sartor.stages.yardstick import Yardstick
from sartor.storage import remembered
from tests.conftest import make_model, texts


@pytest.fixture
def rows(tokenizer: Any) -> torch.Tensor:
    return training_rows(texts("cook", 20, 8), tokenizer, 64)[:12]


@pytest.fixture
def other(tokenizer: Any) -> torch.Tensor:
    return training_rows(texts("sail", 20, 9), tokenizer, 64)[:12]


def effects(model: Any, rows: torch.Tensor) -> probe.Effects:
    return probe.effects_of(net.anatomy(model), feel(model, rows))


def faded(model: Any, layer: int, group: int, much: float) -> Any:
    """A query group said a little more quietly: a cut so small that only its second order is left."""
    a = net.anatomy(model)
    columns = net.query_rows([group], a)[0]
    model = net.clone(model)
    net.linear(model, layer, "self_attn.o_proj").weight.data[:, columns] *= 1 - much
    return model


@torch.no_grad()
def true_kl(model: Any, other: Any, rows: torch.Tensor) -> float:
    """Over all tokens: a network that has learnt nothing spreads what it expects over more than the likeliest hundred."""
    log_p, log_q = (torch.log_softmax(m(input_ids=rows).logits, -1) for m in (model, other))
    return float((log_p.exp() * (log_p - log_q)).sum(-1).mean())


def test_backward_probes_are_the_second_order_of_the_true_damage(model: Any, rows: torch.Tensor) -> None:
    felt = [feel(model, rows, seed) for seed in range(40)]
    for layer, group in ((0, 0), (1, 1), (2, 0)):
        a = net.anatomy(model)
        got = np.mean([float(probe.effects_of(a, f).group[layer][group]) for f in felt])
        much = 0.2
        assert got == pytest.approx(true_kl(model, faded(model, layer, group, much), rows) / much**2, rel=0.25)


def test_effects_foretell_the_order_of_random_cuts_on_other_text(place: dict[str, Any], tokenizer: Any) -> None:
    model, _ = net.load_dense(place["model"])
    fresh = training_rows(texts("cook", 20, 77), tokenizer, 64)[:12]
    e = effects(model, training_rows(texts("cook", 160, 8), tokenizer, 64)[:40])
    worth = probe.check(model, probe.order_units(e), fresh, 12)
    assert worth.spearman > 0.9
    assert worth.r2 > 0.8
    assert worth.factor > 0


def test_effects_are_the_same_after_a_round_trip_through_json(model: Any, rows: torch.Tensor) -> None:
    e = effects(model, rows)
    again = probe.Effects.from_dict(json.loads(json.dumps(e.to_dict())))
    assert again.parts == e.parts
    for n, x in e.channel.items():
        assert torch.allclose(again.channel[n], x, rtol=1e-3)
        assert torch.allclose(again.group[n], e.group[n], rtol=1e-3)
    assert again.tokens == e.tokens == rows.numel()
    assert again.heads == e.heads
    assert again.rows == e.rows == len(rows)
    for n, x in e.group.items():
        assert [h[0] for h in e.heads[n]] == pytest.approx(x.tolist(), rel=1e-3)


def test_intervals_hold_their_effect_and_layers_without_parts_have_none(model: Any, rows: torch.Tensor) -> None:
    net.shrink_attention_(model, 0, [])
    net.shrink_mlp_(model, 1, torch.tensor([], dtype=torch.long))
    e = effects(model, rows)
    assert e.parts["attention"][0] == e.parts["mlp"][1] == [0, 0, 0]
    for effect, low, high in (*e.parts["attention"][1:], e.parts["mlp"][0], e.parts["mlp"][2]):
        assert low < effect < high
        assert effect > 0
    assert 0 not in e.group
    assert 1 not in e.channel


def test_a_units_effect_is_that_of_its_channels(model: Any, rows: torch.Tensor) -> None:
    e = effects(model, rows)
    units = probe.order_units(e)
    for n in range(3):
        assert units.of(n, "mlp").sum() == pytest.approx(float(e.channel[n].sum()))
        assert (np.diff(units.of(n, "mlp")) >= 0).all()
        assert sorted(units.order[n].tolist()) == list(range(256))
        assert units.of(n, "attention") == pytest.approx(e.group[n].numpy())


def made_up(
    noise: float, seed: int, difference: float, again: int = 0
) -> tuple[probe.Effects, list[probe.Effects], probe.Effects]:
    """(true effects of a user, two noisy halves, generic effects)."""
    rng = torch.Generator().manual_seed(seed)
    normal = lambda n: torch.randn(n, generator=rng)  # noqa: E731
    effects = lambda c: probe.Effects({0: c[:3000].exp(), 1: c[3000:6000].exp()}, {0: c[6000:6100].exp()}, {}, 1)  # noqa: E731
    generic = 2 * normal(6100)
    own = generic + difference * normal(6100) + torch.cat([torch.ones(3000), torch.zeros(3100)])
    rng.manual_seed(seed + 1000 * again + 500)
    return effects(own), [effects(own + noise * normal(6100)) for _ in range(2)], effects(generic)


@pytest.mark.parametrize("difference", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("noise", [0.1, 1.0])
def test_recovery_beside_generic_effects_is_never_worse_than_either(noise: float, difference: float) -> None:
    true, (one, two), generic = made_up(noise, 1, difference)
    got = probe.recovered(one, (one, two), generic)
    mean = {n: (one.channel[n] * two.channel[n]).sqrt() for n in (0, 1)}
    error = lambda channel: sum(float((channel[n] / true.channel[n]).log().square().mean()) for n in (0, 1))  # noqa: E731
    assert error(got.channel) <= 1.02 * error(mean) + 1e-4
    assert error(got.channel) < error(generic.channel)  # one layer matters e times as much to the user
    if noise > difference:
        assert error(got.channel) < 0.5 * error(mean)


@pytest.mark.parametrize("noise", [0.5, 1.0, 2.0])
def test_reliability_is_what_two_such_texts_would_agree_on(noise: float) -> None:
    _, halves, _ = made_up(noise, 2, 1.0, again=0)
    _, others, _ = made_up(noise, 2, 1.0, again=1)
    means = [
        np.log(np.concatenate([(h[0].channel[n] * h[1].channel[n]).sqrt().numpy() for n in (0, 1)]))
        for h in (halves, others)
    ]
    agreed = np.corrcoef(*means)[0, 1]
    assert probe.reliability(halves[0], halves[1]) == pytest.approx(agreed, abs=0.03)
    assert np.corrcoef(*(np.log(h.channel[0].numpy()) for h in halves))[0, 1] < agreed - 0.02


@pytest.mark.parametrize("difference", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("noise", [0.5, 1.0, 2.0])
def test_reliability_beside_a_profile_is_how_true_what_is_recovered_there_is(noise: float, difference: float) -> None:
    true, halves, generic = made_up(noise, 3, difference)
    got = probe.recovered(halves[0], halves, generic)
    truth = spearmanr(*(np.concatenate([e.channel[n].numpy() for n in (0, 1)]) for e in (got, true))).statistic ** 2
    told = probe.reliability(*halves, generic)
    assert told == pytest.approx(truth, abs=0.05)
    assert told >= probe.reliability(*halves) - 0.01


def test_a_profile_of_something_else_tells_nothing_and_a_true_one_nearly_all() -> None:
    true, halves, _ = made_up(1.0, 4, 1.0)
    _, _, other = made_up(1.0, 5, 1.0)
    alone = probe.reliability(*halves)
    assert probe.reliability(*halves, other) == pytest.approx(alone, abs=0.02)
    assert probe.reliability(*halves, true) > 0.97 > alone + 0.05


def test_what_a_profile_tells_is_not_read_again(model: Any, rows: torch.Tensor) -> None:
    many = torch.cat([rows] * 4)
    whole, *_ = sounded(model, many, 1.0, 0, lambda share: None)
    alone, *_ = sounded(model, many[:FIRST], 0.0, 0, lambda share: None)
    known = (alone.known + 1) / 2
    assert sounded(model, many, known, 0, lambda share: None)[0].tokens > FIRST * rows.shape[1]
    assert sounded(model, many, known, 0, lambda share: None, whole)[0].tokens == FIRST * rows.shape[1]


def test_rows_are_felt_until_the_order_is_known(model: Any, rows: torch.Tensor) -> None:
    many = torch.cat([rows] * 4)
    enough, one, other = sounded(model, many, 0.0, 0, lambda share: None)
    assert enough.tokens == FIRST * rows.shape[1] == one.tokens + other.tokens
    all_of_it, *_ = sounded(model, many, 1.0, 0, lambda share: None)
    assert all_of_it.tokens == many.numel()
    assert enough.known == pytest.approx(probe.reliability(one, other))
    for few in (1, 2, 3, 5):
        little, one, other = sounded(model, rows[:few], 2.0, 0, lambda share: None)
        assert little.tokens == few * rows.shape[1] == one.tokens + other.tokens
    _, one, other = sounded(model, many[:37], 2.0, 0, lambda share: None)
    assert abs(one.tokens - other.tokens) <= 2 * rows.shape[1]


def test_what_two_texts_say_together_is_what_one_pass_over_both_says(model: Any, rows: torch.Tensor) -> None:
    one, other = feel(model, rows[:4]), feel(model, rows[4:])
    both = together(one, other)
    assert both.tokens == rows.numel()
    site = (1, "down")
    expected = (one.alone[site] * one.tokens + other.alone[site] * other.tokens) / rows.numel()
    assert torch.allclose(both.alone[site], expected)
    squares = one.sketch[site].square().sum(0) * one.tokens + other.sketch[site].square().sum(0) * other.tokens
    assert torch.allclose(both.sketch[site].square().sum(0), squares / rows.numel())


def test_masks_take_cheap_units_only_and_ever_more(model: Any) -> None:
    values = np.random.default_rng(0).random(200)
    masks = probe.random_masks(values, 6, 0)
    assert (masks[:, values > np.median(values)] == 0).all()
    assert (np.diff(masks.sum(1)) > 0).all()


def measured(truth: np.ndarray, rows: int, seed: int) -> list[list[float]]:
    """Intervals of parts whose rows scatter about these effects as those of backward probes do."""
    rng = np.random.default_rng(seed)
    return [student_interval(x * rng.standard_normal(rows) ** 2) for x in truth]


@pytest.mark.parametrize("rows", [(12, 12), (64, 16), (16, 128), (128, 128)])
def test_of_parts_called_personalized_few_are_so_by_chance(rows: tuple[int, int]) -> None:
    false, true, none = 0, 0, 0
    for seed in range(10):
        truth = np.exp(np.random.default_rng(seed).standard_normal(200))
        mine = truth * np.where(np.arange(200) < 20, 8.0, 1.0)
        theirs = measured(truth, rows[1], 100 + seed)
        said = verdicts(measured(mine, rows[0], seed), theirs, rows)
        true, false = true + said[:20].count("personalized"), false + said[20:].count("personalized")
        none += verdicts(measured(truth, rows[0], seed), theirs, rows).count("personalized")
    assert true > (40 if max(rows) < 16 else 120)  # of 200
    assert false < 0.08 * true
    assert none <= 3  # of 2,000 that do not differ


def test_rises_of_either_sign_are_compared_by_their_difference() -> None:
    rng = np.random.default_rng(0)
    rises = lambda mean: [student_interval(m + 0.1 * rng.standard_normal(16)) for m in mean]  # noqa: E731
    said = verdicts(
        rises([-0.5, 0.5, -0.5, 1.0, *[0.0] * 40]), rises([0.5, 0.5, -0.5, 0.1, *[0.0] * 40]), (16, 16), ratios=False
    )
    assert said[:4] == ["personalized", "generic", "generic", "personalized"]
    assert said[4:].count("undecided") >= 38


def test_parts_are_alike_only_where_there_is_text_enough_to_say_so() -> None:
    truth = np.ones(50)
    much, little = (verdicts(measured(truth, n, 1), measured(truth, n, 2), (n, n)) for n in (2000, 6))
    assert much.count("generic") > 40
    assert little.count("generic") < 10
    assert verdicts([[0, 0, 0]] * 3, [[0, 0, 0]] * 3, (8, 8)) == ["generic"] * 3
    assert verdicts([[3, 2, 4]], [[1, 0, 2]], (1, 8)) == ["undecided"]


def test_effects_that_foretell_nothing_say_nothing_of_whose_a_part_is(
    model: Any, rows: torch.Tensor, other: torch.Tensor
) -> None:
    user, generic = effects(model, rows), effects(model, other)
    good, bad = probe.Worth(8, 0.9, 0.9, 1.0), probe.Worth(8, 0.1, 0.2, 1.0)
    loud = replace(
        generic,
        parts={k: [[1e3 * y for y in x] for x in v] for k, v in generic.parts.items()},
        heads={n: [[1e3 * y for y in x] for x in v] for n, v in generic.heads.items()},
    )
    assert {v for _, _, part in diagnose(user, loud, good) for v in part.values()} == {"personalized"}
    assert {v for _, _, part in diagnose(user, loud, bad) for v in part.values()} == {"undecided"}
    for worth, said in ((good, "personalized"), (bad, "undecided")):
        assert {v for layer in heads_of(user, loud, worth)["verdicts"].values() for v in layer} == {said}


@pytest.mark.parametrize("noise", [0.3, 1.0, 2.0])
def test_how_alike_two_texts_order_channels_does_not_depend_on_how_noisy_the_users_is(noise: float) -> None:
    true, halves, generic = made_up(noise, 6, 1.0)
    sure = replace(generic, known=1.0)
    for n, found in alike((halves[0], halves[1]), sure).items():
        truth = spearmanr(true.channel[int(n)].numpy(), generic.channel[int(n)].numpy()).statistic
        assert found == pytest.approx(truth, abs=0.06)


def test_halves_that_agree_on_nothing_say_nothing_of_channels() -> None:
    _, halves, generic = made_up(30.0, 7, 1.0)
    assert alike((halves[0], halves[1]), generic) == {}
    flat = replace(
        generic,
        channel={n: torch.ones_like(x) for n, x in generic.channel.items()},
        group={n: torch.ones_like(x) for n, x in generic.group.items()},
    )
    assert probe.reliability(flat, flat) == 0.0


def test_intervals_hold_the_mean_as_often_as_they_say() -> None:
    rng = np.random.default_rng(0)
    held = [low <= 1 <= high for _, low, high in (student_interval(1 + rng.standard_normal(8)) for _ in range(2000))]
    assert 0.93 < np.mean(held) < 0.97


@pytest.mark.parametrize("photos", [5, 8, 20, 64])
def test_shares_of_few_photos_are_seldom_called_personalized_by_chance(photos: int) -> None:
    rng, called = np.random.default_rng(0), 0
    for _ in range(300):
        rates = rng.uniform(0.0, 1.0, 20)
        sides = [[share_interval((rng.random(n) < r).astype(float)) for r in rates] for n in (photos, 128)]
        called += "personalized" in verdicts(*sides, (photos, 128), ratios=False)
    assert called / 300 <= 0.08
    sure = [share_interval(np.ones(photos)), *[share_interval(np.zeros(photos))] * 3]
    if photos >= 20:
        assert verdicts(sure, [share_interval(np.zeros(128))] * 4, (photos, 128), ratios=False)[0] == "personalized"


def test_none_of_few_photos_is_not_surely_alike() -> None:
    few, many = share_interval(np.zeros(4)), share_interval(np.zeros(100))
    assert verdicts([few], [many], (4, 100), ratios=False) == ["undecided"]
    assert share_interval(np.ones(5))[1] < 0.6


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "mistral"])
def test_the_tail_says_what_the_whole_network_says(tokenizer: Any, rows: torch.Tensor, kind: str) -> None:
    model = make_model(len(tokenizer), kind)
    tail = Tail(model, rows)
    off = {1: torch.tensor([True, False])}, {2: torch.arange(256) % 3 > 0}
    with torch.no_grad():
        assert torch.allclose(tail.hidden_from(0), hidden_of(model, rows), atol=1e-6)
        with net.masked(model, *off):
            assert torch.allclose(tail.hidden_from(1), hidden_of(model, rows), atol=1e-6)
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_the_yardsticks_measurements_agree(model: Any, tokenizer: Any, rows: torch.Tensor) -> None:
    tail = Tail(model, rows)
    stick = Yardstick(model, rows, tail.dense)
    still = stick.read(tail.dense)
    assert still.kl == pytest.approx(0, abs=1e-5)
    assert still.loss == pytest.approx(0, abs=1e-5)
    assert not still.hidden.any()
    assert not still.vector.any()
    reference = top_of(model, rows)
    other = faded(model, 1, 0, 0.5)
    with torch.no_grad():
        moved = stick.read(hidden_of(other, rows))
    assert float(moved.kl.mean()) == pytest.approx(kl_of(other, rows, reference), rel=1e-2)
    assert float((moved.vector**2).sum()) == pytest.approx(true_kl(model, other, rows), rel=0.3)


def plan_of(model: Any, groups: list[list[int]], channels: list[list[int]]) -> Plan:
    a = net.anatomy(model)
    layers = [
        LayerPlan(to_mask(g, a.groups[n]), to_mask(c, a.ffn[n]))
        for n, (g, c) in enumerate(zip(groups, channels, strict=True))
    ]
    return Plan("", a.family, 0, 0, None, None, tuple(layers), {}, 0.0, 0.0, {}, {}, {}, 0.3, 0)


HALF = ([[0, 1], [1], [0, 1]], [list(range(128)), list(range(256)), []])


def test_a_measurement_is_made_once_and_a_damaged_memory_is_none(tmp_path: Path, rows: torch.Tensor) -> None:
    made: list[int] = []

    def measure() -> dict[str, Any]:
        made.append(1)
        return {"x": [1.5, len(made)]}

    recall = remembered(tmp_path, "sha")
    assert recall("effects", rows, 0, measure) == recall("effects", rows, 0, measure) == {"x": [1.5, 1]}
    recall("effects", rows, 1, measure)
    recall("effects", rows[:-1], 0, measure)
    recall("without", rows, 0, measure)
    remembered(tmp_path, "other")("effects", rows, 0, measure)
    assert len(made) == len(list(tmp_path.iterdir())) == 5
    for file in tmp_path.iterdir():
        file.write_text(file.read_text()[:-20])
    assert recall("effects", rows, 0, measure) == {"x": [1.5, 6]}
    assert recall("effects", rows, 0, measure, lambda kept: kept["x"][1] > 6) == {"x": [1.5, 7]}
    assert recall("effects", rows, 0, measure, lambda kept: kept["x"][1] > 6) == {"x": [1.5, 7]}


def test_one_profile_serves_every_user_seed_and_lower_effort(
    model: Any, tokenizer: Any, tiny: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recall = remembered(tmp_path, "sha")
    generic = texts("sail", 40, 1)
    read: list[str] = []
    tell = lambda stage, share, note: read.append(note)  # noqa: E731
    found = []
    for person, effort, seed in (("cook", "standard", 0), ("sail", "standard", 1), ("cook", "quick", 2)):
        own = texts(person, 40, 2)
        mine, theirs, _ = sense(model, tokenizer, Texts(own, own, own, generic, generic), effort, seed, tell, recall)
        found.append(theirs.channel[0])
    assert all(torch.equal(found[0], f) for f in found[1:])
    assert len(list(tmp_path.glob("profile-*"))) == 1
    assert len(list(tmp_path.glob("halves-*"))) == 3
    read.clear()
    monkeypatch.setitem(EFFORTS, "standard", replace(EFFORTS["standard"], known=0.9999, felt_rows=64))
    sense(model, tokenizer, Texts(own, own, own, generic, generic), "standard", 0, tell, recall)
    assert "gradients on generic text" in read  # more was asked for than the profile tells


def test_what_a_part_is_worth_is_what_the_text_costs_without_it(
    place: dict[str, Any], tokenizer: Any, rows: torch.Tensor
) -> None:
    model, _ = net.load_dense(place["model"])
    found = probe.without_parts(model, rows)
    before = float(nats_of(model, rows).mean())
    with net.masked(model, {1: torch.zeros(2, dtype=torch.bool)}, {}):
        rise = float(nats_of(model, rows).mean()) / before - 1
    assert found["attention"][1][0] == pytest.approx(rise, rel=1e-2)
    with net.masked(model, {}, {0: torch.zeros(256, dtype=torch.bool)}):
        rise = float(nats_of(model, rows).mean()) / before - 1
    assert found["mlp"][0][0] == pytest.approx(rise, rel=1e-2)
    assert all(low <= x <= high for k in probe.PARTS for x, low, high in found[k])
    assert found["rows"] == len(rows)


def evidence_on(model: Any, rows: torch.Tensor) -> Evidence:
    return evidence_of(model, rows, rows[:0], 0.3)


def test_both_texts_count_as_their_share_says_whatever_is_heard_of_them(
    model: Any, rows: torch.Tensor, other: torch.Tensor
) -> None:
    evidence = evidence_of(model, rows[:7], other[:4], 0.3)
    assert float(evidence.weight.sum()) == pytest.approx(1)
    ours = torch.tensor([any(torch.equal(r, x) for x in rows[:7]) for r in evidence.rows])
    assert float(evidence.weight[ours].sum()) == pytest.approx(0.7)
    for tokens in evidence.heard.tokens.values():
        counted = (evidence.weight[:, None] / rows.shape[1] * tokens).sum(1)
        assert float(counted[ours].sum()) == pytest.approx(0.7, rel=1e-3)
        assert float(counted.sum()) == pytest.approx(1, rel=1e-3)
    assert float(evidence_on(model, rows).weight.sum()) == pytest.approx(1)


def test_where_nothing_is_cut_or_rounded_nothing_is_to_repair(model: Any, rows: torch.Tensor) -> None:
    before = {n: p.clone() for n, p in model.named_parameters()}
    cut_(model, plan_of(model, [[0, 1]] * 3, [list(range(256))] * 3))
    latents = fit(model, net.clone(model), evidence_on(model, rows), {})
    assert not latents.grids
    for n, p in model.named_parameters():
        assert torch.equal(p, before[n]), n
        assert torch.allclose(latents.value(n), before[n], atol=1e-4), n


def test_repair_brings_the_cut_networks_stream_nearer_to_the_whole_ones(model: Any, rows: torch.Tensor) -> None:
    whole = net.clone(model)
    cut_(model, plan_of(model, *HALF))
    assert gone(net.anatomy(whole), net.anatomy(model)) == {"channels": 384, "groups": 1}
    assert net.anatomy(model).groups == (2, 1, 2)
    assert net.anatomy(model).ffn == (128, 256, 0)
    evidence = evidence_on(whole, rows)
    with torch.no_grad():
        expected = hidden_of(whole, rows)
        plain = (hidden_of(model, rows) - expected).square().sum()
        put_(model, fit(model, whole, evidence, {}))
        assert (hidden_of(model, rows) - expected).square().sum() < 0.8 * plain


def test_rounding_on_the_way_is_taken_up_by_later_layers(place: dict[str, Any], tokenizer: Any) -> None:
    """Against error feedback with every matrix for itself, on what the whole network reads."""
    whole, _ = net.load_dense(place["model"])
    rows = training_rows(texts("cook", 40, 8), tokenizer, 64)
    grids = {n: "IQ4_NL" for n, p in whole.named_parameters() if p.ndim == 2}
    latents = fit(whole, whole, evidence_on(whole, rows), grids)
    assert latents.grids.keys() == grids.keys() == latents.scales.keys()
    assert latents.masters.keys() == dict(whole.named_parameters()).keys()
    moments, apart, walked = second_moments(whole, rows), net.clone(whole), net.clone(whole)
    put_(walked, latents)
    for n, p in apart.named_parameters():
        if n in grids:
            q = gptq(p.data, moments.of(n), GRIDS["IQ4_NL"])
            p.data = snap(q.latent, q.scales, GRIDS["IQ4_NL"])
    with torch.no_grad():
        expected = hidden_of(whole, rows)
        away = [float((hidden_of(m, rows) - expected).square().sum()) for m in (walked, apart)]
    assert away[0] < 0.9 * away[1]


def test_a_grid_that_is_absent_leaves_a_matrix_free(model: Any, rows: torch.Tensor) -> None:
    grids = {f"model.layers.1.{n}.weight": g for n, g in (("self_attn.q_proj", "Q8_0"), ("self_attn.k_proj", "Q5_0"))}
    latents = fit(model, net.clone(model), evidence_on(model, rows), grids)
    assert {n: g.name for n, g in latents.grids.items()} == grids
    value = latents.value("model.layers.1.self_attn.v_proj.weight")
    assert torch.equal(value, net.linear(model, 1, "self_attn.v_proj").weight)


def test_settling_keeps_the_bytes_and_follows_the_new_effects(model: Any, rows: torch.Tensor) -> None:
    a = net.anatomy(model)
    e = effects(model, rows)
    kept = [[0, 1], [1], [0, 1]], [list(range(160)), list(range(256)), list(range(96))]
    before = plan_of(model, *kept)
    after = settle(before, a, e)
    count = lambda plan: sum(len(layer.kept_channels()) for layer in plan.layers)  # noqa: E731
    assert count(before) - net.BLOCK < count(after) <= count(before)
    assert [len(x.kept_groups()) for x in after.layers] == [2, 1, 2]
    assert settle(after, a, e) == after
    units = probe.order_units(e)
    gone = [
        float(units.of(n, "mlp")[: (256 - len(x.kept_channels())) // net.BLOCK].max(initial=0))
        for n, x in enumerate(after.layers)
    ]
    stays = [float(units.of(n, "mlp")[(256 - len(x.kept_channels())) // net.BLOCK]) for n, x in enumerate(after.layers)]
    assert max(gone) <= min(s for s, x in zip(stays, after.layers, strict=True) if len(x.kept_channels()) > 128)
    assert after.layers[1].kept_groups() == [int(np.argmax(units.of(1, "attention")))]
