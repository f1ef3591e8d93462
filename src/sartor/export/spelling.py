"""The tokenizer that lies beside an exported language model, for workers that are started by path."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any


class Spelling:
    """Texts to tokens and back, with the tokenizer.json in `folder`, loaded when text is asked for."""

    folder: Path

    @cached_property
    def tokenizer(self) -> Any:
        from tokenizers import Tokenizer

        if not (self.folder / "tokenizer.json").exists():
            raise SystemExit("tokenizer.json is not beside it: copy all files that sartor export wrote")
        return Tokenizer.from_file(str(self.folder / "tokenizer.json"))

    def tokenize(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=False).ids)

    def prompted(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text).ids)

    def text(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))
