"""Trimming a byte-level BPE tokenizer: fewer tokens, the same bytes.

Kept sets are closed under merges (whoever keeps a token keeps the two parts of the merge that makes it) and hold all
256 byte tokens and every added token, so any text stays encodable and `decode(encode(x)) == x`.
"""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


def can_trim(tokenizer: Any) -> bool:
    """Whether the tokenizer is byte-level BPE, the kind that can be trimmed without losing texts."""
    spec = json.loads(tokenizer.backend_tokenizer.to_str())
    return spec["model"]["type"] == "BPE" and "ByteLevel" in json.dumps(
        [spec.get("pre_tokenizer"), spec.get("decoder")]
    )


def count_tokens(tokenizer: Any, texts: Iterable[str]) -> Counter[int]:
    counts: Counter[int] = Counter()
    for encoding in tokenizer.backend_tokenizer.encode_batch(list(texts), add_special_tokens=False):
        counts.update(encoding.ids)
    return counts


def _merges(spec: dict[str, Any]) -> list[tuple[str, str]]:
    return [tuple(m.split(" ", 1)) if isinstance(m, str) else (m[0], m[1]) for m in spec["model"]["merges"]]  # type: ignore[misc]


def _made_of(merges: Sequence[tuple[str, str]]) -> dict[str, tuple[str, str]]:
    """{token: the two that it is made of}. Of several merges that make it (as in tokenizers that were converted from tiktoken's) the one that comes last when it is spelled from its bytes."""
    rank = {pair: n for n, pair in enumerate(merges)}
    ways = Counter(a + b for a, b in merges)
    found: dict[str, tuple[str, str]] = {}
    for a, b in merges:
        if a + b not in found:
            found[a + b] = (_last_merge(a + b, rank) if ways[a + b] > 1 else None) or (a, b)
    return found


def _last_merge(token: str, rank: Mapping[tuple[str, str], int]) -> tuple[str, str] | None:
    """The pair that byte pair encoding merges last of these letters; None where it does not make one token of them."""
    parts = list(token)
    while len(parts) > 1:
        pairs = [rank.get(pair, len(rank)) for pair in itertools.pairwise(parts)]
        at = pairs.index(min(pairs))
        if pairs[at] == len(rank):
            return None
        if len(parts) == 2:
            return parts[0], parts[1]
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return None


def closed_order(tokenizer: Any, counts: Mapping[int, float]) -> tuple[list[int], int]:
    """Token ids such that every prefix of at least `base` ids is a closed kept set, the most useful tokens first.

    Args:
        counts: expected use of each token, any scale; ties and unseen tokens go by merge rank (early merges are common ones).
    Returns:
        (order, base): base counts the bytes, unmergeable and added tokens that every kept set must hold.
    """
    spec = json.loads(tokenizer.backend_tokenizer.to_str())
    vocab: dict[str, int] = spec["model"]["vocab"]
    parts = {vocab[t]: (vocab[a], vocab[b]) for t, (a, b) in _made_of(_merges(spec)).items()}
    added = {t["id"] for t in spec["added_tokens"]}
    order = sorted(added | {i for i in vocab.values() if i not in parts})
    base, kept = len(order), set(order)
    rank = {token: n for n, token in enumerate(parts)}
    for token in sorted(parts, key=lambda t: (-counts.get(t, 0), rank[t])):
        _add_closed(token, parts, kept, order)
    return order, base


def _add_closed(token: int, parts: dict[int, tuple[int, int]], kept: set[int], order: list[int]) -> None:
    """Append a token after all it is made of."""
    todo = [token]
    while todo:
        now = todo[-1]
        missing = [p for p in parts.get(now, ()) if p not in kept]
        if missing:
            todo.extend(missing)
            continue
        todo.pop()
        if now not in kept:
            kept.add(now)
            order.append(now)


def trim_tokenizer(tokenizer: Any, keep: Sequence[int]) -> tuple[Any, Tensor]:
    """A tokenizer with only these tokens, and the old ids in new order.

    Args:
        keep: ids of a closed set (see `closed_order`), in any order; new ids follow the order of the old ones.
    Returns:
        (tokenizer, ids): row n of the new embedding is row ids[n] of the old one.
    """
    from tokenizers import Tokenizer

    new_of = {old: new for new, old in enumerate(sorted(keep))}
    spec = json.loads(tokenizer.backend_tokenizer.to_str())
    vocab: dict[str, int] = spec["model"]["vocab"]
    spec["model"]["merges"] = [[a, b] for a, b in _merges(spec) if all(vocab[x] in new_of for x in (a, b, a + b))]
    spec["model"]["vocab"] = {t: new_of[i] for t, i in vocab.items() if i in new_of}
    for token in spec["added_tokens"]:
        token["id"] = new_of[token["id"]]
    _renumber(spec.get("post_processor"), new_of)
    new = type(tokenizer)(tokenizer_object=Tokenizer.from_str(json.dumps(spec)), **settings(tokenizer))
    new.chat_template = tokenizer.chat_template
    return new, torch.tensor(sorted(keep))


def _renumber(processor: Any, new_of: dict[int, int]) -> None:
    """Special ids inside template processors."""
    if isinstance(processor, dict):
        for inner in processor.get("processors", []):
            _renumber(inner, new_of)
        for special in (
            processor.get("special_tokens", {}).values() if isinstance(processor.get("special_tokens"), dict) else []
        ):
            special["ids"] = [new_of[i] for i in special["ids"]]


def settings(tokenizer: Any) -> dict[str, Any]:
    """What a tokenizer made of another one's rules needs beside them."""
    names = ("bos_token", "eos_token", "unk_token", "pad_token")
    return {n: getattr(tokenizer, n) for n in names if getattr(tokenizer, n, None) is not None} | {
        "model_max_length": tokenizer.model_max_length,
        "clean_up_tokenization_spaces": False,
    }


def separator(tokenizer: Any) -> int:
    """The token that stands before every document: <|endoftext|> where there is one, else BOS, else EOS."""
    vocab = tokenizer.get_vocab()
    if "<|endoftext|>" in vocab:
        return int(vocab["<|endoftext|>"])
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    return 0
