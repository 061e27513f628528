# Everything is done in a virtual environment of its own. `make quickstart` trains, `make test` checks.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
export GOMP_SPINCOUNT ?= 10000
export TOKENIZERS_PARALLELISM ?= false

.PHONY: help env quickstart test lint types docs unit bench peer claims clean

help:
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/'

$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --upgrade pip
	$(BIN)/pip install -q -c constraints.txt -e ".[test,docs,math,peft,data]"
	@touch $@

env: $(VENV)/.ready ## make the virtual environment

quickstart: env ## warm-start a small model, train it with GRPO, show what it learned
	$(BIN)/python examples/quickstart.py

test: lint types unit docs ## everything that CI runs

lint: env ## ruff
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: env ## mypy
	$(BIN)/mypy

unit: env ## all tests but the claims
	$(BIN)/pytest -n 2

docs: env ## build the documentation
	$(BIN)/mkdocs build --strict -q

bench: env ## speed and memory, side by side with the peer
	$(BIN)/python benchmarks/run_all.py

PEER := .venv-trl
$(PEER)/.tests: $(VENV)/.ready benchmarks/peer/processes.py
	$(BIN)/python -m benchmarks.peer.processes
	$(PEER)/bin/pip install -q -c constraints.txt -e . pytest
	@touch $@

peer: $(PEER)/.tests ## losses against TRL's own, in an environment of its own
	$(PEER)/bin/python -m pytest -m peer $$(grep -rl mark.peer tests)

claims: env ## learning claims: baseline against method over several seeds (slow); one: make claims NAME=dot
	$(BIN)/python benchmarks/claims/run.py $(NAME)

clean: ## remove the virtual environment and run directories
	rm -rf $(VENV) runs site
