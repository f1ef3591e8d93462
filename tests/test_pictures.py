"""Laws of the stages on pictures: a pico vision transformer, and pictures whose classes are drawn."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from sartor import effort, pictures
from sartor.carving import HEADS, four_damage, four_grids
from sartor.errors import BudgetError
from sartor.model.network import BLOCK, anatomy, clone, embed, linear, masked, shrink_attention_, shrink_mlp_, through
from sartor.model.precision import running
from sartor.model.tail import Tail
from sartor.model.vision import Vision, VisionConfig
from sartor.numerics.four import FOUR, row_steps
from sartor.numerics.grids import snap
from sartor.plan import from_mask
from sartor.probing import sounded
from sartor.stages.allot import Costs, Four, allot
from sartor.stages.curves import bent, measured_curves, moments_of, refitted
from sartor.stages.fit import evidence_of, fit
from sartor.stages.head import choose_head, clustered, fit_head, read_out, with_head
from sartor.stages.masters import free, put_
from sartor.stages.probe import Effects, order_units, without_parts
from sartor.stages.recognition import kl_of, log_p_of, recognize, said_of, signed_gradients
from sartor.stages.sensitivity import feel
from sartor.stages.tune import Lessons, TuneConfig, may_mirror, tune_, views

CONFIG = VisionConfig("dinov2", 64, 4, 256, layers=4, size=32, patch=8, classes=0)
COUNTED = TuneConfig(math.inf, 1e-3, checks=2, pictures=320)  # the same on a busy machine
TINY = effort.PictureEffort(32, 0.9, 6, 16, 24, COUNTED, COUNTED)


def bytes_of(a: Any) -> int:
    """Of a file at eight bits, as a job might count them."""
    return 5000 + sum(64 * 64 * g + 128 * f for g, f in zip(a.groups, a.ffn, strict=True))


FOUR_BITS = Four(lambda a: 5000 + (bytes_of(a) - 5000) * 17 // 32, 1e-6)


def network(seed: int = 0, config: VisionConfig = CONFIG) -> Any:
    """Random weights; norms and biases too, so that nothing is trivially zero."""
    torch.manual_seed(seed)
    model = Vision(config)
    for name, p in model.named_parameters():
        if p.ndim == 1:
            p.data += 0.1 * torch.randn_like(p)
        elif "position" in name or "prefix" in name:
            p.data = 0.5 * torch.randn_like(p)
    return model.eval().requires_grad_(False)


def drawn(n: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Three classes: bars that stand, bars that lie, and squares, at random places and in random colours on noise."""
    rng = np.random.default_rng(seed)
    pixels, labels = rng.integers(0, 60, (n, 3, 32, 32)), rng.integers(0, 3, n)
    for picture, label in zip(pixels, labels, strict=True):
        y, x = rng.integers(0, 20, 2)
        high, wide = ((12, 4), (4, 12), (8, 8))[label]
        picture[:, y : y + high, x : x + wide] = rng.integers(120, 256, (3, 1, 1))
    return torch.tensor(pixels, dtype=torch.uint8), torch.tensor(labels)


@pytest.fixture(scope="module")
def headed() -> Any:
    model = network()
    return with_head(model, choose_head(model, *drawn(120, 1), 3))


@pytest.fixture(scope="module")
def given() -> pictures.Pictures:
    validation = drawn(48, 2)
    return pictures.Pictures(*drawn(120, 1), *validation, drawn(40, 3)[0])


def flat(a: Any, value: float = 1.0) -> Effects:
    """Every channel and head worth the same."""
    channel = {n: torch.full((f,), value) for n, f in enumerate(a.ffn)}
    group = {n: torch.full((g,), 32 * value) for n, g in enumerate(a.groups)}
    parts = {k: [[0.0, 0.0, 0.0]] * a.layers for k in ("attention", "mlp")}
    return Effects(channel, group, parts, 1)


def test_a_shrunk_vision_network_says_what_the_masked_one_says(headed: Any) -> None:
    rows, small = drawn(3, 5)[0], clone(headed)
    heads, channels = torch.tensor([True, False, True, True]), torch.rand(256) < 0.5
    shrink_attention_(small, 1, [0, 2, 3])
    shrink_mlp_(small, 0, channels.nonzero()[:, 0])
    with masked(headed, {1: heads}, {0: channels}):
        expected = headed(rows)
    assert torch.allclose(small(rows), expected, atol=1e-5)
    assert anatomy(small).groups[1] == 3
    assert anatomy(small).ffn[0] == int(channels.sum())


