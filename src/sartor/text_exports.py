"""A fitted language model written for a runtime, reopened there, and compared with PyTorch and with the GGUF file."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sartor import storage
from sartor.data.readers import read_folder
from sartor.data.split import split
from sartor.errors import InputError, MissingExtra
from sartor.export import executorch_text, gguf_file, llamacpp, onnx_text
from sartor.export.runtimes import aligned
from sartor.export.text_runtimes import RUNTIMES, absent, run_job
from sartor.files import whole_file
from sartor.model.vocabulary import separator
from sartor.stages.masters import Latents
from sartor.stages.measure import score_of
from sartor.stages.tokens import Window, cut_windows, encode_windows

ARTIFACT = "model.gguf"
TEST_BYTES = 24_000  # of held-out text whose bits are counted
COMPARED = 6  # windows whose logits are compared
WRITTEN = 96  # tokens that the artifact writes to be compared on, where no text is given
SEEDS = range(4)  # of each such text
PROMPT, GENERATE, TURNS = 256, 64, 3  # tokens that are timed, and how often, the runtimes in turns


def write_gguf(folder: Path, model: Any, tokenizer: Any, latents: Latents) -> Path:
    """The artifact's GGUF file."""
    with whole_file(folder / ARTIFACT) as part:
        gguf_file.write_latents(part, model, tokenizer, latents, "sartor")
    return folder / ARTIFACT


Writer = Callable[[Path, Any, Any, Latents], Path]
WRITERS: dict[str, Writer] = {"gguf": write_gguf, "onnx": onnx_text.write, "executorch": executorch_text.write}
ROUNDED = {"executorch": executorch_text.dequantized}  # files that hold other weights: the network -> one with theirs


def installed() -> tuple[list[str], list[str]]:
    """(what a model can be written as here, and what is said of the others)."""
    said = {name: absent(name) for name in WRITERS}
    return [name for name in said if said[name] is None], list(dict.fromkeys(filter(None, said.values())))


def _checked(folder: Path, names: Sequence[str]) -> None:
    for name in names:
        if name not in WRITERS:
            *others, last = WRITERS
            raise InputError(
                f"'{folder.name}' reads texts: it can be written as {', '.join(others)} or {last}, not as {name}"
            )
        if said := absent(name):
            raise MissingExtra(said)


def export_text(folder: Path, to: str, out: Path) -> Path:
    """Write a saved artifact for a runtime, with its exact weights where it has the grids for them.

    Raises:
        InputError: there is no such runtime for language models. SourceError: not an artifact. MissingExtra: the runtime is not installed.
    """
    _checked(folder, [to])
    model, tokenizer, plan = storage.load(folder)
    return WRITERS[to](storage.claim_folder(out), model, tokenizer, storage.latents_of(folder, plan))


@dataclass(frozen=True)
class Ground:
    """What the runtimes are compared on. compared: windows whose logits PyTorch says, too. own: the same, {runtime: with the weights of its file}. held_out: windows of the user's test text, or none."""

    compared: list[Window]
    wanted: list[Tensor]
    own: dict[str, list[Tensor]]
    held_out: list[Window]


