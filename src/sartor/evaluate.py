"""Measuring artifacts in their own runtime, user and generic side by side, and the control arms."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from sartor.errors import OutputError
from sartor.export import gguf_file, llama_quantizer, llamacpp
from sartor.files import whole_file, whole_folder
from sartor.model.network import anatomy, load_dense
from sartor.model.tokenizers import load_tokenizer
from sartor.numerics.grids import GRIDS, search_scales, tensor_bytes
from sartor.numerics.metrics import Score, interval
from sartor.paging import each, kept
from sartor.sources import FORMAT, Source, cache_dir
from sartor.stages.bits import kinds_of
from sartor.stages.calibrate import Moments
from sartor.stages.measure import score, token_nats
from sartor.stages.tokens import Window, cut_windows, encode_windows

CONTROL_KINDS = ("Q2_K", "Q4_0", "Q4_K_M")  # 88, 92 and 105 MB for SmolLM2-135M
TURNS = 3  # of the artifact and the original when they are timed


@dataclass(frozen=True)
class HeldOut:
    """Test windows as text: the user's and the generic reference's. Nothing was decided or trained on them."""

    user: list[list[tuple[int, str]]]
    generic: list[list[tuple[int, str]]]


def held_out(user: Sequence[str], generic: Sequence[str], max_bytes: int) -> HeldOut:
    return HeldOut(cut_windows(user, max_bytes), cut_windows(generic, max_bytes // 3))


@dataclass(frozen=True)
class Dense:
    """The original in its runtime: F16 (quality is measured on it), Q8_0 (speed), and its tokenizer."""

    f16: Path
    q8_0: Path
    tokenizer: Any


def dense_reference(source: Source, loaded: tuple[Any, Any] | None = None) -> Dense:
    """The original as GGUF files in the cache, written once per model.

    Args:
        loaded: the original's model and tokenizer where they are in memory anyway.
    """
    found = cached_dense(source.sha256)
    if found is None:
        _write_reference(source, *(loaded or load_dense(source.folder)))
        found = cached_dense(source.sha256)
    if found is None:
        raise OutputError(f"the cache '{_dense_folder(source.sha256)}' cannot be read back: delete it and try again")
    return found


def _write_reference(source: Source, model: Any, tokenizer: Any) -> None:
    folder = _dense_folder(source.sha256)
    folder.mkdir(parents=True, exist_ok=True)
    for kind in ("F16", "Q8_0"):
        write_plain(folder / f"{kind}.gguf", model, tokenizer, kind)
    with whole_folder(folder / "tokenizer") as part:
        tokenizer.save_pretrained(part)


def cached_dense(sha256: str) -> Dense | None:
    """What an earlier job left of this original, if anything."""
    folder = _dense_folder(sha256)
    if not (folder / "tokenizer").exists():
        return None
    return Dense(folder / "F16.gguf", folder / "Q8_0.gguf", load_tokenizer(folder / "tokenizer"))


def _dense_folder(sha256: str) -> Path:
    return cache_dir() / "dense" / f"{sha256[:16]}-{FORMAT}"


def write_plain(path: Path, model: Any, tokenizer: Any, kind: str) -> None:
    """A GGUF file with every matrix in F16, or rounded to one grid; whole or not there."""
    values = {n: p.detach() for n, p in model.named_parameters()}
    grids = {} if kind == "F16" else {n: kind for n, p in values.items() if p.ndim == 2}
    scales = {
        n: kept(search_scales(w.float(), None, GRIDS[kind]))
        for n, w in zip(grids, each(values[n] for n in grids), strict=True)
    }
    with whole_file(path) as part:
        gguf_file.write(part, model, tokenizer, values, scales, grids, "dense")


def in_runtime(file: Path, windows: HeldOut, tokenizer: Any) -> tuple[Score, Score]:
    """(user, generic) coding length of the test windows in llama.cpp."""
    return tuple(llamacpp.score(file, encode_windows(w, tokenizer)) for w in (windows.user, windows.generic))  # type: ignore[return-value]


def figures(name: str, score: Score, dense: Score) -> dict[str, Any]:
    """One side of the report: bits per byte of artifact and dense, with intervals."""
    change = interval(score, dense)
    return {
        "metric": "bits per byte",
        "dense": dense.bits_per_byte,
        "artifact": score.bits_per_byte,
        "ci95": list(interval(score)),
        "dense_ci95": list(interval(dense)),
        "change": score.bits_per_byte / dense.bits_per_byte - 1,
        "change_ci95": list(change),
        "documents": len(score.size),
        "bytes": int(sum(score.size)),
        "of": name,
    }


def check_parity(file: Path, model: Any, windows: Sequence[Window]) -> dict[str, Any]:
    """Parity of the file with a PyTorch model (fp32, the artifact's exact weights), on some of the test windows.

    Raises:
        ParityError: beyond the stated tolerance.
    """
    some = list(windows)[:: max(1, len(windows) // 12)]
    return asdict(llamacpp.parity(token_nats(model, some), llamacpp.nats(file, some)))


def same_tokens(file: Path, windows: HeldOut, tokenizer: Any) -> float:
    """Share of the user's test texts that llama.cpp cuts into the very tokens that the model was trained on."""
    texts = [text for window in windows.user for _, text in window]
    theirs = llamacpp.run_job(file, "tokenize", texts=texts)["ids"]
    ours = tokenizer.backend_tokenizer.encode_batch(texts, add_special_tokens=False)
    return sum(a.ids == b for a, b in zip(ours, theirs, strict=True)) / max(1, len(texts))


def in_turns(runs: Mapping[str, Callable[[], Mapping[str, float]]]) -> dict[str, float]:
    """What each of them measures, its prefix before every name: the best of TURNS, in turns so that a machine that slows down slows all."""
    best: dict[str, float] = {}
    for _ in range(TURNS):
        for prefix, run in runs.items():
            for k, v in run().items():
                best[prefix + k] = max(best.get(prefix + k, 0.0), v)
    return best


def speeds(artifact: Path, dense: Path, ids: Sequence[int]) -> dict[str, float]:
    """Speed of both, same threads, and peak memory."""
    return in_turns({"": partial(llamacpp.speed, artifact, ids), "dense_": partial(llamacpp.speed, dense, ids)})


def prompt_ids(windows: HeldOut, tokenizer: Any, n: int = 256) -> list[int]:
    """Tokens of held-out text to time a prompt with (they never leave the process)."""
    ids = [i for w in encode_windows(windows.generic[:8], tokenizer) for i in w.ids]
    return (ids * (n // max(1, len(ids)) + 1))[:n]


def control(
    name: str, size: int, user: Score, generic: Score, ours: Score | None = None, note: str = ""
) -> dict[str, Any]:
    """A control arm's row; `change` is our model against it on the user's text (below zero: ours is better), paired by document."""
    return {
        "name": name,
        "bytes": size,
        "user": user.bits_per_byte,
        "generic": generic.bits_per_byte,
        "change": ours.bits_per_byte / user.bits_per_byte - 1 if ours else None,
        "change_ci95": list(interval(ours, user)) if ours else None,
        "note": note,
    }


def not_measured(name: str, way_out: str) -> dict[str, Any]:
    """The row of a control arm that is missing, and how to get it."""
    return dict.fromkeys(("bytes", "user", "generic", "change", "change_ci95")) | {
        "name": name,
        "note": f"not measured: {way_out}",
    }


def quantizer_controls(
    source_gguf: Path,
    moments: Moments,
    windows: HeldOut,
    tokenizer: Any,
    ours: Score | None,
    tell: Any,
    kinds: Sequence[str] = CONTROL_KINDS,
) -> list[dict[str, Any]]:
    """llama.cpp's own files with an importance matrix from the user's text, or one row that says why not.

    Args:
        ours: coding length of the user's test text under the artifact, to compare with.
    """
    if not llama_quantizer.available():
        return [not_measured("llama.cpp quantizer with importance matrix", llama_quantizer.PIP)]
    matrix = llama_quantizer.importance(moments)
    rows = []
    for n, kind in enumerate(kinds):
        tell("controls", 0.8 + 0.2 * n / len(kinds), f"llama.cpp {kind} with importance matrix")
        with tempfile.TemporaryDirectory() as tmp:
            file = Path(tmp) / "control.gguf"
            size = llama_quantizer.quantize(source_gguf, file, kind, matrix)
            scores = in_runtime(file, windows, tokenizer)
        rows.append(control(f"llama.cpp {kind}, importance matrix from the user's text", size, *scores, ours))
    return rows


def torch_scores(model: Any, windows: HeldOut, tokenizer: Any) -> tuple[Score, Score]:
    """(user, generic) in PyTorch, for arms that are compared with each other before recovery."""
    user, generic = (score(model, encode_windows(w, tokenizer)) for w in (windows.user, windows.generic))
    return user, generic


def layer_bytes(model: Any, grids: dict[str, str]) -> dict[str, int]:
    """Where every byte of the weights went: embedding, and each kind of linear, and norms."""
    out: dict[str, int] = {}
    kind_of = {n: k for k, names in kinds_of(model).items() for n in names}
    for name, p in model.named_parameters():
        kind = kind_of.get(name, "norms and biases" if p.ndim == 1 else "vocabulary")
        size = 4 * p.numel() if p.ndim == 1 else tensor_bytes(grids.get(name, "F16"), (p.shape[0], p.shape[1]))
        out[kind] = out.get(kind, 0) + size
    return out


def original_fp16_bytes(model: Any) -> int:
    """Two bytes a parameter: the size that shares are counted against."""
    return 2 * anatomy(model).parameters()
