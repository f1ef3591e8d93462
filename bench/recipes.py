"""What a training should end with: its last weights, the mean of them all, or those half-way, by peak rate and length.

    python bench/recipes.py MODEL --data DIR [DIR ...] [--generic DIR] [--rates 1e-4 2e-4] [--steps 100 400]

The whole original learns each user's rows by cross entropy, as `sartor compress` adapts a network, but for a number of steps instead of a time, so that machines agree. Bits per byte of
96 KB of held-out *test* text; nothing is chosen by them, so nothing of Sartor's may be either: choose on validation. A step of 1,024 tokens takes two to six seconds on two cores. Results: a line each on stdout.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from ground_truth import opened

from sartor.effort import effort_of
from sartor.memory import keep_freed
from sartor.model.precision import running
from sartor.numerics.schedule import warm_then_cosine
from sartor.stages.likelihood import hidden_of, loss_of
from sartor.stages.masters import Adam, InMemory, Latents, Rows, put_, update_
from sartor.stages.measure import score
from sartor.stages.tokens import Window, cut_windows, encode_windows, training_rows
from sartor.stages.watch import BETWEEN, Watch

BATCH = 4  # rows a step


def learn(model: Any, rows: torch.Tensor, windows: list[Window], rate: float, steps: int) -> list[tuple[str, float]]:
    """What held-out text costs under the last weights, their mean, and in between.

    Args: model: fp32; left alone.
    """
    latents = Latents({n: p.detach().clone() for n, p in model.named_parameters()})
    student = running(model)
    watch = Watch(student, latents, lambda network: score(network, windows).bits_per_byte, InMemory())
    named = {n: p.requires_grad_(True) for n, p in student.named_parameters()}
    optimizers = {n: Adam(latents.masters[n], rate) for n in named}
    dealt = Rows(len(rows), 0)
    for step in range(steps):
        part = rows[dealt.deal(BATCH)]
        loss_of(student, hidden_of(student, part), part).backward()
        update_(named, optimizers, rate * warm_then_cosine(step / steps))
        put_(student, latents)
        watch.stepped()
    watch.end_(0.0)
    names = ("last", *(f"{share:.0%} of the way from the mean" for share in BETWEEN))
    return list(zip(names, (bpb for _, bpb in watch.curve[1:]), strict=False))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--data", nargs="+", required=True)
    parser.add_argument("--generic")
    parser.add_argument("--rates", nargs="+", type=float, default=[1e-4, 2e-4])
    parser.add_argument("--steps", nargs="+", type=int, default=[100, 400])
    a = parser.parse_args()
    keep_freed()
    for data in a.data:
        p, _ = opened(a.model, data, a.generic)
        rows = training_rows([*p.texts.train, *p.texts.probe], p.tokenizer)
        windows = encode_windows(cut_windows(p.user.test, effort_of("standard").test_bytes), p.tokenizer)
        print(f"{Path(data).name}: original {score(p.model, windows).bits_per_byte:.4f}", flush=True)
        for rate in a.rates:
            for steps in a.steps:
                found = learn(p.model, rows, windows, rate, steps)
                print(f"  {rate:g} x {steps}: " + ", ".join(f"{name} {bpb:.4f}" for name, bpb in found), flush=True)


if __name__ == "__main__":
    main()
