"""Tokenizers as their own files say: libraries put some together anew, and lose how text is cut before merging."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sartor.errors import SourceError
from sartor.model.vocabulary import settings

# names in GGUF files (tokenizer.ggml.pre) of GPT-2's rules behind one that sets every digit apart, and of those alone (docs of llama.cpp: src/llama-vocab.cpp)
DIGITS_APART = {"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"}
PLAIN = {
    "gpt-2",
    "phi-2",
    "olmo",
    "mpt",
    "jina-es",
    "jina-de",
    "jina-v2-es",
    "jina-v2-de",
    "trillion",
    "granite-docling",
    "default",
    "",
}
PARTS = ("normalizer", "pre_tokenizer", "decoder")


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer in a folder, which cuts texts as its tokenizer.json says.

    transformers builds the tokenizers of some classes (GPT2Tokenizer, which SmolLM2's folders name) from vocabulary and merges alone.
    """
    from tokenizers import Tokenizer
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    if not (file := folder / "tokenizer.json").exists():
        return tokenizer
    own = Tokenizer.from_file(str(file))
    told, found = (json.loads(t.to_str()) for t in (own, tokenizer.backend_tokenizer))
    if all(told.get(part) == found.get(part) for part in PARTS):
        return tokenizer
    whole = PreTrainedTokenizerFast(tokenizer_object=own, **settings(tokenizer))
    whole.chat_template = tokenizer.chat_template
    return whole


def cut_as_gguf_(tokenizer: Any, name: str) -> Any:
    """The tokenizer of a GGUF file, that cuts texts as the file's rules of this name do; transformers knows those of some.

    Raises:
        SourceError: nobody here knows them.
    """
    from tokenizers import pre_tokenizers
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    if name in DIGITS_APART:
        rules = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(rules)
    elif name not in PLAIN and name not in GGUF_PRE_TOKENIZER_SPLITS:
        raise SourceError(
            f"the file cuts texts by the rules '{name}', which Sartor does not know: give the model's transformers folder"
        )
    return tokenizer
