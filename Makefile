# make demo   train a tiny base and three fine-tunes, compress them, serve them with vLLM, show the result
# make test   everything that must pass; make check   the same without servers (under 3 minutes on an idle machine)
# make gpu    everything that needs a GPU, without network, in about 8 minutes (see benchmarks/gpu.sh)
# make check-oldest  tests of the kernels and formats with the oldest versions of torch and Triton, in .venv-oldest (6 GB)
# make setup  only installs into .venv; make test-slow  larger cases; make lint, make format, make clean
PYTHON ?= python3
# PyTorch's CPU wheels; asked only where plain pip has none.
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
export PYTHON TORCH_INDEX

RUN := .venv/bin/python -m
SOURCES := vllm_prinmix compress kernels benchmarks tests

.PHONY: demo test test-slow check check-oldest lint format setup clean gpu
.DEFAULT_GOAL := help

help:
	@sed -n 's/^# make/make/p' Makefile

setup:
	@.ci/setup

demo: setup
	$(RUN) benchmarks.demo

lint: setup
	$(RUN) ruff check $(SOURCES)
	$(RUN) ruff format --check $(SOURCES)
	$(RUN) mypy

# Two processes of one thread each: what these tests compute is too small for threads.
check: lint
	OMP_NUM_THREADS=1 $(RUN) pytest -n 2 -m "not server and not slow and not targets"

test: check
	OMP_NUM_THREADS=1 $(RUN) pytest -n 2 -m targets
	$(RUN) pytest -m "server and not slow"

test-slow: setup
	$(RUN) pytest -m slow

# Without vLLM and cvxpy. The budget of instructions is for a later Triton.
OLDEST := "torch==2.11.0" "triton==3.6.0" "transformers==5.17.0" "numpy<2.4"
check-oldest:
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/pip install --quiet $(OLDEST) pydantic rich safetensors typer xxhash matplotlib \
		pytest pytest-asyncio pytest-timeout pytest-xdist hypothesis
	.venv-oldest/bin/pip install --quiet --no-deps .
	OMP_NUM_THREADS=1 .venv-oldest/bin/python -m pytest -n 2 -m "not targets" --ignore tests/kernels/test_compiled.py \
		tests/kernels tests/format tests/benchmarks/test_generate_delta.py
	.venv-oldest/bin/python -m benchmarks.kernels --device cpu --shape qwen2.5-0.5b --budget-seconds 60 \
		--out build/kernels-oldest

gpu:
	@bash benchmarks/gpu.sh

format: setup
	$(RUN) ruff check --fix $(SOURCES)
	$(RUN) ruff format $(SOURCES)

clean:
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
