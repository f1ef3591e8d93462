"""Every runtime that a network that sees can be written for, as a table, and what each makes of the same pictures.

A row of ROWS is a runtime and a kind of weights: how such files are written, several of one runtime at a time, as they share the slow part; and how one is run, in a process of its own.
Pixels are whole numbers from 0 to 255 (1, 3, s, s) in every file; Core ML's is an RGB image. Each gives features, and logits where there is a head.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int, UInt8
from torch import Tensor

from sartor.errors import InputError, MissingExtra, SartorError
from sartor.export import coreml, litert, lowering, onnx_file, onnxrt, seen
from sartor.export import executorch as et
from sartor.export.apart import answered
from sartor.model.graph import Graph
from sartor.model.network import clone
from sartor.numerics.metrics import cosines

THREADS, ROUNDS = 2, 30
LIMIT_S = 1800.0  # of running a file
BATCH = 16
ONNX = "pip install onnx==1.23.2 onnxruntime==1.32.0"
READERS = {  # what running alone takes
    "executorch": (("executorch", "torchao"), et.NAME, et.INSTALL),
    "litert": (("ai_edge_litert",), litert.NAME, "pip install ai-edge-litert==2.3.0"),
    "coreml": (coreml.NEEDS, "coremltools", coreml.INSTALL),
}
Written = dict[str, dict[str, Any]]  # weights -> {"seconds"} or {"failed"}


@dataclass(frozen=True)
class Row:
    """A runtime and a kind of weights.

    Attributes:
        runtime: its name. ending: of the file. weights: as `write` knows them. needs, install: packages that it takes, and the pip command.
        write: ({weights: file}, network) -> {weights: seconds or why it failed}.
        run: (file, pictures, threads, rounds) -> {"outputs": {name: array}, "seconds" a picture, "peak_rss_bytes"}; the last two are None where the runtime itself does not run here, or with no rounds need not be known.
        note: what a reader of the measurement must know. maps: convolutional networks can be written too.
    """

    runtime: str
    ending: str
    weights: str
    needs: tuple[str, ...]
    install: str
    write: Callable[[Mapping[str, Path], Any], Written]
    run: Callable[[Path, UInt8[np.ndarray, "n 3 s s"], int, int], dict[str, Any]]
    note: str
    maps: bool = True


def _write_onnx(files: Mapping[str, Path], model: Any) -> Written:
    found: Written = {}
    for weights, file in files.items():
        started = time.perf_counter()
        seen.write(file, model, weights)
        found[weights] = {"seconds": time.perf_counter() - started}
    return found


def _run_onnx(file: Path, pixels: np.ndarray, threads: int, rounds: int) -> dict[str, Any]:
    outputs = onnxrt.run_job("outputs", {"file": file}, pixels, batch=1, threads=threads)["outputs"]
    seconds = onnxrt.speeds({"file": file}, pixels, threads, rounds)["file"]["seconds"] if rounds else None
    peak = onnxrt.peak(file, pixels, threads) if rounds else None
    return {"outputs": outputs, "seconds": seconds, "peak_rss_bytes": peak}


def run_job(runtime: str, do: str, file: Path, **job: Any) -> dict[str, Any]:
    """Run one job of `edge_worker` and return its result.

    Args:
        runtime: "executorch", "litert" or "coreml". job: `pixels` (an array), `threads` and `rounds` for "run"; nothing for "constants".

    Raises:
        MissingExtra: the runtime is not installed. SartorError: it failed or took more than LIMIT_S; its last words are in the message.
    """
    needs, name, install = READERS[runtime]
    if lowering.missing(needs):
        raise MissingExtra(f"{name} is not installed: {install}")
    command = [sys.executable, str(Path(__file__).with_name("edge_worker.py"))]
    with tempfile.TemporaryDirectory() as folder:
        spec = {"do": do, "runtime": runtime, "file": str(file), "out": f"{folder}/out.npz"} | job
        if "pixels" in job:
            np.save(f"{folder}/pixels.npy", job["pixels"])
            spec["pixels"] = f"{folder}/pixels.npy"
        late = f"{file.name} ran for more than {LIMIT_S:.0f} s and was ended: take fewer pictures"
        result = answered(command, spec, f"{name} failed on {file.name}", LIMIT_S, late)
        with np.load(spec["out"]) as found:
            return result | {"outputs": dict(found)}


def _run(runtime: str, file: Path, pixels: np.ndarray, threads: int, rounds: int) -> dict[str, Any]:
    return run_job(runtime, "run", file, pixels=pixels, threads=threads, rounds=rounds)


def _read_coreml(file: Path, pixels: np.ndarray, threads: int, rounds: int) -> dict[str, Any]:
    found = run_job("coreml", "run", file, pixels=pixels, threads=threads, rounds=0)
    return found | {"seconds": None, "peak_rss_bytes": None}


MAC = "runs on Apple's systems alone: its program and weights, read back, were computed in PyTorch"
TORCH_TOO = "memory with torch, which its Python side needs"
ROWS: dict[str, Row] = {
    **{
        f"onnx-{w}": Row(
            "ONNX Runtime",
            ".onnx",
            w,
            ("onnx", "onnxruntime"),
            ONNX,
            _write_onnx,
            _run_onnx,
            "",
            w in seen.GRAPH_WEIGHTS,
        )
        for w in onnx_file.WEIGHTS
    },
    **{
        f"executorch-{w}": Row(
            et.NAME, ".pte", w, et.NEEDS, et.INSTALL, et.write, partial(_run, "executorch"), TORCH_TOO
        )
        for w in et.WEIGHTS
    },
    **{
        f"litert-{w}": Row(
            litert.NAME,
            ".tflite",
            w,
            litert.NEEDS,
            litert.INSTALL,
            litert.write,
            partial(_run, "litert"),
            "",
            w != "int4",
        )
        for w in litert.WEIGHTS
    },
    **{
        f"coreml-{w}": Row(
            coreml.NAME, ".mlpackage", w, coreml.NEEDS, coreml.INSTALL, coreml.write, _read_coreml, MAC, w != "int4"
        )
        for w in coreml.WEIGHTS
    },
}


READS: dict[str, Row] = {row.ending: row for row in ROWS.values()}  # a runtime reads all of its kinds of weights


def write(name: str, path: Path, model: Any) -> float:
    """Write the network for one row of ROWS; returns the seconds that it took.

    Raises:
        InputError: there is no such row. MissingExtra: its packages are not installed; the message has the pip command. SartorError: it could not be lowered.
    """
    row = row_for(name, model)
    if lowering.missing(row.needs):
        raise MissingExtra(f"{row.runtime} is not installed: {row.install}")
    made = row.write({row.weights: path}, model)[row.weights]
    if "failed" in made:
        raise SartorError(f"{row.runtime}, {row.weights}: {made['failed']}")
    return float(made["seconds"])


def row_of(name: str) -> Row:
    """Raises InputError where there is no such row."""
    if name not in ROWS:
        raise InputError(f"there is no runtime '{name}': take one of {', '.join(ROWS)}")
    return ROWS[name]


def row_for(name: str, model: Any) -> Row:
    """Raises InputError where there is no such row, or not for this kind of network."""
    row = row_of(name)
    if isinstance(model, Graph) and not row.maps:
        able = ", ".join(n for n, r in ROWS.items() if r.maps)
        raise InputError(
            f"'{name}' is for vision transformers, and this is a convolutional network: take one of {able}"
        )
    return row


def size(path: Path) -> int:
    """Bytes of a file, or of all files of a package."""
    return sum(f.stat().st_size for f in path.rglob("*") if f.is_file()) if path.is_dir() else path.stat().st_size


@torch.inference_mode()
def reference(model: Any, pixels: UInt8[Tensor, "n 3 s s"]) -> dict[str, np.ndarray]:
    """What PyTorch says in fp32."""
    network: Any = clone(model, torch.float32).eval()
    features = torch.cat([network.features(part) for part in pixels.split(BATCH)])
    found = {"features": features} | ({} if network.head is None else {"logits": network.head(features)})
    return {name: value.numpy() for name, value in found.items()}


def alike(found: Mapping[str, np.ndarray], wanted: Mapping[str, np.ndarray]) -> dict[str, float | None]:
    """The worst cosine of features, and the share of pictures with the same answer (None without a head)."""
    cosine = cosines(found["features"], wanted["features"])
    same = (found["logits"].argmax(1) == wanted["logits"].argmax(1)).mean() if "logits" in wanted else None
    return {"cosine": float(cosine.min()), "same_answers": None if same is None else float(same)}


EMPTY = dict.fromkeys(
    ("bytes", "cosine", "same_answers", "accuracy", "pictures", "seconds", "peak_rss_bytes", "lowering_seconds")
)


def measure_all(
    model: Any,
    folder: Path,
    pixels: UInt8[Tensor, "n 3 s s"],
    only: Sequence[str] | None = None,
    rounds: int = ROUNDS,
    labels: Int[Tensor, " n"] | None = None,
) -> list[dict[str, Any]]:
    """Write the network for every row of ROWS into `folder` as NAME.ENDING, reopen each file in its own runtime and compare it with PyTorch in fp32 on these pictures.

    Args:
        only: names of ROWS, or None for all. rounds: pictures that are timed. labels: of the pictures, as their owner named them.

    Returns:
        For each row "runtime", "weights", "bytes", "cosine" (of features, the worst picture's), "same_answers" (share), "accuracy" (share named as labelled), "pictures", "seconds" (a picture, the median, two threads),
        "peak_rss_bytes" (of the process that runs it), "lowering_seconds" (the runtime's shared part counted in each) and "note"; what is not known is None and the note says why.

    Raises:
        InputError: `only` names a row that there is not.
    """
    wanted, rows = reference(model, pixels), []
    if labels is not None:
        wanted["labels"] = labels.numpy()
    able = [name for name, row in ROWS.items() if row.maps or not isinstance(model, Graph)]
    named = {name: row_for(name, model) for name in only or able}
    folder.mkdir(parents=True, exist_ok=True)
    for _, group in groupby(named.items(), lambda item: item[1].runtime):
        files = {row.weights: (row, folder / f"{name}{row.ending}") for name, row in group}
        made = _write_some(
            {weights: file for weights, (_, file) in files.items()}, next(iter(files.values()))[0], model
        )
        for weights, (row, file) in files.items():
            rows.append(_measure(row, file, made[weights], pixels.numpy(), wanted, rounds))
    return rows


def _write_some(files: dict[str, Path], row: Row, model: Any) -> Written:
    """All files of one runtime; what goes wrong with all is said of each."""
    if lowering.missing(row.needs):
        return dict.fromkeys(files, {"failed": f"not installed: {row.install}"})
    try:
        return row.write(files, model)
    except SartorError as error:
        return dict.fromkeys(files, {"failed": str(error)})


def _measure(
    row: Row, file: Path, made: dict[str, Any], pixels: np.ndarray, wanted: dict[str, np.ndarray], rounds: int
) -> dict[str, Any]:
    found: dict[str, Any] = {"runtime": row.runtime, "weights": row.weights} | EMPTY
    if "failed" in made:
        return found | {"note": made["failed"]}
    found |= {"bytes": size(file), "lowering_seconds": made["seconds"]}
    try:
        result = row.run(file, pixels, THREADS, rounds)
    except SartorError as error:
        return found | {"note": str(error)}
    found |= alike(result["outputs"], wanted) | {"pictures": len(pixels)}
    if "labels" in wanted:
        found["accuracy"] = float((result["outputs"]["logits"].argmax(1) == wanted["labels"]).mean())
    return found | {"seconds": result["seconds"], "peak_rss_bytes": result["peak_rss_bytes"], "note": row.note}


def _cells(row: dict[str, Any]) -> list[str]:
    def cell(key: str, write: Callable[[float], str]) -> str:
        return "-" if row[key] is None else write(row[key])

    return [
        row["runtime"],
        row["weights"],
        cell("bytes", lambda x: f"{x / 1e6:.1f}"),
        cell("cosine", lambda x: f"{x:.5f}"),
        cell("same_answers", lambda x: f"{x:.1%}"),
        cell("accuracy", lambda x: f"{x:.1%}"),
        cell("seconds", lambda x: f"{1e3 * x:.1f}"),
        cell("peak_rss_bytes", lambda x: f"{x / 1e6:.0f}"),
        cell("lowering_seconds", lambda x: f"{x:.0f}"),
        row["note"],
    ]


HEAD = ("runtime", "weights", "MB", "cosine", "same answers", "named right", "ms a picture", "peak MB", "lowering s", "note")  # fmt: skip


def cells(rows: Sequence[dict[str, Any]]) -> list[list[str]]:
    """What `measure_all` found, in words, under HEAD."""
    return [_cells(row) for row in rows]


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The same as aligned text."""
    return aligned([HEAD, *cells(rows)], 2)


def about(rows: Sequence[dict[str, Any]], held_out: bool) -> str:
    """What the figures are of. held_out: the pictures shaped nothing of the model."""
    many = max((r["pictures"] or 0 for r in rows), default=0)
    held = ", held out when the model was fitted" if held_out else ""
    return f"Cosine (the worst picture's) and same answers are to PyTorch in fp32, on {many} of your pictures{held}; times are medians with {THREADS} threads."


def aligned(body: Sequence[Sequence[str]], left: int) -> str:
    """Rows under a head; the first `left` columns stand to the left, and so does the last, which may be of any length."""
    widths = [max(len(cells[i]) for cells in body) for i in range(len(body[0]) - 1)]
    lines = []
    for cells in body:
        named = enumerate(zip(cells, widths, strict=False))
        placed = [cell.ljust(w) if i < left else cell.rjust(w) for i, (cell, w) in named]
        lines.append("  ".join([*placed, cells[-1]]).rstrip())
    return "\n".join([lines[0], "-" * (sum(widths) + 2 * len(widths) + 6), *lines[1:]])
