# Needs make and Python 3.11 or newer with venv. Every target uses .venv, never the shell's own environment.
# Ray workers inherit their launcher: programs are called as .venv/bin/..., not through a tool that wraps them.

VENV  := .venv
BIN   := $(VENV)/bin
STAMP := $(VENV)/.installed
RUN   ?= runs/demo.toml
TORCH ?= torch==2.13.0
CHECK := build/wheel-check
# A file's tests on one worker, in the order of the files: the long ones of tests/integration come first.
JOBS  ?= 2
SHARE := --dist loadfile --no-loadscope-reorder
# Unit tests without models, compiled kernels, the disk or long statistics, found by what they name.
SLOW  := tmp_path|subprocess|losses\.dwa|on_average|small_cache|tiny_models|from_pretrained|four_tokenizers|families|live_batch|one_step
QUICK  = $(shell grep -rLE '$(SLOW)|spacy|numba|cpu_kernels' tests/unit --include='test_*.py') tests/integration/test_architecture.py
# Unit tests of the pipeline that run a model.
MODELS := $(addprefix tests/unit/pipeline/test_,capture.py teacher.py draws.py)
# Each library's oldest instructions: another order of sums, other last bits.
PLAIN := ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=SSE41 MKL_CBWR=COMPATIBLE NUMBA_CPU_NAME=generic
# One thread a process: tests run several processes, and torch with more threads than free cores crawls.
# Modules are compiled once, not in each program that a test starts.
ONE   := OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} PYTHONDONTWRITEBYTECODE=

.PHONY: help install fmt lint types layers check quick test suite coverage plain demo preprocess bench wheel clean

help:                   ## this list
	@sed -n 's/^\([a-z]*\):.*## /\1: /p' $(MAKEFILE_LIST) | awk '{name = $$1; sub(/^[a-z]*: /, ""); sub(/:/, "", name); printf "make %-11s %s\n", name, $$0}'

install: $(STAMP)       ## .venv with the tested versions; TORCH="torch==2.13.0 --index-url URL" chooses a build

$(BIN)/python:
	@for python in $(or $(PYTHON),python3.11 python3.12 python3.13 python3); do \
	    "$$python" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || continue; \
	    echo "$$python -m venv $(VENV)"; exec "$$python" -m venv $(VENV); \
	done; \
	echo "error: no Python >= 3.11 with venv and pip$(if $(PYTHON), at $(PYTHON)) found. Next: install one, then make install PYTHON=/path/to/python3.11" >&2; \
	exit 1

$(STAMP): pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(TORCH)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]' -c constraints.txt
	@touch $@

fmt: install            ## ruff formats, and mends what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

lint: install           ## ruff's rules and format, dead code, lines of each sub-package
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/vulture
	$(BIN)/python .ci/lines.py

types: install          ## mypy --strict over the three packages and the demo's scripts
	$(BIN)/mypy
	$(BIN)/mypy data/*.py

layers: install         ## who may import whom
	$(BIN)/lint-imports --no-logo

check: install          ## lint, types, layers and quick at once: under a minute
	$(MAKE) --no-print-directory -j4 lint types layers quick

quick: install          ## tests without models, compiled kernels or the disk
	$(ONE) $(BIN)/python -m pytest -q -n $(JOBS) $(SHARE) $(QUICK)

test: install           ## all checks, docstring examples and tests, those that start Ray too
	$(MAKE) --no-print-directory -j4 lint layers types suite

suite: install          ## tests and docstring examples
	$(ONE) $(BIN)/python -m pytest -n $(JOBS) $(SHARE) -m "not slow" --doctest-modules tests schemas trainer pipeline

coverage: install       ## the suite once more, counting lines that no test runs: twice its time (decision 0019)
	$(ONE) $(BIN)/python -m pytest -q -n $(JOBS) $(SHARE) -m "not slow and not ray" --cov=xkd_schemas --cov=xkd_trainer --cov=xkd_pipeline tests

plain: install          ## the unit tests that compute again, with what the plainest processor computes
	$(PLAIN) $(BIN)/python -c "import torch; assert torch.backends.cpu.get_cpu_capability() == 'DEFAULT'"
	$(PLAIN) $(ONE) $(BIN)/python -m pytest -q -n $(JOBS) $(SHARE) tests/unit/trainer $(MODELS)

demo: install           ## teacher to distilled student on the demo's text
	$(BIN)/python data/demo.py

preprocess: install     ## documents, teacher and align for RUN=runs/demo.toml
	$(BIN)/xkd-cache preprocess $(RUN)

bench: install          ## the measurements of the README
	$(BIN)/python -m benchmarks

wheel: install          ## sdist, wheel from it, and proof that the wheel works without the checkout
	rm -rf dist $(CHECK)
	$(BIN)/python -m build --no-isolation --outdir dist .
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target $(CHECK) dist/*.whl
	cd $(CHECK) && export PYTHONPATH="$$PWD" && \
	    "$(abspath $(BIN)/python)" -c 'import pathlib, xkd_schemas, xkd_trainer, xkd_pipeline; \
	        [pathlib.Path(m.__path__[0]).relative_to(pathlib.Path.cwd()) for m in (xkd_schemas, xkd_trainer, xkd_pipeline)]' && \
	    ./bin/xkd-cache --help >/dev/null && ./bin/xkd-train --help >/dev/null
	@echo "wheel works: $$(ls dist/*.whl)"

clean:                  ## what tools left behind; keeps .venv, demo, cache and out
	rm -rf dist build .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -not -path './$(VENV)/*' -type d -prune -exec rm -rf {} +
