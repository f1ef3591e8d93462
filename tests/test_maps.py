"""Convolutional networks: what channels are worth, what they cost, and what a cut network makes good and rounds."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sartor.carving import MAPS, keep_of
from sartor.errors import BudgetError, InputError, SartorError, SourceError
from sartor.export import lowering, onnxrt, runtimes, seen
from sartor.export.graph_program import OnGrids
from sartor.export.lowering import exported
from sartor.map_view import first_units, in_eight, map_costs, timed_maps
from sartor.model import graph_saved
from sartor.model.graph import INPUT, Graph
from sartor.model.graph_channels import Group, channel_groups, ends_of, kept_channels, shrink, waists
from sartor.model.hooks import removed_after
from sartor.model.network import clone
from sartor.numerics.eight import best_grid, grid_of, held, on_grid, rounded
from sartor.plan import LayerPlan, Plan, from_mask
from sartor.report.layers import map_rows
from sartor.stages.allot_maps import allot_maps
from sartor.stages.attribute import patches_that_decided
from sartor.stages.eight import byte_grid, reading_bytes, round_, rounded_values, unrounded
from sartor.stages.map_curves import measured_map_curves
from sartor.stages.maps import PART, block_of, blocks_of, check_maps, feel_maps, ladder_of, map_effects
from sartor.stages.probe import Effects
from sartor.stages.refit import refit_maps, seen_of

from .test_graph import KINDS, Maker, close, fire, grouped, inverted, pictures, plain, residual


def wide(seed: int = 0) -> Graph:
    """Inverted residual blocks, wide enough that blocks of channels can go."""
    m = Maker(seed)
    x = m.act(m.conv(INPUT, 16, 3, 2), "clip")
    for out, stride in ((16, 1), (32, 2), (32, 1)):
        y = m.conv(m.act(m.depthwise(m.act(m.conv(x, 64), "clip"), 1, stride), "clip"), out)
        x = m.draft.add("add", x, y) if m.draft.shape[x] == m.draft.shape[y] else y
    return m.done(m.act(m.conv(x, 64), "clip"))


def everything(graph: Graph) -> dict[str, Tensor]:
    return kept_channels(graph, {})[0]


def error(small: Graph, whole: Graph, pixels: Tensor) -> float:
    wanted = whole(pixels)
    return float((small(pixels) - wanted).square().mean() / (wanted - wanted.mean(0)).square().mean())


def effects(graph: Graph, seed: int = 0) -> Effects:
    draw = torch.Generator().manual_seed(seed)
    groups = channel_groups(graph)
    return Effects(
        {n: torch.rand(g.units, generator=draw) for n, g in enumerate(groups)}, {}, {PART: [[0.0] * 3] * len(groups)}, 8
    )


def test_eight_bits_are_within_half_a_step_and_hold_what_they_held() -> None:
    x = torch.randn(500, generator=torch.Generator().manual_seed(0))
    scale, zero = grid_of(float(x.min()), float(x.max()))
    assert (on_grid(x, scale, zero) - x).abs().max() <= 0.501 * scale
    assert float(on_grid(torch.zeros(1), *grid_of(0.3, 2.0))) == 0.0  # what padding is made of
    w = torch.randn(6, 3, 3, 3, generator=torch.Generator().manual_seed(1))
    numbers, scales = rounded(w)
    assert ((held(w) - w).abs() <= 0.501 * scales[:, None, None, None]).all()
    assert torch.equal(rounded(held(w))[0], numbers)
    rows = torch.randn(40_000, 8, generator=torch.Generator().manual_seed(2))
    first = rounded(rows)
    for again in (held(rows), held(rows) / 3 * 3):  # pixels' mean and deviation are divided out and multiplied in
        assert all(torch.equal(a, b) for a, b in zip(rounded(again), first, strict=True))


def test_a_grid_gives_up_one_outlier_for_all_others() -> None:
    x = torch.cat([torch.rand(200_000, generator=torch.Generator().manual_seed(0)), torch.tensor([1.5])])
    assert best_grid(x)[0] < grid_of(0.0, 1.5)[0]


def test_gradients_pass_a_rounded_network_but_where_values_are_cut_off() -> None:
    graph = wide()
    round_(graph, dict.fromkeys(rounded_values(graph), (0.05, 128)))
    graph.requires_grad_(True)
    graph(pictures(2)).square().sum().backward()
    assert all(
        p.grad is not None and p.grad.abs().sum() > 0 for n, p in graph.named_parameters() if n.endswith("weight")
    )
    x = torch.tensor([0.5, 100.0], requires_grad=True)
    on_grid(x, 0.01, 0).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [1.0, 0.0]


@pytest.mark.parametrize("kind", KINDS)
def test_a_unit_that_nobody_listens_to_has_no_effect(kind: Callable[[Maker], Graph]) -> None:
    graph = kind(Maker(0))
    group = max(channel_groups(graph), key=lambda g: g.units)
    for name, part in group.columns.items():
        graph.layers[name].weight.data[:, part.at[part.unit == 0]] = 0
    felt = feel_maps(graph, pictures(6))
    number = [g.name for g in channel_groups(graph)].index(group.name)
    found = map_effects(felt).channel[number]
    assert float(found[0]) == 0.0
    assert (found[1:] > 0).any()
    assert not any(m._forward_pre_hooks for m in graph.modules())


def test_effects_foretell_what_random_cuts_cost() -> None:
    graph = plain(Maker(0))
    worth = check_maps(graph, map_effects(feel_maps(graph, pictures(32))), pictures(24), 8)
    assert worth.spearman > 0.8


@pytest.mark.parametrize("kind", KINDS)
def test_a_network_that_lost_nothing_is_fitted_to_what_it_was(kind: Callable[[Maker], Graph]) -> None:
    graph = kind(Maker(0))
    again = refit_maps(graph, graph, everything(graph), seen_of(pictures(24), pictures(0), 0.0, 24), eight=False)
    assert error(again, graph, pictures(8)) < 1e-5
    assert again.rounding is None


def test_a_channel_that_another_one_repeats_is_made_good_exactly() -> None:
    m = Maker(0)
    x = m.act(m.conv(INPUT, 8, 3, 2))
    graph = m.done(m.act(m.conv(x, 12)))
    first = graph.layers[graph.nodes[0].name]
    first.weight.data[3], first.bias.data[3] = first.weight.data[5], first.bias.data[5]
    keep = {channel_groups(graph)[0].name: torch.arange(8) != 3}
    outputs, _ = kept_channels(graph, keep)
    cut = shrink(graph, keep)
    fitted = refit_maps(cut, graph, outputs, seen_of(pictures(32), pictures(0), 0.0, 32), eight=False)
    assert error(cut, graph, pictures(8)) > 1e-3
    assert error(fitted, graph, pictures(8)) < 0.03 * error(cut, graph, pictures(8))  # what is left is the damping's


@pytest.mark.parametrize("kind", [*KINDS, lambda m: wide()])
def test_a_cut_network_says_more_of_what_it_said_once_it_is_fitted(kind: Callable[[Maker], Graph]) -> None:
    graph = kind(Maker(0))
    keep = {g.name: torch.arange(g.units) % 4 != 0 for g in channel_groups(graph) if g.units >= 4}
    outputs, _ = kept_channels(graph, keep)
    cut, fresh = shrink(graph, keep), torch.randint(0, 256, (24, *pictures().shape[1:]), dtype=torch.uint8)
    fitted = refit_maps(cut, graph, outputs, seen_of(pictures(32), pictures(0), 0.0, 32))
    assert error(fitted, graph, fresh) < 0.6 * error(cut, graph, fresh)


@pytest.mark.parametrize("kind", [*KINDS, lambda m: wide()])
def test_a_rounded_file_says_what_pytorch_says_and_repeats_itself(
    kind: Callable[[Maker], Graph], tmp_path: Path
) -> None:
    graph = kind(Maker(0))
    small = refit_maps(graph, graph, everything(graph), seen_of(pictures(32), pictures(0), 0.0, 32))
    for name in ("a.onnx", "b.onnx"):
        seen.write(tmp_path / name, small, "int8")
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()
    said = onnxrt.outputs(tmp_path / "a.onnx", pictures(8).numpy())
    held_network = seen.dequantized(small, "int8")
    features = held_network.features(pictures(8))
    assert torch.cosine_similarity(torch.tensor(said["features"]), features).min() > 0.99
    assert error(held_network, graph, pictures(8)) < 0.05
    with pytest.raises(InputError, match="fp32 or int8"):
        seen.write(tmp_path / "c.onnx", graph, "int8")


def test_sums_beyond_sixteen_bits_do_not_overflow(tmp_path: Path) -> None:
    m = Maker(0)
    x = m.act(m.conv(INPUT, 32, 3, 2), "clip")
    graph = m.done(m.act(m.conv(x, 32)))
    first, second = (graph.layers[n.name] for n in graph.nodes if n.op == "conv")
    first.bias.data.add_(3.0)  # most values stand where they are cut off, at 255 of 255
    second.weight.data.abs_()  # and all products add up: two of them are twice what sixteen bits hold
    small = refit_maps(graph, graph, everything(graph), seen_of(pictures(32), pictures(0), 0.0, 32))
    seen.write(tmp_path / "a.onnx", small, "int8")
    said = torch.tensor(onnxrt.outputs(tmp_path / "a.onnx", pictures(8).numpy())["features"])
    assert torch.allclose(said, seen.dequantized(small, "int8").features(pictures(8)), rtol=0.02)


@pytest.mark.parametrize("kind", [*KINDS, lambda m: wide()])
def test_a_program_on_its_grids_says_what_the_network_says(kind: Callable[[Maker], Graph]) -> None:
    graph = kind(Maker(0))
    small = refit_maps(graph, graph, everything(graph), seen_of(pictures(32), pictures(0), 0.0, 32))
    program = exported(OnGrids(small), small.size, torch.uint8)
    same = 0
    for one in pictures(24).split(1):
        found, wanted = program.module()(one), (small(one), small.features(one))
        same += all(torch.allclose(f, w, atol=1e-4, rtol=1e-4) for f, w in zip(found, wanted, strict=True))
        for f, w in zip(
            found, wanted, strict=True
        ):  # sums are added in another order: what lies between two steps of a grid may fall on the other one
            assert torch.cosine_similarity(f, w) > 0.9999
    assert same >= 18
    held_in = [t for n, t in program.state_dict.items() if n.endswith("codes")]
    assert len(held_in) == len(small.layers)
    assert all(t.dtype == torch.int8 for t in held_in)


def needs_executorch() -> None:
    row = runtimes.ROWS["executorch-int8"]
    if lowering.missing(row.needs):
        pytest.skip(f"{row.runtime} is an optional extra and not installed: {row.install}")


@pytest.mark.parametrize("kind", [plain, residual, inverted, lambda m: wide()])
def test_executorch_computes_on_the_grids_that_were_trained_on(kind: Callable[[Maker], Graph], tmp_path: Path) -> None:
    needs_executorch()
    graph = kind(Maker(0))
    small = refit_maps(graph, graph, everything(graph), seen_of(pictures(32), pictures(0), 0.0, 32))
    found = runtimes.measure_all(small, tmp_path, pictures(8), ["executorch-fp32", "executorch-int8"], rounds=2)
    for measured in found:
        assert measured["cosine"] is not None, measured["note"]
        assert measured["cosine"] > 0.99, measured


@pytest.mark.parametrize("kind", [fire, grouped])
def test_what_executorch_does_not_load_at_eight_bits_is_refused_and_written_in_fp32(
    kind: Callable[[Maker], Graph], tmp_path: Path
) -> None:
    needs_executorch()
    graph = kind(Maker(0))
    with pytest.raises(SartorError, match="has int8 once it was fitted to it: take fp32"):
        runtimes.write("executorch-int8", tmp_path / "m.pte", graph)
    small = refit_maps(graph, graph, everything(graph), seen_of(pictures(32), pictures(0), 0.0, 32))
    found = runtimes.measure_all(small, tmp_path, pictures(2), ["executorch-fp32", "executorch-int8"], rounds=0)
    assert found[0]["cosine"] is not None, found[0]["note"]
    assert found[1]["cosine"] is None
    assert "take fp32" in found[1]["note"]


def test_a_network_that_reads_bytes_says_the_same_away_from_padding() -> None:
    m = Maker(0)
    weight = torch.randn(8, 3, 3, 3, generator=m.g)
    graph = m.done(m.act(m.draft.conv(INPUT, weight, torch.randn(8, generator=m.g))))
    new = reading_bytes(graph)
    assert byte_grid(graph) is None
    assert byte_grid(new) is not None
    close(new(pictures()), graph(pictures()))
    padded = wide()
    assert error(reading_bytes(padded), padded, pictures(8)) < 0.01
    other = m.done(m.act(INPUT))
    assert reading_bytes(other) is other


@pytest.mark.parametrize("kind", [*KINDS, lambda m: wide()])
def test_in_floating_point_numbers_values_end_where_their_grids_do(kind: Callable[[Maker], Graph]) -> None:
    graph = kind(Maker(0))
    small = refit_maps(graph, graph, everything(graph), seen_of(pictures(32), pictures(0), 0.0, 32))
    assert small.rounding is not None
    grids = small.rounding.grids
    tight = {name: (0.5 * scale, zero) for name, (scale, zero) in grids.items()} | {INPUT: grids[INPUT]}
    round_(small, tight)
    loose = unrounded(small)
    assert loose.rounding is None
    assert error(loose, small, pictures(8)) < 0.2 * error(graph, small, pictures(8))


def test_bytes_foretold_are_those_of_the_file_or_a_little_more(tmp_path: Path) -> None:
    graph = wide()
    costs = map_costs(graph, 10**6)
    for share in (0.0, 0.25, 0.6):
        gone = [int(share * u) for u in costs.units]
        seen.write(tmp_path / "m.onnx", in_eight(shrink(graph, first_units(graph, gone))), "int8")
        real = (tmp_path / "m.onnx").stat().st_size
        assert real <= costs.bytes_of(gone) <= real + 400


def test_what_is_allotted_keeps_its_bytes_and_more_bytes_never_foretell_more_damage() -> None:
    graph = wide()
    whole = map_costs(graph, 10**6)
    size, found = whole.bytes_of([0] * len(whole.units)), effects(graph)
    damage = []
    for share in (0.6, 0.75, 0.9, 1.0):
        costs = dataclasses.replace(whole, budget=int(share * size))
        allotted = allot_maps(found, costs)
        kept = [from_mask(c) for c in allotted.channels]
        gone = [u - len(k) for u, k in zip(costs.units, kept, strict=True)]
        assert allotted.size == costs.bytes_of(gone) <= costs.budget
        assert all(len(k) % block_of(u) == 0 for k, u in zip(kept, costs.units, strict=True))
        damage.append(allotted.damage)
    assert damage == sorted(damage, reverse=True)
    assert damage[-1] == 0
    with pytest.raises(BudgetError, match="smallest model"):
        allot_maps(found, dataclasses.replace(whole, budget=size // 10))


def test_what_the_head_reads_stays_whole() -> None:
    graph = wide()
    costs = map_costs(graph, 10**6)
    least = dataclasses.replace(costs, budget=costs.bytes_of(costs.most))
    sizes = [len(from_mask(c)) for c in allot_maps(effects(graph), least).channels]
    features = [g.name for g in channel_groups(graph) if graph.nodes[-1].name in g.columns]
    whole = [g.name for g, size in zip(channel_groups(graph), sizes, strict=True) if size == g.units]
    assert features
    assert whole == features


def test_units_with_the_least_effect_go_first() -> None:
    graph = wide()
    whole, found = map_costs(graph, 10**6), effects(graph)
    costs = dataclasses.replace(whole, budget=int(0.8 * whole.bytes_of([0] * len(whole.units))))
    for n, mask in enumerate(allot_maps(found, costs).channels):
        kept = torch.zeros(costs.units[n], dtype=torch.bool)
        kept[from_mask(mask)] = True
        if not kept.all():
            assert found.channel[n][kept].min() >= found.channel[n][~kept].max()


def test_time_is_kept_too_and_takes_channels_where_maps_are_large() -> None:
    graph = wide()
    costs = map_costs(graph, 10**6)
    timed = dataclasses.replace(costs, prices=(1e-9, 2e-9, 1e-9, 1e-6))
    limit = 0.6 * timed.seconds([0] * len(costs.units))
    allotted = allot_maps(effects(graph), dataclasses.replace(timed, limit=limit))
    gone = [u - len(from_mask(c)) for u, c in zip(costs.units, allotted.channels, strict=True)]
    assert timed.seconds(gone) <= limit
    with pytest.raises(BudgetError, match="--faster"):
        allot_maps(effects(graph), dataclasses.replace(timed, limit=limit / 100))


def test_prices_of_time_are_measured_and_what_cannot_be_reached_is_refused() -> None:
    graph = wide()
    costs = map_costs(graph, 10**6)
    timed, fastest = timed_maps(graph, graph, costs, pictures(8), 0.1)
    assert min(timed.prices) >= 0
    assert timed.limit < 1.0
    assert allot_maps(effects(graph), timed).whole
    assert fastest < 1e6
    slow, _ = timed_maps(graph, graph, costs, pictures(8), 1e6)
    with pytest.raises(BudgetError, match="ask for less with --faster"):
        allot_maps(effects(graph), slow)


def ending(graph: Graph) -> int:
    """Number of the group that the last residual block ends with."""
    groups = channel_groups(graph)
    return [g.name for g in groups].index(list(ends_of(graph, groups))[-1])


def test_a_residual_block_goes_as_a_whole_where_its_layers_take_time() -> None:
    graph = wide()
    costs, found, n = map_costs(graph, 10**6), effects(graph), ending(graph)
    assert costs.levels(n)[-1] == costs.units[n] == costs.most[n]
    assert all(costs.levels(k)[-1] < costs.units[k] for k in set(range(len(costs.units))) - costs.ends)
    found.channel[n] *= 1e-3
    timed = dataclasses.replace(costs, prices=(1e-12, 1e-12, 1e-12, 1e-3))
    limit = timed.seconds([0] * len(costs.units)) - 2.5e-3  # a block of three layers
    allotted = allot_maps(found, dataclasses.replace(timed, limit=limit))
    assert not from_mask(allotted.channels[n])
    plans = tuple(LayerPlan("0:0", c) for c in allotted.channels)
    small = shrink(graph, keep_of(graph, plans))
    assert len(small.layers) == len(graph.layers) - 3
    other = next(k for k in costs.ends if k != n)
    for share, goes in ((1e-6, n), (1e9, other)):  # what it was measured to cost, beside the sum of effects
        curve = {ladder_of(n): [[0.5, 1.0], [1.0, share]]}
        anew = allot_maps(found, dataclasses.replace(timed, limit=limit, curves=curve))
        assert [k for k in costs.ends if not from_mask(anew.channels[k])] == [goes]
    assert anew.damage == pytest.approx(float(found.channel[other].sum()), rel=1e-4)
    dip = {ladder_of(n): [[0.5, 1.0], [0.92, 50.0], [1.0, 0.1]]}  # all of it costs less than a part
    anew = allot_maps(found, dataclasses.replace(timed, limit=limit, curves=dip))
    assert anew.damage == pytest.approx(0.1 * float(found.channel[n].sum()), rel=1e-4)


def test_what_lies_in_a_block_that_went_is_not_counted_twice() -> None:
    graph = inverted(Maker(0))  # with a squeezed part in every block
    costs, found = map_costs(graph, 10**6), effects(graph)
    groups = channel_groups(graph)
    ends = ends_of(graph, groups)
    within = {n for n, group in enumerate(groups) if costs.inside[n]}
    assert within == {
        n
        for n, g in enumerate(groups)
        if g.name not in ends and any({*g.rows, *g.columns} <= b.inside for b in ends.values())
    }
    assert len(within) == len(ends) == 2
    limit = costs.bytes_of(costs.most)
    allotted = allot_maps(found, dataclasses.replace(costs, budget=limit))
    gone = [u - len(from_mask(c)) for u, c in zip(costs.units, allotted.channels, strict=True)]
    assert all(gone[n] == 0 for n in within)
    assert all(gone[n] == costs.units[n] for n in costs.ends)
    assert allotted.size == costs.bytes_of(gone)
    assert allotted.damage == pytest.approx(
        sum(float(found.channel[n].sort().values[:less].sum()) for n, less in enumerate(gone)), rel=1e-5
    )
    plan = tuple(LayerPlan("0:0", c) for c in allotted.channels)
    rows = map_rows(Plan("", "", 0, 0, None, None, plan, {}, 0.0, 0.0, {}, {}, {}, 0.0, 0), graph)
    small = shrink(graph, keep_of(graph, plan))
    assert sum(r["channels"] - r["channels_kept"] for r in rows) == MAPS.gone(graph, small)["channels"]
    assert MAPS.gone(graph, small)["residual_blocks"] == 2


def test_what_a_block_added_is_made_good_by_the_layers_behind_it() -> None:
    graph, x = wide(), pictures(24)
    n = ending(graph)
    keep = {channel_groups(graph)[n].name: torch.zeros(64, dtype=torch.bool)}
    small, outputs = shrink(graph, keep), kept_channels(graph, keep)[0]
    fitted = refit_maps(small, graph, outputs, seen_of(x, x[:0], 0.0, 24), eight=False)
    assert error(fitted, graph, x) < 0.7 * error(small, graph, x)
    first = list(ends_of(graph, channel_groups(graph)))[0]
    for name in (first, channel_groups(graph)[n].name):  # a block that adds nothing may go: the rest stays as it is
        silent = clone(graph)
        branch = ends_of(silent, channel_groups(silent))[name]
        for part in ("weight", "bias"):
            getattr(silent.layers[branch.last], part).data.zero_()
        keep = {name: torch.zeros(64, dtype=torch.bool)}
        again = refit_maps(
            shrink(silent, keep), silent, kept_channels(silent, keep)[0], seen_of(x, x[:0], 0.0, 24), eight=False
        )
        close(again(x), silent(x))


def repeating(graph: Graph, group: Group) -> Graph:
    """A copy whose second half of these channels says what the first says."""
    new = clone(graph)
    for name, part in group.rows.items():
        layer: Any = new.layers[name]
        for values in (layer.weight.data, layer.bias.data):
            values[part.at[part.unit >= 32]] = values[part.at[part.unit < 32]]
    return new


def test_curves_are_what_fitted_cuts_cost() -> None:
    graph, x, n = wide(), pictures(24), ending(wide())
    group = channel_groups(graph)[n]
    again = repeating(graph, group)
    felt = map_effects(feel_maps(again, x[:16]))
    felt.channel[n][:32] += 1.0  # so that what is said again goes first
    curve = measured_map_curves(again, felt, x[:16], x[16:])[ladder_of(n)]
    assert [share for share, _ in curve] == [0.5, pytest.approx(0.75), 1.0]
    assert curve[0][1] * float(felt.channel[n][32:].sum()) < 0.1 * curve[-1][1] * float(felt.channel[n].sum())
    before = {name: p.clone() for name, p in graph.state_dict().items()}
    found = map_effects(feel_maps(graph, x[:16]))
    curves = measured_map_curves(graph, found, x[:16], x[16:], fixed=(0,))
    assert ladder_of(0) not in curves
    assert all(torch.equal(p, before[name]) for name, p in graph.state_dict().items())
    # a block that went as a whole left its mean behind
    last: Any = ends_of(graph, [group])[group.name].last
    means, whole = clone(graph), torch.log_softmax(graph(x[16:]), -1)
    made: list[Tensor] = []
    with removed_after([graph.layers[last].register_forward_hook(lambda *args: made.append(args[2]))]):
        graph(x[:16])
    means.layers[last].weight.data.zero_()
    means.layers[last].bias.data = torch.cat(made).mean((0, 2, 3))
    real = float((whole.exp() * (whole - torch.log_softmax(means(x[16:]), -1))).sum(-1).mean())
    share, ratio = curves[ladder_of(n)][-1]
    assert share == 1.0
    assert ratio * sum(max(0.0, float(w)) for w in blocks_of(found)[1][n]) == pytest.approx(real, rel=0.02)


def test_a_group_that_nobody_listens_to_has_no_curve() -> None:
    graph, x = wide(), pictures(16)
    last = list(ends_of(graph, channel_groups(graph)).values())[-1].last
    graph.layers[last].weight.data.zero_()
    found = map_effects(feel_maps(graph, x[:8]))
    assert ladder_of(ending(graph)) not in measured_map_curves(graph, found, x[:8], x[8:])


def test_masks_of_a_plan_are_units_of_groups() -> None:
    graph = wide()
    plans = tuple(LayerPlan("0:0", c) for c in allot_maps(effects(graph), map_costs(graph, 10**6)).channels)
    assert keep_of(graph, plans) == {}


@pytest.mark.parametrize("kind", [*KINDS, lambda m: wide()])
def test_a_saved_network_is_the_same_again(kind: Callable[[Maker], Graph], tmp_path: Path) -> None:
    graph = kind(Maker(0))
    graph_saved.save(graph, tmp_path)
    again, grids = graph_saved.load(tmp_path)
    assert torch.equal(again(pictures()), graph(pictures()))
    assert grids == {}
    rounding = dict.fromkeys(rounded_values(graph), (0.05, 128))
    round_(graph, rounding)
    graph_saved.save(graph, tmp_path)
    assert graph_saved.load(tmp_path)[1] == rounding
    text = (tmp_path / "graph.json").read_text()
    for harm in (text.replace("conv", "eval"), text[:-9], text.replace('"inputs": ["pixels"]', '"inputs": ["conv_9"]')):
        (tmp_path / "graph.json").write_text(harm)
        with pytest.raises(SourceError, match="damaged"):
            graph_saved.load(tmp_path)


def test_a_network_can_be_read_where_everything_passes() -> None:
    graph = wide()
    names = waists(graph)
    live = {n.name: n.op for n in graph.nodes}
    assert names[-1] == graph.nodes[graph.before_pool - 1].name
    assert all(live[n] in ("clip", "add", "conv") for n in names)
    for name in names:  # nothing behind it reads anything in front of it
        at = list(live).index(name)
        assert all(set(n.inputs).isdisjoint(list(live)[:at]) for n in graph.nodes[at + 1 :])


def test_places_that_decide_sum_to_the_answer_of_a_pooled_map() -> None:
    m = Maker(0)
    graph = m.done(m.act(m.conv(INPUT, 8, 3, 2)))
    one = torch.zeros(1, 3, 24, 24, dtype=torch.uint8)
    one[:, :, :8, :8] = 255
    found = patches_that_decided(graph, one, int(graph(one).argmax()))
    assert found.shape == (12, 12)
    assert 0 <= float(found.min()) <= float(found.max()) <= 1


def test_generic_pictures_count_for_their_share() -> None:
    own, others = torch.zeros(30, 3, 4, 4), torch.ones(10, 3, 4, 4)
    found = seen_of(own, others, 0.4, 20)
    assert len(found.pixels) == len(found.weight) == 20
    assert float(found.weight.sum()) == pytest.approx(1)
    assert float(found.weight[found.pixels[:, 0, 0, 0] == 1].sum()) == pytest.approx(0.4)
    assert float(seen_of(own[:0], others, 0.4, 20).weight.sum()) == pytest.approx(1)
