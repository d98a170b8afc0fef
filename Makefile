# make demo: compile the example model and generate text.   make test: lint and tests.   make docs: the pages of docs/ as a site.
# make test-oldest: the tests with the oldest torch and transformers.   All of them set everything up first.
# PYTHON=/path/to/python3.12 picks the interpreter that .venv is made from; make test ALL=1 runs the tests marked slow too.

SHELL := /bin/bash
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.stamp
TORCH := $(shell grep '^torch==' constraints.txt)
PYTEST_FLAGS ?=
MARKED = $(if $(ALL),,-m "not slow")

.PHONY: demo test test-oldest lint docs setup clean distclean
.DEFAULT_GOAL := demo

demo: $(STAMP)
	$(BIN)/python examples/demo.py

# The tests run even if lint fails, so that one run shows everything; pytest's status wins.
test: $(STAMP)
	@$(BIN)/ruff check . ; lint=$$?; \
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 \
	$(BIN)/python -m pytest -q -n auto --maxprocesses=8 --dist worksteal $(MARKED) $(PYTEST_FLAGS); \
	tests=$$?; \
	[ -n "$(ALL)" ] || echo "make test: tests marked slow were left out: make test ALL=1"; \
	[ $$lint -eq 0 ] || echo "make test: ruff check failed, see the top" >&2; \
	[ $$tests -ne 0 ] && exit $$tests || exit $$lint

# The oldest torch and transformers that pyproject.toml admits, in an environment of their own.
OLDEST := .venv-oldest
OLDEST_PINS := torch==2.11.* transformers==5.17.*

test-oldest: $(STAMP)
	[ -x $(OLDEST)/bin/python ] || $(BIN)/python -m venv $(OLDEST)
	grep -v -i -E '^(setuptools|torch|transformers|triton|tokenizers|huggingface[-_]hub|nvidia-.*|cuda-.*)==' constraints.txt > $(OLDEST)/constraints.txt
	$(OLDEST)/bin/python -m pip install --quiet --disable-pip-version-check -c $(OLDEST)/constraints.txt 'setuptools>=77.0.3,<82' $(OLDEST_PINS)
	$(OLDEST)/bin/python -m pip install --quiet --disable-pip-version-check --no-build-isolation -c $(OLDEST)/constraints.txt $(OLDEST_PINS) -e '.[dev]'
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(OLDEST)/bin/python -m pytest -q -n auto --maxprocesses=8 --dist worksteal -m "not slow" $(PYTEST_FLAGS)

lint: $(STAMP)
	$(BIN)/ruff check .

# The pages of docs/ as a site, in site/index.html; a warning, as of a link that leads nowhere, is an error.
docs: $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-build-isolation -c constraints.txt -e '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet -d site
	@echo "written to site/index.html"

setup: $(STAMP)

# A candidate has to run (a pyenv shim of a version that is off is on PATH and exits 127) and to be able to make a venv.
PROBE := import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))

# torch goes first, so that a download of that size is complete, or its failure plain, before the resolver sees the rest.
$(STAMP): pyproject.toml constraints.txt
	@if ! $(BIN)/python -m pip --version >/dev/null 2>&1; then \
	    for candidate in $(or $(PYTHON),python3.11 python3.12 python3.13 python3); do \
	        if "$$candidate" -c "$(PROBE)" >/dev/null 2>&1; then python="$$candidate"; break; fi; \
	    done; \
	    if [ -z "$$python" ]; then \
	        echo "error: fxc needs Python 3.11, 3.12 or 3.13 that can make a venv, and found none" >&2; \
	        echo "why: tried $(or $(PYTHON),python3.11 python3.12 python3.13 python3);" \
	             "python3 here is $$(python3 --version 2>/dev/null || echo missing)" >&2; \
	        echo "try: install python3.11 and python3.11-venv, or make PYTHON=/path/to/python3.12" >&2; \
	        exit 1; \
	    fi; \
	    echo "making $(VENV) with $$python ($$("$$python" --version))"; \
	    "$$python" -m venv --clear $(VENV); \
	fi
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt $(TORCH)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-build-isolation -c constraints.txt -e '.[dev]'
	@touch $@

clean:
	rm -rf build dist out/pylm-int8 site .pytest_cache .ruff_cache .hypothesis
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

# The environment goes too; the next make sets it up again.
distclean: clean
	rm -rf $(VENV) $(OLDEST) *.egg-info
