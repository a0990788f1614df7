# The two commands of the README, and the checks before a commit.
PYTHON ?= python3
BIN := .venv/bin
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.PHONY: demo test test-slow test-backends test-gpu lint clean

demo: .venv/installed
	$(BIN)/benchmatrix run quickstart

test: .venv/installed
	$(BIN)/pytest

test-slow: .venv/installed
	$(BIN)/pytest -m slow

# the extras need most of a gigabyte more: only these tests install them
test-backends: .venv/backends
	$(BIN)/pytest -m backends

test-gpu: .venv/installed
	$(BIN)/pytest -m gpu

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# constraints.txt pins everything that was tested; torch is installed first, so that nothing pulls another build
.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt torch==2.13.0
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

.venv/backends: .venv/installed
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev,quality,train,kvquant,cluster,ao,gptq]'
	touch $@

clean:
	rm -rf .venv
