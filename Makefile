# Each target sets up what it needs: `make demo` and `make test` work on a fresh machine with Python 3.11+ and make.
PYTHON ?= $(shell command -v python3.12 >/dev/null 2>&1 && python3.12 --version >/dev/null 2>&1 && echo python3.12 || echo python3)
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip
TORCH ?= torch==2.13.0
WORKERS ?= 2

# tests of one process each, on as many processes as the machine has cores
export OMP_NUM_THREADS ?=

.PHONY: setup demo test test-all lint type format bench clean

setup: $(VENV)/.installed  ## create .venv and install remoe with what demo and tests need

$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install -q -c constraints.txt $(TORCH)
	$(PIP) install -q -c constraints.txt -e '.[data,report,dev]'
	touch $@

$(VENV)/.installed-all: $(VENV)/.installed
	$(PIP) install -q -c constraints.txt -e '.[all,dev]'
	touch $@

demo: setup  ## train ReLU, Top-K and dense on text that Python ships; writes one HTML report
	$(BIN)/remoe demo

test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadgroup -m "not slow and not heavy"

test-all: $(VENV)/.installed-all  ## also the tests that need heavy extras or minutes
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadgroup

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

type: setup
	$(BIN)/pyright

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) dist build .pytest_cache .ruff_cache .cache
