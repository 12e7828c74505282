# make demo   venv, install, train on a bundled data set, generate 1,000 series
# make test   venv, install, all tests, a process for each core
# make test-matrix  all tests with the oldest and the newest torch that is allowed, each in a venv of its own (several GB)
# make bench  the benchmark tables
# make lint   ruff and clang-format
# make docs   the documentation site -> build/site/index.html; a warning is an error
# make sanitize  the C++ operations under AddressSanitizer and UndefinedBehaviorSanitizer, about three minutes on two cores
# make sanitize-gpu  the operations on a GPU under compute-sanitizer: memcheck, racecheck
# make gpu    on a GPU machine, with its own Python and no network: build, GPU tests, GPU benchmarks -> gpu.json, gpu.md
VENV ?= .venv
PYTHON ?= python3
MINUTES ?= 8
TORCHES ?= 2.10.0 2.14.1
BIN := $(VENV)/bin
INSTALL = $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
SOURCES := setup.py pyproject.toml CMakeLists.txt constraints.txt $(shell find csrc -type f)

.PHONY: demo test test-matrix bench gpu sanitize sanitize-gpu lint docs clean

demo: $(VENV)/demo.stamp
	rm -rf runs/demo
	mkdir -p runs
	$(BIN)/python -m ncfast.train --dataset GunPoint --ssl vicreg --stage1-epochs 200 --stage2-epochs 300 --out runs/demo
	$(BIN)/python -m ncfast.generate --run runs/demo --num-samples 1000 --out runs/demo/generated.h5
	@echo "picture: runs/demo/samples.png   series: runs/demo/generated.h5"

test: $(VENV)/test.stamp
	$(BIN)/python -m pytest -n auto --dist worksteal --benchmark-disable

test-matrix: $(TORCHES:%=test-torch-%)

test-torch-%:
	test -d .venv-torch-$* || $(PYTHON) -m venv .venv-torch-$*
	.venv-torch-$*/bin/python -m pip install --quiet --disable-pip-version-check --editable '.[data,eval,log,test]' torch==$*
	.venv-torch-$*/bin/python -m pytest -n auto --dist worksteal --benchmark-disable

bench: $(VENV)/test.stamp
	$(BIN)/python -m pytest benchmarks --benchmark-only

gpu: export PYTHONPATH := $(CURDIR):$(PYTHONPATH)
gpu:
	@$(PYTHON) benchmarks/run.py --check
	NCFAST_CUDA=1 $(PYTHON) setup.py build_ext --inplace
	$(PYTHON) benchmarks/run.py --device cuda --tests --minutes $(MINUTES) --seconds 0.3 --out gpu.json

# With GCC. A copy of the package, so that the module in ncfast/ stays as it is. Python has no sanitizers in it, so their
# runtime has to be there first, and with it the C++ library, whose exceptions it watches. Python frees little when it
# ends: what a leak checker would report is not ours.
SANITIZED := build/sanitize
PRELOAD = $(foreach name,libasan libstdc++,$(shell $(CXX) -print-file-name=$(name).so))

sanitize: export PYTHONPATH := $(CURDIR)/$(SANITIZED)
sanitize: $(VENV)/sanitize.stamp
	rm -rf $(SANITIZED)
	PATH="$(abspath $(BIN)):$$PATH" CXX="$(CXX)" NCFAST_SANITIZE=1 NCFAST_CPP=auto NCFAST_CUDA=0 \
		$(BIN)/python setup.py --quiet build --build-lib $(SANITIZED) --build-temp $(SANITIZED)-cmake
	LD_PRELOAD="$(PRELOAD)" ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
		$(BIN)/python tests/ops/cpu_operations.py

sanitize-gpu: export PYTHONPATH := $(CURDIR):$(PYTHONPATH)
sanitize-gpu:
	@$(PYTHON) benchmarks/run.py --check
	NCFAST_CUDA=1 $(PYTHON) setup.py build_ext --inplace
	$(PYTHON) tests/ops/gpu_operations.py
	compute-sanitizer --tool memcheck --error-exitcode 1 $(PYTHON) tests/ops/gpu_operations.py
	compute-sanitizer --tool racecheck --error-exitcode 1 $(PYTHON) tests/ops/gpu_operations.py

lint: $(VENV)/lint.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(shell find csrc tests -name '*.cpp' -o -name '*.h' -o -name '*.cu*')

# It reads the sources and imports no torch, so that nothing has to be built first.
docs: $(VENV)/docs.stamp
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet
	@echo "site: build/site/index.html"

clean:
	rm -rf build ncfast.egg-info ncfast/_C* ncfast/_build.json $(VENV)

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/demo.stamp: $(BIN)/python $(SOURCES)
	$(INSTALL) --editable '.[data,eval]'
	touch $@

$(VENV)/test.stamp: $(BIN)/python $(SOURCES)
	$(INSTALL) --editable '.[data,eval,log,test]'
	touch $@

$(VENV)/sanitize.stamp: $(VENV)/test.stamp
	$(INSTALL) 'setuptools>=77' 'cmake>=3.20' ninja
	touch $@

$(VENV)/lint.stamp: $(BIN)/python pyproject.toml
	$(INSTALL) ruff clang-format
	touch $@

# ruff formats the signatures.
$(VENV)/docs.stamp: $(BIN)/python pyproject.toml constraints.txt
	$(INSTALL) mkdocs-material 'mkdocstrings[python]' ruff
	touch $@
