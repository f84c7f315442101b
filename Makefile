# Each target sets up what it needs: .venv, torch, the build. Needs make, g++ and Python 3.10 or newer with venv; all else
# comes from pip. A second run does only what has changed.
#
#   make bench   build, then measure the matching against what people use today
#   make test    build, then everything a change must pass (CI runs this)
#   make help    all targets and variables
.DEFAULT_GOAL := help
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:

PYTHON ?= python3
# What pip installs as torch; without torchvision neither the benchmarks nor the detector run, and their tests are skipped.
# A CPU build, for example: make test TORCH="torch==2.13.0"
TORCH ?= torch torchvision
# Two architectures build in half a minute and run on every GPU from Ampere on (newer ones compile the PTX when first used).
# A plain `pip install .` or `pip wheel .` compiles for all of them.
CUDA_ARCHITECTURES ?= 80-real;90
# The torch that the wheel is tried under, in an environment of its own: one version, and one build, other than .venv's.
WHEEL_TORCH ?= torch==2.13.0
BENCH_ARGS ?=
GPU_CHECK_ARGS ?=
PYTEST_ARGS ?=
FUZZ_CALLS ?= 50000
FUZZ_FIRST ?= 0
RACES_ARGS ?=
WHEEL_TEST_ARGS ?=

VENV := $(CURDIR)/.venv
PY := $(VENV)/bin/python
CMAKE := PATH="$(VENV)/bin:$$PATH" cmake
PIP := $(PY) -m pip --disable-pip-version-check
LIBRARY := mg_ops/libmg_ops.so
SOURCES := $(wildcard csrc/* csrc/*/*) CMakeLists.txt setup.py
export CMAKE_ARGS := -DMG_OPS_CUDA_ARCHITECTURES=$(CUDA_ARCHITECTURES) $(CMAKE_ARGS)
# Here a build without the library is an error, not a package without it.
export MG_OPS_REQUIRE_LIBRARY := 1
export PIP_NO_INPUT := 1
SANITIZER_LIBRARIES = $(foreach library,libasan.so libubsan.so libstdc++.so,$(shell $(or $(CXX),g++) -print-file-name=$(library)))

.PHONY: help venv build bench bench-step gpu-check examples test test-python asan-checkout test-asan fuzz races soak test-wheel test-wheels test-headers wheel docs lint format clean FORCE

help:  ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16
	@echo; echo "Variables: PYTHON=$(PYTHON)  TORCH='$(TORCH)'  WHEEL_TORCH='$(WHEEL_TORCH)'  CMAKE_ARGS"
	@echo "  CUDA_ARCHITECTURES='$(CUDA_ARCHITECTURES)'  FUZZ_CALLS=$(FUZZ_CALLS)  FUZZ_FIRST=$(FUZZ_FIRST)  ASAN_TESTS"
	@echo "  BENCH_ARGS  GPU_CHECK_ARGS  PYTEST_ARGS  RACES_ARGS  WHEEL_TEST_ARGS"

venv: $(VENV)/.installed  ## .venv with torch and the tools of pyproject.toml
$(VENV)/.installed: pyproject.toml
	@$(PYTHON) -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "Python 3.10 or newer with venv is needed (on Debian: apt install python3-venv), or choose one: make PYTHON=..."; exit 1; }
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PIP) install --upgrade pip
	$(PIP) install $(TORCH)
	$(PIP) install --group dev
	@touch $@

build: $(LIBRARY)  ## the library, and mg_ops in .venv (editable: changes of Python files need no build)
$(LIBRARY): $(SOURCES) build/.cmake_args $(VENV)/.installed
	$(PY) setup.py build_ext --inplace
	$(PIP) install --quiet --no-build-isolation --no-deps --editable .
	@touch $@

# Changes only when the options do, and then has the library built again.
build/.cmake_args: FORCE
	@mkdir -p build; echo '$(CMAKE_ARGS)' | cmp -s - $@ || echo '$(CMAKE_ARGS)' > $@

bench: build  ## the matching against what people use today, into runs/benchmarks; options in BENCH_ARGS, "--help" among them
	$(PY) benchmarks/match_speed.py $(BENCH_ARGS)

bench-step: build  ## where the time of a training step goes, for each detector and each matching; options in BENCH_ARGS
	$(PY) benchmarks/training_step.py $(BENCH_ARGS)

gpu-check:  ## check and measure on this machine's GPU, with PYTHON and no .venv; options in GPU_CHECK_ARGS, "--help" among them
	$(PYTHON) benchmarks/gpu_check.py $(GPU_CHECK_ARGS)

