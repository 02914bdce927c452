# Two jobs: `make leaderboard` measures on the embedded data and renders the page, `make test` proves it all.
# PYTHON picks the interpreter; VENV_FLAGS=--system-site-packages reuses a torch that is already there.
PYTHON ?= python3
VENV ?= .venv
VENV_FLAGS ?=
BIN = $(VENV)/bin

.PHONY: leaderboard test lint format clean

leaderboard: $(VENV)/.installed
	$(BIN)/replivit leaderboard

test: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --cov --cov-report=term:skip-covered

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Editable, so that a changed source needs no second install; the stamp keeps it from running twice.
$(VENV)/.installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV_FLAGS) $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info site .pytest_cache .ruff_cache .benchmarks .coverage .coverage.*
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
