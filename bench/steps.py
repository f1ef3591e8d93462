"""One cut or many: step buffering beside one shot and steps of equal size, on the network as it came.

    python bench/steps.py MODEL --data DIR [--generic DIR] [--removed 0.4] [--steps 3] [--seconds 0]

Every arm removes the same parameters of attention and FFN, senses with the same rows, heals every step with the same rows (and `--seconds` of distillation towards the
network as it came, in all), and is fitted once more with all of them at the end. Bits per byte of 48 KB of held-out test text, in PyTorch. Results: a table on stdout, every step on stderr.
"""

from __future__ import annotations

import argparse
import sys
import time
from typing import Any

from cuts import TEST_BYTES, by_effects, chosen, plan_of
from ground_truth import opened

from sartor.memory import keep_freed
from sartor.model.network import anatomy
from sartor.model.precision import running, running_dtype
from sartor.stages.buffer import buffered
from sartor.stages.distil import DistilConfig, anchor, distil_, joined
from sartor.stages.fit import evidence_of, fit
from sartor.stages.likelihood import kl_of, top_of
from sartor.stages.masters import Latents, put_
from sartor.stages.measure import score
from sartor.stages.probe import Effects, effects_of
from sartor.stages.sensitivity import feel
from sartor.stages.tokens import cut_windows, encode_windows, sample, training_rows

RHO = 0.3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--data", required=True)
    parser.add_argument("--generic")
    parser.add_argument("--removed", type=float, default=0.4)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=0.0)
    a = parser.parse_args()
    keep_freed()
    p, whole = opened(a.model, a.data, a.generic)
    test = encode_windows(cut_windows(p.user.test, TEST_BYTES), p.tokenizer)
    validation = encode_windows(cut_windows(p.texts.validation, TEST_BYTES // 2), p.tokenizer)
    rows = [training_rows(t, p.tokenizer) for t in (p.texts.train, p.texts.generic_train)]
    held = sample(training_rows(p.texts.validation, p.tokenizer), 8, 0)
    reference = top_of(whole, held)
    evidence = evidence_of(whole, sample(rows[0], 64, 0), sample(rows[1], 32, 0), RHO)
    said = joined(anchor(whole, sample(rows[0], 192, 1)), anchor(whole, sample(rows[1], 32, 1))) if a.seconds else None

    def sense(network: Any) -> Effects:
        half = running(network)
        return effects_of(anatomy(half), feel(half, sample(rows[0], 64, 0)))

    def healed(network: Any, seconds: float) -> Any:
        latents: Latents = fit(network, whole, evidence, {})
        if said is not None and seconds > 0:
            distil_(running(network), latents, None, said, validation, DistilConfig(seconds, 2e-4, checks=1))
        put_(network, latents)
        return network

    def damage(network: Any) -> float:
        return kl_of(running(network), held, reference)

    shape = anatomy(p.model)
    plan = plan_of(shape, chosen(shape, by_effects(sense(p.model)), a.removed), 0)
    dense = score(whole, test).bits_per_byte
    print(f"dense {dense:.3f} bits per byte; {a.removed:.0%} removed, {a.seconds:.0f} s of distillation", flush=True)
    for name, steps, by_entropy in (
        ("one shot", 1, True),
        (f"{a.steps} steps of equal allowance", a.steps, True),
        (f"{a.steps} steps of equal size", a.steps, False),
    ):
        started, left = time.monotonic(), [a.seconds / steps] * steps
        small, _, done = buffered(
            p.model, plan, sense, lambda net, left=left: healed(net, left.pop() if left else 0.0), damage, steps, by_entropy,
            lambda share, note: print("  " + note, file=sys.stderr, flush=True),
        )  # fmt: skip
        put_(small, fit(small, whole, evidence, {}))
        got = score(small.to(running_dtype()), test).bits_per_byte
        back = sum(not s.kept for s in done)
        print(
            f"{name:30s} {got:.4f} ({got / dense - 1:+.1%}); foretold {sum(s.allowed for s in done if s.kept):.3f}, real {sum(s.real for s in done if s.kept):.3f} nats "
            f"a token; {back} steps taken back; {time.monotonic() - started:.0f} s",
            flush=True,
        )


if __name__ == "__main__":
    main()
