"""Laws of the benchmark: what is run and what is remembered, means and plots."""

from __future__ import annotations

import json
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import ablations
import artifacts
import benchmark
import cells
import contenders
import ground_truth
import numpy as np
import pareto
import pytest
import recipes
import scoreboard
from contenders import CONTENDERS, Contender
from subject import Subject

from sartor import evaluate
from sartor.effort import EFFORTS
from sartor.errors import InputError, SartorError
from sartor.stages.measure import score
from sartor.stages.tokens import cut_windows, encode_windows, training_rows


def run(place: dict[str, Path], out: Path, only: tuple[str, ...] = ()) -> list[dict[str, Any]]:
    """The benchmark's cells, as it wrote them."""
    benchmark.run(str(place["model"]), [place["user"]], place["generic"], ["25%"], "quick", only, out)
    return json.loads((out / "results.json").read_text())["cells"]  # type: ignore[no-any-return]


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Kinds of file whose figures were taken; nothing is really measured."""
    told: list[str] = []

    def figures(artifact: Any, subject: Subject) -> dict[str, Any]:
        told.append(artifact)
        return planted("one", "user", 1.5, artifact) | {"scores": "of documents"}

    monkeypatch.setattr(benchmark, "figures", figures)
    return told


def alone(monkeypatch: pytest.MonkeyPatch, version: str, make: Any) -> None:
    """One contender with files a and b takes part."""
    monkeypatch.setattr(contenders, "CONTENDERS", {"one": Contender("one", "", make, ("a", "b"), version)})


def test_a_cell_is_run_once_and_again_when_what_it_depends_on_changes(
    place: dict[str, Path], tiny: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ran: list[str]
) -> None:
    make = lambda subject, kind, work: kind  # noqa: E731
    alone(monkeypatch, "1", make)
    assert [c["kind"] for c in run(place, tmp_path, ("one/a",))] == ["a"]
    first = run(place, tmp_path)
    assert ran == ["a", "b"]
    assert first == run(place, tmp_path)
    assert ran == ["a", "b"]
    assert "scores" not in first[0]
    alone(monkeypatch, "2", make)
    assert [c["kind"] for c in run(place, tmp_path, ("one/b",))] == ["b"]
    assert ran == ["a", "b", "b"]
    monkeypatch.setitem(EFFORTS, "quick", replace(EFFORTS["quick"], test_bytes=4_000))
    run(place, tmp_path, ("one/b",))
    assert ran == ["a", "b", "b", "b"]


def test_a_killed_run_goes_on_where_it_was(
    place: dict[str, Path], tiny: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ran: list[str]
) -> None:
    def killed(subject: Subject, kind: str, work: Path) -> str:
        if kind == "b":
            raise KeyboardInterrupt
        return kind

    alone(monkeypatch, "1", killed)
    with pytest.raises(KeyboardInterrupt):
        run(place, tmp_path)
    alone(monkeypatch, "1", lambda subject, kind, work: kind)
    assert [c["kind"] for c in run(place, tmp_path)] == ["a", "b"]
    assert ran == ["a", "b"]


def test_figures_are_the_files_own_beside_the_original_in_the_same_run(subject: Subject) -> None:
    made = artifacts.gguf_artifact(subject.dense.q8_0, subject.dense.tokenizer, 1.5)
    found = artifacts.figures(made, subject)
    assert found["user"]["dense"] == pytest.approx(found["user"]["artifact"], rel=0.02)
    assert found["generic"]["change"] != 0
    assert 0 < found["read_bytes_per_token"] < found["bytes"] == subject.dense.q8_0.stat().st_size
    assert found["share_of_bandwidth"] > 0
    assert scoreboard.speed_ratio(found, "peak_rss_bytes") == pytest.approx(1, abs=0.1)
    assert len(found["scores"][0]["nats"]) == found["user"]["documents"]
    assert "secret-name" not in json.dumps(found)


def test_what_is_trained_depends_on_the_whole_effort_and_nothing_else_does(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = subject.about(True), subject.about(False)
    monkeypatch.setitem(EFFORTS, "quick", replace(EFFORTS["quick"], fit_rows=17))
    assert subject.about(False) == before[1]
    assert cells.digest(subject.about(True)) != cells.digest(before[0])


def test_a_failed_cell_is_told_and_tried_again(
    place: dict[str, Path], tiny: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ran: list[str], capsys: Any
) -> None:
    trouble: list[Exception] = [SartorError("install it:\npip"), ValueError("odd\nsecond line")]

    def make(of: Subject, kind: str, work: Path) -> str:
        if trouble:
            raise trouble.pop(0)
        return kind

    alone(monkeypatch, "1", make)
    assert run(place, tmp_path, ("one/a",))[0]["failed"] == "install it:"
    assert "failed: one (a): install it:" in capsys.readouterr().out
    assert "install it:" in (tmp_path / "results.html").read_text()
    assert run(place, tmp_path, ("one/a",))[0]["failed"] == "ValueError: odd"
    assert "failed" not in run(place, tmp_path, ("one/a",))[0]
    assert ran == ["a"]


def test_only_takes_names_kinds_and_patterns_and_refuses_strangers() -> None:
    assert {c.name for c, _ in contenders.chosen(["sartor*"], ["25%"])} == set(ablations.VARIANTS)
    assert [(c.name, k) for c, k in contenders.chosen(["torchao/int8"], ["25%"])] == [("torchao", "int8")]
    assert len({c.name for c, _ in contenders.chosen([], ["25%"])}) == len(CONTENDERS)
    with pytest.raises(InputError, match="stranger"):
        contenders.chosen(["stranger"], ["25%"])


def planted(contender: str, user: str, ratio: float, kind: str = "25%") -> dict[str, Any]:
    side = {"artifact": 2.0 * ratio, "dense": 2.0, "change": ratio - 1, "change_ci95": [ratio - 1.1, ratio - 0.9]}
    speed = dict.fromkeys(("generate_tokens_per_s", "prompt_tokens_per_s", "peak_rss_bytes"), 3.0)
    return {
        "contender": contender, "kind": kind, "user_name": user, "bytes": 10**7, "seconds": 1.0, "user": side, "generic": side,
        "speed": speed | {f"dense_{k}": 2.0 for k in speed}, "share_of_bandwidth": 0.5,
    }  # fmt: skip


def test_means_over_users_are_geometric_and_leave_out_what_failed() -> None:
    found = [
        planted("a", "one", 0.5),
        planted("a", "two", 2.0),
        planted("b", "one", 0.9),
        planted("a", "one", 4.0, "9%"),
    ]
    found.append({"contender": "b", "kind": "25%", "user_name": "two", "failed": "no"})
    a, b, other = scoreboard.means(found)
    assert a["user"] == pytest.approx(1.0)
    assert a["speed"] == pytest.approx(1.5)
    assert (a["users"], b["users"], other["users"]) == (2, 1, 1)
    assert b["user"] == pytest.approx(0.9)
    assert other["user"] == pytest.approx(4.0)
    shown = scoreboard.text(found)
    assert "2 of 2" in shown
    assert "failed: b (25%): no" in shown


def test_plots_show_every_contender_and_say_who_is_missing() -> None:
    names = list(CONTENDERS)
    found = [planted(n, user, 0.8 + 0.01 * i) for i, n in enumerate(names[:-1]) for user in ("one", "two")]
    drawn = scoreboard.plots(found, names)
    assert [heading for heading, _ in drawn] == ["one", "two", "geometric mean over users"]
    for _, pictures in drawn:
        assert len(pictures) == 3
        for picture in pictures:
            assert all(f">{n}" in picture for n in names)
            assert picture.count("<title>") == len(names) - 1
            assert f">{names[-1]} (not measured)<" in picture
    page = scoreboard.page(found, {"model": "<x>"}, {n: CONTENDERS[n].what for n in names})
    assert "<script" not in page
    assert "&lt;x&gt;" in page
    assert page.count("<svg") == 9


def test_the_front_holds_exactly_what_none_beats_in_both() -> None:
    rng = np.random.default_rng(0)
    marks = [pareto.Mark(str(i), "", *rng.random(2)) for i in range(60)]
    for up in (scoreboard.USER, scoreboard.SPEED):
        sign = 1 if up.less else -1
        points = np.array([(m.x, sign * m.y) for m in marks])
        beaten = [((points <= p).all(1) & (points < p).any(1)).any() for p in points]
        truth = {m.series for m, lost in zip(marks, beaten, strict=True) if not lost}
        assert {m.series for m in pareto.front(marks, scoreboard.BYTES, up)} == truth


def test_what_is_timed_is_timed_in_turns_and_the_best_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluate, "TURNS", 3)
    order: list[str] = []

    def timed(name: str, values: list[float]) -> Any:
        return lambda: (order.append(name), {"speed": values.pop(0)})[1]

    best = evaluate.in_turns({"": timed("a", [1.0, 3.0, 2.0]), "dense_": timed("b", [5.0, 4.0, 4.5])})
    assert best == {"speed": 3.0, "dense_speed": 5.0}
    assert order == ["a", "b"] * 3


def test_a_recipe_is_told_by_its_last_weights_their_mean_and_half_way(place: dict[str, Path]) -> None:
    p, _ = ground_truth.opened(str(place["model"]), str(place["user"]), str(place["generic"]))
    rows = training_rows(p.texts.train, p.tokenizer)
    windows = encode_windows(cut_windows(p.user.test, 4096), p.tokenizer)
    before = score(p.model, windows).bits_per_byte
    found = recipes.learn(p.model, rows, windows, 1e-3, 12)
    assert [name for name, _ in found] == ["last", "0% of the way from the mean", "50% of the way from the mean"]
    assert len({bpb for _, bpb in found}) == 3
    assert max(bpb for _, bpb in found) < before
    assert score(p.model, windows).bits_per_byte == before


@pytest.mark.parametrize("file", sorted((Path(__file__).parent.parent / "bench").glob("*.py")), ids=lambda f: f.stem)
def test_every_script_says_how_it_is_used(
    file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if "argparse" not in file.read_text():
        pytest.skip("not a script")
    monkeypatch.setattr("sys.argv", [file.name, "--help"])
    with pytest.raises(SystemExit) as ended:
        import_module(file.stem).main()
    assert ended.value.code == 0
    assert "usage:" in capsys.readouterr().out