def measure_text_exports(folder: Path, names: Sequence[str], data: Path | None, out: Path) -> list[dict[str, Any]]:
    """Write a saved artifact for these runtimes (none: for all that are installed), reopen each file in its own, and measure it beside llama.cpp on the GGUF file.

    Args:
        data: the user's texts, split as they were when the model was made (same seed); None: what is compared is text that the artifact writes.
    Returns:
        For each runtime, llama.cpp first: "runtime", "bytes", "bits_per_byte" (None without data), "largest" and "mean" difference of its logits from PyTorch's with the artifact's exact weights,
        "same_top1" (share), "tokens" compared, "prompt_tokens_per_s", "generate_tokens_per_s" (the best of TURNS, in turns), "peak_rss_bytes".
    Raises:
        InputError: no such runtime, not an artifact, or no texts. ParityError: a file does not say what PyTorch says. MissingExtra: a runtime is not installed.
    """
    names = list(names or installed()[0])
    _checked(folder, names)
    model, tokenizer, plan = storage.load(folder)
    if not (folder / ARTIFACT).exists():
        raise InputError(f"'{folder.name}' holds no {ARTIFACT} to compare with: its job did not come to an end")
    held = _held_out(folder, data, tokenizer) if data else []
    storage.claim_folder(out)
    files, latents = {"gguf": folder / ARTIFACT}, storage.latents_of(folder, plan)
    for name in names:
        files[name] = WRITERS[name](out, model, tokenizer, latents)
    compared = held[:: -(-len(held) // COMPARED)] if held else _written_by(folder / ARTIFACT, tokenizer)
    own = {n: _all_logits(ROUNDED[n](model), compared) for n in names if n in ROUNDED}
    ground = Ground(compared, _all_logits(model, compared), own, held)
    del model, latents
    rows = {name: _measured(name, file, ground) for name, file in files.items()}
    _time_(rows, files, ground)
    return list(rows.values())


def _held_out(folder: Path, data: Path, tokenizer: Any) -> list[Window]:
    report = (
        storage.report_of(folder) if (folder / "report.json").exists() else None
    )  # none where it was saved from Python
    found = split(read_folder(data), report["seed"] if report else 0)
    if report:
        storage.refuse_other_texts(report, found)
    windows = encode_windows(cut_windows(found.test, TEST_BYTES), tokenizer)
    if not windows:
        raise InputError("there is no held-out text in --data: give the folder that the model was fitted to")
    return windows


def _written_by(file: Path, tokenizer: Any) -> list[Window]:
    """Texts that the artifact writes itself."""
    first = separator(tokenizer)
    asked: dict[str, Any] = {"prompt": "", "before": first, "tokens": WRITTEN, "temperature": 1.0, "top_p": 0.95}
    written = [run_job("gguf", file, "generate", seed=seed, **asked)["ids"] for seed in SEEDS]
    return [Window(tuple(ids), ()) for ids in written if len(ids) > 1] or [Window((first, first), ())]


@torch.inference_mode()
def _all_logits(model: Any, windows: Sequence[Window]) -> list[Tensor]:
    return [model(input_ids=torch.tensor([w.ids]), use_cache=False).logits[0] for w in windows]


def _nats(logits: Tensor, window: Window) -> Tensor:
    """-log p of tokens 1, 2, ..."""
    return -torch.log_softmax(logits[:-1].double(), -1).gather(1, torch.tensor(window.ids[1:])[:, None])[:, 0]


def _measured(runtime: str, file: Path, ground: Ground) -> dict[str, Any]:
    """A row without its times."""
    with tempfile.TemporaryDirectory() as tmp:
        run_job(runtime, file, "logits", windows=[list(w.ids) for w in ground.compared], out=f"{tmp}/logits.npz")
        with np.load(f"{tmp}/logits.npz") as arrays:
            said = [torch.from_numpy(arrays[f"arr_{n}"]) for n in range(len(ground.compared))]
    ours = ground.own.get(runtime, ground.wanted)
    ours, theirs = ([_nats(x, w) for x, w in zip(xs, ground.compared, strict=True)] for xs in (ours, said))
    llamacpp.parity(ours, theirs, RUNTIMES[runtime].name)
    found, wanted = torch.cat(said), torch.cat(ground.wanted)
    off = (found - wanted).abs()
    row: dict[str, Any] = {
        "runtime": RUNTIMES[runtime].name,
        "bytes": file.stat().st_size,
        "bits_per_byte": None,
        "largest": float(off.max()),
        "mean": float(off.mean()),
        "same_top1": float((found.argmax(1) == wanted.argmax(1)).double().mean()),
        "tokens": len(found),
    }
    if ground.held_out:
        nats = run_job(runtime, file, "score", windows=[list(w.ids) for w in ground.held_out])["nats"]
        row["bits_per_byte"] = score_of(ground.held_out, [torch.tensor(n) for n in nats]).bits_per_byte
    return row


def _time_(rows: dict[str, dict[str, Any]], files: dict[str, Path], ground: Ground) -> None:
    """Add speed and memory to the rows: in turns, so that a machine that slows down slows all; the best turn of each."""
    ids = [i for w in ground.compared for i in w.ids]
    prompt = (ids * (PROMPT // len(ids) + 1))[:PROMPT]
    for _ in range(TURNS):
        for name, file in files.items():
            found = run_job(name, file, "speed", ids=prompt, generate=GENERATE, repeats=1)
            for key in ("prompt_tokens_per_s", "generate_tokens_per_s", "peak_rss_bytes"):
                rows[name][key] = max(rows[name].get(key, 0), found[key])


HEAD = ("runtime", "MB", "bits per byte", "logits off", "at most", "same top-1", "prompt t/s", "tokens/s", "peak MB", "")  # fmt: skip


def cells(rows: Sequence[dict[str, Any]]) -> list[list[str]]:
    """What `measure_text_exports` found, in words, under HEAD."""
    body = []
    for row in rows:
        bits = "-" if row["bits_per_byte"] is None else f"{row['bits_per_byte']:.4f}"
        speed = [f"{row[k]:.0f}" for k in ("prompt_tokens_per_s", "generate_tokens_per_s")]
        known = [row["runtime"], f"{row['bytes'] / 1e6:.1f}", bits, f"{row['mean']:.3f}", f"{row['largest']:.2f}"]
        body.append([*known, f"{row['same_top1']:.1%}", *speed, f"{row['peak_rss_bytes'] / 1e6:.0f}", ""])
    return body


def about(rows: Sequence[dict[str, Any]]) -> str:
    """What the figures are of."""
    said = f"Differences are from PyTorch's logits with the artifact's exact weights, on {rows[0]['tokens']} tokens."
    if any(row["runtime"] == executorch_text.NAME for row in rows):
        said += " ExecuTorch's file holds rounded ones, with which it was compared with PyTorch, too; its memory is with torch, which its Python side needs."
    return said


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The same as aligned text."""
    return f"{aligned([HEAD, *cells(rows)], 1)}\n\n{about(rows)}"
