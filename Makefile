# `make demo` and `make test` each work alone on a fresh clone: they make .venv, install PyTorch and the tools, build the
# C++ kernels and run. Later calls reuse .venv: Python edits need nothing, edits under csrc/ are compiled anew.

PYTHON ?= python3
VENV   := .venv
PY     := $(VENV)/bin/python
PIP    := $(PY) -m pip --disable-pip-version-check --no-input
NEWEST := $(VENV)/newest/bin/python -m pip --disable-pip-version-check --no-input install -qq
# A wheel for the CPU is enough. The first is tried, then the second; `make TORCH="torch==2.12.*"` asks for another one.
TORCH          ?= torch==2.13.0
TORCH_FALLBACK ?= torch>=2.11
RUFF           ?= ruff==0.17.5
MYPY           ?= mypy==2.4.1
# Everything else that demo and tests install is the tested set, so that a new release elsewhere does not reach a fresh clone.
TESTED         := -c constraints/tested.txt
# Beside .venv, not in it. Its interpreter needs the numpy of its time.
OLDEST_TRITON  ?= "triton==3.6.*" "numpy<2.4"
OLDEST_HF      ?= "transformers==5.4.*"
# Processes that share the tests; `make test WORKERS=` runs them in one.
WORKERS        ?= -n 2 --dist worksteal
# ... each with one thread of its own, but where a test asks for more: threads that spin while they wait would take the cores from each other.
ONE_THREAD     := OMP_NUM_THREADS=1
ARGS           ?=
# How long `make fuzz` tries each backend.
SECONDS        ?= 120
# The demo's memory, e.g. PRESET=yaad; its own default if empty.
PRESET         ?=

# A kernel that does not compile is an error for a developer (users get a package without it, and the reason).
export MIRAS_REQUIRE_CPP ?= 1
export PIP_PROGRESS_BAR ?= off

CXX_SOURCES := $(shell find csrc -type f 2>/dev/null)

.PHONY: help demo test test-slow mutants test-oldest test-oldest-hf test-newest update-constraints test-all bench study lint types sanitize aarch64 sanitized fuzz tools format build clean distclean
.DEFAULT_GOAL := help

help:  ## this list
	@awk -F ':.*##' '/^[a-z0-9-]+:.*##/ { printf "  make %-18s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo "  variables: PYTHON=python3.12 (for a new .venv), TORCH=\"torch==...\", ARGS=\"...\" (for the program that runs),"
	@echo "             PRESET=yaad (the demo's memory)"

demo: $(VENV)/.built  ## train a small Llama with and without a Miras memory; a table and a picture
	$(PY) examples/demo.py $(if $(PRESET),--preset $(PRESET)) $(ARGS)

test: $(VENV)/.built  ## the tests, without the slow ones
	$(ONE_THREAD) $(PY) -m pytest tests -q -m "not slow" $(WORKERS) $(ARGS)

test-slow: $(VENV)/.built  ## the slow ones: wider sweeps, whole programs, budgets on every code path, all Triton configurations compiled
	$(ONE_THREAD) $(PY) -m pytest tests -q -m slow $(WORKERS) $(ARGS)

mutants: $(VENV)/.built  ## planted one-line faults: which does no test catch? ARGS="-k NAME" for some of them
	$(PY) tests/mutants.py $(ARGS)

# The cases of every pair of properties use all that the kernels use of Triton.
test-oldest: $(VENV)/.oldest  ## Triton tests with the oldest Triton that is supported
	$(ONE_THREAD) PYTHONPATH=$(CURDIR)/$(VENV)/oldest $(PY) -m pytest tests/triton/test_triton.py tests/triton/test_compile.py -q -k "compile and not every_configuration or gates or float32 and (pairs or sizes)" $(WORKERS) $(ARGS)

test-oldest-hf: $(VENV)/.oldest-hf  ## the transformers tests with the oldest transformers that is supported
	$(ONE_THREAD) PYTHONPATH=$(CURDIR)/$(VENV)/oldest-hf $(PY) -m pytest tests/hf/test_hf_generate.py tests/hf/test_hf_static.py tests/hf/test_hf_parallel.py tests/hf/test_hf_save.py tests/hf/test_hf_model.py tests/hf/test_hf_versions.py -q -m "not slow" $(WORKERS) $(ARGS)

# Beside .venv, in an environment of its own: what a new release would break for users is seen here first.
test-newest: $(VENV)/.newest  ## transformers, Triton and packaging tests with the newest releases of everything but PyTorch
	$(ONE_THREAD) $(VENV)/newest/bin/python -m pytest tests/hf tests/triton/test_triton.py tests/core/test_packaging.py -q -m "not slow" $(WORKERS) $(ARGS)

