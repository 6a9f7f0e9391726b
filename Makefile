# `make demo` and `make test` each do everything on a fresh machine: set-up (once), build, run.
#
# An interpreter that already has torch >= 2.11 and the build and test tools is used as it is: nothing is installed and
# no network is needed. Otherwise .venv is made with pinned versions, torch first (an unpinned torch brings gigabytes of
# CUDA; TORCH="torch==2.13.0+cpu" and the like choose another build).
PYTHON ?= python3
VENV   ?= .venv
TORCH  ?= torch==2.13.0
export MAX_JOBS ?= $(shell nproc 2>/dev/null || echo 2)
# In a checkout a failed build is an error; FASTPETL_REQUIRE_EXT=0 goes on with the pure-Python parts.
export FASTPETL_REQUIRE_EXT ?= 1

CHECK := import shutil, torch, numpy, pytest, pybind11, setuptools; \
  v = torch.__version__.split('.'); \
  print((int(v[0]), int(v[1])) >= (2, 11) and bool(shutil.which('ninja') or __import__('ninja')))
READY := $(shell $(PYTHON) -c "$(CHECK)" 2>/dev/null)
ifeq ($(READY),True)
PY := $(PYTHON)
SETUP :=
else
PY := $(VENV)/bin/python
SETUP := $(VENV)/.ready
endif

# The tests in two processes of a thread each (tests/conftest.py), where pytest-xdist is installed, as it is in .venv.
# A file's tests stay together: they share what took long to make. In the order of the tree, whose last files are short.
SHARED = $(shell $(PY) -c "import xdist; print('-n 2 --dist loadfile --no-loadscope-reorder')" 2>/dev/null)

.PHONY: test test-slow demo build bench lint sanitize adapterhub
test: build
	$(PY) -m pytest -q tests -m "not slow" $(SHARED)

# what `make test` leaves out: whole grids, every ahead-of-time compile, builds from nothing
test-slow: build
	$(PY) -m pytest -q tests -m slow $(SHARED)

demo: build
	$(PY) -m fastpetl demo

bench: build
	$(PY) -m fastpetl bench vilt

# what `python -m fastpetl bench adapterhub` compares with: AdapterHub's library and its older transformers, aside
adapterhub: $(SETUP)
	$(PY) -m pip install -q --disable-pip-version-check --no-deps --upgrade --target .adapterhub -r benchmarks/adapterhub-requirements.txt

build: $(SETUP)
	$(PY) setup.py -q build_ext --inplace

# the C++ kernels, and the op tests on them, under AddressSanitizer and UndefinedBehaviorSanitizer
sanitize: $(SETUP)
	$(PY) -m pytest -q tests/build/test_sanitizers.py

lint: $(SETUP)
	$(PY) -m ruff check .

$(VENV)/.ready: requirements-dev.txt
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install -q --disable-pip-version-check $(TORCH)
	$(PY) -m pip install -q --disable-pip-version-check -r requirements-dev.txt
	touch $@
