"""Safetensors files written and read one tensor at a time; the library itself wants all of them in memory at once.

The format: https://huggingface.co/docs/safetensors (eight bytes with the length of a JSON header, the header, the tensors without gaps).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.uint8: "U8"}
ALIGNED = 8  # bytes that the header's length is a multiple of


@dataclass(frozen=True)
class Entry:
    """A tensor to be written: what is known of it before `make` makes it."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    make: Callable[[], Tensor]

    @staticmethod
    def of(t: Tensor) -> Entry:
        return Entry(t.dtype, tuple(t.shape), lambda: t)


def write_tensors(path: Path, entries: Mapping[str, Entry], metadata: Mapping[str, str]) -> None:
    """Every tensor is made when its turn comes; larger numbers go first, so that all lie on multiples of their size."""
    order, at = sorted(entries, key=lambda n: (-entries[n].dtype.itemsize, n)), 0
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    for name in order:
        e = entries[name]
        end = at + math.prod(e.shape) * e.dtype.itemsize
        header[name] = {"dtype": NAMES[e.dtype], "shape": list(e.shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % ALIGNED)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            made = entries[name].make().detach().contiguous()
            if (made.dtype, tuple(made.shape)) != (entries[name].dtype, entries[name].shape):
                raise ValueError(f"{name} is {made.dtype} {tuple(made.shape)}, not what was said of it")
            file.write(made.flatten().view(torch.uint8).numpy().data)


def read_tensors(*paths: Path) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of all tensors of the files, each read into memory of its own: as a mapping, the whole of a large file would count."""
    from safetensors import safe_open

    for path in paths:
        with safe_open(path, "pt", backend="pread") as file:
            for name in file.keys():  # noqa: SIM118 (not a dict)
                yield name, file.get_tensor(name)


def metadata_of(path: Path) -> dict[str, str]:
    from safetensors import safe_open

    with safe_open(path, "pt", backend="pread") as file:
        return dict(file.metadata() or {})


def files_of(folder: Path) -> list[Path]:
    """The safetensors files of a transformers folder that hold its weights; some hold them twice, under other names."""
    whole, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if whole.exists():
        return [whole]
    if index.exists():
        named = {Path(str(name)).name for name in json.loads(index.read_text())["weight_map"].values()}
        return sorted(folder / name for name in named)
    return sorted(folder.glob("*.safetensors"))


def sizes_in(folder: Path) -> list[int]:
    """How many numbers every tensor of a folder's weights has, from the files' headers."""
    from safetensors import safe_open

    sizes = []
    for path in files_of(folder):
        with safe_open(path, "pt", backend="pread") as file:
            sizes += [math.prod(file.get_slice(name).get_shape()) for name in file.keys()]  # noqa: SIM118
    return sizes
