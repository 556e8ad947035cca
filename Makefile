# Every routine task is one target; CI calls the same ones. `make PYTHON=python3.12 test` chooses the interpreter.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# PyTorch's idle OpenMP threads spin, which costs a busy machine several times its speed: hence one thread a test process
# and passive waiting.

.PHONY: help quickstart test test-gpu check lint typecheck format kernels clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

$(VENV)/.train $(VENV)/.dev: pyproject.toml constraints.txt setup.py tools/make_venv.py
	$(PYTHON) tools/make_venv.py $(VENV) $(subst .,,$(@F))
	@touch $@

quickstart: $(VENV)/.train  ## fine-tune a small Llama in rotated 8 bits and in bf16, and compare
	OMP_WAIT_POLICY=passive $(BIN)/halo-train compare recipes/quickstart.yaml quant.recipe=bf16,fp8 run.overwrite=true

test: $(VENV)/.dev  ## the tests that need no GPU (the others skip)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto

test-gpu: $(VENV)/.dev kernels  ## all tests; a missing GPU or kernel is a failure
	$(BIN)/python -m pytest --require-gpu

check: lint typecheck  ## what a pull has to pass besides the tests: style, types, structure
	$(BIN)/python -m pytest -q tests/test_architecture.py

lint: $(VENV)/.dev  ## ruff and clang-format, without changing anything
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	find csrc -name '*.cu' -o -name '*.cuh' -o -name '*.cpp' -o -name '*.h' | xargs $(BIN)/clang-format --dry-run --Werror

typecheck: $(VENV)/.dev  ## mypy
	$(BIN)/mypy

format: $(VENV)/.dev  ## rewrite the sources the way lint wants them
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	find csrc -name '*.cu' -o -name '*.cuh' -o -name '*.cpp' -o -name '*.h' | xargs $(BIN)/clang-format -i

kernels: $(VENV)/.dev  ## compile the CUDA kernels in place (needs nvcc, no GPU)
	$(BIN)/python tools/build_kernels.py

clean:  ## remove the environment and everything built
	rm -rf $(VENV) build dist *.egg-info halo_train/_kernels.so halo_train/_kernels.json
