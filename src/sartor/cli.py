"""The command line: results on stdout, progress on stderr, one-line errors."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shlex
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sartor.arguments import parser
from sartor.errors import OutputError, SartorError
from sartor.memory import keep_freed
from sartor.progress import Progress


def do_export(a: argparse.Namespace) -> None:
    """Write, and compare: language models always, models that see where there are photos."""
    from sartor import picture_api, picture_exports, storage, text_exports
    from sartor.api import export
    from sartor.errors import InputError
    from sartor.export import runtimes
    from sartor.export.text_runtimes import RUNTIMES
    from sartor.report import exports

    if a.labels and not a.data:
        raise InputError(
            "--labels says of which classes the photos in --data are, and there is no --data: add it, or leave --labels out"
        )
    if not a.data and len(a.to) != 1:
        raise InputError("name one runtime with --to; with --data several are compared")
    _no_bars()
    if not picture_api.is_picture_artifact(a.folder):
        storage.refuse_labels(a.folder, a.labels)
        there, others = text_exports.installed()
        if "executorch" in (a.to or there):
            print("ExecuTorch's file takes minutes to lower; leave it out by naming others with --to", file=sys.stderr)
        rows = text_exports.measure_text_exports(a.folder, a.to, a.data, a.out)
        print(text_exports.table(rows))
        spec, said = storage.original_of(a.folder), text_exports.about(rows)
        exports.write(a.out, spec, said, text_exports.HEAD, text_exports.cells(rows), rows)
        print(f"\nwritten: {', '.join(RUNTIMES[name].file for name in a.to or there)} in {a.out}", file=sys.stderr)
        if others and not a.to:
            print(f"left out: {'; '.join(others)}", file=sys.stderr)
    elif a.data:
        rows = picture_exports.measure_exports(a.folder, a.to, a.data, a.out, a.labels)
        said = runtimes.about(rows, held_out=(a.folder / "report.json").exists())
        print(f"{runtimes.table(rows)}\n\n{said}")
        exports.write(a.out, storage.original_of(a.folder), said, runtimes.HEAD, runtimes.cells(rows), rows)
        print(f"written: {len(rows)} rows and their files in {a.out}, as a page in exports.html", file=sys.stderr)
    else:
        print(f"written: {export(a.folder, a.to[0], a.out)}", file=sys.stderr)


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
            a.keep_general,
            a.memory,
        )
    except KeyboardInterrupt:
        progress.end()
        print(f"interrupted; the checkpoint is kept. Go on with:\n  {shlex.join(_resuming(a))}", file=sys.stderr)
        raise SystemExit(130) from None
    finally:
        progress.end()
    report = json.loads((a.out / "report.json").read_text())
    print(_words_for(report).table(report))
    artifact = "model.onnx" if report.get("kind") == "pictures" else "model.gguf"
    print(f"\nwritten: {a.out / artifact}, {a.out / 'report.html'}", file=sys.stderr)


RESUMED = (
    "data",
    "size",
    "effort",
    "controls",
    "method",
    "steps",
    "keep-general",
    "memory",
    "seed",
    "to",
    "generic",
    "labels",
    "faster",
    "out",
)


def _resuming(a: argparse.Namespace) -> list[str]:
    """The command that goes on with an interrupted job."""
    command = ["sartor", "compress", a.model]
    for name in RESUMED:
        value = getattr(a, name.replace("-", "_"))
        command += [] if value is None else [f"--{name}", str(value)]
    return [*command, "--resume"]


def _words_for(report: dict[str, Any]) -> Any:
    """The module that puts this kind of report into words."""
    from sartor.report import pictures, text

    return pictures if report.get("kind") == "pictures" else text


PROBED = {"open": 10.0, "probe": 110.0, "explain": 110.0}  # seconds, as `effort.STAGES`


def do_probe(a: argparse.Namespace) -> None:
    """Probe, print, and draw."""
    from sartor.api import probe
    from sartor.report import probing
    from sartor.storage import claim_folder

    keep_freed()
    _no_bars()
    folder = claim_folder(a.out) if a.out else None
    progress = Progress(PROBED)
    try:
        found = probe(a.model, a.data, a.generic, a.effort, a.seed, progress, a.labels)
    finally:
        progress.end()
    print(json.dumps(found, indent=1) if a.json else probing.text(found))
    if folder:
        (folder / "probe.json").write_text(json.dumps(found, indent=1))
        (folder / "probe.html").write_text(probing.page(found))
        print(f"\nwritten: {folder / 'probe.html'}, {folder / 'probe.json'}", file=sys.stderr)


def do_run(a: argparse.Namespace) -> None:
    """Generate with the artifact, or say what is on a photo."""
    from sartor.errors import InputError
    from sartor.export.text_runtimes import RUNTIMES, run_job, runtime_of
    from sartor.picture_api import sees
    from sartor.text_exports import ARTIFACT

    if sees(a.folder):
        return _run_on_photo(a)
    files = [a.folder / row.file for row in RUNTIMES.values()] if a.folder.is_dir() else [a.folder]
    file = next((f for f in files if f.exists()), None)
    runtime = runtime_of(file) if file else None
    if file is None or runtime is None:
        raise InputError(f"no {ARTIFACT} in '{a.folder.name}': make one with sartor compress ... --out {a.folder}")
    asked = {"tokens": a.tokens, "temperature": a.temperature, "top_p": a.top_p, "seed": a.seed}
    if not a.prompt:
        raise InputError("the prompt is empty: give the beginning of a text")
    result = run_job(runtime, file, "generate", prompt=a.prompt, **asked)
    print(a.prompt + result["text"])


def _run_on_photo(a: argparse.Namespace) -> None:
    from sartor.picture_api import classify
    from sartor.report.overlay import overlay

    found, pixels, relevance = classify(a.folder, Path(a.prompt))
    for name, p in found[:3]:
        print(f"{p:6.1%}  {name}")
    if relevance is None:
        print(
            "not drawn what decided: name the folder that sartor compress wrote for that, not an export",
            file=sys.stderr,
        )
        return
    why = a.why or Path(f"{Path(a.prompt).stem}-why.png")
    if why.exists():
        print(f"not drawn: '{why.name}' is there already, name another with --why", file=sys.stderr)
        return
    try:
        overlay(pixels, relevance).save(why)
    except (OSError, ValueError) as error:
        raise OutputError(
            f"cannot draw to '{why}' ({type(error).__name__}): name a .png in a folder that is there, with --why"
        ) from error
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
    from sartor.storage import report_of

    report = report_of(a.folder)
    if not (a.folder / "plan.json").exists():
        raise InputError(f"'{a.folder.name}' is not a Sartor artifact: plan.json is missing")
    plan = Plan.from_json((a.folder / "plan.json").read_text())
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


COMMANDS: dict[str, Callable[[argparse.Namespace], None]] = {
    "compress": do_compress,
    "probe": do_probe,
    "run": do_run,
    "eval": do_eval,
    "inspect": do_inspect,
    "export": do_export,
    "doctor": do_doctor,
    "fetch-generic": do_fetch_generic,
}


def main(argv: list[str] | None = None) -> int:
    """Entry point: 0 on success, 2 with one line on stderr for every mistake a user can make."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TQDM_DISABLE", "1")  # before transformers loads it
    arguments = parser(COMMANDS).parse_args(argv)
    do: Callable[[argparse.Namespace], None] = arguments.do
    with contextlib.suppress(ValueError):  # not the main thread
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # kill, or a batch system's end, is as Ctrl-C
    try:
        _quiet()
        do(arguments)
    except SartorError as error:
        print(f"sartor: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        named = f" '{error.filename}'" if error.filename else ""
        print(
            f"sartor: the system refuses{named} ({error.strerror or type(error).__name__}): make room or give leave there, or choose another place ($SARTOR_CACHE, --out, TMPDIR)",
            file=sys.stderr,
        )
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
