# Everything sets itself up in .venv: nothing has to be installed but Python >= 3.11.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Pinned and installed first: a bare `torch` may pull gigabytes of CUDA libraries on a machine that has no GPU.
# On a GPU machine choose your own, e.g. make demo TORCH=torch==2.13.0+cu130
TORCH ?= torch==2.13.0

.DEFAULT_GOAL := help
.PHONY: help demo test lint clean

help:  ## Show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/'

$(VENV)/.base: pyproject.toml
	@echo "setting up $(VENV): torch, transformers and demur (a minute or two, once)"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "demur needs Python >= 3.11; say which with: make $(MAKECMDGOALS) PYTHON=python3.12"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check "$(TORCH)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable .
	@touch $@

$(VENV)/.dev: $(VENV)/.base
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[dev]"
	@touch $@

demo: $(VENV)/.base  ## Run the whole study on a real small model and say where the report is
	@echo "running: demur study (SmolLM2-135M-Instruct, about five minutes on two cores)"
	@$(BIN)/demur study

test: $(VENV)/.dev lint  ## Lint, check types, run every test, and one quick study on the real model
	@$(BIN)/python -m pytest

lint: $(VENV)/.dev  ## ruff and mypy
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

clean:  ## Remove the virtual environment and caches, keep runs
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .hypothesis
