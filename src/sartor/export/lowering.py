"""Lowering a network for a phone's runtime, in a process of its own: a job as JSON on stdin, its result as JSON on stdout.

    network -> program (torch.export) -> [prepare: once] -> [WEIGHTS: once a kind of weights] -> files, moved to their places once they are whole

The packages that lower take 3 to 11 s to load, disturb each other and may end the process they are in. What stands in brackets is in a runtime's own file.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sartor.errors import InputError, MissingExtra
from sartor.export.apart import answered
from sartor.export.worker import answer
from sartor.model.graph import Graph
from sartor.model.network import clone
from sartor.stages.eight import unrounded

LIMIT_S = 3600.0  # a ViT-S takes one to four minutes
FACTS = "facts.json"


class Outputs(nn.Module):
    """Logits, where there is a head, and features, of one pass."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network

    def forward(self, pixels: Tensor) -> tuple[Float[Tensor, "n c"], ...]:
        features = self.network.features(pixels)
        return (features,) if self.network.head is None else (self.network.head(features), features)


def program(model: Any, pixels: torch.dtype) -> torch.export.ExportedProgram:
    """The network in fp32 for one picture (1, 3, s, s), pixels from 0 to 255 of this type."""
    plain = clone(model, torch.float32)
    return exported(Outputs(unrounded(plain) if isinstance(plain, Graph) else plain), model.size, pixels)


def exported(network: nn.Module, size: int, pixels: torch.dtype) -> torch.export.ExportedProgram:
    """The program of whatever reads one picture of this side."""
    network = network.eval().requires_grad_(False)
    return nameless(torch.export.export(network, (torch.zeros(1, 3, size, size, dtype=pixels),)))


def nameless(made: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """The same program without the folders of this machine that its nodes name."""
    for node in made.graph.nodes:
        node.meta.pop("stack_trace", None)
    return made


def missing(needs: Sequence[str]) -> bool:
    return any(importlib.util.find_spec(name) is None for name in needs)


def lower(runtime: str, files: Mapping[str, Path], model: Any, limit_s: float = LIMIT_S) -> dict[str, dict[str, Any]]:
    """`lower_program` of a network that sees; the runtime's file says PIXELS, too."""
    return lower_program(runtime, files, lambda of: program(model, of.PIXELS), {}, limit_s)


def lower_program(
    runtime: str,
    files: Mapping[str, Path],
    make: Callable[[Any], torch.export.ExportedProgram],
    facts: Mapping[str, Any],
    limit_s: float = LIMIT_S,
) -> dict[str, dict[str, Any]]:
    """Write a file for each kind of weights: {weights: {"seconds": of this kind, what they share counted in} or {"failed": why}}.

    Args:
        runtime: a file of this folder with NEEDS, INSTALL, `prepare` and WEIGHTS. make: that file -> the program. facts: what `prepare` reads about it, in FACTS of its folder.
        limit_s: seconds until the process is ended.

    Raises:
        MissingExtra: the runtime is not installed. InputError: it has no such weights. SartorError: the process failed; its last words are in the message.
    """
    of: Any = importlib.import_module(f"sartor.export.{runtime}")
    if missing(of.NEEDS):
        raise MissingExtra(f"{of.NAME} is not installed: {of.INSTALL}")
    if unknown := [w for w in files if w not in of.WEIGHTS]:
        raise InputError(f"there are no '{unknown[0]}' weights for {of.NAME}: take one of {', '.join(of.WEIGHTS)}")
    with tempfile.TemporaryDirectory(dir=next(iter(files.values())).parent, prefix=".lowering-") as folder:
        torch.export.save(make(of), f"{folder}/program.pt2")
        (Path(folder) / FACTS).write_text(json.dumps(dict(facts)))
        parts = {weights: f"{folder}/{weights}-{file.name}" for weights, file in files.items()}
        made = _apart(of.NAME, {"runtime": runtime, "folder": folder, "files": parts}, limit_s)
        for weights, file in files.items():
            if "failed" not in made[weights]:
                _move(Path(parts[weights]), file)
    return made


def _apart(name: str, job: dict[str, Any], limit_s: float) -> dict[str, dict[str, Any]]:
    """The job in a process of its own; -P: a folder that the user stands in holds no modules of ours."""
    command = [sys.executable, "-P", "-m", "sartor.export.lowering"]
    ours = os.pathsep.join([str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])])
    env = os.environ | {"PYTHONPATH": ours}
    late = f"{name}: lowering took more than {limit_s:.0f} s and was ended: give it more time"
    said = partial(_said, folder=job["folder"])
    return answered(command, job, f"{name} failed to lower the network", limit_s, late, env, said)


def _said(text: str, folder: str) -> str:
    return " ".join(text.replace(f"{folder}/", "").split())[:300]


def _move(part: Path, place: Path) -> None:
    """A package is a folder, which cannot be replaced in one step."""
    if place.is_dir():
        shutil.rmtree(place)
    part.replace(place)


def _written(of: Any, prepared: Any, weights: str, file: Path, folder: str) -> dict[str, Any]:
    started = time.perf_counter()
    try:
        of.WEIGHTS[weights](prepared, file)
    except Exception as error:
        return {"failed": _said(f"{type(error).__name__}: {error}", folder)}
    return {"seconds": time.perf_counter() - started}


def work(job: dict[str, Any]) -> dict[str, Any]:
    """All files of one runtime."""
    of: Any = importlib.import_module(f"sartor.export.{job['runtime']}")
    started = time.perf_counter()
    prepared = of.prepare(torch.export.load(f"{job['folder']}/program.pt2"), Path(job["folder"]))
    shared = time.perf_counter() - started
    made = {w: _written(of, prepared, w, Path(file), job["folder"]) for w, file in job["files"].items()}
    for found in made.values():
        found.update({"seconds": shared + found["seconds"]} if "seconds" in found else {})
    return made


if __name__ == "__main__":
    answer(work)