def test_a_vision_network_goes_on_from_any_layer(headed: Any) -> None:
    rows = drawn(3, 5)[0]
    tail = Tail(headed, rows)
    assert torch.allclose(tail.hidden_from(1), through(headed, embed(headed, rows)), atol=1e-5)


def test_the_head_is_read_where_it_is_best_and_names_new_pictures(headed: Any) -> None:
    model = network()
    assert recognize(headed, *drawn(90, 9)).accuracy > 0.6
    assert 3 <= headed.config.layers <= 4
    read = read_out(model, drawn(4, 1)[0], 3)
    assert torch.allclose(read[-1], model.features(drawn(4, 1)[0]), atol=1e-5)


def test_a_head_gives_every_class_the_same_weight() -> None:
    torch.manual_seed(0)
    labels = torch.tensor([0] * 190 + [1] * 10)
    features = torch.randn(200, 4) + 0.5 * labels[:, None]
    w, b = fit_head(features, labels, 2, 0.03)
    called = (features @ w.T + b).argmax(-1)
    assert float((called[labels == 1] == 1).float().mean()) > 0.5


def test_pictures_without_labels_fall_into_clusters(headed: Any) -> None:
    shaping, fresh = drawn(96, 4)[0], drawn(20, 5)[0]
    (clusters, others), k = clustered(network(), [shaping, fresh])
    assert 2 <= k <= 8
    assert sorted(set(clusters.tolist())) == list(range(k))
    (again, alone), _ = clustered(network(), [shaping, fresh[:1]])  # what does not shape them changes nothing
    assert torch.equal(again, clusters)
    assert torch.equal(alone, others[:1])


def test_signed_directions_have_the_second_moments_of_drawn_labels(headed: Any) -> None:
    rows = drawn(1, 6)[0]
    hidden = through(headed, embed(headed, rows))
    generator = torch.Generator().manual_seed(0)
    along = headed.head.weight.new_zeros(3, 3)
    many = 400
    for _ in range(many):
        g = signed_gradients(headed, hidden, generator)
        moved = torch.linalg.lstsq(headed.head.weight.T, _pooled(headed, g)[0][:, None]).solution[:, 0]
        along += torch.outer(moved, moved) / many
    p = log_p_of(headed, rows)[0].exp()
    assert torch.allclose(along, torch.diag(p) - torch.outer(p, p), atol=0.03)


def _pooled(model: Any, gradient: torch.Tensor) -> torch.Tensor:
    """The gradient at the pooled features that came from: the class token's, and the sum over patches."""
    return torch.cat([gradient[:, 0], gradient[:, model.config.prefix :].sum(1)], -1)


def test_what_pictures_feel_foretells_small_cuts(headed: Any) -> None:
    rows = drawn(64, 7)[0]
    felt, said = feel(headed, rows), said_of(headed, rows)
    foretold, measured = [], []
    for layer in range(headed.config.layers):
        for start in range(0, 256, 64):
            keep = torch.ones(256)
            keep[start : start + 64] = 0
            gone = felt.sketch[layer, "down"][:, start : start + 64].sum(1).square().sum()
            with masked(headed, {}, {layer: keep.bool()}):
                measured.append(kl_of(headed, rows, said))
            foretold.append(float(gone))
    assert np.corrcoef(np.log(foretold), np.log(measured))[0, 1] > 0.8


def test_views_stay_pictures_and_repeat_with_the_seed() -> None:
    pixels = drawn(8, 1)[0]
    once, again = (views(pixels, torch.Generator().manual_seed(3), mirror=True) for _ in range(2))
    assert torch.equal(once, again)
    assert once.shape == pixels.shape
    assert 0 <= float(once.min()) < float(once.max()) <= 255


