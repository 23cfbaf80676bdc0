# `make demo` and `make test` each work alone on a fresh clone: they create .venv, install PyTorch and the tools, build the
# C++ kernels and run. Later calls reuse .venv: Python edits need no step, edits under csrc/ are recompiled.

PYTHON ?= python3
VENV   := .venv
PY     := $(VENV)/bin/python
PIP    := $(PY) -m pip --disable-pip-version-check --no-input
NEWEST := $(VENV)/newest/bin/python -m pip --disable-pip-version-check --no-input install -qq
# PyTorch for the CPU is enough. TORCH is tried first, then TORCH_FALLBACK; `make TORCH="torch==2.12.*"` takes another version.
TORCH          ?= torch==2.13.0
TORCH_FALLBACK ?= torch>=2.11
RUFF           ?= ruff==0.17.5
MYPY           ?= mypy==2.4.1
CLANG_FORMAT   ?= clang-format==23.1.5
# All other packages are pinned to the tested releases, so that a new release elsewhere cannot break a fresh clone.
TESTED         := -c constraints/tested.txt
# Installed beside .venv, not in it. Triton 3.6's interpreter needs an older numpy.
OLDEST_TRITON  ?= "triton==3.6.*" "numpy<2.4"
OLDEST_HF      ?= "transformers==5.4.*"
# The newest pair on the package index that accept each other: transformers names the versions of kernels that it takes.
HUB_KERNELS    ?= "transformers==5.20.*" "kernels==0.17.*"
# Processes that run the tests; `make test WORKERS=` uses one.
WORKERS        ?= -n 2 --dist worksteal
# One thread per process, unless a test sets more: idle OpenMP threads spin and would slow the other processes down.
ONE_THREAD     := OMP_NUM_THREADS=1
ARGS           ?=
# How long `make fuzz` runs for each backend.
SECONDS        ?= 120
# The preset that the demo trains, e.g. PRESET=yaad; the demo's default if empty.
PRESET         ?=

# For developers a kernel that does not compile is an error. (For users the package installs without it and says why.)
export MIRAS_REQUIRE_CPP ?= 1
export PIP_PROGRESS_BAR ?= off

CXX_SOURCES := $(shell find csrc -type f 2>/dev/null)

.PHONY: help demo test test-slow mutants test-oldest test-oldest-hf test-hub-kernels test-extras hub test-newest update-constraints test-all ptx bench study lint types docs sanitize aarch64 sanitized fuzz tools format build clean distclean
.DEFAULT_GOAL := help

help:  ## list the targets
	@awk -F ':.*##' '/^[a-z0-9-]+:.*##/ { printf "  make %-18s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo "  variables: PYTHON=python3.12 (for a new .venv), TORCH=\"torch==...\", ARGS=\"...\" (for the program that runs),"
	@echo "             PRESET=yaad (the demo's memory)"

demo: $(VENV)/.built  ## train a small Llama with attention and with a Miras memory; prints a table, draws a picture
	$(PY) examples/demo.py $(if $(PRESET),--preset $(PRESET)) $(ARGS)

test: $(VENV)/.built  ## run the tests, without the slow ones
	$(ONE_THREAD) $(PY) -m pytest tests -q -m "not slow" $(WORKERS) $(ARGS)

test-slow: $(VENV)/.built  ## run the slow tests: wider sweeps, whole programs, every CPU code path, all Triton configurations compiled
	$(ONE_THREAD) $(PY) -m pytest tests --ignore=tests/ptx -q -m slow $(WORKERS) $(ARGS)

# Compiled kernels are kept in build/ptx: later runs are much faster. `make test` runs a part of these tests; what only compiles (registers,
# the whole library) is in `make test-slow`.
ptx: $(VENV)/.built  ## execute the compiled GPU kernels on the CPU and look for races: Triton (every configuration) and, with nvcc, CUDA C++
	$(ONE_THREAD) $(PY) -m pytest tests/ptx tests/cuda -q -k "not spill and not builds" $(WORKERS) $(ARGS)

mutants: $(VENV)/.built  ## mutation testing: one-line faults that the tests must catch; ARGS="-k NAME" for some of them
	$(PY) tests/mutants.py $(ARGS)

# These tests use every feature of Triton that the kernels use.
test-oldest: $(VENV)/.oldest  ## run the Triton tests with the oldest supported Triton
	$(ONE_THREAD) PYTHONPATH=$(CURDIR)/$(VENV)/oldest $(PY) -m pytest tests/triton/test_triton.py tests/triton/test_compile.py -q -k "compile and not every_configuration or gates or float32 and (pairs or sizes)" $(WORKERS) $(ARGS)

