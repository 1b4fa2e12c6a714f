# Python that makes the environment; any from 3.11 on.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SOURCES := pyproject.toml $(shell find vae_export trainers runtimes -name "*.py" -o -name "*.cu")

# The extras beside which a GPU's are tested.
EXTRAS ?= dev
# Processes of the tests.
JOBS ?= 2

# A processor with AVX2 and neither AVX-512, VNNI nor bfloat16; what its emulator lacks is named, or it would warn.
AVX2_CPU := Haswell-noTSX,-pcid,-x2apic,-tsc-deadline,-invpcid
# What runs on it: an export and its certificate, and tests that failed on such a processor once.
AVX2_TESTS := \
	tests/test_export.py::test_graphs_are_as_the_manifest_says[mlp-bernoulli] \
	tests/test_export.py::test_graphs_are_as_the_manifest_says[conv-gaussian] \
	tests/test_runtime.py::test_a_bundle_that_contradicts_itself \
	tests/test_latents.py::test_as_pipelines_do \
	tests/test_precision.py::test_what_is_computed_is_near \
	tests/test_tiling.py::test_as_diffusers_does
# What runs natively with PyTorch held to AVX2: where it is one side of a comparison.
AVX2_TORCH_TESTS := tests/test_diffusers.py::test_every_family tests/test_runtime.py::test_parity

.PHONY: demo quick test test-commands test-avx2 test-gpu setup lint types bench performance overhead hops memory passes figures sources margins trained trainer throughput kills gpu record docs clean

demo: setup
	$(BIN)/vae-export demo --out out/demo

# Before each commit: lint, types and the tests that take less than a second each.
quick: lint types
	$(BIN)/pytest -p no:cacheprovider -m 'quick and not commands' -n $(JOBS) --dist loadfile --no-loadscope-reorder

# Files are dealt out to processes: what a file's tests share is made once.
test: lint types
	$(BIN)/pytest -p no:cacheprovider -m 'not commands' -n $(JOBS) --dist loadfile --no-loadscope-reorder

# Installs, the README's commands and code, and the examples, as a newcomer runs them.
test-commands: setup
	$(BIN)/pytest -p no:cacheprovider -m commands -n $(JOBS) --dist loadfile --no-loadscope-reorder

# A part of the tests as on a processor with AVX2 alone: PyTorch by its libraries' switches, then everything emulated.
# ONNX Runtime has no such switch, and OpenVINO ends the process under oneDNN's: no builds. Processes that a test starts are not emulated.
test-avx2: setup
	ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2 \
		$(BIN)/pytest -p no:cacheprovider -k 'not build' $(AVX2_TORCH_TESTS)
	@if command -v qemu-x86_64 >/dev/null; then set -x; \
		OMP_NUM_THREADS=1 qemu-x86_64 -cpu $(AVX2_CPU) $(BIN)/python -m pytest -p no:cacheprovider $(patsubst %,'%',$(AVX2_TESTS)); \
	else echo "skipped: the emulated part needs qemu-x86_64, which is not installed (Debian: apt-get install qemu-user)"; fi

# On a machine with a GPU: make test-gpu EXTRAS=gpu,export,train,test,rtx
test-gpu: setup
	$(BIN)/pytest -p no:cacheprovider -m gpu

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

# What each graph pass buys, on each runner.
passes: setup
	mkdir -p out/bench
	$(BIN)/python benchmarks/passes.py out/bench/passes.json

# What a call of ours costs beside the bare session's, in turns of a millisecond.
overhead: setup
	mkdir -p out/bench
	$(BIN)/python benchmarks/overhead.py out/bench/overhead.json

# The files of the package that `load` and `decode` pass through, for the demo's bundle.
hops: demo
	$(BIN)/python benchmarks/hops.py out/demo/digits.bundle

# What calls need of memory: many sizes, many threads, given back, and beside PyTorch.
memory: setup
	mkdir -p out/bench
	$(BIN)/python benchmarks/memory.py out/bench/memory.json

# Every figure that is promised of the trainer, likewise.
trainer: setup
	mkdir -p out/bench
	$(BIN)/python benchmarks/trainer.py out/bench/trainer.json

# Every figure that is promised of trained models from elsewhere, likewise.
sources: setup
	mkdir -p out/bench
	$(BIN)/python benchmarks/sources.py out/bench/sources.json

# How far right exports stay below the certificate's tolerances, and planted faults above them.
margins: setup
	mkdir -p out/bench
	$(BIN)/python benchmarks/margins.py out/bench/margins.json

# Trained weights in every precision: pictures and a table, in out/trained.
trained: setup
	$(BIN)/python benchmarks/trained.py out/trained

# Training speed beside a plain loop and pythae, which is installed beside everything else for that.
throughput: setup out/pythae
	mkdir -p out/bench
	$(BIN)/python benchmarks/training.py out/bench/training.json --pythae out/pythae

out/pythae:
	$(BIN)/python -m pip install --quiet --no-deps --target $@ pythae==0.1.2 tqdm imageio

# Speed beside whatever else runs a model, and how it grows. It can be stopped, and goes on where it was.
performance: setup
	mkdir -p out/bench
	$(BIN)/python benchmarks/performance.py out/bench/performance.json --resume --work out/bench/models

# What is promised of GPUs, recorded: certificates, latency, noise.
gpu: setup
	$(BIN)/python benchmarks/gpu.py benchmarks/results/gpu.json

# Kill 200 training runs at random moments, and continue them.
kills: setup
	$(BIN)/python benchmarks/kills.py 200

# Renew the recorded results that README.md and the documents quote, and print their tables.
record: setup out/pythae
	$(BIN)/python benchmarks/figures.py benchmarks/results/figures-cpu.json
	$(BIN)/python benchmarks/latency.py benchmarks/results/latency-cpu.json
	$(BIN)/python benchmarks/trainer.py benchmarks/results/trainer-cpu.json
	$(BIN)/python benchmarks/training.py benchmarks/results/training-cpu.json --pythae out/pythae
	$(BIN)/python benchmarks/recipes.py benchmarks/results/recipes-cpu.json
	$(BIN)/python benchmarks/sources.py benchmarks/results/sources-cpu.json
	$(BIN)/python benchmarks/passes.py benchmarks/results/passes-cpu.json
	$(BIN)/python benchmarks/overhead.py benchmarks/results/overhead-cpu.json
	$(BIN)/python benchmarks/memory.py benchmarks/results/memory-cpu.json
	$(BIN)/python benchmarks/performance.py benchmarks/results/performance-cpu.json --work out/bench/models
	$(BIN)/python benchmarks/tables.py

# The documentation site, in out/docs/site, from an environment of its own that has no PyTorch. A link to nowhere fails it.
docs:
	$(PYTHON) -m venv out/docs/venv
	rm -rf build
	out/docs/venv/bin/python -m pip install --quiet --constraint constraints.txt '.[docs]'
	PATH="$(CURDIR)/out/docs/venv/bin:$$PATH" out/docs/venv/bin/mkdocs build --strict

clean:
	rm -rf $(VENV) build dist out *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis

$(VENV)/dependencies: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.12 …")'
	$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt pip setuptools wheel
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-build-isolation '.[$(EXTRAS)]'
	touch $@

$(VENV)/installed: $(VENV)/dependencies $(SOURCES)
	rm -rf build
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --force-reinstall .
	touch $@
