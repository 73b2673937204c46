# Every target makes its own environment on a fresh machine: python3, venv and pip, nothing outside PyPI.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test lint docs clean

.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet -c constraints.txt torch
	$(BIN)/pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

demo: .venv/.installed  ## the main job on the model that ships with the package
	$(BIN)/coterie demo

test: .venv/.installed  ## the whole suite
	$(BIN)/python -m pytest -n 2

lint: .venv/.installed  ## style, types, floors, generated pages
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python docs/generate.py --check

docs: .venv/.installed  ## write the generated tables anew
	$(BIN)/python docs/generate.py

clean:
	rm -rf .venv build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis coterie-demo