test-oldest-hf: $(VENV)/.oldest-hf  ## run the transformers tests with the oldest supported transformers
	$(ONE_THREAD) PYTHONPATH=$(CURDIR)/$(VENV)/oldest-hf $(PY) -m pytest tests/hf/test_hf_hosts.py tests/hf/test_hf_take_back.py tests/hf/test_hf_generate.py tests/hf/test_hf_static.py tests/hf/test_hf_parallel.py tests/hf/test_hf_save.py tests/hf/test_hf_model.py tests/hf/test_hf_versions.py -q -m "not slow" $(WORKERS) $(ARGS)

# Neither in this folder nor with it among the paths: kernels/ would be imported in the place of the package.
test-hub-kernels: $(VENV)/.hub-kernels  ## run the tests of functions loaded by the kernels package
	cd tests && $(ONE_THREAD) PYTHONPATH=$(CURDIR)/$(VENV)/hub-kernels $(CURDIR)/$(PY) -m pytest hf/test_hub_kernels.py -q -o pythonpath=tests $(ARGS)

test-extras: $(VENV)/.extras  ## run the tests with deepspeed, torchao, optimum-quanto and bitsandbytes
	$(ONE_THREAD) PYTHONPATH=$(CURDIR)/$(VENV)/extras $(PY) -m pytest tests/hf/test_hf_extras.py -q -rs $(ARGS)

# Nothing is uploaded.
hub: $(VENV)/.built  ## write the memories as a repository for the Hub's kernels, into build/hub
	rm -rf build/hub && $(PY) -m miras_kernels.hf.hub build/hub

# In a virtual environment of its own: shows what a new release of a dependency would break for users.
test-newest: $(VENV)/.newest  ## run the transformers, Triton and packaging tests with the newest releases of all but PyTorch
	$(ONE_THREAD) $(VENV)/newest/bin/python -m pytest tests/hf tests/triton/test_triton.py tests/core/test_packaging.py -q -m "not slow" $(WORKERS) $(ARGS)

update-constraints: test-newest  ## pin the newest releases in constraints/tested.txt
	$(VENV)/newest/bin/python constraints/freeze.py > $(VENV)/tested.txt
	mv $(VENV)/tested.txt constraints/tested.txt

# `make test` fuzzes for some seconds; this runs longer. The backends run in parallel, one core each.
fuzz: $(VENV)/.built  ## compare random calls with the reference, SECONDS=120 for each backend
	printf '%s\n' cpp triton | xargs -P 2 -I {} env $(ONE_THREAD) TRITON_INTERPRET=1 $(PY) -m miras_kernels fuzz --backend {} --seconds $(SECONDS) $(ARGS)

test-all: test test-slow test-oldest test-oldest-hf  ## all tests

bench: $(VENV)/.built  ## run the CPU benchmark, e.g. ARGS="--quick --plots bench/out" or ARGS="--base HEAD" (docs/benchmarks.md)
	$(PY) -m bench.cpu $(ARGS)

study: $(VENV)/.built  ## measure which attentional bias remembers what, and write docs/which-bias.md (under ten minutes)
	$(PY) -m examples.which_bias --json docs/which-bias.json --page docs/which-bias.md --plot docs/which-bias/recall.png $(ARGS)

lint: $(VENV)/.lint  ## check style with ruff, as CI does
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

format: $(VENV)/.lint  ## format all sources
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

sanitize: $(VENV)/.sanitized  ## run the C++ kernels under AddressSanitizer and UndefinedBehaviorSanitizer
	$(PY) tests/cpp/sanitize.py

