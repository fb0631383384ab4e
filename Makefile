# Every target does the set-up it needs; .venv is made again when pyproject.toml or constraints.txt change.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-slow lint bench clean

demo: .venv/ready
	$(BIN)/mm1 demo

test: .venv/ready
	$(BIN)/python -m pytest -q

test-slow: .venv/ready
	$(BIN)/python -m pytest -q -m slow

lint: .venv/ready
	$(BIN)/ruff format --check mm1 tests
	$(BIN)/ruff check mm1 tests
	$(BIN)/basedpyright --level error

bench: .venv/ready
	$(BIN)/mm1 bench train

.venv/ready: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[data,integrations,report,dev]'
	touch $@

clean:
	rm -rf .venv runs dist build .pytest_cache .ruff_cache .benchmarks