def test_classes_that_mind_are_not_mirrored() -> None:
    side = torch.arange(60) % 2
    bright = drawn(60, 8)[0] // 2 + 100 * side[:, None, None, None].to(torch.uint8)
    assert may_mirror(with_head(network(), choose_head(network(), bright, side, 2)), bright, side)
    left = torch.zeros(60, 3, 32, 32, dtype=torch.uint8)
    left[side == 0, :, :, :12] = 255
    left[side == 1, :, :, 20:] = 255
    handed = with_head(network(), choose_head(network(), left, side, 2))
    assert not may_mirror(handed, left, side)


def test_the_allotment_fits_the_budget_and_takes_what_is_worth_least(headed: Any) -> None:
    a = anatomy(headed)
    bytes_of = lambda b: 1000 + sum(64 * 64 * g + 128 * f for g, f in zip(b.groups, b.ffn, strict=True))  # noqa: E731
    effects = flat(a)
    effects.channel[1][:128] = 1e-6
    found = allot(a, effects, Costs(bytes_of, bytes_of(a) - 128 * 128))
    assert found.size <= bytes_of(a) - 128 * 128
    assert found.channels[1].startswith("256:" + "0" * 32)
    assert all(found.channels[n] == found.channels[0] for n in range(a.layers) if n != 1)
    with pytest.raises(BudgetError) as told:
        allot(a, effects, Costs(bytes_of, 1000))
    assert allot(a, effects, Costs(bytes_of, int(told.value.nearest or 0))).size <= int(told.value.nearest or 0)


def test_what_fits_as_it_is_loses_nothing(headed: Any) -> None:
    a = anatomy(headed)
    bytes_of = lambda b: 1000 + sum(64 * 64 * g + 128 * f for g, f in zip(b.groups, b.ffn, strict=True))  # noqa: E731
    found = allot(a, flat(a), Costs(bytes_of, bytes_of(a), 1e-4, 1e-2, 1e9))
    assert found.damage == 0
    assert found.size == bytes_of(a)
    assert all(len(from_mask(m)) == a.ffn[0] for m in found.channels)


def test_four_bits_are_taken_where_they_damage_less_than_cuts(headed: Any) -> None:
    a = anatomy(headed)
    eight = lambda b: 1000 + sum(64 * 64 * g + 128 * f for g, f in zip(b.groups, b.ffn, strict=True))  # noqa: E731
    four = lambda b: 1000 + (eight(b) - 1000) * 17 // 32  # noqa: E731
    budget = int(0.6 * eight(a))
    cut = allot(a, flat(a), Costs(eight, budget))
    found = allot(a, flat(a), Costs(eight, budget, four=Four(four, 0.5 * cut.damage)))
    assert found.four
    assert found.damage == 0.5 * cut.damage
    assert found.size == four(a)
    assert allot(a, flat(a), Costs(eight, budget, four=Four(four, 2 * cut.damage))) == cut
    assert not allot(a, flat(a), Costs(eight, eight(a), four=Four(four, -1.0))).four  # eight bits suffice
    deep = Costs(eight, int(0.1 * eight(a)), four=Four(four, 1.0))  # that only four bits reach
    assert allot(a, flat(a), deep).four
    with pytest.raises(BudgetError) as told:
        allot(a, flat(a), replace(deep, budget=1000))
    assert allot(a, flat(a), replace(deep, budget=int(told.value.nearest or 0))).size <= int(told.value.nearest or 0)


def test_a_curve_says_what_the_cut_and_fitted_part_really_damages_and_leaves_no_trace(headed: Any) -> None:
    effects = sounded(headed, drawn(24, 1)[0], 0.9, 0, lambda share: None)[0]
    rows, judged = drawn(48, 2)[0], drawn(32, 3)[0]
    state = {n: p.clone() for n, p in headed.named_parameters()}
    curves = measured_curves(headed, effects, moments_of(headed, rows), judged)
    assert all(torch.equal(state[n], p) for n, p in headed.named_parameters())
    assert set(curves) == {f"{kind}.{n}" for kind in ("attention", "mlp") for n in range(4)}
    units = order_units(effects)
    for share, ratio in curves["mlp.2"]:
        gone = round(share * len(units.of(2, "mlp")))
        stays = sorted(units.order[2].tolist()[gone * units.size :])
        small = clone(headed)
        shrink_mlp_(small, 2, torch.tensor(stays))
        new = linear(small, 2, "mlp.down_proj")
        new.weight.data, new.bias.data = refitted(
            linear(headed, 2, "mlp.down_proj"), moments_of(headed, rows)[2, "mlp.down_proj"], stays
        )
        foretold = float(units.of(2, "mlp")[:gone].sum())
        assert ratio * foretold == pytest.approx(kl_of(small, judged, said_of(headed, judged)), rel=1e-3)


