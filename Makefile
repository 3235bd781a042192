# The only requirement is Python >= 3.11: `make setup PYTHON=/path/to/python3.11` picks another one than python3.

PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed

# Waiting OpenMP threads sleep: on shared cores spinning ones slow everything down by far more than they gain.
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: setup demo smoke test test-gpu drill fuzz format lint types docs

setup: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt | $(BIN)/pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

$(BIN)/pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "make setup: $(PYTHON) must be Python >= 3.11; choose one with make setup PYTHON=..." >&2; exit 1; }
	$(PYTHON) -m venv .venv

demo: setup
	$(BIN)/python tools/demo.py

smoke: setup
	$(BIN)/python tools/smoke.py

test: setup lint types
	$(BIN)/python -m pytest -m "dist and not gpu and not drill"
	$(BIN)/python -m pytest -m "not dist and not gpu and not drill" --numprocesses 2 --dist loadfile

test-gpu: setup
	$(BIN)/python -m pytest -m gpu

drill: setup
	$(BIN)/python -m pytest -m drill

fuzz: setup
	$(BIN)/python -m tests.fuzz --seconds 600

format: setup
	$(BIN)/ruff check --fix-only . && $(BIN)/ruff format .

lint: setup
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

types: setup
	$(BIN)/mypy

docs: setup
	$(BIN)/python -m pretrain.config.docs
