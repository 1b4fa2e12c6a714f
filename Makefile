# Python that makes the environment; any from 3.11 on.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SOURCES := pyproject.toml $(wildcard vae_export/*.py vae_export/*/*.py trainers/*.py runtimes/*.py)

.PHONY: demo test setup lint types bench figures record clean

demo: setup
	$(BIN)/vae-export demo --out out/demo

test: lint types
	$(BIN)/pytest -p no:cacheprovider

setup: $(VENV)/installed

lint: $(VENV)/dependencies
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# The package is checked as it is installed, where `vae_export.runtimes` and `vae_export.trainers` are in it.
types: setup
	cd $(VENV) && bin/mypy --config-file ../pyproject.toml --cache-dir mypy_cache -p vae_export

bench: setup
	mkdir -p out/bench
	$(BIN)/pytest benchmarks -p no:cacheprovider --benchmark-json=out/bench/latency.json

# Every figure that the project promises, measured and compared with its bound.
figures: setup
	mkdir -p out/bench
	$(BIN)/python benchmarks/figures.py out/bench/figures.json

# Renew the recorded results that the README quotes; it prints the README's tables.
record: setup
	$(BIN)/python benchmarks/figures.py benchmarks/results/figures-cpu.json
	$(BIN)/python benchmarks/latency.py benchmarks/results/latency-cpu.json

clean:
	rm -rf $(VENV) build dist out *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis

$(VENV)/dependencies: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.12 …")'
	$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt pip setuptools wheel
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-build-isolation '.[dev]'
	touch $@

$(VENV)/installed: $(VENV)/dependencies $(SOURCES)
	rm -rf build
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --force-reinstall .
	touch $@