update-constraints: test-newest  ## make the newest releases the tested set
	$(VENV)/newest/bin/python constraints/freeze.py > $(VENV)/tested.txt
	mv $(VENV)/tested.txt constraints/tested.txt

# What is to be found in seconds is found by `make test`; this looks longer. Backends side by side, a core each.
fuzz: $(VENV)/.built  ## random calls against the reference, SECONDS=120 for each backend
	printf '%s\n' cpp triton | xargs -P 2 -I {} env $(ONE_THREAD) TRITON_INTERPRET=1 $(PY) -m miras_kernels fuzz --backend {} --seconds $(SECONDS) $(ARGS)

test-all: test test-slow test-oldest test-oldest-hf  ## all of these

bench: $(VENV)/.built  ## the CPU benchmark, e.g. ARGS="--quick --plots bench/out" or ARGS="--base HEAD" (docs/benchmarks.md)
	$(PY) -m bench.cpu $(ARGS)

study: $(VENV)/.built  ## which attentional bias remembers what: measure, and write docs/which-bias.md (under ten minutes)
	$(PY) -m miras_kernels study --json docs/which-bias.json --page docs/which-bias.md --plots docs/which-bias $(ARGS)

lint: $(VENV)/.lint  ## ruff, as CI runs it
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

format: $(VENV)/.lint  ## let ruff rewrite what it can
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

sanitize: $(VENV)/.sanitized  ## the C++ kernels under AddressSanitizer and UndefinedBehaviorSanitizer
	$(PY) tests/cpp/sanitize.py

aarch64:  ## the C++ kernels built for 64-bit ARM and checked under qemu, if both are here
	@for tool in aarch64-linux-gnu-g++ qemu-aarch64; do command -v $$tool >/dev/null || { \
	  echo "aarch64: skipped, no $$tool here (Debian's g++-aarch64-linux-gnu, qemu-user)"; exit 0; }; done; \
	mkdir -p build && \
	aarch64-linux-gnu-g++ -O2 -std=c++20 -static -Icsrc tests/cpp/selfcheck.cpp csrc/cpu/*.cpp -o build/selfcheck-aarch64 && \
	qemu-aarch64 build/selfcheck-aarch64

types: $(VENV)/.types  ## mypy over what users call, see pyproject.toml
	$(PY) -m mypy

build: $(VENV)/.built  ## .venv and the C++ kernels, no more

# For CI, which installs and builds before it measures: nothing waits for another later.
tools: $(VENV)/.lint $(VENV)/.types $(VENV)/.oldest $(VENV)/.oldest-hf
sanitized: $(VENV)/.sanitized

clean:  ## what was built and cached, less .venv
	rm -rf build dist .pytest_cache .ruff_cache .benchmarks .hypothesis $(VENV)/.built $(VENV)/.sanitized
	rm -f python/miras_kernels/_C*.so python/miras_kernels/_cuda.so python/miras_kernels/_build_info.py
	find python kernels tests bench examples -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true

distclean: clean  ## .venv as well
	rm -rf $(VENV)

# ---- .venv, one step after the other; each leaves a stamp when it is done ----

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
	@echo "installing the oldest Triton that is supported, for the tests alone"
	@$(PIP) install -qq --upgrade --target $(VENV)/oldest $(OLDEST_TRITON)
	@touch $@

# Made anew each time: the newest of today.
.PHONY: $(VENV)/.newest
$(VENV)/.newest: | $(VENV)/.built
	@echo "installing the newest releases, for these tests alone (some minutes)"
	@rm -rf $(VENV)/newest && $(PYTHON) -m venv $(VENV)/newest
	@$(NEWEST) "$(TORCH)" || $(NEWEST) "$(TORCH_FALLBACK)"
	@$(NEWEST) "setuptools>=77" wheel pybind11
	@$(NEWEST) --no-build-isolation -e ".[test,demo]"

# With what it depends on (PyTorch is not among that).
$(VENV)/.oldest-hf: | $(VENV)/.built
	@echo "installing the oldest transformers that is supported, for the tests alone"
	@$(PIP) install -qq --upgrade --target $(VENV)/oldest-hf $(OLDEST_HF)
	@touch $@

$(VENV)/.types: | $(VENV)/.torch
	@$(PIP) install -qq "$(MYPY)"
	@touch $@

$(VENV)/.lint: | $(VENV)/.python
	@$(PIP) install -qq "$(RUFF)"
	@touch $@
