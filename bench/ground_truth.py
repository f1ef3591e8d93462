"""Exact leave-one-out effects of every unit of a model, on one user's text after another and on the generic reference.

    python bench/ground_truth.py MODEL --data DIR [DIR ...] --generic DIR [--rows 8] [--block 64]

Units are query groups and blocks of FFN channels of like importance on *generic* text, so that they are the same for every user. Every unit is
removed alone and the four measurements of `stages/yardstick.py` are taken row by row. Cached by content hash: it takes minutes a text, once.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sartor.job import Job, Prepared
from sartor.memory import keep_freed
from sartor.model.network import anatomy, masked
from sartor.model.precision import running
from sartor.model.tail import Tail
from sartor.sources import cache_dir
from sartor.stages.probe import Units, effects_of, order_units, unit_masks
from sartor.stages.sensitivity import feel
from sartor.stages.tokens import sample, training_rows
from sartor.stages.yardstick import Yardstick

VERSION = 2


def opened(model: str, data: str, generic: str | None) -> tuple[Prepared, Any]:
    """The job's texts and the model as it runs here (`running_dtype`)."""
    p = Prepared(Job(model, data, "25%", generic=generic), lambda *_: None)
    return p, running(p.model)


def generic_units(p: Prepared, model: Any, block: int) -> Units:
    """Units ordered by what generic text needs."""
    if odd := [f for f in anatomy(model).ffn if block < 1 or f % block]:
        sys.exit(f"--block is {block}: it must divide the {odd[0]} channels of a layer")
    rows = sample(training_rows(p.texts.generic_train, p.tokenizer), 64, 0)
    generic = effects_of(anatomy(model), feel(model, rows))
    return order_units(generic, block)


def probing_rows(p: Prepared, generic: bool, rows: int) -> torch.Tensor:
    return sample(training_rows(p.texts.generic_probe if generic else p.texts.probe, p.tokenizer), rows, 0)


def at_least(many: int, rows: torch.Tensor, name: str) -> None:
    """Ends the script where there is less text."""
    if len(rows) < many:
        sys.exit(f"{name} has {len(rows)} rows of {rows.shape[1]} tokens: {many} are needed, so give it more text")


def kept_file(kind: str, *parts: Any) -> Path:
    """Where a result with these inputs lies in the cache."""
    digest = hashlib.sha256(str(VERSION).encode())
    for part in parts:
        digest.update(part.numpy().tobytes() if isinstance(part, torch.Tensor) else str(part).encode())
    folder = cache_dir() / "bench"
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{kind}-{digest.hexdigest()[:16]}.npz"


def found_share(scores: np.ndarray, truth: np.ndarray, share: float = 0.1) -> float:
    """Of the units with the highest true effects, one at least, those among the highest scores."""
    k = max(1, round(share * len(truth)))
    return len(set(np.argsort(-scores)[:k]) & set(np.argsort(-truth)[:k])) / k


def remembered(compute: Callable[[], Any], kind: str, *parts: Any) -> Any:
    """A small result, computed once for these inputs."""
    file = kept_file(kind, *parts).with_suffix(".json")
    if not file.exists():
        file.write_text(json.dumps(compute()))
    return json.loads(file.read_text())


def leave_one_out(model: Any, sha256: str, units: Units, rows: torch.Tensor, name: str) -> dict[str, np.ndarray]:
    """kl, loss, hidden (d, rows) and vector (d, s) of every unit removed alone; `seconds` in all."""
    file = kept_file("loo", sha256, torch.cat(list(units.order.values())), units.size, rows)
    if file.exists():
        return dict(np.load(file))
    started = time.monotonic()
    tail = Tail(model, rows)
    stick = Yardstick(model, rows, tail.dense)
    found: dict[str, list[np.ndarray]] = {"kl": [], "loss": [], "hidden": [], "vector": []}
    for u, layer in enumerate(units.layer):
        with masked(model, *unit_masks(model, units, np.arange(len(units.layer)) == u)):
            reading = stick.read(tail.hidden_from(int(layer)))
        for kind, values in found.items():
            values.append(getattr(reading, kind))
        if u % 50 == 49:
            gone = time.monotonic() - started
            left = gone / (u + 1) * (len(units.layer) - u - 1)
            print(f"{name}: unit {u + 1} of {len(units.layer)}, {left / 60:.0f} min left", file=sys.stderr, flush=True)
    out = {k: np.stack(v).astype(np.float16 if k == "vector" else np.float32) for k, v in found.items()}
    out["seconds"] = np.array(time.monotonic() - started)
    np.savez(file, **out)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--data", nargs="+", required=True)
    parser.add_argument("--generic")
    parser.add_argument("--rows", type=int, default=8, help="of 256 tokens")
    parser.add_argument("--block", type=int, default=64, help="FFN channels a unit")
    a = parser.parse_args()
    keep_freed()
    for n, data in enumerate(a.data):
        p, model = opened(a.model, data, a.generic)
        units = generic_units(p, model, a.block)
        for name in ("generic", Path(data).name) if n == 0 else (Path(data).name,):
            truth = leave_one_out(model, p.source.sha256, units, probing_rows(p, name == "generic", a.rows), name)
            kl = truth["kl"].mean(1)
            print(
                f"{name:18s} {len(kl)} units, {float(truth['seconds']):.0f} s; KL alone: median {np.median(kl):.4f}, highest tenth from "
                f"{np.quantile(kl, 0.9):.4f}, sum {kl.sum():.2f} nats; {int((truth['loss'].mean(1) < 0).sum())} units whose removal helps",
                flush=True,
            )


if __name__ == "__main__":
    main()
