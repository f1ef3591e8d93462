"""Laws of the stages: likelihoods in pieces, words, bits, and the ways to make an MLP smaller."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from sartor.effort import UNTRAINED, Training
from sartor.model import network as net
from sartor.model.vocabulary import count_tokens, trim_tokenizer
from sartor.numerics.schedule import affordable_batch
from sartor.plan import LayerPlan, to_mask
from sartor.stages import calibrate, likelihood, words
from sartor.stages.bits import BASE, DOWN, RICHER, base_damage, damage_by_grid, kinds_of, poorer_damage
from sartor.stages.calibrate import heard, second_moments, unheard
from sartor.stages.distil import DistilConfig, _due
from sartor.stages.masters import LATER, Latents, Mean
from sartor.stages.prune import share_gone
from sartor.stages.tokens import sample, training_rows
from tests.conftest import make_model, texts


@pytest.fixture
def rows(tokenizer: Any) -> torch.Tensor:
    return sample(training_rows(texts("cook", 20, 8), tokenizer, 64), 6, 0)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("target", ["truth", "teacher"])
def test_the_fused_losses_and_their_gradients_are_autograds(
    tokenizer: Any, rows: torch.Tensor, tied: bool, target: str
) -> None:
    model = make_model(len(tokenizer), "llama" if tied else "mistral", tied).requires_grad_(True)
    teacher = make_model(len(tokenizer), "llama", tied, seed=1)
    values, ids = likelihood.lesson_of(teacher, rows)

    def gradients(loss: torch.Tensor) -> tuple[float, dict[str, torch.Tensor]]:
        (3 * loss).backward()
        found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
        return float(loss.detach()), found

    logits = model(input_ids=rows).logits
    if target == "truth":
        expected, theirs = gradients(F.cross_entropy(logits[:, :-1].flatten(0, 1), rows[:, 1:].flatten()))
        got, ours = gradients(likelihood.loss_of(model, likelihood.hidden_of(model, rows), rows))
    else:
        p = values.float().exp()
        said = torch.special.xlogy(p, p) - p * torch.log_softmax(logits, -1).gather(-1, ids.long())
        expected, theirs = gradients(said.sum(-1).mean())
        got, ours = gradients(likelihood.loss_to_lesson(model, likelihood.hidden_of(model, rows), values, ids))
    assert got == pytest.approx(expected, rel=1e-5)
    assert ours.keys() == theirs.keys()
    for name, gradient in ours.items():
        assert torch.allclose(gradient, theirs[name], atol=1e-5), name


def test_a_lesson_stands_for_all_that_the_teacher_expects(tokenizer: Any, rows: torch.Tensor) -> None:
    teacher = make_model(len(tokenizer), "llama", True, seed=1)
    with torch.no_grad():
        expected = torch.softmax(teacher(input_ids=rows).logits, -1)
    found = torch.zeros_like(expected)
    for seed in range(50):
        values, ids = likelihood.lesson_of(teacher, rows, seed, batch=4)
        p = values.float().exp()
        assert torch.allclose(p.sum(-1), torch.ones(p.shape[:-1]), atol=2e-3)
        found.scatter_add_(-1, ids.long(), p / 50)
    rest = expected.topk(likelihood.LIKELY).values.sum(-1).mean()
    assert rest < 0.9, "a teacher that is sure of itself tests nothing"
    # a token is drawn some 1,700 times in all: 2.4% of its 0.0023, four times that for the worst of 400
    assert torch.allclose(found.mean((0, 1)), expected.mean((0, 1)), atol=2.5e-4)
    top = expected.topk(likelihood.LIKELY)
    assert torch.allclose(found.gather(-1, top.indices), top.values, rtol=2e-2, atol=1e-4)


def test_likelihoods_in_pieces_are_those_of_the_whole(model: Any, rows: torch.Tensor) -> None:
    with torch.no_grad():
        log_p = torch.log_softmax(model(input_ids=rows).logits, -1)
    nats = -log_p[:, :-1].gather(-1, rows[:, 1:, None])[..., 0]
    assert torch.allclose(likelihood.nats_of(model, rows), nats, atol=1e-4)
    values, ids = likelihood.top_of(model, rows, batch=4)
    assert torch.allclose(values.float(), log_p.topk(values.shape[-1]).values, atol=1e-2)
    assert torch.allclose(log_p.gather(-1, ids.long()), values.float(), atol=1e-2)
    expected = likelihood.expected_use(model, rows, batch=4)
    assert torch.allclose(expected, log_p.exp().mean((0, 1)), atol=1e-5)


def test_a_model_is_at_no_distance_from_itself_and_at_some_from_another(model: Any, rows: torch.Tensor) -> None:
    reference = likelihood.top_of(model, rows)
    assert likelihood.kl_of(model, rows, reference) == pytest.approx(0, abs=1e-5)
    other = net.clone(model)
    net.shrink_mlp_(other, 0, torch.arange(32))
    assert likelihood.kl_of(other, rows, reference) > 2e-5


def test_words_the_model_expects_rank_before_words_nobody_expects(model: Any, tokenizer: Any) -> None:
    n = len(tokenizer)
    own = count_tokens(tokenizer, texts("cook", 10, 3))
    unseen = [i for i in range(n) if not own[i]]
    expected = torch.zeros(n)
    expected[unseen[-1]] = 0.5
    order, base = words.rank(tokenizer, own, expected)
    assert order.index(unseen[-1]) < base + 20
    plain, _ = words.rank(tokenizer, own, torch.zeros(n))
    assert plain.index(unseen[-1]) > order.index(unseen[-1])
    assert sorted(order) == sorted(plain) == list(range(n))


def test_training_text_lacks_as_many_words_as_new_text(model: Any, tokenizer: Any) -> None:
    train, new = texts("cook", 8, 3), [*texts("cook", 6, 9), *texts("sail", 1, 9)]
    use = likelihood.expected_use(model, training_rows(train, tokenizer, 64))
    w = words.words(model, tokenizer, train, use, new, 4_000, lambda share, note: None)
    assert w.sizes == sorted(w.sizes, reverse=True)
    assert w.lost == sorted(w.lost)
    assert w.lost[0] == 0 < w.lost[-1]
    kept = w.sizes[2]
    again = w.seen_again(kept)
    assert set(again) <= set(w.order[:kept])
    trim_tokenizer(tokenizer, again)  # closed under merges, or this fails
    missing = words.share_of(w.held_out, w.order[kept:])
    without = [1 - words.share_of(w.own, set(w.order[:kept]) & set(o[:kept])) for o in w.fewer]
    assert abs(1 - words.share_of(w.own, again) - missing) == min(abs(x - missing) for x in without)


def test_shares_are_of_all_occurrences() -> None:
    assert words.share_of(Counter({1: 3, 2: 1}), [1]) == 0.75
    assert words.share_of(Counter(), [1]) == 0


def test_three_bits_cost_more_than_four_and_leave_the_model_alone(model: Any, rows: torch.Tensor) -> None:
    before = {n: p.clone() for n, p in model.named_parameters()}
    reference = likelihood.top_of(model, rows)
    down = kinds_of(model)[DOWN]
    moments = second_moments(model, rows)
    base = base_damage(model, down, rows, reference, moments)
    damage = poorer_damage(model, moments, base, rows, reference, 2, lambda share, note: None)
    assert damage["Q3_K"].sum() > damage["IQ4_XS"].sum() >= 0
    finer = damage_by_grid(model, down, base, RICHER)
    assert base == finer[BASE] > finer["Q5_0"] > finer["Q8_0"] > 0
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_what_is_heard_of_tokens_has_mean_one_and_no_heavy_tail(model: Any, rows: torch.Tensor) -> None:
    weight = torch.full((len(rows),), 1 / len(rows))
    found = heard(model, rows, weight)
    assert torch.allclose(found.head, second_moments(model, rows).head, rtol=1e-3, atol=1e-5)
    assert len(found.tokens) == 4 * net.anatomy(model).layers
    for tokens in found.tokens.values():
        assert tokens.shape == rows.shape
        assert tokens.min() >= 0
        assert float(tokens.mean()) == pytest.approx(1, rel=1e-4)
        assert float(tokens.max()) < 20
        assert float(tokens.std()) > 0.05
        assert torch.all(tokens[:, -1] == 0)  # the last token foretells nothing


def test_unheard_rows_say_the_same_of_the_head(model: Any, rows: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.linspace(1, 2, len(rows))
    weight /= weight.sum()
    found = unheard(model, rows, weight)
    assert not found.tokens
    assert torch.allclose(found.head, heard(model, rows, weight).head, rtol=1e-3, atol=1e-5)
    monkeypatch.setattr(calibrate, "HEAD_ROWS", 3)
    few = unheard(model, rows, torch.full((len(rows),), 1 / len(rows))).head
    assert torch.allclose(few, second_moments(model, rows[:3]).head, rtol=1e-3, atol=1e-5)


def test_what_is_due_adds_up_whatever_a_step_takes() -> None:
    """Shares of steps of four rows, of one, and of some of both."""
    for share in (0.0, 0.875, 1 / 3, 1.0):
        for seen in (range(0, 100, 4), range(25), (0, 2, 6, 7, 8, 12)):
            dealt = np.diff([_due(n, share) for n in seen])
            assert dealt.sum() == int(seen[-1] * share + 1e-9)
            assert np.all(np.abs(dealt - np.diff(seen) * share) < 1)


def test_steps_have_fewer_rows_where_there_is_no_time_for_enough_of_them() -> None:
    """At so many rows a second, a training of 300 s is to have 200 steps of one to four rows."""
    for speed, rows in ((0.1, 1), (0.66, 1), (1.35, 2), (2.0, 3), (2.7, 4), (50.0, 4)):
        assert affordable_batch(1, 4, 200, speed, 300.0) == rows
    assert affordable_batch(3, 4, 200, 0.1, 300.0) == 3


def test_the_more_is_cut_the_more_of_the_time_heals() -> None:
    whole = Training(DistilConfig(60.0, 1e-4), DistilConfig(40.0, 3e-4), 12)
    for gone, healing in ((0.0, 0.0), (0.03, 0.0), (0.3, 45.0), (0.9, 60.0)):
        dealt = whole.dealt(gone)
        assert (dealt.adapt.seconds, dealt.recover.seconds) == pytest.approx((100 - healing, healing))
        assert (dealt.adapt.rate, dealt.recover.rate) == (1e-4, 3e-4)
        assert dealt.lessons == np.ceil(12 * healing / 60)
    for nothing in (UNTRAINED, replace(whole, recover=DistilConfig(0.0))):
        assert nothing.dealt(0.3) == nothing
    assert replace(whole, lessons=0).dealt(0.3).lessons == 0


def test_the_share_that_goes_is_counted_in_weights(model: Any) -> None:
    a = net.anatomy(model)
    whole = LayerPlan(to_mask(range(a.groups[0]), a.groups[0]), to_mask(range(a.ffn[0]), a.ffn[0]))
    half = replace(whole, channels=to_mask(range(a.ffn[0] // 2), a.ffn[0]))
    plan = SimpleNamespace(layers=(half, *[whole] * (a.layers - 1)))
    linears = [p.numel() for n, p in model.named_parameters() if "_proj" in n]
    mlp = sum(p.numel() for n, p in model.named_parameters() if "layers.0.mlp" in n)
    assert share_gone(plan, a) == pytest.approx(mlp / 2 / sum(linears))


def test_moments_and_gradients_skip_what_a_layer_has_lost(model: Any, rows: torch.Tensor) -> None:
    net.shrink_attention_(model, 0, [])
    net.shrink_mlp_(model, 1, torch.tensor([], dtype=torch.long))
    for sites in (second_moments(model, rows).c, heard(model, rows, torch.full((len(rows),), 1 / len(rows))).tokens):
        assert {(0, "attention"), (0, "output"), (1, "mlp"), (1, "down")}.isdisjoint(sites)
        assert {(0, "mlp"), (1, "output"), (2, "down")} <= sites.keys()


@pytest.mark.parametrize("tied", [True, False])
def test_an_untied_embedding_is_only_looked_up(tokenizer: Any, rows: torch.Tensor, tied: bool) -> None:
    moments = second_moments(make_model(len(tokenizer), "llama" if tied else "mistral", tied), rows)
    assert torch.equal(moments.of("lm_head.weight"), moments.head)
    assert torch.equal(moments.of("model.embed_tokens.weight"), moments.head) == tied


def test_grids_that_do_not_fit_are_no_option(model: Any, rows: torch.Tensor) -> None:
    net.shrink_mlp_(model, 1, torch.arange(96))
    reference = likelihood.top_of(model, rows)
    damage = poorer_damage(model, second_moments(model, rows), 0.0, rows, reference, 1, lambda share, note: None)
    assert np.isinf(damage["Q3_K"]).tolist() == [False, True, False]


def test_the_mean_of_a_training_forgets_its_start_and_counts_later_weights_more() -> None:
    at = lambda x: Latents({"w": torch.full((2,), float(x))})  # noqa: E731
    mean = Mean(at(9.0))
    mean.add_(at(1.0))
    assert mean.latents.masters["w"].tolist() == [1.0, 1.0]
    for x in range(2, 101):
        mean.add_(at(x))
    # weights t ** LATER: the mean of t from 1 to n is n (1 + LATER) / (2 + LATER), for many steps
    assert float(mean.latents.masters["w"][0]) == pytest.approx(100 * (1 + LATER) / (2 + LATER), rel=0.01)
    last = at(0.0)
    assert float(mean.moved_(last, 1.0).masters["w"][0]) == 0.0
    assert last.masters["w"].tolist() == [0.0, 0.0]
