# make reproduce  sets up .venv and runs the main job;  make test  sets up .venv and runs every check.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
# Arguments for the commands below, such as ARGS=--quick.
ARGS ?=

.PHONY: reproduce test test-slow bench lint figures clean

reproduce: $(READY)
	$(BIN)/me-stats reproduce $(ARGS)

test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m "not slow" $(ARGS)

test-slow: $(READY)
	OMP_NUM_THREADS=2 $(BIN)/python -m pytest -m slow $(ARGS)

bench: $(READY)
	OMP_NUM_THREADS=2 $(BIN)/python -m pytest benchmarks --benchmark-columns=median,iqr,rounds $(ARGS)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

figures: $(READY)
	$(BIN)/me-stats report experiments/results --out report --figures figures --paper paper_repro.md

# torch comes first and alone: the pinned version, before anything else asks for a range.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c "import sys; sys.exit(0 if sys.version_info >= (3, 11) else 'me_stats needs Python 3.11 or newer')"
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade "pip>=25.1"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[gguf,vocabularies,lm-eval,http,llamacpp,ray,slurm]" --group dev
	touch $(READY)

clean:
	rm -rf .venv report .pytest_cache .mypy_cache .ruff_cache .hypothesis
