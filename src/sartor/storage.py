"""A compressed model on disk: safetensors, JSON and a tokenizer; nothing that can run code.

FOLDER/model.safetensors   grid tensors as the very bytes of the GGUF blocks (uint8), free ones as fp32
FOLDER/plan.json           the decision
FOLDER/config.json         transformers' config of the original, with the trimmed vocabulary
FOLDER/tokenizer.json ...  the trimmed tokenizer
FOLDER/provenance.json     where the model came from, by sha256
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sartor import paging
from sartor.data.split import Corpus
from sartor.errors import InputError, OutputError, SourceError
from sartor.files import whole_file, write_whole
from sartor.model.network import empty_like, rebuild_rotary_
from sartor.model.tokenizers import load_tokenizer
from sartor.numerics.four import NAMED
from sartor.numerics.grids import GRIDS, decode_scales, encode, tensor_bytes
from sartor.paging import copied, kept
from sartor.plan import Plan
from sartor.probing import Enough, Recall, always
from sartor.stages.masters import Latents
from sartor.tensors import Entry, metadata_of, read_tensors, write_tensors

CHECKPOINT = "checkpoint"  # the folder of an unfinished job within the artifact's, and its files
OURS = {"job.json", "plan.json", "view.json", "adapt.safetensors", "steps.safetensors", "recover.safetensors"}


def claim_folder(folder: Path, resume: bool = False) -> Path:
    """Make the output folder, or refuse one that holds something else.

    Raises:
        OutputError: the folder is not empty, or cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        half = _asked(folder / CHECKPOINT) is not None
        if any(folder.iterdir()) and not (resume and half):
            way = "add --resume to go on, or choose another --out" if half else "choose another --out or empty it"
            what = "holds no unfinished job to resume" if resume else "is not empty"
            raise OutputError(f"the folder '{folder.name}' {what} and Sartor overwrites nothing: {way}")
        probe = folder / ".write-test"
        probe.write_bytes(b"x")
        probe.unlink()
    except (OSError, FileExistsError) as error:
        raise OutputError(f"cannot write to '{folder}' ({type(error).__name__}): choose another --out") from error
    return folder


@contextlib.contextmanager
def claimed(folder: Path | None, resume: bool) -> Iterator[Path | None]:
    """`claim_folder` for a job, and the folder removed again where an error leaves nothing in it; None is nowhere."""
    claim = claim_folder(folder, resume) if folder else None
    try:
        yield claim
    except BaseException:
        if claim:
            give_up(claim)
        raise


def give_up(folder: Path) -> None:
    """Remove an output folder in which nothing was made."""
    with contextlib.suppress(OSError):  # something lies in it
        folder.rmdir()


