# make demo                         train a small Llama on several ranks of this machine
# make demo ARGS="--strategy ddp"   the same, with options of `nemo-dist demo`
# make test                         lint, type check and test, as CI does
# make matrix                       the full matrices of compositions, which take long; ARGS="--one-in 40" samples them
# make models                       every family of transformers under every kind of parallelism; goes on where it stopped
# make gpu                          every check that needs a CUDA device, within 8 minutes; ARGS=--check runs them without one
# make lint | bench | clean
#
# Needs Python 3.11 or newer with venv, and make; everything else is installed into .venv, at the tested versions.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed
ARGS ?=
WORKERS ?= 3
# The tests start some hundred processes: let them keep what they compile of the package.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help demo test matrix models lint bench gpu clean
help:
	@sed -n 's/^# \{0,1\}//p;/^$$/q' Makefile

demo: $(INSTALLED)
	$(BIN)/nemo-dist demo $(ARGS)

test: lint
	$(BIN)/python -m pytest --numprocesses $(WORKERS) --dist loadfile $(ARGS)

matrix: $(INSTALLED)
	$(BIN)/python -m pytest -m slow --numprocesses $(WORKERS) --dist loadfile $(ARGS)

models: $(INSTALLED)
	$(BIN)/python -m nemo_dist.testing.families $(ARGS)

lint: $(INSTALLED)
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy

bench: $(INSTALLED)
	$(BIN)/python benchmarks/run.py $(ARGS)

gpu: $(INSTALLED)
	PYTHON=$(BIN)/python bash benchmarks/gpu.sh $(ARGS)

# Installed again when what is to be installed changes; an editable install follows the sources by itself.
$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit(f"nemo_dist needs Python 3.11 or newer (got {sys.version.split()[0]}); pass PYTHON=python3.12, say")'
	@$(BIN)/python -c pass 2>/dev/null || $(PYTHON) -m venv --clear $(VENV)
	@echo "installing into $(VENV), torch included: a few minutes, once"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

clean:
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .hypothesis build dist
