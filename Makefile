# Each target sets up what it needs: `make demo` and `make test` work on a fresh machine with Python 3.11+ and make.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip
TORCH ?= torch==2.13.0
WORKERS ?= 2
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadgroup

.PHONY: setup demo test test-heavy test-all test-gpu lint type format docs bench-cpu clean

setup: $(VENV)/.installed  ## create .venv and install remoe with what demo and tests need

$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "$(PYTHON) is too old, must be Python 3.11 or newer: make $(MAKECMDGOALS) PYTHON=python3.12"; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install -q -c constraints.txt $(TORCH)
	$(PIP) install -q -c constraints.txt -e '.[data,report,dev]'
	touch $@

$(VENV)/.installed-all: $(VENV)/.installed
	$(PIP) install -q -c constraints.txt -e '.[all,triton,wandb,trackio,megatron,docs,dev]' 'lm_eval[hf]' peft
	touch $@

$(VENV)/.installed-docs: $(VENV)/.installed
	$(PIP) install -q -c constraints.txt -e '.[docs]'
	touch $@

demo: setup  ## train ReLU, Top-K and dense on text that comes with Python and torch; writes one HTML report
	$(BIN)/remoe demo

test: setup  ## the quick tests
	$(PYTEST) -m "not slow and not heavy"

test-heavy: $(VENV)/.installed-all  ## the tests that need heavy extras and take seconds
	$(PYTEST) -m "heavy and not slow"

test-all: $(VENV)/.installed-all  ## the tests that need heavy extras or minutes
	$(PYTEST) -m "slow or heavy" --timeout 1800

test-gpu: $(VENV)/.installed-all  ## on a machine with a GPU; a process a file, since a broken CUDA context breaks what follows
	@failed=; for file in $$(grep -rl mark.gpu tests); do \
		$(BIN)/python -m pytest -m gpu -v $$file || failed="$$failed $$file"; \
	done; test -z "$$failed" || { echo "failed:$$failed"; exit 1; }

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

type: $(VENV)/.installed-all  ## pyright: reads the extras' own types
	$(BIN)/pyright

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(VENV)/.installed-docs  ## the site, in build/site
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build -q --strict

bench-cpu: $(VENV)/.installed-all  ## one MoE layer on the CPU against a dense MLP and transformers
	$(BIN)/python benchmarks/layer_cpu.py --output results/layer_cpu.json

clean:
	rm -rf $(VENV) dist build .pytest_cache .ruff_cache .cache
