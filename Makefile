# Linux and macOS; README.md has the same steps as plain pip lines for Windows.
PYTHON ?= python3
BIN := .venv/bin
INSTALL = $(BIN)/python -m pip install --editable

.PHONY: demo test bench

demo: .venv/installed
	$(BIN)/medxai demo

test: .venv/installed-test
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/python -m pytest -n 2

bench: .venv/installed-peers
	$(BIN)/python -m benchmarks

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/installed: pyproject.toml constraints.txt | .venv/bin/python
	$(INSTALL) . -c constraints.txt
	touch $@

.venv/installed-test: .venv/installed
	$(INSTALL) ".[test,dev]" -c constraints.txt
	touch $@

.venv/installed-peers: .venv/installed
	$(INSTALL) ".[peers]" -c constraints.txt
	touch $@