aarch64:  ## build the C++ kernels for 64-bit ARM and check them under qemu, if both tools are installed
	@for tool in aarch64-linux-gnu-g++ qemu-aarch64; do command -v $$tool >/dev/null || { \
	  echo "aarch64: skipped, no $$tool here (Debian's g++-aarch64-linux-gnu, qemu-user)"; exit 0; }; done; \
	mkdir -p build && \
	aarch64-linux-gnu-g++ -O2 -std=c++20 -static -Icsrc tests/cpp/selfcheck.cpp csrc/cpu/*.cpp -o build/selfcheck-aarch64 && \
	qemu-aarch64 build/selfcheck-aarch64

types: $(VENV)/.types  ## check the types of the package with mypy
	$(PY) -m mypy

docs: $(VENV)/.docs  ## build the documentation in build/docs; a warning is an error
	$(PY) -m sphinx -q -W --keep-going -b html docs build/docs

build: $(VENV)/.built  ## create .venv and build the C++ kernels

# For CI, which installs everything first.
tools: $(VENV)/.lint $(VENV)/.types $(VENV)/.docs $(VENV)/.oldest $(VENV)/.oldest-hf
sanitized: $(VENV)/.sanitized

clean:  ## delete what was built and cached, but not .venv
	rm -rf build dist .pytest_cache .ruff_cache .benchmarks .hypothesis $(VENV)/.built $(VENV)/.sanitized
	rm -f python/miras_kernels/_C*.so python/miras_kernels/_cuda.so python/miras_kernels/_build_info.py
	find python kernels tests bench examples -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true

distclean: clean  ## delete .venv as well
	rm -rf $(VENV)

# ---- the steps that make .venv; each writes a stamp file when it is done ----

$(VENV)/.python:
	@command -v $(PYTHON) >/dev/null || { echo "miras-kernels: no '$(PYTHON)' here: make PYTHON=python3.12 ..." >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo "miras-kernels needs Python >= 3.10, '$(PYTHON)' is $$($(PYTHON) --version 2>&1): make PYTHON=python3.12 ..." >&2; exit 1; }
	@test -x $(PY) || { echo "making $(VENV)"; $(PYTHON) -m venv $(VENV); }
	@touch $@

# PyTorch comes first, so that nothing else chooses its version.
$(VENV)/.torch: | $(VENV)/.python
	@$(PY) -c 'import torch' 2>/dev/null || { \
	  echo "installing PyTorch (some minutes the first time)"; \
	  $(PIP) install -qq $(TESTED) "$(TORCH)" || $(PIP) install -qq $(TESTED) "$(TORCH_FALLBACK)"; }
	@touch $@

$(VENV)/.tools: | $(VENV)/.torch
	@echo "installing the build tools"
	@$(PIP) install -qq $(TESTED) "setuptools>=77" wheel pybind11
	@touch $@

$(VENV)/.installed: pyproject.toml setup.py | $(VENV)/.tools
	@echo "installing miras-kernels, what tests and demo need, and building the C++ kernels (about a minute the first time)"
	@$(PIP) install -qq $(TESTED) --no-build-isolation -e ".[test,demo]"
	@touch $@

$(VENV)/.built: $(CXX_SOURCES) $(VENV)/.installed
	@$(PY) setup.py -q build_ext --inplace
	@touch $@

$(VENV)/.sanitized: $(CXX_SOURCES) setup.py | $(VENV)/.built
	@echo "building the C++ kernels for the sanitizers (some minutes the first time)"
	@MIRAS_SANITIZE=1 MIRAS_CUDA=0 $(PY) setup.py -q build_ext
	@touch $@

$(VENV)/.oldest: | $(VENV)/.built
	@echo "installing the oldest supported Triton, for test-oldest"
	@$(PIP) install -qq --upgrade --target $(VENV)/oldest $(OLDEST_TRITON)
	@touch $@

# Recreated each time, to get today's newest releases.
.PHONY: $(VENV)/.newest
$(VENV)/.newest: | $(VENV)/.built
	@echo "installing the newest releases, for test-newest (some minutes)"
	@rm -rf $(VENV)/newest && $(PYTHON) -m venv $(VENV)/newest
	@$(NEWEST) "$(TORCH)" || $(NEWEST) "$(TORCH_FALLBACK)"
	@$(NEWEST) "setuptools>=77" wheel pybind11
	@$(NEWEST) --no-build-isolation -e ".[test,demo,docs]"

# With its dependencies (PyTorch is not one of them).
$(VENV)/.oldest-hf: | $(VENV)/.built
	@echo "installing the oldest supported transformers, for test-oldest-hf"
	@$(PIP) install -qq --upgrade --target $(VENV)/oldest-hf $(OLDEST_HF)
	@touch $@

$(VENV)/.hub-kernels: | $(VENV)/.built
	@echo "installing transformers and kernels, for test-hub-kernels"
	@$(PIP) install -qq --upgrade --target $(VENV)/hub-kernels $(HUB_KERNELS)
	@touch $@

# Without dependencies: they would bring PyTorch for CUDA; the list is complete.
$(VENV)/.extras: constraints/extras.txt | $(VENV)/.built
	@echo "installing deepspeed, torchao, optimum-quanto and bitsandbytes, for test-extras"
	@DS_BUILD_OPS=0 $(PIP) install -qq --no-deps --no-build-isolation --upgrade --target $(VENV)/extras -r $<
	@touch $@

$(VENV)/.types: | $(VENV)/.torch
	@$(PIP) install -qq "$(MYPY)"
	@touch $@

$(VENV)/.docs: pyproject.toml | $(VENV)/.built
	@$(PIP) install -qq $(TESTED) furo myst-parser sphinx
	@touch $@

$(VENV)/.lint: | $(VENV)/.python
	@$(PIP) install -qq "$(RUFF)" "$(CLANG_FORMAT)"
	@touch $@
