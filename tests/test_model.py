"""Laws of networks and tokenizers."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from sartor.errors import SourceError
from sartor.export.gguf_file import pre_tokenizer
from sartor.model import network as net
from sartor.model import precision
from sartor.model.attention import register
from sartor.model.tokenizers import cut_as_gguf_, load_tokenizer
from sartor.model.vocabulary import _made_of, closed_order, count_tokens, trim_tokenizer
from sartor.stages.tokens import cut_windows, encode_windows
from tests.conftest import make_model, texts

IDS = torch.randint(0, 400, (2, 20), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_shrinking_equals_masking(family: str, tokenizer: Any) -> None:
    model = make_model(len(tokenizer), family)
    channels = torch.arange(256) % 3 != 0
    with net.masked(model, {1: torch.tensor([False, True])}, {0: channels}), torch.no_grad():
        expected = model(IDS).logits
    small = net.clone(model)
    net.shrink_attention_(small, 1, [1])
    net.shrink_mlp_(small, 0, channels.nonzero().flatten())
    with torch.no_grad():
        assert torch.allclose(small(IDS).logits, expected, atol=1e-5)
    assert net.anatomy(small).groups == (2, 1, 2)
    assert net.anatomy(model).groups == (2, 2, 2)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_grouped_attention_and_its_gradients_are_transformers_own(family: str, tokenizer: Any) -> None:
    model = make_model(len(tokenizer), family).requires_grad_(True)
    found = []
    for kernel in ("eager", register()):
        model.set_attn_implementation(kernel)
        logits = model(IDS).logits
        logits.square().mean().backward()
        found.append([logits.detach(), *(p.grad.clone() for p in model.parameters())])
        model.zero_grad()
    assert model.config._attn_implementation == register() != "eager"
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*found, strict=True))


def test_whole_sublayers_can_go(model: Any) -> None:
    with (
        net.masked(model, {1: torch.zeros(2, dtype=torch.bool)}, {2: torch.zeros(256, dtype=torch.bool)}),
        torch.no_grad(),
    ):
        expected = model(IDS).logits
    net.shrink_attention_(model, 1, [])
    net.shrink_mlp_(model, 2, torch.tensor([], dtype=torch.long))
    with torch.no_grad():
        assert torch.allclose(model(IDS).logits, expected, atol=1e-5)


def test_masking_leaves_nothing_behind_even_on_error(model: Any) -> None:
    with torch.no_grad():
        before = model(IDS).logits
    with pytest.raises(RuntimeError, match="inside"), net.masked(model, {0: torch.tensor([True, False])}, {}):
        raise RuntimeError("inside")
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, before)
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_kept_vocabularies_are_closed_at_every_size(tokenizer: Any) -> None:
    counts = count_tokens(tokenizer, texts("cook", 20, 9))
    order, base = closed_order(tokenizer, counts)
    assert sorted(order) == sorted(set(tokenizer.get_vocab().values()))
    for size in (base, base + 17, 400):
        smaller, ids = trim_tokenizer(tokenizer, order[:size])
        assert len(smaller) == size == len(ids)
        for text in ("butter and the harbour", "ünïcödé ☃ 漢字 \x00\x7f", bytes(range(256)).decode("latin-1")):
            assert smaller.decode(smaller(text, add_special_tokens=False)["input_ids"]) == text


def test_the_whole_vocabulary_is_the_identity(tokenizer: Any) -> None:
    same, ids = trim_tokenizer(tokenizer, list(range(len(tokenizer))))
    text = texts("sail", 1, 11)[0]
    assert same(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert ids.tolist() == list(range(len(tokenizer)))


def test_used_tokens_survive_trimming(tokenizer: Any) -> None:
    own = texts("cook", 20, 9)
    counts = count_tokens(tokenizer, own)
    order, base = closed_order(tokenizer, counts)
    needed = max(order.index(i) for i in counts) + 1
    smaller, _ = trim_tokenizer(tokenizer, order[: max(base, needed)])
    assert [len(smaller(t)["input_ids"]) for t in own] == [len(tokenizer(t)["input_ids"]) for t in own]


def cutting_digits(tokenizer: Any) -> Any:
    """The same vocabulary, every digit apart, as SmolLM2's."""
    from tokenizers import pre_tokenizers

    other = copy.deepcopy(tokenizer)
    rules = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    other.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(rules)
    return other


def cuts(tokenizer: Any) -> list[str]:
    """The pieces in which a text is merged."""
    return [w for w, _ in tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str("salt\n\n12 eggs  3")]


def test_a_folders_tokenizer_cuts_texts_as_its_own_file_says(tokenizer: Any, tmp_path: Path) -> None:
    digits = cutting_digits(tokenizer)
    assert cuts(digits) != cuts(tokenizer)
    digits.save_pretrained(tmp_path)
    file = tmp_path / "tokenizer_config.json"
    told = json.loads(file.read_text())
    # the last two are made of vocabulary and merges by transformers
    for name in (told["tokenizer_class"], "GPT2Tokenizer", "Qwen2Tokenizer"):
        file.write_text(json.dumps(told | {"tokenizer_class": name}))
        again = load_tokenizer(tmp_path)
        assert cuts(again) == cuts(digits)
        assert again.eos_token_id == digits.eos_token_id
        again.save_pretrained(tmp_path / "saved")
        assert cuts(load_tokenizer(tmp_path / "saved")) == cuts(digits)
    assert pre_tokenizer(json.loads(again.backend_tokenizer.to_str())) == "smollm"


def test_a_gguf_files_rules_are_its_tokenizers(tokenizer: Any) -> None:
    for name, wanted in (("smollm", cutting_digits(tokenizer)), ("gpt-2", tokenizer), ("", tokenizer)):
        assert cuts(cut_as_gguf_(copy.deepcopy(tokenizer), name)) == cuts(wanted)
    with pytest.raises(SourceError, match="'chameleon'"):
        cut_as_gguf_(tokenizer, "chameleon")


def test_a_token_of_several_merges_is_made_of_those_that_spell_it() -> None:
    # "abc" could be a + bc, listed first, but its letters merge to ab first, then to abc
    merges = [("a", "b"), ("a", "bc"), ("ab", "c"), ("b", "c")]
    assert _made_of(merges) == {"ab": ("a", "b"), "abc": ("ab", "c"), "bc": ("b", "c")}
    assert _made_of([("x", "yz"), ("xy", "z")]) == {"xyz": ("x", "yz")}  # its letters never make it: as listed


def test_windows_hold_the_same_text_for_every_tokenizer(tokenizer: Any) -> None:
    own = [*texts("cook", 5, 12), "short", "word " * 900]
    windows = cut_windows(own)
    joined: dict[int, str] = {}
    for w in windows:
        assert sum(len(t) for _, t in w) <= 1024
        for d, t in w:
            joined[d] = joined.get(d, "") + t
    assert [joined[i] for i in range(len(own))] == own
    smaller, _ = trim_tokenizer(tokenizer, closed_order(tokenizer, count_tokens(tokenizer, own))[0][:300])
    for a, b in zip(encode_windows(windows, tokenizer), encode_windows(windows, smaller), strict=True):
        assert [p.size for p in a.pieces] == [p.size for p in b.pieces]


def test_networks_run_in_whichever_numbers_this_machine_multiplies_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    for slower, expected in ((torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)):
        monkeypatch.setattr(precision, "_seconds", lambda dtype, slower=slower: 2.0 if dtype == slower else 1.0)
        precision.running_dtype.cache_clear()
        assert precision.running_dtype() == expected
    precision.running_dtype.cache_clear()
