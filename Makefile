# make demo   venv, install, train on a bundled data set, generate 1,000 series
# make test   venv, install, all tests, a process for each core
# make bench  the benchmark tables
# make lint   ruff and clang-format
# make sanitize-gpu  the operations on a GPU under compute-sanitizer: memcheck, racecheck
# make gpu    on a GPU machine, with its own Python and no network: build, GPU tests, GPU benchmarks -> gpu.json, gpu.md
VENV ?= .venv
PYTHON ?= python3
MINUTES ?= 6
BIN := $(VENV)/bin
INSTALL = $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
SOURCES := setup.py pyproject.toml CMakeLists.txt constraints.txt $(shell find csrc -type f)

.PHONY: demo test bench gpu sanitize-gpu lint clean

demo: $(VENV)/demo.stamp
	rm -rf runs/demo
	mkdir -p runs
	$(BIN)/python -m ncfast.train --dataset GunPoint --ssl vicreg --stage1-epochs 200 --stage2-epochs 300 --out runs/demo
	$(BIN)/python -m ncfast.generate --run runs/demo --num-samples 1000 --out runs/demo/generated.h5
	@echo "picture: runs/demo/samples.png   series: runs/demo/generated.h5"

test: $(VENV)/test.stamp
	$(BIN)/python -m pytest -n auto --dist worksteal --benchmark-disable

bench: $(VENV)/test.stamp
	$(BIN)/python -m pytest benchmarks --benchmark-only

gpu: export PYTHONPATH := $(CURDIR):$(PYTHONPATH)
gpu:
	@$(PYTHON) benchmarks/gpu.py --check
	NCFAST_CUDA=1 $(PYTHON) setup.py build_ext --inplace
	$(PYTHON) benchmarks/gpu.py --tests --minutes $(MINUTES) --out gpu.json

sanitize-gpu: export PYTHONPATH := $(CURDIR):$(PYTHONPATH)
sanitize-gpu:
	@$(PYTHON) benchmarks/gpu.py --check
	NCFAST_CUDA=1 $(PYTHON) setup.py build_ext --inplace
	$(PYTHON) tests/gpu_operations.py
	compute-sanitizer --tool memcheck --error-exitcode 1 $(PYTHON) tests/gpu_operations.py
	compute-sanitizer --tool racecheck --error-exitcode 1 $(PYTHON) tests/gpu_operations.py

lint: $(VENV)/lint.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu')

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

$(VENV)/lint.stamp: $(BIN)/python pyproject.toml
	$(INSTALL) ruff clang-format
	touch $@