def test_a_part_left_out_renames_as_many_pictures_as_a_network_without_its_weights(headed: Any) -> None:
    pixels = drawn(60, 5)[0]
    found = without_parts(headed, pixels)
    names = log_p_of(headed, pixels).argmax(-1)
    shares = []
    for part, name in (("attention", "self_attn.o_proj"), ("mlp", "mlp.down_proj")):
        for n in range(4):
            small = clone(headed)
            linear(small, n, name).weight.data.zero_()
            shares.append(float((log_p_of(small, pixels).argmax(-1) != names).float().mean()))
            assert found[part][n][0] == pytest.approx(shares[-1], abs=1e-4)
    assert max(shares) > 0
    assert found["rows"] == 60
    assert without_parts(headed, pixels, batch=16) == found


def test_a_curve_is_met_where_it_was_measured_and_never_falls() -> None:
    measured = bent((0.0, 1.0, 2.0, 3.0, 4.0), [[0.5, 0.5], [0.75, 2.0]])
    assert measured[2] == pytest.approx(1.0)
    assert measured[3] == pytest.approx(6.0)
    assert list(measured) == sorted(measured)
    falling = bent((0.0, 1.0, 2.0, 3.0, 4.0), [[0.25, 10.0], [0.75, 0.1]])
    assert list(falling) == sorted(falling)
    assert bent((0.0, 3.0), [[1.0, 2.0], [1.0, 2.0]]) == pytest.approx((0.0, 6.0))
    few = bent((0.0, 1.0, 2.0, 4.0), [[1 / 3, 0.5], [2 / 3, 0.4], [1.0, 1.5]])  # every number of three was tried
    assert few == pytest.approx((0.0, 0.5, 0.8, 6.0))
    rest = bent((0.0, 0.0, 0.0, 1.0, 2.0, 3.0, 4.0), [[0.5, 0.5], [0.75, 2.0]])  # two units went before
    assert rest == pytest.approx((0.0, 0.0, *measured))


def test_what_was_measured_to_cost_more_than_its_sum_is_cut_less(headed: Any) -> None:
    a = anatomy(headed)
    bytes_of = lambda b: 1000 + sum(64 * 64 * g + 128 * f for g, f in zip(b.groups, b.ffn, strict=True))  # noqa: E731
    straight = Costs(bytes_of, int(0.35 * bytes_of(a)))
    dear = {f"{kind}.{n}": [[0.5, 1.0], [0.9, 1.0]] for kind in ("attention", "mlp") for n in range(a.layers)}
    effects = flat(a)
    for e in (*effects.channel.values(), *effects.group.values()):
        e *= torch.linspace(0.5, 1.5, len(e))
    assert allot(a, effects, replace(straight, curves=dear)) == allot(a, effects, straight)
    dear["mlp.1"] = [[0.5, 1.0], [0.9, 8.0]]
    found = allot(a, effects, replace(straight, curves=dear))
    stays = [len(from_mask(m)) for m in found.channels]
    assert stays[1] > max(stays[0], stays[2], stays[3])
    assert found.size <= straight.budget


def test_time_that_a_kind_of_unit_does_not_take_is_sought_elsewhere(headed: Any) -> None:
    a = anatomy(headed)
    bytes_of = lambda b: sum(64 * 64 * g + 128 * f for g, f in zip(b.groups, b.ffn, strict=True))  # noqa: E731
    found = allot(a, flat(a), Costs(bytes_of, int(0.7 * bytes_of(a)), 0.0, 1e-2, 1e-2 * a.layers * 2))
    assert found.size <= 0.7 * bytes_of(a)
    assert sum(len(from_mask(m)) for m in found.groups) <= 2 * a.layers