def report_of(folder: Path) -> dict[str, Any]:
    """The report of an artifact.

    Raises:
        InputError: there is none, or it is damaged.
    """
    file = folder / "report.json"
    if not file.exists():
        raise InputError(
            f"'{folder.name}' is not a Sartor artifact, or its job did not come to an end: {file.name} is missing"
        )
    try:
        return dict(json.loads(file.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise InputError(
            f"'{folder.name}/{file.name}' is damaged ({type(error).__name__}): fit the model again"
        ) from error


def original_of(folder: Path) -> str:
    """What the report of an artifact calls its model; "a model" where there is no report, as of one that was saved from Python."""
    return str(report_of(folder)["model"]["spec"]) if (folder / "report.json").exists() else "a model"


def refuse_labels(folder: Path, labels: Path | None) -> None:
    """Raises InputError where labels of photos are given for a model that sees none."""
    if labels:
        raise InputError(f"--labels is for models that see, and '{folder.name}' holds none: leave it out")


def refuse_other_texts(report: dict[str, Any], found: Corpus) -> None:
    """Raises InputError where these are not the texts that the artifact of this report was fitted to: what was held out would be mixed with what it learnt."""
    told = report["data"]
    same = told["sha256"] == found.fingerprint() if "sha256" in told else told["documents"] == found.counts()
    if not same:
        raise InputError(
            "the texts are not those this artifact was fitted to, or are split differently: what was held out would be mixed with what it learnt; give the same folder as it was then"
        )


def remembered(folder: Path, model_sha256: str) -> Recall:
    """A memory for measurements of one model: JSON files in `folder`, found again by the content of the rows.

    A file holds numbers about the model's parts and hashes, no text; one made on public text ("profile") can be given to the next user of the model.
    """

    def recall(
        what: str, rows: Tensor, seed: int, compute: Callable[[], dict[str, Any]], enough: Enough = always
    ) -> dict[str, Any]:
        about = {
            "format": f"sartor-{what}-3",
            "model_sha256": model_sha256,
            "rows_sha256": hashlib.sha256(rows.numpy().tobytes()).hexdigest(),
            "seed": seed,
        }
        name = hashlib.sha256(json.dumps(about).encode()).hexdigest()[:24]
        file = folder / f"{what}-{name}.json"
        if file.exists():
            try:
                kept = json.loads(file.read_text())
                if all(kept.get(k) == v for k, v in about.items()) and enough(kept["measured"]):
                    return dict(kept["measured"])
            except (ValueError, KeyError, TypeError):
                pass  # half-written or damaged: measured again
        measured = compute()
        folder.mkdir(parents=True, exist_ok=True)
        with whole_file(file) as part:
            part.write_text(json.dumps(about | {"measured": measured}))
        return measured

    return recall


def save_weights(path: Path, latents: Latents) -> None:
    """The artifact's exact weights."""

    def entry(name: str, master: Tensor) -> Entry:
        grid = latents.grids.get(name)
        if grid is None:
            return Entry.of(master.float())

        def encoded() -> Tensor:
            made = torch.from_numpy(encode(master, latents.scales[name], grid))
            paging.let_go(master)
            return made

        return Entry(torch.uint8, (len(master), tensor_bytes(grid.name, (1, master.shape[1]))), encoded)

    with whole_file(path) as part:
        write_tensors(part, {n: entry(n, m) for n, m in latents.masters.items()}, {"format": "sartor-1"})


def save(model: Any, tokenizer: Any, latents: Latents, plan: Plan, provenance: dict[str, str], folder: Path) -> None:
    """Write everything that `load` needs."""
    save_weights(folder / "model.safetensors", latents)
    write_whole(folder / "plan.json", plan.to_json())
    write_whole(folder / "provenance.json", json.dumps(provenance, indent=1))
    model.config.to_json_file(folder / "config.json")
    tokenizer.save_pretrained(folder)


def load(folder: Path) -> tuple[Any, Any, Plan]:
    """(model in fp32, tokenizer, plan) from a folder that `save` wrote.

    Raises:
        SourceError: something is missing or does not fit together.
    """
    from transformers import AutoConfig

    needed = [
        n for n in ("plan.json", "model.safetensors", "config.json", "tokenizer.json") if not (folder / n).exists()
    ]
    if needed:
        raise SourceError(f"'{folder.name}' is not a Sartor artifact: {', '.join(needed)} missing")
    plan = Plan.from_json((folder / "plan.json").read_text())
    try:
        config, full = (AutoConfig.from_pretrained(folder, trust_remote_code=False) for _ in range(2))
        tokenizer = load_tokenizer(folder)
        state = {n: kept(_decoded(t, plan.grids.get(n))) for n, t in read_tensors(folder / "model.safetensors")}
    except Exception as error:
        raise SourceError(
            f"'{folder.name}' is damaged ({type(error).__name__}: {str(error)[:80]}): fit the model again"
        ) from error
    config.vocab_size = state["model.embed_tokens.weight"].shape[0]
    full.vocab_size = config.vocab_size
    model = empty_like(full, [len(p.kept_groups()) for p in plan.layers], [len(p.kept_channels()) for p in plan.layers])
    missing, unexpected = model.load_state_dict(state, strict=False, assign=True)
    if full.tie_word_embeddings:
        model.tie_weights()
        missing = [n for n in missing if n != "lm_head.weight"]
    if missing or unexpected:
        raise SourceError(
            f"'{folder.name}' does not fit its plan: {len(missing)} tensors missing, {len(unexpected)} unknown"
        )
    rebuild_rotary_(model)
    model.eval().requires_grad_(False)
    paging.layer_by_layer_(model.model.layers)
    return model, tokenizer, plan


def _decoded(raw: Tensor, grid: str | None) -> Tensor:
    """Weights from what the file has of them: the bytes of blocks, or numbers as they are."""
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize

    return torch.from_numpy(np.array(dequantize(raw.numpy(), GGMLQuantizationType[grid]))) if grid in GRIDS else raw


def latents_of(folder: Path, plan: Plan) -> Latents:
    """The artifact's weights as latents on their grids: encoding them again gives the same bytes."""
    latents = Latents({})
    for name, tensor in read_tensors(folder / "model.safetensors"):
        grid = plan.grids.get(name)
        latents.masters[name] = _decoded(tensor, grid)
        if grid in GRIDS:
            latents.scales[name] = decode_scales(tensor.numpy(), GRIDS[grid])
            latents.grids[name] = GRIDS[grid]
    return latents


def _asked(checkpoint: Path) -> dict[str, Any] | None:
    """What the unfinished job asked for whose checkpoint this is; None where it is none of ours."""
    try:
        found = json.loads((checkpoint / "job.json").read_text())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) and {"model", "data", "size"} <= found.keys() else None


class Checkpoint:
    """An unfinished job on disk, in a folder of its own within the artifact's: what was asked, the plan, the latest weights. Cleared when the job ends.

    Attributes:
        resumed: an earlier process began it.
    """

    def __init__(self, artifact: Path, job: dict[str, Any]) -> None:
        self.folder = artifact / CHECKPOINT
        self.folder.mkdir(exist_ok=True)
        job = json.loads(json.dumps(job))
        self.resumed = _asked(self.folder) is not None
        if (_asked(self.folder) or job) != job:
            raise OutputError(
                "the unfinished job in this folder had other options or other data: repeat its very command with --resume, or choose another --out"
            )
        write_whole(self.folder / "job.json", json.dumps(job))

    def plan(self) -> Plan | None:
        file = self.folder / "plan.json"
        return Plan.from_json(file.read_text()) if file.exists() else None

    def save_plan(self, plan: Plan) -> None:
        write_whole(self.folder / "plan.json", plan.to_json())

    def of(self, stage: str) -> WeightsFile:
        """Where the weights of this training are kept."""
        return WeightsFile(self.folder / f"{stage}.safetensors", self.plan())

    def clear(self) -> None:
        """Remove what is ours."""
        for file in self.folder.iterdir():
            if file.name in OURS:
                file.unlink()
        give_up(self.folder)


def told_of(point: Checkpoint | None) -> list[str]:
    """What a report must say of a job that was interrupted."""
    told = "the job was interrupted and resumed: times and courses of training are of its last part alone"
    return [told] if point and point.resumed else []


def planned(point: Checkpoint | None, seconds: dict[str, float], decide: Callable[[], Plan]) -> Plan:
    """The checkpoint's plan, else the one that is decided now and kept there, with the seconds it took.

    Raises:
        BudgetError, InputError: what `decide` raises; there is nothing to resume then, and no folder is left that the next try would trip over.
    """
    if point and (saved := point.plan()):
        return saved
    started = time.monotonic()
    try:
        plan = decide()
    except InputError:
        if point:
            point.clear()
        raise
    seconds["plan"] = time.monotonic() - started
    if point:
        point.save_plan(plan)
    return plan


SCALES = "scales:"  # in front of a parameter's name: those of its blocks, where it lies on a grid


def with_scales(weights: Mapping[str, Tensor], scales: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Both as one set of named tensors, for a file."""
    return dict(weights) | {f"{SCALES}{n}": t.contiguous() for n, t in scales.items()}


def without_scales(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(weights, scales) of what `with_scales` made."""
    scales = {n.removeprefix(SCALES): t for n, t in tensors.items() if n.startswith(SCALES)}
    return {n: t for n, t in tensors.items() if not n.startswith(SCALES)}, scales


class WeightsFile:
    """The latest weights of a training (`masters.Kept`), on the grids of the plan."""

    def __init__(self, file: Path, plan: Plan | None) -> None:
        self.file, self.grids = file, plan.grids if plan else {}

    def save(self, latents: Latents, seconds: float, state: Mapping[str, Any] | None = None) -> None:
        """Masters, scales, how long they have been trained, and what else was reached; the old file stays until the new one is whole."""

        def halved(name: str, master: Tensor) -> Entry:
            dtype = latents.halved_dtype(name)

            def make() -> Tensor:
                half = master.to(dtype)
                paging.let_go(master)
                return half

            return Entry(dtype, tuple(master.shape), make)

        entries = {n: halved(n, m) for n, m in latents.masters.items()}
        entries |= {n: Entry.of(t) for n, t in with_scales({}, latents.scales).items()}
        with whole_file(self.file) as part:
            write_tensors(part, entries, {"seconds": str(seconds), "state": json.dumps(dict(state or {}))})

    def state(self) -> dict[str, Any]:
        """What was told with the last weights."""
        return dict(json.loads(metadata_of(self.file)["state"])) if self.file.exists() else {}

    def load(self) -> tuple[Latents, float] | None:
        """What was saved last."""
        if not self.file.exists():
            return None
        seconds = float(metadata_of(self.file)["seconds"])
        masters, scales = without_scales({n: copied(t, torch.float32) for n, t in read_tensors(self.file)})
        return Latents(masters, scales, {n: NAMED[self.grids[n]] for n in scales}), seconds
