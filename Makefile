# Everything sets itself up in .venv: nothing has to be installed but Python >= 3.11.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# torch is pinned and installed first, so that nothing else chooses it. Which build that is depends on pip's index:
# the default index gives the CUDA build (gigabytes) on Linux x86-64. For the CPU build, or another CUDA, say so, e.g.
# make demo PIP_ARGS="--index-url URL-OF-PYTORCH'S-CPU-WHEELS"
TORCH ?= torch==2.13.0
PIP_ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help demo test lint sae-formats vllm pyrit clean

help:  ## Show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/'

$(VENV)/.base: pyproject.toml
	@echo "setting up $(VENV): torch, transformers and demur (a minute or two, once)"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "demur needs Python >= 3.11; say which with: make $(MAKECMDGOALS) PYTHON=python3.12"; exit 1; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) "$(TORCH)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable .
	@touch $@

$(VENV)/.dev: $(VENV)/.base
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[dev]"
	@touch $@

demo: $(VENV)/.base  ## Run the whole study on a real small model and say where the report is
	@echo "running: demur study (SmolLM2-135M-Instruct, six or seven minutes on two cores)"
	@$(BIN)/demur study

test: $(VENV)/.dev lint  ## Lint, check types, run every test, and one quick study on the real model
	@$(BIN)/python -m pytest

lint: $(VENV)/.dev  ## ruff and mypy
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

sae-formats: $(VENV)/.dev  ## Write the SAE fixtures anew with the real libraries and check that we read them
	@TORCH="$(TORCH)" PIP_ARGS="$(PIP_ARGS)" $(BIN)/python scripts/sae_fixtures/check.py $(if $(UPDATE),--update)

vllm: $(VENV)/.dev  ## Run the tests of the vLLM plugin in an environment with vLLM's CPU build (3 GB, minutes)
	@VLLM_CPU_KVCACHE_SPACE=1 $$($(BIN)/python scripts/peer_environment.py vllm) -m pytest tests/vllm

pyrit: $(VENV)/.dev  ## Let PyRIT's own Crescendo attack `demur serve` (PyRIT in an environment of its own)
	@$(BIN)/python scripts/pyrit_crescendo.py

clean:  ## Remove the virtual environment and caches, keep runs
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .hypothesis
