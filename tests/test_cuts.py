"""Laws of cutting in steps, and of the paper's two-rate rule."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import sartor
from sartor.cli import main
from sartor.errors import BudgetError, InputError
from sartor.job import Job, Prepared
from sartor.model import network as net
from sartor.numerics.grids import fits
from sartor.pipeline import curves_of, measure
from sartor.plan import Plan
from sartor.stages import buffer, paper, probe
from sartor.stages.buffer import buffered
from sartor.stages.calibrate import second_moments
from sartor.stages.curves import WRITERS, foretold, measured_curves, moments_of, refitted
from sartor.stages.decide import decide, settle
from sartor.stages.likelihood import kl_of, top_of
from sartor.stages.masters import InMemory
from sartor.stages.sensitivity import feel
from sartor.stages.tokens import training_rows
from tests.conftest import make_model, texts
from tests.test_probing import plan_of

PLAN = ([[0, 1], [1], [0, 1]], [list(range(160)), list(range(256)), list(range(128))])


@pytest.fixture
def known(place: dict[str, Path]) -> Any:
    return net.load_dense(place["model"])[0]


@pytest.fixture
def rows(tokenizer: Any) -> torch.Tensor:
    return training_rows(texts("cook", 20, 8), tokenizer, 64)[:12]


def in_steps(model: Any, rows: torch.Tensor, steps: int, damage: Any = None, **more: Any) -> Any:
    reference = top_of(model, rows)

    def sense(network: Any) -> probe.Effects:
        return probe.effects_of(net.anatomy(network), feel(network, rows))

    heal = more.pop("heal", lambda x: x)
    return buffered(
        model, plan_of(model, *PLAN), sense, heal, damage or (lambda m: kl_of(m, rows, reference)), steps, **more
    )


def test_a_curve_says_what_a_cut_and_fitted_part_of_a_language_model_damages(known: Any, rows: torch.Tensor) -> None:
    e, a = probe.effects_of(net.anatomy(known), feel(known, rows)), net.anatomy(known)
    fitted, judged = moments_of(known, rows[:8]), rows[8:]
    before = {n: p.clone() for n, p in known.named_parameters()}
    curves = measured_curves(known, e, fitted, judged)
    assert all(torch.equal(p, before[n]) for n, p in known.named_parameters())
    assert set(curves) == {f"{kind}.{n}" for kind in ("attention", "mlp") for n in range(3)}
    assert [share for share, _ in curves["attention.1"]] == [0.5, 1.0]  # of two query groups one, and all
    units, said = probe.order_units(e), top_of(known, judged)
    for name, cut in (
        ("mlp.1", lambda m, gone: net.shrink_mlp_(m, 1, units.order[1][gone * net.BLOCK :].sort().values)),
        ("attention.1", lambda m, gone: net.shrink_attention_(m, 1, probe.kept_groups(units.of(1, "attention"), gone))),
    ):
        kind, n = name.split(".")
        for share, ratio in curves[name]:
            gone = round(share * len(units.of(1, kind)))
            small = net.clone(known)
            cut(small, gone)
            if gone < len(units.of(1, kind)):
                stays = sorted(units.order[1][gone * net.BLOCK :].tolist())
                if kind == "attention":
                    stays = net.query_rows(probe.kept_groups(units.of(1, kind), gone), a)[0].tolist()
                whole = net.linear(known, 1, WRITERS[kind])
                weight, bias = refitted(whole, fitted[1, WRITERS[kind]], stays)
                net.linear(small, 1, WRITERS[kind]).weight.data = weight
                assert bias is None
            damage = ratio * sum(np.sort(units.of(1, kind))[:gone])
            assert damage == pytest.approx(kl_of(small, judged, said), rel=1e-2, abs=1e-6)
            told = foretold(units, 1, kind, curves)
            assert told[gone] == pytest.approx(max(damage, told[gone - 1]), rel=1e-4)  # it never falls


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_a_jobs_curves_are_fitted_by_the_moments_of_what_is_cut_and_of_parts_that_may_be(
    tokenizer: Any, rows: torch.Tensor, family: str
) -> None:
    model = make_model(len(tokenizer), family)
    e = probe.effects_of(net.anatomy(model), feel(model, rows))
    found = curves_of(model, e, second_moments(model, rows[:8]), rows[8:], lambda share, note: None)
    kinds = (
        ("attention", "mlp") if family == "llama" else ("mlp",)
    )  # llama.cpp has one number of heads for all of qwen2's layers
    assert set(found) == {f"{kind}.{n}" for kind in kinds for n in range(3)}
    same = measured_curves(model, e, moments_of(model, rows[:8]), rows[8:], kinds=kinds)
    for name, points in found.items():
        assert np.array(points) == pytest.approx(np.array(same[name]), rel=1e-3)


def test_a_plan_says_by_which_curves_it_was_made_and_goes_by_them(place: dict[str, Path], tiny: None) -> None:
    p = Prepared(Job(str(place["model"]), str(place["user"]), "20%", generic=str(place["generic"])), lambda *_: None)
    ask = p.model, p.tokenizer, p.texts
    plan = sartor.make_plan(*ask, p.budget_bytes, p.bytes_of, p.source.sha256, "quick")
    parts = [f"{kind}.{n}" for kind in ("attention", "mlp") for n in range(3)]
    assert set(plan.curves) == set(parts)
    assert Plan.from_json(plan.to_json()).curves == plan.curves
    measured = measure(*ask, p.budget_bytes, p.bytes_of, "quick")
    assert measured.curves == plan.curves

    def made(cheap: str) -> tuple[int, int]:
        """(query groups, channels) that stay where what goes of the other parts is dear."""
        curves = {name: [[0.5, r := 0.02 if name.startswith(cheap) else 50.0], [1.0, r]] for name in parts}
        rest = p.model, p.tokenizer, replace(measured, curves=curves), p.budget_bytes, p.bytes_of, p.source.sha256
        layers = decide(*rest, 0.3, 0).layers
        return sum(len(x.kept_groups()) for x in layers), sum(len(x.kept_channels()) for x in layers)

    heads, channels = made("attention"), made("mlp")
    assert heads[0] < channels[0]
    assert heads[1] > channels[1]
    easy = measure(*ask, 100 * p.budget_bytes, p.bytes_of, "quick")
    assert easy.curves == {}  # nothing has to go


def test_a_layer_of_few_channels_can_be_decided(known: Any, rows: torch.Tensor) -> None:
    small = net.clone(known)
    net.shrink_mlp_(small, 1, torch.arange(96))  # fewer than a layer keeps
    e = probe.effects_of(net.anatomy(small), feel(small, rows))
    layers = settle(plan_of(small, PLAN[0], [PLAN[1][0], list(range(96)), PLAN[1][2]]), net.anatomy(small), e).layers
    assert len(layers[1].kept_channels()) == 96


def test_a_plan_takes_what_was_measured_to_cost_less(known: Any, rows: torch.Tensor) -> None:
    a, e = net.anatomy(known), probe.effects_of(net.anatomy(known), feel(known, rows))
    plan = plan_of(known, *PLAN)
    dear = {f"mlp.{n}": [[0.5, 0.05 if n == 0 else 15.0], [1.0, 0.05 if n == 0 else 15.0]] for n in range(3)}
    plain, curved = (settle(replace(plan, curves=c), a, e) for c in ({}, dear))
    lost = lambda p: [f - len(x.kept_channels()) for f, x in zip(a.ffn, p.layers, strict=True)]  # noqa: E731
    assert sum(lost(curved)) == sum(lost(plain))
    assert lost(curved)[0] > lost(plain)[0]
    assert settle(curved, a, e).layers == curved.layers


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("by_entropy", [True, False])
def test_steps_end_at_the_plans_size_and_say_what_they_did(
    known: Any, rows: torch.Tensor, steps: int, by_entropy: bool
) -> None:
    before = {n: p.clone() for n, p in known.named_parameters()}
    small, plan, done = in_steps(known, rows, steps, by_entropy=by_entropy)
    a = net.anatomy(small)
    assert a.ffn == tuple(len(x.kept_channels()) for x in plan.layers)
    assert a.groups == tuple(len(x.kept_groups()) for x in plan.layers) == (2, 1, 2)
    assert sum(a.ffn) <= 160 + 256 + 128 < sum(a.ffn) + net.BLOCK
    assert plan.settled
    assert all(torch.equal(p, before[n]) for n, p in known.named_parameters())
    kept = [s for s in done if s.kept]
    assert sum(s.blocks for s in kept) * net.BLOCK == 3 * 256 - sum(a.ffn)
    assert sum(s.groups for s in kept) == 1
    reference = top_of(known, rows)
    assert sum(s.real for s in kept) == pytest.approx(kl_of(small, rows, reference), rel=1e-2, abs=1e-5)
    if steps == 3:
        assert len(kept) > 1


def test_a_step_that_costs_more_than_foretold_is_taken_back(known: Any, rows: torch.Tensor) -> None:
    reference, calls = top_of(known, rows), list[int]()

    def damage(network: Any) -> float:
        """The first attempt seems to cost far more than it may."""
        calls.append(1)
        return kl_of(network, rows, reference) + (100.0 if len(calls) == 2 else 0.0)

    small, plan, done = in_steps(known, rows, 2, damage)
    assert [s.kept for s in done[:2]] == [False, True]
    assert done[0].real > 100 > done[0].allowed
    first, second = (s.blocks + s.groups for s in done[:2])
    assert second == (first + 1) // 2
    assert sum(net.anatomy(small).ffn) <= 160 + 256 + 128
    assert sum(s.blocks for s in done if s.kept) * net.BLOCK == 3 * 256 - sum(net.anatomy(small).ffn)


def test_a_budget_rules_in_the_end_whatever_it_costs(known: Any, rows: torch.Tensor) -> None:
    rising = iter(range(1000))
    small, _, done = in_steps(known, rows, 2, lambda m: 100.0 * next(rising))
    assert sum(net.anatomy(small).ffn) <= 160 + 256 + 128
    assert sum(not s.kept for s in done) >= 2


def test_steps_never_settle_on_fewer_blocks_than_are_gone(known: Any, rows: torch.Tensor) -> None:
    """With grids that make a shallower cut as small: Q3_K, which needs rows that 256 divides."""
    a = net.anatomy(known)
    e = probe.effects_of(a, feel(known, rows))
    plan = replace(plan_of(known, *PLAN), poorer_damage={"Q3_K": [1e-9] * 3})
    plan = replace(plan, grids={f"model.layers.{n}.mlp.down_proj.weight": "IQ4_NL" for n in range(3)})
    for gone in ([0, 0, 0], [1, 2, 0], [3, 0, 3]):
        after = settle(plan, a, e, gone)
        for n, x in enumerate(after.layers):
            lost = 256 - len(x.kept_channels())
            assert lost >= gone[n] * net.BLOCK
            grid = after.grids[f"model.layers.{n}.mlp.down_proj.weight"]
            assert fits(grid, len(x.kept_channels()))


def test_equal_allowances_are_of_damage_and_equal_ratios_of_parameters() -> None:
    units = [buffer._Unit(0, True, (i,), float(i + 1), 10) for i in range(10)]
    for left in (2, 3, 5):
        taken = buffer._first(units, left, True)
        assert abs(sum(u.effect for u in taken) - 55 / left) <= max(u.effect for u in units) / 2
        assert len(buffer._first(units, left, False)) == pytest.approx(10 / left, abs=0.5)
    assert buffer._first(units, 1, True) == units


def test_sparse_recovery_finds_the_few_parts_that_matter() -> None:
    rng = np.random.default_rng(0)
    taken = (rng.random((paper.PROBES, 40)) < paper.TAKEN).astype(float)
    truth = np.zeros(40)
    truth[[3, 17, 29]] = 2.0, 1.0, 3.0
    found = paper.sparse(taken, taken @ truth + 0.02 * rng.normal(size=len(taken)))
    assert set(np.argsort(-found)[:3]) == {3, 17, 29}
    assert (found >= 0).all()
    assert found[truth == 0].max() < 0.2
    assert (paper.rates(found) == paper.SPARED).sum() == 3


def test_personalized_parts_lose_half_as_much(known: Any, rows: torch.Tensor) -> None:
    order = paper.by_activation(known, second_moments(known, rows))
    found = np.array([0, 1, 0, 0, 0, 0.0])
    groups, channels = paper.cut_at(order, paper.rates(found), 0.5, 1)
    assert [len(groups[n]) for n in range(3)] == [1, 1, 1]
    assert [256 - len(channels[n]) for n in range(3)] == [64, 128, 128]
    assert set(channels[0]).isdisjoint(order.channels[0][:64].tolist())
    assert paper.importance(known, order, rows).sum() > 0


@pytest.mark.parametrize("options", [["--method", "paper"], ["--steps", "2"]])
def test_a_job_by_either_way_keeps_its_budget_and_says_so(
    options: list[str], place: dict[str, Path], tmp_path: Path, tiny: None, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = ["--data", str(place["user"]), "--generic", str(place["generic"]), "--out", str(tmp_path / "o")]
    size = "29%" if "paper" in options else "20%"
    assert main(["compress", str(place["model"]), *paths, "--size", size, "--controls", "none", *options]) == 0
    r = json.loads((tmp_path / "o" / "report.json").read_text())
    assert r["bytes"]["artifact"] <= r["bytes"]["budget"]
    plan = sartor.Plan.from_json((tmp_path / "o" / "plan.json").read_text())
    assert plan.settled
    if "paper" in options:
        assert plan.method == r["plan"]["method"] == "paper"
        assert plan.vocabulary is None
        assert "our reading" in (tmp_path / "o" / "report.html").read_text()
        assert set(plan.grids.values()) == {"IQ4_NL"}
    else:
        assert any(s["kept"] for s in r["pruning"]["steps"])
        assert "made in steps" in (tmp_path / "o" / "report.html").read_text()
        capsys.readouterr()
        assert main(["inspect", str(tmp_path / "o")]) == 0
        told = [line.split() for line in capsys.readouterr().out.splitlines()]
        assert sum(line[-1:] == ["kept"] for line in told) == sum(s["kept"] for s in r["pruning"]["steps"])


def test_an_interrupted_cut_goes_on_behind_its_last_step(known: Any, rows: torch.Tensor) -> None:
    class Stop(Exception):
        pass

    def healed(network: Any) -> Any:
        network.model.norm.weight.data += 0.01  # so that a step leaves something that no mask tells
        return network

    def stop(share: float, note: str) -> None:
        if note.startswith("step 3"):
            raise Stop

    through, plan, done = in_steps(known, rows, 3, heal=healed)
    kept = InMemory()
    with pytest.raises(Stop):
        in_steps(known, rows, 3, heal=healed, kept=kept, tell=stop)
    assert [s["kept"] for s in kept.state()["history"]].count(True) == 2
    told: list[str] = []
    again, plan_again, done_again = in_steps(
        known, rows, 3, heal=healed, kept=kept, tell=lambda share, note: told.append(note)
    )
    assert not any(note.startswith(("step 1", "step 2")) for note in told)
    assert plan_again == plan
    assert done_again == done
    assert all(torch.equal(p, q) for p, q in zip(through.parameters(), again.parameters(), strict=True))
    told.clear()
    finished, plan_finished, _ = in_steps(
        known, rows, 3, heal=healed, kept=kept, tell=lambda share, note: told.append(note)
    )
    assert not told
    assert plan_finished == plan
    assert all(torch.equal(p, q) for p, q in zip(finished.parameters(), again.parameters(), strict=True))


def test_a_job_in_steps_resumes_behind_those_it_made(place: dict[str, Path], tmp_path: Path, tiny: None) -> None:
    def stop(now: str, share: float, said: str) -> None:
        if now == "prune" and "step 2" in said:
            raise KeyboardInterrupt

    ask = (str(place["model"]), place["user"], "20%", tmp_path / "out")
    more = {"generic": place["generic"], "controls": "none", "steps": 2}
    with pytest.raises(KeyboardInterrupt):
        sartor.compress(*ask, **more, tell=stop)
    assert not sartor.Plan.from_json((tmp_path / "out" / "checkpoint" / "plan.json").read_text()).settled
    seen: list[str] = []
    made = sartor.compress(*ask, **more, resume=True, tell=lambda stage, share, said: seen.append(said))
    assert not any(said.startswith("step 1:") for said in seen)
    assert made.plan.settled
    assert made.plan.steps == sum(s["kept"] for s in made.pruning["steps"])
    assert not (tmp_path / "out" / "checkpoint").exists()


def test_the_papers_rule_refuses_what_it_cannot_do(
    place: dict[str, Path], tmp_path: Path, tiny: None, tokenizer: Any
) -> None:
    ask = {"generic": place["generic"], "method": "paper"}
    with pytest.raises(BudgetError, match="the paper's rule"):
        sartor.compress(str(place["model"]), place["user"], "12.2%", tmp_path / "o", **ask)
    make_model(len(tokenizer), "qwen2").save_pretrained(tmp_path / "qwen")
    tokenizer.save_pretrained(tmp_path / "qwen")
    with pytest.raises(InputError, match="leave --method"):
        sartor.compress(str(tmp_path / "qwen"), place["user"], "30%", tmp_path / "p", **ask)
    assert not (tmp_path / "p").exists()
    with pytest.raises(InputError, match="--steps"):
        sartor.compress(str(place["model"]), place["user"], "30%", tmp_path / "q", steps=2, **ask)
    with pytest.raises(InputError, match="unknown"):
        sartor.compress(str(place["model"]), place["user"], "30%", tmp_path / "q", method="guess")
    with pytest.raises(InputError, match="steps"):
        sartor.compress(str(place["model"]), place["user"], "30%", tmp_path / "q", steps=0)


def test_a_plan_by_the_papers_rule_foretells_its_damage(place: dict[str, Path], tiny: None) -> None:
    job = sartor.api.Job(str(place["model"]), str(place["user"]), "29%", generic=str(place["generic"]))  # type: ignore[attr-defined]
    p = sartor.api.Prepared(job, lambda *a: None)  # type: ignore[attr-defined]
    ask = (p.model, p.tokenizer, p.texts)
    plan, less = (
        sartor.make_plan(*ask, int(share * p.budget_bytes), p.bytes_of, p.source.sha256, method="paper")
        for share in (1, 0.95)
    )
    assert plan.predicted_bytes <= plan.budget_bytes
    assert 0 < plan.predicted_damage < less.predicted_damage
    assert replace(plan, settled=False) != plan
