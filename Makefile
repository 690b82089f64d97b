# Two commands do everything on a fresh machine: `make demo` and `make test`. Both create .venv when it is absent.
# PYTHON picks the interpreter (3.11 or newer), VENV the environment's folder, OUT where the demo writes.
PYTHON ?= python3
VENV ?= .venv
OUT ?= out/demo
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: help env demo test bench lint types format build clean

help:  ## list the targets
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10

env: $(STAMP)  ## create the environment (.venv) with everything the tests need

# torch and torchvision are resolved together: their builds must match.
$(STAMP): setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch torchvision
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	@touch $@

demo: env  ## read a picture as text, answer from fewer tokens, write a report
	$(BIN)/dualstream demo --out $(OUT)

test: env  ## run the test suite (two processes, offline, CPU)
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile $(ARGS)

bench: env  ## measure the tiny shape (minutes) and render BENCHMARKS.md from all records
	$(BIN)/dualstream bench --shape tiny --report $(ARGS)

lint: env types  ## check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# An editable install is an import hook that type checkers cannot follow, so they are given a folder of links.
types: env  ## type-check the public API
	@rm -rf .typecheck && mkdir -p .typecheck/dualstream
	@ln -s ../../src/dualstream/__init__.py ../../src/dualstream/cli.py ../../src/dualstream/measuring.py ../../src/dualstream/py.typed .typecheck/dualstream/
	@for folder in modeling processing data_builders train eval analysis hub_cards benchmarks; do \
	  ln -s ../../$$folder .typecheck/dualstream/$$folder; done
	MYPYPATH=.typecheck $(BIN)/mypy -p dualstream

format: env  ## rewrite the code in the house style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

build: env  ## build the wheel and the source archive
	rm -rf build dist
	$(BIN)/python -m build

clean:  ## remove what the targets above made, except the environment
	rm -rf build dist out .typecheck .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
