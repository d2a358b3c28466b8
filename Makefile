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

bench: .venv-peers/installed
	.venv-peers/bin/python -m benchmarks

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/installed: pyproject.toml constraints.txt | .venv/bin/python
	$(INSTALL) . -c constraints.txt
	touch $@

.venv/installed-test: .venv/installed
	$(INSTALL) ".[test,dev]" -c constraints.txt
	touch $@

# An environment of its own: shap brings a package `slicer`, which overwrites that of slicer-core in the extra `test`.
# LXT goes without what it asks for (transformers and more): nothing that is measured uses it.
.venv-peers/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-peers
	.venv-peers/bin/python -m pip install --editable ".[peers]" -c constraints.txt
	.venv-peers/bin/python -m pip install --no-deps lxt -c constraints.txt
	touch $@