def test_time_is_kept_too_and_costs_no_more_than_it_must(headed: Any) -> None:
    a = anatomy(headed)
    bytes_of = lambda b: sum(64 * 64 * g + 128 * f for g, f in zip(b.groups, b.ffn, strict=True))  # noqa: E731
    effects = flat(a)
    for e in (*effects.channel.values(), *effects.group.values()):
        e *= torch.linspace(0.5, 1.5, len(e))
    budget, seconds = int(0.7 * bytes_of(a)), Costs(bytes_of, 0, 1e-4, 1e-2).seconds(a)
    free = allot(a, effects, Costs(bytes_of, budget, 1e-4, 1e-2))
    bound = allot(a, effects, Costs(bytes_of, budget, 1e-4, 1e-2, 0.5 * seconds))
    heads = [sum(len(from_mask(m)) for m in found.groups) for found in (free, bound)]
    assert heads[1] <= a.layers * 2 < heads[0]
    assert bound.size <= budget
    assert free.damage < bound.damage
    with pytest.raises(BudgetError):
        allot(a, flat(a), Costs(bytes_of, budget, 1e-4, 1e-2, 0.05 * seconds))


def test_the_fit_brings_a_cut_vision_network_nearer_biases_too(headed: Any) -> None:
    rows, fresh = drawn(64, 1)[0], drawn(32, 11)[0]
    small, gone = clone(headed), torch.arange(0, 160)
    shrink_mlp_(small, 1, gone)
    plain = clone(small)
    evidence = evidence_of(headed, rows[:48], rows[48:], 0.3)
    latents = fit(small, headed, evidence, {})
    put_(small, latents)
    wanted = through(headed, embed(headed, fresh))
    away = [float((through(m, embed(m, fresh)) - wanted).square().sum()) for m in (plain, small)]
    assert away[1] < 0.7 * away[0]
    assert not torch.equal(linear(small, 1, "mlp.down_proj").bias, linear(plain, 1, "mlp.down_proj").bias)


def test_training_learns_from_labels_and_from_a_teacher(headed: Any, given: pictures.Pictures) -> None:
    from sartor.stages.masters import Latents

    student = clone(headed)
    for p in student.parameters():
        p.data += 0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1))
    before = float(recognize(student, *given.judged).nats.mean())
    lessons = Lessons(given.train, given.labels, True, given.generic, teacher=running(headed))
    latents = Latents({n: p.data.clone() for n, p in student.named_parameters()})
    course = tune_(running(student), latents, lessons, given.judged, TuneConfig(4.0, 1e-3, checks=4))
    assert min(nats for _, nats in course.curve) < before
    assert course.pictures > 16


def test_a_training_of_so_many_pictures_is_the_same_every_time(headed: Any, given: pictures.Pictures) -> None:
    lessons, config = Lessons(given.train, given.labels, True, given.generic), TuneConfig(math.inf, 1e-3, pictures=72)
    ends = []
    for _ in range(2):
        student = clone(headed)
        course = pictures.trained(student, free(student), lessons, given, config, 0)
        assert course is not None
        assert course.pictures == 72
        ends.append(student.state_dict())
    assert all(torch.equal(w, ends[1][name]) for name, w in ends[0].items())
    assert any(not torch.equal(w, headed.state_dict()[name]) for name, w in ends[0].items())


