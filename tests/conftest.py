"""Pico models and texts, built in code: the real pipeline on something that trains in seconds."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TQDM_DISABLE"] = "1"
# gw0, gw1: a core each, as threads of two processes on two cores only wait for each other
if worker := os.environ.get("PYTEST_XDIST_WORKER"):
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[int(worker.removeprefix("gw")) % len(cores)]})

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sartor import effort
from sartor.numerics.grids import GRIDS, fits, search_scales
from sartor.stages.distil import DistilConfig
from sartor.stages.masters import Latents

WORDS = {
    "cook": [
        "butter",
        "onion",
        "simmer",
        "garlic",
        "stir",
        "pan",
        "roast",
        "salt",
        "lemon",
        "thyme",
        "oven",
        "dough",
        "whisk",
        "taste",
        "plate",
    ],
    "sail": [
        "wind",
        "harbour",
        "mast",
        "rope",
        "tide",
        "anchor",
        "storm",
        "sail",
        "deck",
        "keel",
        "north",
        "wave",
        "captain",
        "shore",
        "chart",
    ],
}
TRAINING = effort.Training(DistilConfig(1.0, 1e-3, checks=2), DistilConfig(1.0, 2e-4, checks=2), 16)
TINY = effort.Effort(16, 16, 0.9, 4, 6, 16, 2, 2, 16, TRAINING, 8_000, 8_000)
COMMON = [
    "the",
    "a",
    "and",
    "then",
    "we",
    "with",
    "of",
    "to",
    "in",
    "it",
    "was",
    "is",
    "very",
    "under",
    "over",
    "before",
    "after",
]


def texts(topic: str, documents: int, seed: int) -> list[str]:
    """Documents of random but topical sentences, each one different."""
    rng = np.random.default_rng(seed)
    out = []
    for _ in range(documents):
        words = [str(rng.choice(WORDS[topic] if rng.random() < 0.5 else COMMON)) for _ in range(120)]
        out.append(" ".join(words) + ".\n")
    return out


def make_tokenizer() -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train_from_iterator(texts("cook", 60, 1) + texts("sail", 60, 2), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<|endoftext|>", eos_token="<|endoftext|>")


def make_model(vocab: int, model_type: str = "llama", tied: bool = True, layers: int = 3, seed: int = 0) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(seed)
    config = AutoConfig.for_model(
        model_type,
        vocab_size=vocab,
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16 if model_type == "qwen2" else 32,  # llama.cpp derives qwen2's from the width
        max_position_embeddings=1024,
        tie_word_embeddings=tied,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=None,
        rms_norm_eps=1e-5,
    )
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval().requires_grad_(False)


def on_grid(model: Any, grid: str | None) -> Latents:
    """The model's weights on a grid, as far as their rows fit it; None: on none."""
    latents = Latents({n: p.detach().clone() for n, p in model.named_parameters()})
    if grid:
        for n, w in latents.masters.items():
            if w.ndim == 2 and fits(grid, w.shape[1]):
                latents.grids[n], latents.scales[n] = GRIDS[grid], search_scales(w, None, GRIDS[grid])
    return latents


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return make_tokenizer()


@pytest.fixture
def model(tokenizer: Any) -> Any:
    return make_model(len(tokenizer))


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> dict[str, Path]:
    """Folders of a pico model, a user's files and generic files; a short training makes the model know the language."""
    root = tmp_path_factory.mktemp("pico")
    found = {name: root / name for name in ("model", "user", "generic")}
    model = make_model(len(tokenizer)).requires_grad_(True)
    from sartor.stages.tokens import training_rows

    rows = training_rows(texts("cook", 100, 3) + texts("sail", 100, 4), tokenizer, 64)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(60):
        batch = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(step))[:16]]
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(found["model"])
    tokenizer.save_pretrained(found["model"])
    for name, topic, seed in (("user", "cook", 5), ("generic", "sail", 6)):
        found[name].mkdir()
        for i, text in enumerate(texts(topic, 150, seed)):
            (found[name] / f"secret-name-{i}.txt").write_text(text)
    return found


def make_efforts_tiny(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(effort, "pace", lambda: 1.0)  # so that levels mean the same on every machine
    for name in effort.EFFORTS:
        patch.setitem(effort.EFFORTS, name, TINY)


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Efforts that fit a pico model, and a cache of its own."""
    make_efforts_tiny(monkeypatch)
    monkeypatch.setenv("SARTOR_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def subject(place: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A user of the benchmark with the pico model; what several tests of a file need of it is computed once."""
    import artifacts
    from subject import Subject

    from sartor import evaluate
    from sartor.sources import resolve

    model = str(place["model"])
    with pytest.MonkeyPatch.context() as patch:
        make_efforts_tiny(patch)
        patch.setenv("SARTOR_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setattr(artifacts, "COPIED", 1 << 20)
        patch.setattr(evaluate, "TURNS", 1)
        yield Subject(model, resolve(model), place["user"], place["generic"], "quick")
