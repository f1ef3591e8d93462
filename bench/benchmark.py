"""Sartor beside what a user would pick instead: every contender on the same user, split, tokens, held-out windows and machine.

    pip install -e '.[bench,llamacpp]'
    python bench/benchmark.py MODEL --data DIR [DIR ...] [--generic DIR] [--sizes 25% 18% 15% 12%] [--effort standard] [--only NAME ...] [--out DIR]

Every cell (contender, user, size or type) is kept by the content of all that it depends on: a killed run goes on where it was, a cell that failed
is told, with the reason, and tried again next time. --only restricts what is run ("torchao", "llama.cpp/Q4_0", "sartor*"); everything known of these users,
sizes and effort is shown. Results: tables on stdout, results.json and results.html in --out, progress on stderr.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import cells
import contenders
import scoreboard
import torch
from artifacts import figures
from contenders import Contender
from subject import Subject
from transformers.utils import logging

from sartor.effort import EFFORTS
from sartor.errors import InputError, SartorError
from sartor.memory import cores, hand_back, keep_freed
from sartor.plan import parse_budget
from sartor.sources import resolve

SIZES = ("25%", "18%", "15%", "12%")


def run(
    model: str,
    data: Sequence[Path],
    generic: Path | None,
    sizes: Sequence[str],
    effort: str,
    only: Sequence[str],
    out: Path,
) -> None:
    """All that is asked for; results.json and results.html are brought up to date after every cell.

    Raises:
        SartorError: the model or a user's data cannot be opened, or `only` names nobody.
    """
    if len({folder.name for folder in data}) < len(data):
        raise InputError("two users have the same folder name: rename one, as tables tell them apart by it")
    for size in sizes:
        parse_budget(size, effort)
    asked, source = contenders.chosen(only, sizes), resolve(model)
    about = {
        "model": source.spec,
        "sha256": source.sha256,
        "effort": effort,
        "sizes": list(sizes),
        "cores": cores(),
    }
    found: list[scoreboard.Cell] = []
    for folder in data:
        subject = Subject(model, source, folder, generic, effort)
        for n, (contender, kind) in enumerate(asked):
            print(f"{subject.name}: {contender.name} {kind} ({n + 1} of {len(asked)})", file=sys.stderr, flush=True)
            one_cell(contender, kind, subject)
            shown = [*found, *known_of(subject, sizes)]
            scoreboard.write(shown, about, {c.name: c.what for c in contenders.CONTENDERS.values()}, out)
        found = shown
        del subject
        hand_back()
    print(scoreboard.text(found))


def one_cell(contender: Contender, kind: str, subject: Subject) -> dict[str, Any]:
    """Made and measured, unless an earlier run did."""

    def compute() -> dict[str, Any]:
        started = time.strftime("%Y-%m-%dT%H:%M:%S")
        with tempfile.TemporaryDirectory() as work:
            return figures(contender.make(subject, kind, Path(work)), subject) | {"measured": started}

    found = cells.measured(contenders.depends_on(contender, kind, subject), compute)
    hand_back()
    return found


def known_of(subject: Subject, sizes: Sequence[str]) -> Iterator[scoreboard.Cell]:
    """Every cell of this user that was ever tried, in the order of the table."""
    for contender, kind in contenders.chosen((), sizes):
        found = cells.known(contenders.depends_on(contender, kind, subject))
        if found is not None:
            yield {"contender": contender.name, "kind": kind, "user_name": subject.name} | found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--data", nargs="+", required=True, type=Path, help="one folder a user")
    parser.add_argument("--generic", type=Path)
    parser.add_argument("--sizes", nargs="+", default=list(SIZES), help="of the files, as for sartor compress")
    parser.add_argument("--effort", default="standard", choices=list(EFFORTS))
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="NAME", help="; ".join(contenders.CONTENDERS).replace("%", "%%")
    )
    parser.add_argument("--out", type=Path, default=Path("bench-results"))
    a = parser.parse_args()
    logging.disable_progress_bar()
    keep_freed()  # as the command line does: every training gets as many steps as the product's
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(cores())
    try:
        run(a.model, a.data, a.generic, a.sizes, a.effort, a.only, a.out)
    except SartorError as error:
        sys.exit(f"benchmark: {error}")


if __name__ == "__main__":
    main()