def test_a_transformers_cuts_in_steps_keep_the_budget_and_are_healed_on_the_way(
    headed: Any, given: pictures.Pictures, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(effort.PICTURE_EFFORTS, "quick", TINY)
    costs = Costs(bytes_of, int(0.45 * bytes_of(anatomy(headed))))
    plan = pictures.plan_pictures(headed, given, costs, "0" * 64, "quick")
    told: list[pictures.Plan] = []
    made = pictures.fit_pictures(headed, plan, given, costs, "quick", settled=told.append, steps=3)
    assert told == [made.plan]
    kept = [s for s in made.pruning["steps"] if s["kept"]]
    assert made.plan.steps == len(kept) > 1
    assert sum(s["groups"] for s in kept) == made.pruning["groups"]
    assert sum(s["blocks"] for s in kept) * BLOCK == made.pruning["channels"]
    assert bytes_of(anatomy(made.model)) == made.plan.predicted_bytes <= costs.budget
    assert made.plan.predicted_damage > 0  # of the whole cut, not of what was left to go in the last step
    replayed = pictures.fit_pictures(headed, made.plan, given, costs, "quick", (TuneConfig(0.0), TuneConfig(0.0)))
    assert replayed.plan.layers == made.plan.layers  # cut at once: what the steps healed is not in a plan
    assert replayed.plan.steps == 1
    assert made.pruning["validation_cut"]["nats"] < replayed.pruning["validation_cut"]["nats"]  # healed on the way
    assert recognize(made.model, *drawn(90, 9)).accuracy > 0.5


def test_bits_are_decided_once_for_all_steps(
    headed: Any, given: pictures.Pictures, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(effort.PICTURE_EFFORTS, "quick", TINY)
    costs = Costs(bytes_of, int(0.35 * bytes_of(anatomy(headed))), four=FOUR_BITS)
    plan = pictures.plan_pictures(headed, given, costs, "0" * 64, "quick")
    made = pictures.fit_pictures(headed, plan, given, costs, "quick", steps=2)
    assert made.model.block_scales
    assert 0.8 * costs.budget < FOUR_BITS.bytes_of(anatomy(made.model)) == made.plan.predicted_bytes <= costs.budget


def test_a_vision_job_fits_its_budget_and_a_settled_plan_is_replayed(
    headed: Any, given: pictures.Pictures, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(effort.PICTURE_EFFORTS, "quick", TINY)
    budget = int(0.6 * bytes_of(anatomy(headed)))
    costs = Costs(bytes_of, budget)
    plan = pictures.plan_pictures(headed, given, costs, "0" * 64, "quick")
    state = {n: p.clone() for n, p in headed.named_parameters()}
    made = pictures.fit_pictures(headed, plan, given, costs, "quick")
    assert all(torch.equal(state[n], p) for n, p in headed.named_parameters())
    assert bytes_of(anatomy(made.model)) == made.plan.predicted_bytes <= budget
    assert made.plan.settled
    assert set(made.plan.curves) == {f"{kind}.{n}" for kind in ("attention", "mlp") for n in range(4)}
    assert recognize(made.model, *drawn(90, 9)).accuracy > 0.5
    none = TuneConfig(0.0), TuneConfig(0.0)
    again = pictures.fit_pictures(headed, made.plan, given, costs, "quick", none)
    assert again.plan == made.plan
    assert anatomy(again.model) == anatomy(made.model)
    assert replace(plan, settled=True) != made.plan
    fitted = pictures.fit_pictures(clone(made.teacher), replace(made.plan, settled=False), given, costs, "quick", none)
    # what a control arm that starts from the adapted network would find
    for name, weight in made.unrecovered.named_parameters():
        assert torch.allclose(weight, fitted.model.get_parameter(name), atol=1e-6)
        assert weight.data_ptr() != made.model.get_parameter(name).data_ptr()  # recovery left it alone


def test_a_job_at_four_bits_trains_and_ends_on_its_grid(
    headed: Any, given: pictures.Pictures, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(effort.PICTURE_EFFORTS, "quick", TINY)
    costs = Costs(bytes_of, int(0.5 * bytes_of(anatomy(headed))), four=FOUR_BITS)
    plan = pictures.plan_pictures(headed, given, costs, "0" * 64, "quick")
    assert set(plan.grids.values()) == {"INT4"}
    made = pictures.fit_pictures(headed, plan, given, costs, "quick")
    assert made.model.block_scales.keys() == four_grids(made.model).keys() <= made.plan.grids.keys()
    for name, scales in made.model.block_scales.items():
        weight = made.model.get_parameter(name)
        assert torch.equal(weight, snap(weight, scales, FOUR))
        row_steps(scales)
    assert recognize(made.model, *drawn(90, 9)).accuracy > 0.5
    alone = replace(made.plan, layers=tuple(replace(n, groups="4:8") for n in made.plan.layers))  # of 16 inputs
    small, latents = HEADS.fit(
        HEADS.cut(clone(headed), alone), headed, given.train[:16], given.generic[:8], alone, lambda *_: None
    )
    assert not any("o_proj" in name for name in latents.scales)
    assert any("down_proj" in name for name in small.block_scales)
    damage = four_damage(headed, given.train[:24], given.generic[:8], given.validation, 0.3)
    assert 0 < damage < 0.5
