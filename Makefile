# The two commands of the README, and the checks before a commit.
PYTHON ?= python3
BIN := .venv/bin
export PIP_DISABLE_PIP_VERSION_CHECK = 1
# what has no wheel of its own is built once and kept for every checkout on this machine
WHEELS := $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/benchmatrix/wheels

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

.venv/backends: .venv/installed $(WHEELS)/llama-cpp
	$(BIN)/pip install --quiet --constraint constraints.txt --find-links $(WHEELS) \
		--editable '.[dev,quality,train,kvquant,cluster,ao,gptq,gguf,onnx]'
	touch $@

# 8 CPU-minutes, with gcc, g++ and make; pip brings cmake and ninja. Not for this very processor: such a build is killed
# on machines that report AMX and have it not. pip's own cache is left out, which does not know how a wheel was built;
# a wheel of the pinned version that lies in the folder is taken as it is.
$(WHEELS)/llama-cpp: constraints.txt | .venv/installed
	CMAKE_ARGS='-DGGML_NATIVE=OFF -DLLAVA_BUILD=OFF' $(BIN)/pip wheel --quiet --no-deps --no-cache-dir \
		--constraint constraints.txt --find-links $(WHEELS) --wheel-dir $(WHEELS) llama-cpp-python
	touch $@

clean:
	rm -rf .venv
