"""Laws of the numerics: grids, error feedback, repair, allocation, recovery, schedules."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from gguf.quants import dequantize

from sartor.numerics.allocate import Ladder, allocate
from sartor.numerics.compensate import refit, strength
from sartor.numerics.four import FOUR, nearest_scales, packed, row_steps
from sartor.numerics.gptq import gptq
from sartor.numerics.grids import GRIDS, decode_scales, encode, nearest_index, search_scales, snap, tensor_bytes
from sartor.numerics.metrics import Score, interval
from sartor.numerics.schedule import warm_then_cosine


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def moments(n: int, tokens: int = 400) -> torch.Tensor:
    z = random(tokens, n, seed=7) @ random(n, n, seed=8)
    z[:, 3] *= 40  # massive activation
    return z.T @ z / tokens


@pytest.mark.parametrize("name", GRIDS)
def test_what_the_file_holds_is_what_snap_gives(name: str) -> None:
    w = random(6, 512)
    w[2, :256] = 0
    scales = search_scales(w, None, GRIDS[name])
    data = encode(w, scales, GRIDS[name])
    assert data.nbytes == tensor_bytes(name, (6, 512))
    read = torch.from_numpy(np.array(dequantize(data, GGMLQuantizationType[name])))
    assert torch.equal(read, snap(w, scales, GRIDS[name]))
    assert torch.equal(decode_scales(data, GRIDS[name]), scales)


@pytest.mark.parametrize("name", GRIDS)
def test_snapping_takes_the_nearest_level_and_is_idempotent(name: str) -> None:
    grid = GRIDS[name]
    x = torch.linspace(grid.levels[0] - 1, grid.levels[-1] + 1, 4001)
    levels = torch.tensor(grid.levels, dtype=torch.float32)
    best = (x[:, None] - levels).abs().min(1).values
    assert torch.allclose((x - levels[nearest_index(x, grid).long()]).abs(), best, atol=1e-5)
    w = random(4, 256)
    scales = search_scales(w, None, grid)
    once = snap(w, scales, grid)
    assert torch.equal(snap(once, scales, grid), once)


def test_more_bits_never_hurt() -> None:
    w = random(16, 256)
    errors = [
        float(((snap(w, search_scales(w, None, GRIDS[n]), GRIDS[n]) - w) ** 2).sum())
        for n in ("Q3_K", "IQ4_XS", "IQ4_NL", "Q5_0", "Q8_0")
    ]
    assert errors == sorted(errors, reverse=True)


@pytest.mark.parametrize("name", ["IQ4_NL", "Q3_K"])
def test_error_feedback_beats_rounding_under_its_moments(name: str) -> None:
    grid = GRIDS[name]
    w, c = random(24, grid.weights * 2), moments(grid.weights * 2)
    q = gptq(w, c, grid)
    plain = snap(w, search_scales(w, c.diagonal(), grid), grid)

    def damage(v: torch.Tensor) -> float:
        return float(((v - w) @ c * (v - w)).sum())

    assert damage(snap(q.latent, q.scales, grid)) < 0.8 * damage(plain)


def test_error_feedback_survives_singular_moments() -> None:
    z = random(3, 64)
    q = gptq(random(8, 64), z.T @ z, GRIDS["Q4_0"])
    assert torch.isfinite(q.latent).all()
    assert torch.isfinite(q.scales).all()


def test_what_others_explain_can_go_without_loss() -> None:
    z = random(500, 8)
    gone = z[:, :2] @ random(2, 2, seed=3)
    w, w_gone = random(5, 8), random(5, 2, seed=4)
    wanted = z @ w.T + gone @ w_gone.T
    new = refit(w, wanted.T @ z, z.T @ z, 1e-6)
    assert (wanted - z @ new.T).square().sum() < 1e-4 * (wanted - z @ w.T).square().sum()


def test_repair_on_the_whole_networks_own_stream_is_the_closed_form_of_the_cut() -> None:
    w, c = random(12, 32), moments(32)
    s, r = [i for i in range(32) if i % 4 != 1], [i for i in range(32) if i % 4 == 1]
    for lam in (0.1, 0.3, 1.0):
        damped = c[s][:, s] + lam * torch.diag(c.diagonal()[s])
        expected = w[:, s] + w[:, r] @ torch.linalg.solve(damped, c[s][:, r]).T
        got = refit(w[:, s], w @ c[:, s], c[s][:, s], lam)
        assert torch.allclose(got, expected, atol=1e-4)
        assert lost(w, c, s, got) < lost(w, c, s, w[:, s])
    assert torch.equal(refit(w[:, s], w @ c[:, s], c[s][:, s], float("inf")), w[:, s])


def lost(w: torch.Tensor, c: torch.Tensor, kept: list[int], new: torch.Tensor) -> float:
    change = w.clone()
    change[:, kept] -= new
    return float((change @ c * change).sum())


def test_a_fit_is_as_strong_as_other_text_bears() -> None:
    w, truth = random(6, 12), random(6, 12, seed=1)

    def pair(tokens: int, says: torch.Tensor, noise: float, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        z = random(tokens, 12, seed=seed)
        t = z @ says.T + noise * random(tokens, 6, seed=seed + 1)
        return t.T @ z, z.T @ z

    held = pair(50, truth, 0.0, 9)
    assert strength(w, pair(400, truth, 0.0, 2), held) == 0.1
    assert strength(w, pair(400, -truth, 0.0, 2), held) > 0.1
    assert strength(w, pair(14, w, 3.0, 4), pair(50, w, 0.0, 9)) == float("inf")


def test_allocation_is_the_optimum_on_convex_ladders() -> None:
    rng = np.random.default_rng(0)
    ladders = [
        Ladder(
            f"l{n}",
            (0, *np.cumsum(rng.integers(3, 9, 4)).tolist()),
            (0.0, *np.cumsum(np.sort(rng.random(4)) * 9).tolist()),
        )
        for n in range(3)
    ]
    for need in (5, 20, 35):
        got = allocate(ladders, need)
        assert got.saved >= need
        options = [
            (sum(x.damage[i] for x, i in zip(ladders, steps, strict=True)), steps)
            for steps in itertools.product(range(5), repeat=3)
            if sum(x.saved[i] for x, i in zip(ladders, steps, strict=True)) >= got.saved
        ]
        assert got.damage <= min(options)[0] + 1e-9  # no other way saves as much for less


def test_saving_more_never_costs_less() -> None:
    rng = np.random.default_rng(1)
    ladders = [
        Ladder(f"l{n}", (0, *np.cumsum(rng.integers(1, 9, 6)).tolist()), (0.0, *np.cumsum(rng.random(6)).tolist()))
        for n in range(4)
    ]
    damages = [allocate(ladders, need).damage for need in range(0, 90, 5)]
    assert damages == sorted(damages)


def test_the_rate_rises_to_one_and_falls_to_its_floor() -> None:
    rate = [warm_then_cosine(n / 100, warm=0.1, floor=0.05) for n in range(101)]
    assert rate[:11] == sorted(rate[:11])
    assert rate[10:] == sorted(rate[10:], reverse=True)
    assert 0 < rate[0] < 0.2
    assert rate[10] == 1.0
    assert rate[-1] == pytest.approx(0.05)


def test_the_interval_holds_the_value_and_pairing_narrows_it() -> None:
    rng = np.random.default_rng(0)
    size = rng.integers(100, 900, 60)
    dense = size * rng.uniform(0.5, 1.5, 60)
    a, b = Score(tuple(dense), tuple(size)), Score(tuple(dense * rng.uniform(0.93, 0.97, 60)), tuple(size))
    low, high = interval(a)
    assert low < a.bits_per_byte < high
    low, high = interval(b, a)
    assert -0.06 < low < b.bits_per_byte / a.bits_per_byte - 1 < high < -0.04


def test_the_interval_of_few_documents_is_wide() -> None:
    rng, truth = np.random.default_rng(0), 0.9
    for few in (3, 8, 20):
        held = 0
        for _ in range(200):
            size = rng.integers(100, 900, few)
            dense = size * rng.uniform(0.5, 1.5, few)
            fitted = dense * truth * rng.uniform(0.8, 1.2, few)
            low, high = interval(Score(tuple(fitted), tuple(size)), Score(tuple(dense), tuple(size)))
            held += low <= truth - 1 <= high
        assert held >= 174, few  # of 190 that were promised
    one = Score((10.0,), (20,))
    assert interval(Score((9.0,), (20,)), one) == pytest.approx((-1, 0.8))
    assert interval(one)[0] == 0


def test_four_bits_are_eight_with_one_scale_a_row() -> None:
    w = random(24, 96) * torch.logspace(-6, 0, 24)[:, None]  # rows far smaller than fp16 knows
    w[3] = 0
    scales = nearest_scales(w)
    units, steps = row_steps(scales)
    assert torch.equal(units[:, None] * steps, scales)
    assert steps.abs().max() <= 15
    codes, packed_steps, packed_units = packed(w, scales)
    levels = np.stack([codes & 15, codes >> 4], -1).reshape(24, 3, 32).astype(np.int16) - 8
    numbers = levels * packed_steps
    assert np.abs(numbers).max() <= 127
    held = torch.from_numpy(numbers.reshape(24, 96).astype(np.float32) * packed_units[:, None])
    assert torch.equal(held, snap(w, scales, FOUR))
    assert float((held - w).norm() / w.norm()) < 0.1


def test_error_feedback_on_four_bits_beats_the_nearest() -> None:
    z = random(400, 24) @ random(24, 96) + 0.3 * random(400, 96)
    w, c = random(32, 96), z.T @ z
    q = gptq(w, c, FOUR)
    row_steps(q.scales)  # whole multiples of one number a row, or it raises
    lost = [
        float((((x - w) @ c) * (x - w)).sum())
        for x in (snap(q.latent, q.scales, FOUR), snap(w, nearest_scales(w), FOUR))
    ]
    assert lost[0] < 0.6 * lost[1]


def test_scales_that_are_no_multiples_are_refused() -> None:
    with pytest.raises(ValueError, match="whole multiples"):
        row_steps(torch.tensor([[1.0, 0.333]]))
