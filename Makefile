# Every target installs what it needs: `demo` and `demo-aim` few packages (stamp .venv/demo), all others everything
# (stamp .venv/ready).
# Packages are installed again when pyproject.toml or constraints.txt change.
PYTHON ?= python3
BIN := .venv/bin

KERNELS := $(shell cat tests/kernels.txt)
GPU_PYTHON ?= $(BIN)/python
TUNE_SECONDS ?= 240
GPUS := h200 h100 a100 b200 rtx4090 rtx5090 mi300x

.PHONY: demo demo-aim test test-slow chaos test-gpu first-contact lint docs bench bench-gpu tune-gpu tables check-tables clean

demo: .venv/demo
	$(BIN)/mm1 demo

demo-aim: .venv/demo
	$(BIN)/mm1 demo aim

# Kernels are tested twice: their Triton source under Triton's interpreter, then their CPU implementations.
test: .venv/ready
	TRITON_INTERPRET=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 $(KERNELS)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2

test-slow: .venv/ready
	$(BIN)/python -m pytest -q -m slow

# Run a server under 200 clients and every attack for ten minutes. The last line is one JSON object.
chaos: .venv/ready
	$(BIN)/python tests/chaos_run.py --seconds 600 --clients 200

# The four targets for a GPU run with any Python that has torch, triton and numpy; the tests also need pytest.
# GPU_PYTHON=python3 names it. The first contact takes four minutes at most, and continues after every failure.
first-contact:
	$(GPU_PYTHON) -m mm1.bench.contact --out mm1/bench/results

test-gpu:
	CUDA_VISIBLE_DEVICES=0 $(GPU_PYTHON) -m pytest -q $(KERNELS)

# It takes nine minutes at most. A second run on the same day continues the first.
bench-gpu:
	$(GPU_PYTHON) -m mm1.bench.run --out mm1/bench/results --tables mm1/autotune/tables

tune-gpu:
	$(GPU_PYTHON) -m mm1.autotune.tune $(TUNE_SECONDS) --out mm1/autotune/tables --sweeps mm1/bench/results

# Predict the rows of all kernels for all GPUs, and check every row. Each takes half an hour on two cores, without a GPU.
tables: .venv/ready
	$(BIN)/mm1 tune --static $(addprefix --device ,$(GPUS))

check-tables: .venv/ready
	$(BIN)/mm1 tune --check

# Build the site of docs/ in site/. It fails on a broken link.
docs: .venv/ready
	$(BIN)/mkdocs build --strict

lint: .venv/ready
	$(BIN)/ruff format --check mm1 tests examples native docs/hooks.py
	$(BIN)/ruff check mm1 tests examples native docs
	$(BIN)/basedpyright --level error

# Results are kept in .benchmarks and compared with the run before, on the same machine with the same OMP_NUM_THREADS.
bench: .venv/ready
	$(BIN)/python -m pytest -q mm1/bench/suite --benchmark-autosave --benchmark-compare --benchmark-group-by=group \
		--benchmark-columns=min,median,iqr,rounds

$(BIN)/python:
	$(PYTHON) -m venv .venv

.venv/demo: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[report,serve]'
	touch $@

.venv/ready: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[data,docs,integrations,report,serve,dev]'
	$(BIN)/python -m pip install -q -c constraints.txt --no-deps torchtitan spmd_types   # for one test of one module
	touch .venv/demo $@

clean:
	rm -rf .venv runs dist build site .pytest_cache .ruff_cache .benchmarks
