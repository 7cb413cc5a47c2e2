# Two commands: `make demo` (see it work) and `make test` (see that it is right).
PYTHON ?= python3
VIDEO ?=
BIN := .venv/bin

.PHONY: demo test lint results clean

.venv/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "casa needs Python 3.11 or newer: call make with PYTHON=python3.11")'
	$(PYTHON) -m venv .venv
	@echo "Installing casa and what it needs into .venv (a few minutes the first time) ..."
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

demo: .venv/installed
	$(BIN)/casa demo --out demo $(if $(VIDEO),--video "$(VIDEO)")

test: .venv/installed
	$(BIN)/python -m pytest

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

# The figures of docs/results, measured again (about 15 minutes on two quiet cores).
results: .venv/installed
	$(BIN)/casa bench attention --repeats 9 --out docs/results/attention-cpu.json
	$(BIN)/casa eval casa-tiny --seed 2026 --limit 200 --out docs/results/casa-tiny.json
	$(BIN)/casa bench stream --frames 120 --out docs/results/stream-cpu.json
	$(BIN)/casa bench stream --frames 1000 --max-text-tokens 128 --out docs/results/stream-bounded-cpu.json

clean:
	rm -rf .venv demo runs build dist
