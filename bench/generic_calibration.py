"""The same bytes with generic calibration, against an artifact that is there already.

    python bench/generic_calibration.py MODEL --data DIR --size 25% --fitted DIR [--generic DIR] [--effort standard]

Plans, cuts, quantizes and trains once more with generic text in the user's place (as `--controls full` does) and prints both files
on the user's and on generic held-out text, with the interval of the gain, paired by document.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from transformers import AutoTokenizer

from sartor import evaluate
from sartor.api import ARTIFACT
from sartor.controls import trained_arm
from sartor.effort import EFFORTS
from sartor.job import Job, Prepared
from sartor.memory import keep_freed
from sartor.report.text import against


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--data", required=True)
    parser.add_argument("--size", required=True)
    parser.add_argument("--fitted", type=Path, required=True)
    parser.add_argument("--generic")
    parser.add_argument("--effort", default="standard", choices=list(EFFORTS))
    a = parser.parse_args()
    keep_freed()  # as the command line does: the arm gets as many steps as the artifact did
    job = Job(a.model, a.data, a.size, effort=a.effort, generic=a.generic)
    p = Prepared(job, lambda *_: None)
    windows = evaluate.held_out(p.user.test, p.generic.test, EFFORTS[a.effort].test_bytes)
    file = a.fitted / ARTIFACT
    ours = evaluate.in_runtime(file, windows, AutoTokenizer.from_pretrained(a.fitted))
    told = lambda stage, share, note: print(f"{100 * share:3.0f}% {note}", file=sys.stderr, flush=True)  # noqa: E731
    for row in (
        evaluate.control("fitted", file.stat().st_size, *ours),
        *trained_arm(p, job, ours[0], windows, told),
    ):
        print(f"{row['name']:34s} {row['bytes'] / 1e6:6.1f} MB  user {row['user']:.4f}  {against(row)}")


if __name__ == "__main__":
    main()