# Each is a training of a minute or two on a CPU.
examples: build  ## the trainings of examples/frameworks whose framework is installed in .venv
	@for script in examples/frameworks/train_*.py; do \
	  framework=$${script##*train_}; framework=$${framework%.py}; \
	  if $(PY) -c "import $$framework" 2>/dev/null; then echo "$$script"; $(PY) $$script; \
	  else echo "$$script: skipped, $$framework is not installed"; fi; \
	done

test: test-wheel test-asan test-python  ## everything a change must pass
	@echo "make test: all passed"

# All of it in two processes, which share it out as they go; what PYTEST_ARGS chooses, in one.
test-python: build wheel test-headers  ## the test suite; options in PYTEST_ARGS
	$(PY) -m pytest $(or $(PYTEST_ARGS),-n 2 --dist worksteal)

test-headers: build/tests/.built  ## the plain C++ headers as a Python module, for the tests
build/tests/.built: tests/bindings.cpp $(wildcard csrc/*.h) CMakeLists.txt $(VENV)/.installed
	@mkdir -p build/tests
	if test -f "$$($(PY) -c 'import sysconfig; print(sysconfig.get_path("include"))')/Python.h"; then \
	  $(CMAKE) -S . -B build/headers -G Ninja -DPython_EXECUTABLE=$(PY) -DMG_OPS_CUDA=OFF -DMG_OPS_TEST_BINDINGS=ON; \
	  $(CMAKE) --build build/headers --target mg_ops_headers; \
	else echo "The tests of the plain C++ headers will be skipped: no Python.h (on Debian: apt install python3-dev)"; fi
	@touch $@

# The C++ backend in a copy of the checkout whose library has the sanitizers in it. They must be loaded before Python; Python
# and torch leak at exit, so leaks are not looked for. What they find they write to file descriptor 2, which pytest must leave
# alone. Fewer random cases than `make test-python` has: each takes several times as long.
ASAN_TESTS ?= tests/test_every_clause_of_the_definition.py tests/test_cpp_equals_reference.py tests/test_arguments.py \
  tests/test_wrong_calls.py
ASAN_CHECKOUT := build/asan/checkout
SANITIZED = cd $(ASAN_CHECKOUT) && UBSAN_OPTIONS=print_stacktrace=1 LD_PRELOAD="$(SANITIZER_LIBRARIES)" \
  ASAN_OPTIONS=detect_leaks=0:protect_shadow_gap=0:abort_on_error=0:exitcode=99:handle_segv=2:allocator_may_return_null=1
asan-checkout: $(VENV)/.installed
	$(CMAKE) -S . -B build/asan -G Ninja -DPython_EXECUTABLE=$(PY) -DMG_OPS_SANITIZE=ON
	$(CMAKE) --build build/asan --target mg_ops
	rm -rf $(ASAN_CHECKOUT) && mkdir -p $(ASAN_CHECKOUT)
	cp -r pyproject.toml mg_ops tests $(ASAN_CHECKOUT) && rm -f $(ASAN_CHECKOUT)/$(LIBRARY)
	$(CMAKE) --install build/asan --prefix $(ASAN_CHECKOUT)

test-asan: asan-checkout  ## the C++ backend's tests under AddressSanitizer and UndefinedBehaviorSanitizer
	$(SANITIZED) MG_OPS_FUZZ=$${MG_OPS_FUZZ:-0.1} \
	  $(PY) -m pytest -p no:cacheprovider --capture=sys $(ASAN_TESTS) $(PYTEST_ARGS)

fuzz: asan-checkout  ## FUZZ_CALLS right and wrong calls of everything public under the sanitizers
	$(SANITIZED) $(PY) tests/wrong_calls.py --calls $(FUZZ_CALLS) --first $(FUZZ_FIRST) --backends cpp cpp cpp eager

# Needs g++'s libtsan, and leave to switch off the randomization of addresses, which it cannot always handle.
races: $(VENV)/.installed  ## calls on several threads under ThreadSanitizer; options in RACES_ARGS
	$(CMAKE) -S . -B build/tsan -G Ninja -DPython_EXECUTABLE=$(PY) -DMG_OPS_SANITIZE_THREADS=ON
	$(CMAKE) --build build/tsan --target mg_ops
	rm -rf build/tsan/checkout && mkdir -p build/tsan/checkout
	cp -r mg_ops tests build/tsan/checkout && rm -f build/tsan/checkout/$(LIBRARY)
	$(CMAKE) --install build/tsan --prefix build/tsan/checkout
	cd build/tsan/checkout && LD_PRELOAD="$$($(or $(CXX),g++) -print-file-name=libtsan.so)" OMP_NUM_THREADS=1 \
	  TSAN_OPTIONS=halt_on_error=1:exitcode=66:report_mutex_bugs=0:suppressions=tests/races.supp setarch --addr-no-randomize $(PY) tests/races.py $(RACES_ARGS)

soak: build  ## 100,000 calls in a row: the process must not grow
	$(PY) tests/soak.py

# From the sdist, so that it is known to hold everything; for all GPU generations (the default in CMakeLists.txt); linked for
# glibc 2.28, which is what torch's own wheels ask for. auditwheel checks that and names the wheel. torch brings its
# libraries itself; any other one would be copied into the wheel, and the tests would say so.
WHEEL_PLATFORM := manylinux_2_28_x86_64
wheel: dist/.built  ## the release in dist: an audited wheel for glibc 2.28 or newer, and the sdist
dist/.built: $(SOURCES) $(wildcard mg_ops/*.py mg_ops/*/*.py) README.md pyproject.toml MANIFEST.in $(VENV)/.installed
	rm -rf dist build/wheel/build/lib.* build/wheel/build/bdist.* build/wheel/build/*.whl
	mkdir -p build/wheel && find build/wheel -mindepth 1 -maxdepth 1 ! -name build -exec rm -rf {} +
	$(PY) -m build --no-isolation --sdist --outdir dist .
	tar -xf dist/mg_ops-*.tar.gz -C build/wheel --strip-components=1
	CMAKE_ARGS="$(filter-out -DMG_OPS_CUDA_ARCHITECTURES=%,$(CMAKE_ARGS)) -DMG_OPS_MANYLINUX=ON" \
	  $(PIP) wheel --no-build-isolation --no-deps --wheel-dir build/wheel/build build/wheel
	PATH="$(VENV)/bin:$$PATH" auditwheel repair --plat $(WHEEL_PLATFORM) --only-plat \
	  --exclude 'libtorch*.so' --exclude 'libc10*.so' --wheel-dir dist build/wheel/build/mg_ops-*.whl
	$(PY) -m zipfile --extract dist/mg_ops-*.whl build/wheel/unpacked
	$(VENV)/bin/torch-abi-audit --check torch build/wheel/unpacked/$(LIBRARY)
	@grep -q nv_fatbin build/wheel/unpacked/$(LIBRARY) && echo "With the CUDA backend:" || \
	  echo "WITHOUT the CUDA backend, for want of nvcc 12.8 or newer:"
	@ls -l dist
	@touch $@

build/wheel-venv/.installed: Makefile
	rm -rf build/wheel-venv && $(PYTHON) -m venv build/wheel-venv
	build/wheel-venv/bin/python -m pip --disable-pip-version-check install "$(WHEEL_TORCH)"
	@touch $@

test-wheel: wheel build/wheel-venv/.installed  ## the wheel in a clean environment, under another torch
	build/wheel-venv/bin/python -m pip --disable-pip-version-check install --quiet --force-reinstall --no-deps dist/*.whl
	build/wheel-venv/bin/python -I tests/try_installed_wheel.py

# In an environment of its own, without torch: the API pages are made from the source, which is not imported.
DOCS_VENV := build/docs-venv
docs: $(DOCS_VENV)/.installed  ## the documentation site in build/site, without a warning and with every link checked
	NO_MKDOCS_2_WARNING=1 $(DOCS_VENV)/bin/mkdocs build --quiet --strict
	$(DOCS_VENV)/bin/lychee --offline --include-fragments --no-progress --root-dir $(CURDIR)/build/site 'build/site/**/*.html'
$(DOCS_VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(DOCS_VENV)
	$(DOCS_VENV)/bin/python -m pip --disable-pip-version-check install --quiet --upgrade pip
	$(DOCS_VENV)/bin/python -m pip --disable-pip-version-check install --quiet --group docs
	@touch $@

# Needs 6 GB of disk at a time. uv takes the Python versions from PATH (with pyenv: `PYENV_VERSION=3.10.13:3.11.7:...`) or
# downloads them.
test-wheels: wheel  ## the test suite with the wheel under every supported torch and Python; options in WHEEL_TEST_ARGS
	PATH="$(VENV)/bin:$$PATH" nox $(WHEEL_TEST_ARGS)

lint: $(VENV)/.installed  ## ruff, mypy --strict, clang-format, and linters of the workflows and the citation file, without changing anything
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy mg_ops detector
	git ls-files '*.cpp' '*.h' '*.cu' '*.cuh' | xargs $(VENV)/bin/clang-format --dry-run -Werror
	$(VENV)/bin/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml
	$(VENV)/bin/check-jsonschema --builtin-schema vendor.github-issue-forms .github/ISSUE_TEMPLATE/*.yml
	$(VENV)/bin/check-jsonschema --builtin-schema vendor.citation-file-format CITATION.cff
	$(VENV)/bin/zizmor --offline --quiet .github

format: $(VENV)/.installed  ## rewrites what ruff and clang-format can
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .
	git ls-files '*.cpp' '*.h' '*.cu' '*.cuh' | xargs $(VENV)/bin/clang-format -i

clean:  ## removes everything that make has made, .venv too
	rm -rf .venv build dist *.egg-info $(LIBRARY) .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
