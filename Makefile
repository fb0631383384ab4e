# Every target does the set-up that it needs: `demo` a light one (stamp .venv/demo), all others everything (stamp
# .venv/ready). Packages are installed again when pyproject.toml or constraints.txt change.
PYTHON ?= python3
BIN := .venv/bin

KERNELS := $(addprefix tests/test_, $(addsuffix .py, route grouped_gemm experts positions patch_embed conv_block \
	adaptive_pool flash paged quantize linear_cross_entropy every_op timing clock))
GPU_PYTHON ?= $(BIN)/python
TUNE_SECONDS ?= 240
GPUS := h200 h100 a100 b200 rtx4090 rtx5090 mi300x

.PHONY: demo test test-slow chaos test-gpu lint docs bench bench-gpu tune-gpu tables check-tables clean

demo: .venv/demo
	$(BIN)/mm1 demo

# Twice for the kernels: what a CPU runs, and then their Triton source itself, interpreted.
test: .venv/ready
	TRITON_INTERPRET=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 $(KERNELS)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2

test-slow: .venv/ready
	$(BIN)/python -m pytest -q -m slow

# A server under 200 clients and every attack for ten minutes; ends with one JSON object.
chaos: .venv/ready
	$(BIN)/python tests/chaos_run.py --seconds 600 --clients 200

# On a machine with a GPU, with any Python that has torch and pytest: GPU_PYTHON=python3
test-gpu:
	CUDA_VISIBLE_DEVICES=0 $(GPU_PYTHON) -m pytest -q $(KERNELS)

# At most nine minutes; started again on the same day, it goes on where it was.
bench-gpu:
	$(GPU_PYTHON) -m mm1.bench.run --out mm1/bench/results --tables mm1/autotune/tables

tune-gpu:
	$(GPU_PYTHON) -m mm1.autotune.tune $(TUNE_SECONDS) --out mm1/autotune/tables --sweeps mm1/bench/results

# Predicted rows of all kernels for all GPUs, without one; and the check of every row. Half an hour each on two cores.
tables: .venv/ready
	$(BIN)/mm1 tune --static $(addprefix --device ,$(GPUS))

check-tables: .venv/ready
	$(BIN)/mm1 tune --check

# The site of docs/, in site/; fails on a broken link.
docs: .venv/ready
	$(BIN)/mkdocs build --strict

lint: .venv/ready
	$(BIN)/ruff format --check mm1 tests examples docs/hooks.py
	$(BIN)/ruff check mm1 tests examples docs
	$(BIN)/basedpyright --level error

# Kept in .benchmarks, and compared with the run before. OMP_NUM_THREADS and the machine should be the same.
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
