"""A checkpoint's files: its JSON, and tensors out of one safetensors file or of several with an index."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jaxtyping import Float
from torch import Tensor

from sartor.errors import SourceError


def read_json(path: Path) -> dict[str, Any]:
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SourceError(f"'{path.name}' cannot be read ({type(error).__name__}): fetch the model again") from error
    if not isinstance(raw, dict):
        raise SourceError(f"'{path.name}' is not a JSON object: fetch the model again")
    return raw


def files_of(folder: Path) -> list[Path]:
    """Its safetensors.

    Raises:
        SourceError: not all are there, or it is not clear which.
    """
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names = {str(n) for n in read_json(index).get("weight_map", {}).values()}
        outside = [n for n in names if Path(n).name != n]
        files = [folder / n for n in sorted(names)]
        if outside or not files or not all(f.is_file() for f in files):
            raise SourceError(f"not all of {len(files)} files of '{index.name}' are there: fetch the model again")
        return files
    found = sorted(folder.glob("*.safetensors"))
    whole = [f for f in found if f.name == "model.safetensors"] or found
    if len(whole) != 1:
        raise SourceError(
            f"the folder holds {len(found)} *.safetensors without an index, one was needed: name it model.safetensors"
        )
    return whole


@contextmanager
def _reading() -> Iterator[None]:
    """What goes wrong with a file is the source's fault."""
    try:
        yield
    except SourceError:
        raise
    except Exception as error:
        raise SourceError(f"the weights cannot be read ({type(error).__name__}): fetch the model again") from error


def names_in(folder: Path) -> list[str]:
    """Of all tensors.

    Raises:
        SourceError: as `stored`.
    """
    from safetensors import safe_open

    with _reading():
        return [name for file in files_of(folder) for name in safe_open(file, "pt").keys()]  # noqa: SIM118


def stored(folder: Path, wanted: Callable[[str], bool]) -> dict[str, Float[Tensor, ...]]:
    """What the files hold under the names that are wanted, in fp32.

    Raises:
        SourceError: they cannot be read.
    """
    from safetensors import safe_open

    found: dict[str, Tensor] = {}
    with _reading():
        for file in files_of(folder):
            with safe_open(file, "pt") as f:
                found |= {name: f.get_tensor(name).float() for name in filter(wanted, f.keys())}
    return found
