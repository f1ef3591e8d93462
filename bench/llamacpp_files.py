"""Every file that llama.cpp's quantizer makes of a model with an importance matrix from the user's text, on held-out text.

    python bench/llamacpp_files.py MODEL --data DIR [--generic DIR] [--fitted DIR] [--kinds Q2_K IQ4_XS ...]

Prints bytes and bits per byte (user, generic) beside the original's, on the test windows of `--effort standard`; with
--fitted also Sartor's artifact against each file, paired by document.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from sartor import evaluate
from sartor.api import ARTIFACT
from sartor.effort import EFFORTS
from sartor.export.llama_quantizer import FTYPES
from sartor.job import Job, Prepared
from sartor.report.text import against
from sartor.stages.calibrate import second_moments
from sartor.stages.tokens import sample, training_rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--data", required=True)
    parser.add_argument("--generic")
    parser.add_argument("--fitted", type=Path)
    parser.add_argument("--kinds", nargs="*", default=list(FTYPES))
    a = parser.parse_args()
    p = Prepared(Job(a.model, a.data, "25%", generic=a.generic), lambda *_: None)
    windows = evaluate.held_out(p.user.test, p.generic.test, EFFORTS["standard"].test_bytes)
    reference = evaluate.dense_reference(p.source)
    dense = evaluate.in_runtime(reference.f16, windows, reference.tokenizer)
    print(line("F16", evaluate.control("F16", reference.f16.stat().st_size, *dense)))
    ours = None
    if a.fitted:
        file = a.fitted / ARTIFACT
        scores = evaluate.in_runtime(file, windows, AutoTokenizer.from_pretrained(a.fitted))
        ours = scores[0]
        print(line("Sartor", evaluate.control("Sartor", file.stat().st_size, *scores)))
    rows = sample(training_rows(p.texts.train, p.tokenizer), 32, 0)
    moments = second_moments(p.release().to(torch.bfloat16), rows)
    for kind in a.kinds:
        arms = evaluate.quantizer_controls(
            reference.f16, moments, windows, reference.tokenizer, ours, lambda *_: None, [kind]
        )
        print(line(kind, arms[0]), flush=True)


def line(kind: str, row: dict[str, Any]) -> str:
    """A control arm in one line."""
    return f"{kind:8s} {row['bytes'] / 1e6:6.1f} MB  user {row['user']:.4f}  {against(row)}"


if __name__ == "__main__":
    main()
