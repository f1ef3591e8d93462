"""Every file that llama.cpp's quantizer makes of a model with an importance matrix from the user's text, on held-out text.

    python bench/llamacpp_files.py MODEL --data DIR [--generic DIR] [--kinds Q2_K IQ4_XS ...]

Prints bytes and bits per byte (user, generic) beside the original's, on the test windows of `--effort standard`.
"""

from __future__ import annotations

import argparse

import torch

from sartor import evaluate
from sartor.export.llama_quantizer import FTYPES
from sartor.job import Job, Prepared
from sartor.pipeline import EFFORTS
from sartor.stages.calibrate import second_moments
from sartor.stages.tokens import sample, training_rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--data", required=True)
    parser.add_argument("--generic")
    parser.add_argument("--kinds", nargs="*", default=list(FTYPES))
    a = parser.parse_args()
    p = Prepared(Job(a.model, a.data, "25%", generic=a.generic), lambda *_: None)
    windows = evaluate.held_out(p.user.test, p.generic.test, EFFORTS["standard"].test_bytes)
    reference = evaluate.dense_reference(p.source)
    user, generic = evaluate.in_runtime(reference.f16, windows, reference.tokenizer)
    print(
        f"{'F16':10s} {reference.f16.stat().st_size / 1e6:7.1f} MB  user {user.bits_per_byte:.4f}  generic {generic.bits_per_byte:.4f}"
    )
    rows = sample(training_rows(p.texts.train, p.tokenizer), 32, 0)
    moments = second_moments(p.release().to(torch.bfloat16), rows)
    for kind in a.kinds:
        row = evaluate.quantizer_controls(
            reference.f16, moments, windows, reference.tokenizer, lambda *_: None, [kind]
        )[0]
        print(
            f"{kind:10s} {row['bytes'] / 1e6:7.1f} MB  user {row['user']:.4f}  generic {row['generic']:.4f}", flush=True
        )


if __name__ == "__main__":
    main()
