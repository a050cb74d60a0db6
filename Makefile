# make demo   train a tiny base and three fine-tunes, compress them, serve them with vLLM, show the result
# make test   everything that must pass; make check   the same without servers (under 3 minutes on an idle machine)
# make gpu    everything that needs a GPU, without network, in about 8 minutes (see benchmarks/gpu.sh)
# make setup  only installs into .venv; make test-slow  larger cases; make lint, make format, make clean
PYTHON ?= python3
# PyTorch's CPU wheels; asked only where plain pip has none.
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
export PYTHON TORCH_INDEX

RUN := .venv/bin/python -m
SOURCES := vllm_prinmix compress kernels benchmarks tests

.PHONY: demo test test-slow check lint format setup clean gpu
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

gpu:
	@bash benchmarks/gpu.sh

format: setup
	$(RUN) ruff check --fix $(SOURCES)
	$(RUN) ruff format $(SOURCES)

clean:
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
