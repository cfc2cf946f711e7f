# make demo   set up, fetch and pack the default model, answer a prompt
# make test   set up, run the tests          make check   lint, types, imports, documents
# make bench  speed of the default model     make ratios  speed beside llama.cpp, recorded in bench/ (bench/record.sh)
# make clean  remove what these made
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
PROMPT ?= Explain in two sentences why the sky is blue.
# Where the CPU has no AVX-512, tests run that level on SIMDe's portable intrinsics (Debian: libsimde-dev).
EMULATE := $(shell grep -qs avx512_vnni /proc/cpuinfo || test ! -e /usr/include/simde/x86/avx512.h || echo ON)
NATIVE_OPTIONS := $(if $(EMULATE),--config-settings=cmake.define.ELUTE_EMULATE_AVX512=$(EMULATE))
BUILD_INPUTS := pyproject.toml CMakeLists.txt $(shell find csrc -type f)

.PHONY: demo test check bench ratios clean

demo: $(VENV)/.demo
	@$(BIN)/elute run default --temperature 0 --max-tokens 200 "$(PROMPT)"

test: $(VENV)/.test
	$(BIN)/elute convert default --fetch-only
	$(BIN)/python -m pytest -n 2 -q

check: $(VENV)/.check
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(VENV)/.demo
	@$(BIN)/elute bench model default

ratios: $(VENV)/.demo
	@bash bench/record.sh

$(BIN)/python:
	$(PYTHON) -m venv $(VENV) || { echo "make: $(PYTHON) -m venv failed; install python3-venv (Debian) or set PYTHON=" >&2; rm -rf $(VENV); exit 1; }

# Editable: Python edits need no step, C++ edits rebuild what changed.
$(VENV)/.demo: $(BIN)/python $(BUILD_INPUTS)
	$(PIP) install -q -e .
	@touch $@

$(VENV)/.test: $(BIN)/python $(BUILD_INPUTS)
	$(PIP) install -q -e ".[test]" $(NATIVE_OPTIONS)
	@touch $@ $(VENV)/.demo

$(VENV)/.check: $(BIN)/python $(BUILD_INPUTS)
	$(PIP) install -q -e ".[test,check]" $(NATIVE_OPTIONS)
	@touch $@ $(VENV)/.demo $(VENV)/.test

clean:
	rm -rf $(VENV) build .mypy_cache .ruff_cache .pytest_cache
