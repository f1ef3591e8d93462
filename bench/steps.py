"""One cut or many: step buffering beside one shot and steps of equal size, on the network as it came.

    python bench/steps.py MODEL --data DIR [--generic DIR] [--removed 0.4] [--steps 3] [--train 0] [--seed 0]

Every arm removes the same parameters of attention and FFN, senses with the same rows, heals every step with the same rows, and is fitted once more with all of them at the end. With `--train` so many rows of
recovery (as in `cuts.py`) are spent: two fifths in the steps, the rest at the end, as in a job; all of them at the end where there is one step. Bits per byte of 48 KB of held-out test text, in PyTorch. Results: a table on stdout, every step on stderr.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import replace
from typing import Any

from cuts import TEST_BYTES, by_effects, chosen, lesson_of, plan_of
from ground_truth import opened

from sartor.memory import keep_freed
from sartor.model.network import anatomy, linears_of
from sartor.model.precision import running
from sartor.stages.buffer import IN_STEPS, buffered
from sartor.stages.distil import distil_
from sartor.stages.fit import evidence_of, fit
from sartor.stages.likelihood import kl_of, top_of
from sartor.stages.masters import Latents, put_
from sartor.stages.measure import score
from sartor.stages.probe import Effects, blended, effects_of
from sartor.stages.sensitivity import feel
from sartor.stages.tokens import cut_windows, encode_windows, sample, training_rows

RHO = 0.3


def weights_of(model: Any) -> int:
    """Of attention and FFN."""
    return sum(module.weight.numel() for _, _, module in linears_of(model))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--data", required=True)
    parser.add_argument("--generic")
    parser.add_argument("--removed", type=float, default=0.4)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--train", type=int, default=0, help="rows of recovery")
    parser.add_argument("--seed", type=int, default=0)
    a = parser.parse_args()
    keep_freed()
    p, whole = opened(a.model, a.data, a.generic)
    test = encode_windows(cut_windows(p.user.test, TEST_BYTES), p.tokenizer)
    rows = [training_rows(t, p.tokenizer) for t in (p.texts.train, p.texts.generic_train)]
    held = sample(training_rows(p.texts.validation, p.tokenizer), 8, 0)
    reference = top_of(whole, held)
    evidence = evidence_of(whole, sample(rows[0], 64, a.seed), sample(rows[1], 32, a.seed), RHO)
    lesson = lesson_of(p, whole, a.train, a.seed) if a.train else None

    def sense(network: Any) -> Effects:
        half = running(network)
        return blended(
            *(
                effects_of(anatomy(half), feel(half, sample(r, many, a.seed)))
                for r, many in zip(rows, (64, 32), strict=True)
            ),
            RHO,
        )

    def healed(network: Any, share: float, seed: int) -> Any:
        latents: Latents = fit(network, whole, evidence, {})
        if lesson and share > 0:
            config = replace(lesson.config.part(share), checks=1)
            distil_(running(network), latents, None, lesson.said, lesson.validation, config, seed)
        put_(network, latents)
        return network

    def damage(network: Any) -> float:
        return kl_of(running(network), held, reference)

    shape = anatomy(p.model)
    plan = plan_of(shape, chosen(shape, by_effects(sense(p.model)), a.removed), a.seed)
    dense, weights = score(whole, test).bits_per_byte, weights_of(whole)
    print(f"dense {dense:.3f} bits per byte; {a.removed:.0%} removed, {a.train} rows of recovery", flush=True)
    for name, steps, by_entropy in (
        ("one shot", 1, True),
        (f"{a.steps} steps of equal allowance", a.steps, True),
        (f"{a.steps} steps of equal size", a.steps, False),
    ):
        in_steps = IN_STEPS if steps > 1 else 0.0
        started, left = time.monotonic(), list(range(steps))
        small, _, done = buffered(
            p.model, plan, sense,
            lambda net, left=left, part=in_steps / steps: healed(net, part if left else 0.0, 1 + left.pop() if left else 0),
            damage, steps, by_entropy, lambda share, note: print("  " + note, file=sys.stderr, flush=True),
        )  # fmt: skip
        small = healed(small, 1 - in_steps, a.seed)
        got = score(running(small), test).bits_per_byte
        back = sum(not s.kept for s in done)
        print(
            f"{name:30s} {got:.4f} ({got / dense - 1:+.1%}); {weights - weights_of(small):,} weights gone; foretold {sum(s.allowed for s in done if s.kept):.3f}, real {sum(s.real for s in done if s.kept):.3f} nats "
            f"a token; {sum(s.kept for s in done)} steps kept, {back} taken back; {time.monotonic() - started:.0f} s",
            flush=True,
        )


if __name__ == "__main__":
    main()
